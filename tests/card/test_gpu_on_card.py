"""The tests of tests/gpu, on the card that is not there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import test_formats_gpu, test_placement_gpu
from tests.gpu.test_formats_gpu import folder  # noqa: F401 - a fixture of theirs
from tests.support.card import Card
from tests.support.card_driver import installed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")

# transformers loads in threads, and modes are of one; it takes a device by its number, which torch
# knows in builds for CUDA alone; and bitsandbytes' Params4bit cannot be of a tensor that is of a
# class already. tests/test_formats.py opens the folder on the CPU.
OPENS_PIPELINE = "bitsandbytes makes tensors of its own class of the card's"
LEFT_OUT = {
    "test_diffusers_opens_the_nf4_folder_and_both_models_give_our_values": OPENS_PIPELINE,
    "test_the_nf4_folder_gives_the_same_picture_in_plain_diffusers": OPENS_PIPELINE,
}
IN_PART = "test_streams_and_pinned_memory_give_the_resident_pixels"


@pytest.fixture(autouse=True)
def card() -> Iterator[Card]:
    """A card for each test, which has no problems then, and no error or pinned memory is left."""
    with installed(Card()) as card:
        yield card
    assert card.problems == []
    assert card.left_error == ""
    assert card.pinned == {}


for module in (test_formats_gpu, test_placement_gpu):
    for name, function in vars(module).items():
        if name.startswith("test_") and name not in (*LEFT_OUT, IN_PART):
            globals()[name] = function


@pytest.mark.parametrize(
    "precision, offload",
    [
        ("nf4", "stream"),
        pytest.param("bf16", "sequential", marks=pytest.mark.exhaustive),
        pytest.param("bf16", "stream", marks=pytest.mark.exhaustive),
        pytest.param("fp8", "stream", marks=pytest.mark.exhaustive),
        pytest.param("int8", "stream", marks=pytest.mark.exhaustive),
        pytest.param("nf4", "sequential", marks=pytest.mark.exhaustive),
        pytest.param("fp8", "sequential", marks=pytest.mark.exhaustive),
        pytest.param("int8", "sequential", marks=pytest.mark.exhaustive),
    ],
)
def test_streams_and_pinned_memory(precision, offload, tiny_folder, baked):
    test = getattr(test_placement_gpu, IN_PART)
    test(precision, offload, tiny_folder=tiny_folder, baked=baked)


def test_no_test_of_a_card_is_forgotten():
    """A test that moves or is renamed is no longer left out."""
    names = {*vars(test_formats_gpu), *vars(test_placement_gpu)}
    assert {*LEFT_OUT, IN_PART} <= names
    files = Path(test_formats_gpu.__file__).parent.glob("test_*.py")
    assert {path.stem for path in files} == {"test_formats_gpu", "test_placement_gpu"}
