"""The seconds of a plan: products by FLOP, the rest by bytes and launches, copies by their way; and
what of that may decide a precision.
"""

import re
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from benchmarks.counting import pretend_baked
from fluxcli.engine.cards import describe_card
from fluxcli.models.shapes import read_known_shapes
from fluxcli.plan import costs, placement, planner, steps
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, Candidate
from quant.checkpoint import Checkpoint
from quant.lora import Adapter, Part
from quant.spec import BAKEABLE, ROTATED, SCHEMES, QuantSpec
from quant.tensor_info import GGUF_BITS, TensorInfo
from quant.weights import Piece, Weight
from tests.support.helpers import ROOT, order, survey_for

DEV = "black-forest-labs/FLUX.1-dev"
SPECS = [QuantSpec(name, SCHEMES[name].text_encoder) for name in BAKEABLE]


@pytest.fixture(scope="module")
def variants() -> list[Checkpoint]:
    """The model with everything that can be baked from it."""
    dev = read_known_shapes(DEV)
    return [*(pretend_baked(dev, spec) for spec in SPECS), dev]


def card(text: str, **changes: object) -> Hardware:
    """A card with 64 GiB of RAM beside it, with other fields or other speeds."""
    here = describe_card(text)
    speeds = {name: changes.pop(name) for name in list(changes) if hasattr(here.speeds, name)}
    memory = {"ram_bytes": 64 * GIB, "ram_free_bytes": 64 * GIB}
    return replace(here, speeds=replace(here.speeds, **speeds), **memory, **changes)


def candidates(variants: list[Checkpoint], here: Hardware, **request: object) -> dict:
    found = survey_for(order("a fox", steps=28, **request), variants, here)
    return {candidate.precision: candidate for candidate in found}


def step_s(candidate: Candidate, **speeds: float) -> float:
    """What the blocks of a step compute, with some of the device's speeds changed."""
    hardware = candidate.hardware
    changed = replace(hardware.speeds, **speeds)
    return sum(costs.block_seconds(candidate.cost, hardware, changed))


def moved_gb(candidate: Candidate) -> float:
    """GB that a step moves beside its products, as the planner reckons."""
    speeds = {"wide": inf, "attention": inf, "launch_s": 0.0, "memory_bytes": 1e9}
    return step_s(candidate, eight_bit={"fp8": inf, "int8": inf}, **speeds)


# --- bytes and launches

# The rows of tests/golden_steps.txt, which is what the engine does, that a plan knows.
COUNTED = {
    "bf16": steps.SIXTEEN_BIT,
    "nf4": "nf4",
    "fp8": "fp8 scaled_mm",
    "fp8-per-tensor": "fp8 scaled_mm per tensor",
    "fp8-unpacked": "fp8 dequantize",
    **{scheme: f"{scheme} int_mm" for scheme in ROTATED},
    **{f"{scheme}-unpacked": f"{scheme} dequantize" for scheme in ROTATED},
    **{f"{scheme}-kernels": steps.KITCHEN for scheme in ROTATED},
    **{f"gguf-{kind}": kind for kind in GGUF_BITS},
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
}
UPDATE = (
    "if that is meant: `python -m tests.test_seconds` prints the rows for fluxcli/plan/steps.py"
)
LINE = re.compile(r"(\S+) +\d+ (\d+) \+ 19 x (\d+) \+ 38 x (\d+) +\d+ +([\d.]+) ")


def test_the_planners_rows_are_what_the_engine_was_counted_to_do():
    """The launches of its blocks, and the bytes of a step within 3 %."""
    assert set(COUNTED.values()) == set(steps.ROWS)
    found = LINE.findall((ROOT / "tests" / "golden_steps.txt").read_text(encoding="utf-8"))
    lines = {name: counts for name, *counts in found}
    # Of GGUF, a layer outside of the blocks is quantized, too; a plan leaves that out.
    assert steps.OUTSIDE.launches == int(lines["bf16"][0]), UPDATE
    for name, key in COUNTED.items():
        _, double, single, moved_gb = map(float, lines[name])
        row = steps.ROWS[key]
        assert (row.double.launches, row.single.launches) == (double, single), f"{name}: {UPDATE}"
        mb = steps.OUTSIDE.moved_mb + 19 * row.double.moved_mb + 38 * row.single.moved_mb
        assert mb / 1e3 == pytest.approx(moved_gb, rel=0.03), f"{name}: {UPDATE}"


def print_rows() -> None:
    """The rows of `plan.steps`, counted now."""
    from tests.support.steps import ROWS, count_blocks

    for name, key in COUNTED.items():
        counts = count_blocks(ROWS[name])
        shown = []
        for part in (counts.beside, counts.double, counts.single):
            shown.append(f"Passes({part.launches.total()}, {part.other_bytes / 1e6:.1f})")
        if key == steps.SIXTEEN_BIT:
            print(f"OUTSIDE = {shown[0]}")
        print(f'    "{key}": StepRow({shown[1]}, {shown[2]}),', flush=True)


@pytest.mark.parametrize(
    ("precision", "key"),
    [
        ("bf16", steps.SIXTEEN_BIT),
        ("nf4", "nf4"),
        ("fp8", "fp8 scaled_mm"),
        ("int8", "int8 int_mm"),
    ],
)
def test_a_step_at_the_counted_size_moves_and_launches_what_was_counted(precision, key, variants):
    candidate = candidates(variants, card("24GiB:sm89"))[precision]
    row = steps.ROWS[key]
    counted_mb = steps.OUTSIDE.moved_mb + 19 * row.double.moved_mb + 38 * row.single.moved_mb
    assert moved_gb(candidate) == pytest.approx(counted_mb / 1e3, rel=2e-3)
    launches = steps.OUTSIDE.launches + 19 * row.double.launches + 38 * row.single.launches
    nothing_else = {"wide": inf, "attention": inf, "memory_bytes": inf, "launch_s": 1.0}
    found = step_s(candidate, eight_bit={"fp8": inf, "int8": inf}, **nothing_else)
    assert found == pytest.approx(launches, rel=2e-3)


def test_bytes_grow_with_tokens_and_those_of_weights_do_not(variants):
    small, large = (candidates(variants, card("24GiB:sm89"), image_size=px) for px in (512, 1024))
    assert moved_gb(large["bf16"]) == pytest.approx(moved_gb(small["bf16"]) * 4608 / 1536)
    assert moved_gb(large["fp8"]) == pytest.approx(moved_gb(small["fp8"]) * 4608 / 1536)
    dequantizing = [moved_gb(found["nf4"]) - moved_gb(found["bf16"]) for found in (small, large)]
    assert dequantizing[0] == pytest.approx(dequantizing[1]) and dequantizing[0] > 10


def test_every_form_of_gguf_has_a_row():
    assert {steps.find_row(form, "dequantize") for form in GGUF_BITS} <= set(steps.ROWS)


def test_a_step_is_never_faster_than_its_launches_and_a_faster_card_never_slower(variants):
    for candidate in candidates(variants, card("24GiB:sm89")).values():
        usual = step_s(candidate)
        assert step_s(candidate, launch_s=1e-2) > 10 > usual
        for name in ("wide", "attention", "memory_bytes"):
            faster = {name: 2 * getattr(candidate.hardware.speeds, name)}
            assert step_s(candidate, **faster) < usual or candidate.precision in ("fp8", "int8")


def test_a_card_that_dequantizes_fp8_is_planned_so(variants):
    computes = candidates(variants, card("24GiB:sm89"))["fp8"]
    unpacks = candidates(variants, card("24GiB:sm89", multiply={"fp8": "dequantize"}))["fp8"]
    assert moved_gb(unpacks) - moved_gb(computes) == pytest.approx(
        (19 * _added("fp8", "double") + 38 * _added("fp8", "single")) / 1e3, rel=0.02
    )
    assert step_s(unpacks) > step_s(candidates(variants, card("24GiB:sm89"))["bf16"])


def _added(scheme: str, kind: str) -> float:
    """MB that a block moves more where its weights are dequantized."""
    unpacked, computed = (
        getattr(steps.ROWS[f"{scheme} {way}"], kind) for way in ("dequantize", "scaled_mm")
    )
    return unpacked.moved_mb - computed.moved_mb


# --- copies


def test_sequential_comes_at_the_speed_of_pageable_copies(variants):
    here = card("12GiB:sm89")
    found = candidates(variants, here, precision="bf16", offload="sequential")["bf16"]
    copied_s = found.cost.blocks_bytes / 4e9
    assert found.plan.seconds["denoise"] / 28 == pytest.approx(copied_s + step_s(found), rel=1e-3)


def test_blocks_beyond_what_is_pinned_still_overlap_and_are_bound_by_the_host(variants):
    for precision, text in (("bf16", "8GiB:sm86"), ("bf16", "12GiB:sm89"), ("fp8", "8GiB:sm89")):
        taken = []
        for pin_gib in (None, 4, 1, 0):
            pin_bytes = None if pin_gib is None else pin_gib * GIB
            here = card(text, pin_bytes=pin_bytes, host_copy_bytes=1.5e9)
            found = candidates(variants, here, precision=precision)[precision]
            streamed = [found.cost.blocks[i].nbytes for i in found.plan.placement.streamed]
            copied_s = sum(placement.find_bus(here).copy_seconds(streamed))
            taken.append(found.plan.seconds["denoise"] / 28)
            computed_s = step_s(found)
            # Those that are not pinned come one after the other at the end of a step.
            assert max(copied_s, computed_s) * 0.999 <= taken[-1]
            assert taken[-1] <= max(copied_s, computed_s) + 0.7 * min(copied_s, computed_s)
        assert taken == sorted(taken) and taken[-1] > 1.2 * taken[0]


# --- adapters


def adapter(layers: dict[str, tuple[int, int]], rank: int) -> Adapter:
    """A LoRA on these layers of the transformer, by their shapes (N, K)."""
    parts = []
    for name, shape in layers.items():
        pieces = {}
        for kind, numels in (("down", (rank, shape[1])), ("up", (shape[0], rank))):
            pieces[kind] = Piece(Path("x"), TensorInfo(kind, "BF16", numels))
        stored = Weight(name, shape, "", pieces)
        parts.append(Part("transformer", {name: ((0, shape[0]),)}, shape, rank, 1.0, stored))
    return Adapter("0", 1.0, Path("x"), "", tuple(parts), (), (), {})


def test_adapters_cost_their_products_and_their_layers_outputs_once_more(variants):
    request, here = order("a fox", steps=28).request, card("24GiB:sm89")
    layers = {
        "transformer_blocks.0.ff.net.0.proj": (12288, 3072),
        "transformer_blocks.0.ff_context.net.0.proj": (12288, 3072),
        "single_transformer_blocks.5.proj_out": (3072, 15360),
        "transformer_blocks.0.norm1.linear": (18432, 3072),  # modulation: once a run
    }
    rank = 16
    added = costs.make_workload(request, [adapter(layers, rank)] * 2)
    per_token = [(12288 * 2 + 3072, 4096), (12288 * 2 + 3072, 512), (3072 * 2 + 15360, 4608)]
    assert added.adapter_moved_numel == 2 * sum(numel * tokens for numel, tokens in per_token)
    assert added.adapter_launches == 2 * 3 * 2
    widths = [(15360, 4096), (15360, 512), (18432, 4608)]
    assert added.adapter_flop == 2 * sum(2 * rank * width * tokens for width, tokens in widths)
    plain = candidates(variants, here)["bf16"]
    changed = replace(plain, cost=replace(plain.cost, workload=added))
    expected_s = 2 * added.adapter_moved_numel / here.speeds.memory_bytes
    expected_s += added.adapter_flop / here.speeds.wide
    assert step_s(changed) - step_s(plain) == pytest.approx(expected_s, rel=0.05)


# --- what decides


def test_bf16_is_too_slow_for_8_bit_only_where_somebody_measured(variants):
    for text in ("4090", "5090", "24GiB:sm89", "48GiB:sm89", "80GiB:sm90"):
        guess = card(text, eight_bit={"fp8": 1e16, "int8": 1e16}, is_measured=False)
        assert candidates(variants, guess)["bf16"].verdict == "chosen"
        known = card(text, eight_bit={"fp8": 1e16, "int8": 1e16}, is_measured=True)
        found = candidates(variants, known)
        fastest_s = min(found[name].plan.picture_s for name in ("fp8", "int8"))
        is_slow = fastest_s * planner.SLOWER < found["bf16"].plan.picture_s
        assert (found["bf16"].verdict == "too slow") == is_slow
        assert is_slow or text == "80GiB:sm90"


def test_int8_goes_before_bf16_only_on_cards_where_its_speed_is_published(variants):
    """Twice as fast on an RTX 3090, says somebody who measured; of an RTX 4090 nobody has."""
    here = card("3090")
    found = candidates(variants, here)
    assert (found["bf16"].verdict, found["int8"].verdict) == ("too slow", "chosen")
    assert "int8 products as in ComfyUI-Flux2-INT8" in found["int8"].plan.speeds
    assert "ComfyUI" not in found["bf16"].plan.speeds + found["nf4"].plan.speeds
    guess = candidates(variants, card("3090", published={}))
    assert guess["bf16"].verdict == candidates(variants, card("4090"))["bf16"].verdict == "chosen"
    assert "by its data sheet" in guess["w4a8"].plan.speeds


def test_what_stays_is_faster_for_certain_where_bf16_waits_for_the_bus(variants):
    found = candidates(variants, card("12GiB:sm89", bus_bytes=1e9))
    assert (found["bf16"].verdict, found["int8"].verdict) == ("too slow", "chosen")


@pytest.mark.parametrize("text", ["8GiB:sm89", "12GiB:sm86", "24GiB:sm89"])
def test_loading_decides_no_precision(text, variants):
    """A worker has loaded already; a picture must not depend on whether there is one."""
    verdicts = []
    for disk_bytes in (2e7, 2e9, 2e12):
        found = candidates(variants, card(text, disk_bytes=disk_bytes))
        verdicts.append({name: each.verdict for name, each in found.items()})
    assert verdicts[0] == verdicts[1] == verdicts[2]


if __name__ == "__main__":
    print_rows()
