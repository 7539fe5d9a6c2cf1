"""A worker with a fake session in a short folder of its own."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluxcli.run import client
from tests.support.helpers import ROOT
from tests.support.workers import FAKE, eventually


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for temporary files; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a worker with a fake session, and wait until it answers."""
    processes = []

    def started(idle_s: float = 60, *, wait: bool = True) -> subprocess.Popen:
        command = [sys.executable, "-c", FAKE, str(idle_s)]
        with (home / "log").open("ab") as log:
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log))
        if wait:
            eventually(lambda: client.ask("status"))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def worker(start: Callable[..., subprocess.Popen]) -> subprocess.Popen:
    return start()
