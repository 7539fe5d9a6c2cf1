"""Memory that ends at any launch of a run: the engine steps down and pixels stay, or it says so."""

from collections.abc import Callable

import numpy as np
import pytest

from fluxcli.errors import DoesNotFit, ExitCode
from fluxcli.events import Notice, explain
from quant.checkpoint import inspect
from tests.support.card import Card
from tests.support.helpers import tiny
from tests.support.on_card import OnCardRun, draw_on_card, draw_on_cpu

ORDER = tiny(precision="bf16", offload="auto", device="cuda", steps=2)
PARTS = 8


@pytest.fixture(scope="module")
def launches(tiny_folder) -> int:
    """How many a run has where memory does not end."""
    run = draw_on_card(ORDER, inspect(tiny_folder))
    assert run.card.problems == []
    return run.card.launched[0]


@pytest.fixture(scope="module")
def expect_the_cpus_pixels() -> Callable[[OnCardRun], None]:
    """Holds a run against the same placement on the CPU, which is drawn once."""
    known: dict = {}

    def expect(run: OnCardRun) -> None:
        key = run.plan.placement
        if key not in known:
            known[key] = draw_on_cpu(ORDER, run)
        assert np.array_equal(run.pixels, known[key])

    return expect


def expect_survival(number: int, tiny_folder, expect_the_cpus_pixels) -> None:
    """There is no memory for one launch."""
    card = Card()
    run = draw_on_card(ORDER, inspect(tiny_folder), card, failing=[number])
    said = [event.message for event in run.events if isinstance(event, Notice)]
    assert [text for text in said if text.startswith("out of memory in ")], said
    expect_the_cpus_pixels(run)
    assert card.problems == []
    assert card.memory[0].live_bytes == 0


@pytest.mark.parametrize("part", range(PARTS))
def test_a_launch_without_memory(part, launches, tiny_folder, expect_the_cpus_pixels):
    number = 1 + (launches - 1) * part // (PARTS - 1)
    expect_survival(number, tiny_folder, expect_the_cpus_pixels)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(10))
def test_every_tenth_launch(part, launches, tiny_folder, expect_the_cpus_pixels):
    """Each part has every hundredth."""
    for number in range(1 + 10 * part, launches + 1, 100):
        expect_survival(number, tiny_folder, expect_the_cpus_pixels)


@pytest.mark.parametrize("part", [0, 4])
def test_no_memory_from_a_launch_on_is_exit_5(part, launches, tiny_folder):
    first = 1 + (launches - 1) * part // (PARTS - 1)
    card = Card()
    with pytest.raises(DoesNotFit) as caught:
        draw_on_card(ORDER, inspect(tiny_folder), card, failing=range(first, 1 << 30))
    assert explain(caught.value).exit_code == ExitCode.DOES_NOT_FIT
    assert card.problems == [] and card.pinned == {}
