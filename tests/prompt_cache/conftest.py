"""Files of the prompt cache."""

import os

import pytest


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
