"""The engine on the card that is not there: the CPU's pixels, no problem, no host that waits."""

import numpy as np
import pytest

from quant.checkpoint import inspect
from tests.support.helpers import BAKED, tiny
from tests.support.on_card import draw_on_card, draw_on_cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
TIMESTEP = 1  # where a step makes the host wait today


@pytest.mark.parametrize(
    "precision, offload", [("bf16", "none"), ("fp16", "stream"), ("nf4", "stream")]
)
def test_a_picture_on_the_card_is_the_cpus(precision, offload, tiny_folder, baked):
    folder = baked(precision, **BAKED[precision]) if precision in BAKED else tiny_folder
    order = tiny(precision=precision, offload=offload, device="cuda")
    run = draw_on_card(order, inspect(folder))
    assert run.card.problems == []
    assert len(run.waits()) <= TIMESTEP, run.waits()
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))
