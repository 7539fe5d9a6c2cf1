"""Weights that the driver does not pin, and weights of files, on the card that is not there: a
thread brings them, who launches kernels waits for no card, and the pixels are the same.
"""

import gc
import itertools
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fluxcli.engine import feeder
from fluxcli.engine.feeder import Feeder
from fluxcli.events import Notice
from quant.checkpoint import inspect
from quant.errors import CheckpointError
from tests.support.card import Card
from tests.support.card_driver import installed
from tests.support.helpers import BAKED, tiny
from tests.support.on_card import OnCardRun, draw_on_card, draw_on_cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
BUFFER = 100_000  # bytes: a block of the tiny model takes several
BUFFERS = feeder.BUFFERS * BUFFER


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers that a block does not fit into; afterwards no thread is left."""
    monkeypatch.setattr(feeder, "BUFFER_BYTES", BUFFER)
    yield
    assert list_left_threads() == []


def list_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(feeder.THREAD)]


def list_left_threads() -> list[threading.Thread]:
    """Feeders' threads that do not end.

    Nobody waits for a thread that collected its own feeder: it needs a moment.
    """
    for thread in list_threads():
        thread.join(10)
    return list_threads()


def list_notices(run: OnCardRun) -> list[str]:
    return [event.message for event in run.events if isinstance(event, Notice)]


@pytest.mark.parametrize(
    "precision, pinnable_bytes",
    [("bf16", 0), ("bf16", BUFFERS), ("bf16", BUFFERS + 1_000_000), ("nf4", BUFFERS)],
)
def test_whatever_the_driver_pins_the_pixels_are_the_same(
    precision, pinnable_bytes, tiny_folder, baked
):
    folder = baked(precision, **BAKED[precision]) if precision in BAKED else tiny_folder
    order = tiny(precision=precision, offload="stream", device="cuda", steps=2)
    run = draw_on_card(order, inspect(folder), Card(pinnable_bytes=pinnable_bytes))
    assert "passes through a buffer" in str(list_notices(run))
    assert run.card.problems == []
    assert run.waits() == []
    assert list_left_threads() == []
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))


@pytest.mark.parametrize("precision, pinnable_bytes", [("bf16", 0), ("nf4", 1 << 40)])
def test_blocks_of_files_are_checked_in_the_first_step_and_make_no_later_one_wait(
    precision, pinnable_bytes, tiny_folder, baked
):
    folder = baked(precision, **BAKED[precision]) if precision in BAKED else tiny_folder
    order = tiny(precision=precision, offload="sequential", device="cuda", steps=2)
    run = draw_on_card(order, inspect(folder), Card(pinnable_bytes=pinnable_bytes))
    assert run.card.problems == []
    waits = [sum(step.waits.values()) for step in run.steps]
    assert waits[0] > 0 and not any(waits[1:])
    assert list_left_threads() == []
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))


def test_memory_that_ends_in_the_thread_is_survived(tiny_folder, monkeypatch):
    real = feeder.launch
    numbers = itertools.count()

    def launch(*arguments: object) -> None:
        if next(numbers) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(*arguments)

    monkeypatch.setattr(feeder, "launch", launch)
    order = tiny(precision="bf16", offload="stream", device="cuda", steps=2)
    run = draw_on_card(order, inspect(tiny_folder), Card(pinnable_bytes=BUFFERS))
    assert "out of memory in denoise" in str(list_notices(run))
    assert run.card.problems == []
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))


# --- the thread


@pytest.fixture
def card() -> Iterator[Card]:
    with installed(Card()) as card:
        yield card
    assert card.problems == []


def fill_with_position(buffer: torch.Tensor, start: int) -> None:
    buffer.copy_(torch.arange(start, start + buffer.numel()) % 251)


def test_what_is_brought_is_there_in_order(card):
    made = Feeder("cuda:0")
    for size_bytes in (0, 1, BUFFER, 3 * BUFFER + 7):
        found = made.bring(size_bytes, fill_with_position)
        expected = (torch.arange(size_bytes) % 251).to(torch.uint8)
        assert torch.equal(found.cpu(), expected)
    assert len(list_threads()) == 1
    del made
    gc.collect()
    assert list_left_threads() == [] and card.pinned == {}


def test_what_fails_in_the_thread_is_raised_where_it_is_waited_for(card):
    made = Feeder("cuda:0")
    damaged = CheckpointError("weight file is truncated", "there", why="a test's")

    def fail(buffer: torch.Tensor, start: int) -> None:
        raise damaged

    with pytest.raises(CheckpointError) as found:
        made.bring(5, fail)
    assert found.value is damaged
    assert made.bring(5, fill_with_position).tolist() == [0, 1, 2, 3, 4]
    found.value.__traceback__ = None


def test_an_interrupt_ends_waiting_for_the_thread(card):
    made = Feeder("cuda:0")
    is_over = threading.Event()

    def hang(buffer: torch.Tensor, start: int) -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert is_over.wait(60)

    with pytest.raises(KeyboardInterrupt):
        made.bring(5, hang)
    is_over.set()
    del made
    gc.collect()
    assert list_left_threads() == []
