"""What decides pixels: the request and the device, never a day, a process, or what was learned.

A precision and the decode in tiles are decided by a card's total memory and its table's speeds.
What is free, what earlier runs have learned, and how the process began move weights and seconds.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.counting import pretend_baked
from fluxcli.engine.cards import describe_card
from fluxcli.models.shapes import read_known_shapes
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, Candidate
from quant.checkpoint import Checkpoint
from quant.linear import PER_TENSOR
from quant.spec import DEQUANTIZE, KITCHEN, ROTATED, QuantSpec
from tests.support.helpers import order, survey_for

DEV = "black-forest-labs/FLUX.1-dev"
MIB = 2**20
CARDS = ("6GiB:sm75", "8GiB:sm86", "12GiB:sm89", "16GiB:sm120", "24GiB:sm89", "16GiB:xpu")


@pytest.fixture(scope="module")
def variants() -> list[Checkpoint]:
    """The model, with fp8 and nf4 baked beside it."""
    dev = read_known_shapes(DEV)
    baked = [pretend_baked(dev, spec) for spec in (QuantSpec("nf4", "nf4"), QuantSpec("fp8"))]
    return [*baked, dev]


def card(text: str, **changes: object) -> Hardware:
    """A card with 64 GiB of RAM beside it."""
    return replace(describe_card(text), ram_bytes=64 * GIB, ram_free_bytes=64 * GIB, **changes)


def decided(found: Sequence[Candidate]) -> tuple[str, bool | None]:
    """The precision of a picture, and whether it is decoded in tiles; None where none is drawn."""
    taken = next(each for each in found if each.verdict in ("chosen", "not now"))
    return taken.precision, taken.plan and taken.plan.placement.decode == "tiled"


# What is so today or in this process.
CIRCUMSTANCES = {
    "nothing pinned": {"pin_bytes": 0},
    "as in WSL": {"pin_bytes": 512 * MIB},
    "some pinned": {"pin_bytes": 5 * GIB},
    "little RAM free": {"ram_free_bytes": 24 * GIB},
    "CUDA used before": {"expandable": False, "fixed_segments": "CUDA was in use before"},
    "CUDA used before, nothing pinned": {"expandable": False, "pin_bytes": 0},
}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        *((text, {}) for text in CARDS),
        (CARDS[1], {"image_size": 1536}),
        *(
            pytest.param(text, {"image_size": size}, marks=pytest.mark.exhaustive)
            for text in CARDS
            for size in (512, 1536)
            if (text, size) != (CARDS[1], 1536)
        ),
    ],
    ids=str,
)
def test_the_day_and_the_process_decide_no_pixel(text, asked, variants):
    here = card(text)
    wanted = order("a fox", steps=28, **asked)
    usual = decided(survey_for(wanted, variants, here))
    for name, changes in CIRCUMSTANCES.items():
        assert decided(survey_for(wanted, variants, replace(here, **changes))) == usual, name
    for share in (0.9, 0.75, 0.6):
        busy = replace(here, free_bytes=int(here.total_bytes * share))
        found = decided(survey_for(wanted, variants, busy))
        assert found in (usual, (usual[0], None)), share
    warned = survey_for(wanted, variants, here, margin_bytes=here.total_bytes // 4)
    assert decided(warned) == usual
    compiled = replace(wanted, resources=replace(wanted.resources, compile=True))
    assert decided(survey_for(compiled, variants, here)) == usual


def test_what_the_driver_pins_moves_seconds_and_not_the_precision(variants):
    """Beyond the limit all of it comes by a feeder, which is slow on this machine.

    The card has no products in 8 bit, so that 16 bit is streamed.
    """
    here = card("12GiB:xpu")
    here = replace(here, speeds=replace(here.speeds, host_copy_bytes=5e8))
    wanted = order("a fox", steps=28)
    usual = survey_for(wanted, variants, here)
    unpinned = survey_for(wanted, variants, replace(here, pin_bytes=0))
    assert decided(unpinned) == decided(usual) == ("bf16", False)
    assert [each.verdict for each in unpinned] == [each.verdict for each in usual]
    seconds = [found[0].plan.seconds["denoise"] for found in (usual, unpinned)]
    assert seconds[1] > 3 * seconds[0]
    smaller = next(each for each in unpinned if each.precision == "fp8")
    assert seconds[1] > 1.25 * smaller.plan.seconds["denoise"], "too slow, if this day counted"


def test_a_program_that_used_cuda_before_gets_the_same_precision(variants):
    """Where 16 bit stays on the card only if segments can grow, it is in no program's plan."""
    here = card("24GiB:sm89")
    for tenth_gib in range(170, 200):
        limit = {"vram_limit": f"{tenth_gib / 10}GiB", "offload": "none"}
        wanted = order("a fox", steps=28, **limit)
        grows = survey_for(wanted, variants, here)
        fixed = survey_for(wanted, variants, replace(here, expandable=False))
        assert decided(grows) == decided(fixed), limit
        assert [each.verdict for each in grows] == [each.verdict for each in fixed]
    taken = [next(each for each in found if each.verdict == "chosen") for found in (grows, fixed)]
    assert taken[0].plan.peak_bytes["denoise"] < taken[1].plan.peak_bytes["denoise"]


@pytest.mark.parametrize("text", ["8GiB:sm86", "12GiB:sm89", "16GiB:sm75", "24GiB:sm89"])
def test_installed_kernels_move_seconds_and_not_the_precision(text, variants):
    here = card(text)
    wanted = order("a fox", steps=28)
    usual = survey_for(wanted, variants, here)
    kernels = dict.fromkeys(ROTATED, f"{KITCHEN} cuda")
    faster = survey_for(wanted, variants, replace(here, multiply=kernels))
    assert decided(faster) == decided(usual)
    assert [each.verdict for each in faster] == [each.verdict for each in usual]
    seconds = [
        next(each.plan.seconds["denoise"] for each in found if each.precision == "int8")
        for found in (usual, faster)
    ]
    assert seconds[1] < seconds[0]


WINDOWS = "Rowwise scaling is not currently supported on your device"


@pytest.mark.parametrize("text", ["4060", "4090", "5090", "8GiB:sm120"])
@pytest.mark.parametrize("way", [PER_TENSOR, DEQUANTIZE])
def test_fp8_without_a_row_wise_kernel_is_said_and_never_preferred(text, way, variants):
    """torch for Windows: the choice stays what it was; a folder of fp8 alone is drawn, and told."""
    here = card(
        text,
        multiply={"fp8": way, "int8": "int_mm"},
        multiply_why={"fp8": WINDOWS},
        pin_bytes=24 * GIB,
    )
    wanted = order("a fox", steps=28)
    beside = survey_for(wanted, variants, here)
    assert decided(beside)[0] == ("bf16" if here.total_bytes > 8 * GIB else "w4a8")
    alone = survey_for(wanted, [each for each in variants if _stored(each) == "fp8"], here)
    assert [each.precision for each in alone] == ["fp8"] and alone[0].verdict == "chosen"
    plan = alone[0].plan
    how = "unpacked" if way == DEQUANTIZE else "multiplied per tensor"
    assert f"fp8: {how} here, because {WINDOWS}" in plan.reasons
    on_linux = replace(here, multiply={}, multiply_why={})
    (native,) = survey_for(wanted, [alone[0].checkpoint], on_linux)
    assert plan.seconds["denoise"] > native.plan.seconds["denoise"]


def _stored(checkpoint: Checkpoint) -> str:
    return checkpoint.components["transformer"].precision


def test_what_ram_has_no_room_for_is_said_of_the_ram(variants):
    """What is packed while loading is streamed or nothing: with little RAM a small card is none."""
    here = card("4GiB:sm89")
    wanted = order("a fox", steps=28, precision="fp8")
    (small,) = survey_for(wanted, variants[-1:], replace(here, ram_bytes=8 * GIB))
    assert small.verdict == "does not fit"
    assert re.fullmatch(r"denoise streams [67]\.\d GiB, for which RAM has 4\.8 GiB", small.why)
    (busy,) = survey_for(wanted, variants[-1:], replace(here, ram_free_bytes=4 * GIB))
    assert busy.verdict == "not now"
    assert busy.why.endswith("RAM has 3.2 GiB (4.0 GiB free, 4.0 GiB of RAM)")
