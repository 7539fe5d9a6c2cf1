"""What tests on the card that is not there share."""

import gc
from collections.abc import Iterator

import pytest

from tests.support import card_driver


@pytest.fixture(scope="module", autouse=True)
def frozen_libraries() -> Iterator[None]:
    """Keep the libraries' objects out of collections, of which an engine makes many."""
    card_driver.import_libraries()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
