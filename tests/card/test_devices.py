"""Cards of several generations, drivers that pin little, and two cards, none of which is there."""

import numpy as np
import pytest
import torch

from fluxcli.plan.placement import GIB
from quant.checkpoint import inspect
from quant.spec import ROTATED, SCHEMES
from tests.support.card import Card
from tests.support.helpers import BAKED, tiny
from tests.support.on_card import draw_on_card, draw_on_cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
MIB = 1 << 20
EVERY_PRECISION = ("auto", "bf16", "fp16", "fp8", "nf4", *ROTATED)
IN_CI = {((7, 5), "auto"), ((7, 5), "w6a8"), ((8, 6), "fp8")}


def folder_of(precision, tiny_folder, baked):
    if precision in SCHEMES:
        return baked(precision, **BAKED.get(precision, {}))
    return tiny_folder


def expect_equal(order, run):
    assert run.card.problems == []
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))


@pytest.mark.parametrize(
    "sm, precision",
    [
        pytest.param(
            sm, precision, marks=[] if (sm, precision) in IN_CI else pytest.mark.exhaustive
        )
        for sm in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
        for precision in EVERY_PRECISION
    ],
)
def test_each_generation_draws_in_what_it_has(sm, precision, tiny_folder, baked):
    order = tiny(precision=precision, offload="stream", device="cuda", steps=2)
    run = draw_on_card(order, inspect(folder_of(precision, tiny_folder, baked)), Card(sm=sm))
    expect_equal(order, run)
    if precision == "auto":
        assert run.dtype == (torch.float16 if sm < (8, 0) else torch.bfloat16)
    if precision == "fp8":
        assert run.multiply == ("scaled_mm" if sm >= (8, 9) else "dequantize")
    if precision in ROTATED:
        assert run.multiply == "int_mm"


@pytest.mark.parametrize(
    "pinnable_bytes, precision",
    [
        (0, "bf16"),
        (MIB, "nf4"),
        pytest.param(0, "nf4", marks=pytest.mark.exhaustive),
        pytest.param(2 * MIB, "bf16", marks=pytest.mark.exhaustive),
        pytest.param(3 * MIB, "int8", marks=pytest.mark.exhaustive),
        pytest.param(GIB, "bf16", marks=pytest.mark.exhaustive),
        pytest.param(GIB, "fp8", marks=pytest.mark.exhaustive),
    ],
)
def test_a_driver_that_pins_little_changes_no_pixel(pinnable_bytes, precision, tiny_folder, baked):
    order = tiny(precision=precision, offload="stream", device="cuda", steps=2)
    card = Card(pinnable_bytes=pinnable_bytes)
    run = draw_on_card(order, inspect(folder_of(precision, tiny_folder, baked)), card)
    expect_equal(order, run)


@pytest.mark.parametrize(
    "offload",
    [
        "stream",
        pytest.param("none", marks=pytest.mark.exhaustive),
        pytest.param("sequential", marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_goes_to_the_other_card(offload, baked):
    order = tiny(precision="nf4", offload=offload, device="cuda:1", steps=2)
    run = draw_on_card(order, inspect(baked("nf4", **BAKED["nf4"])), Card(cards=2))
    expect_equal(order, run)
    other, own = run.card.memory
    assert run.card.launched[0] == 0 < run.card.launched[1]
    assert other.peak_bytes == 0 < own.peak_bytes
