"""The planner: precision by what the device has in total, placement by what is free, a reason for
each decision.
"""

import builtins
import io
import json
import math
import os
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from benchmarks.counting import pretend_baked
from fluxcli import paths
from fluxcli.cli import console
from fluxcli.engine.cards import describe_card
from fluxcli.errors import DoesNotFit, ExitCode, UsageError
from fluxcli.models import find as models
from fluxcli.models.abilities import check_abilities
from fluxcli.models.shapes import read_known_controlnet, read_known_redux, read_known_shapes
from fluxcli.plan import costs, placement
from fluxcli.plan.costs import Cost
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, PHASES, Candidate
from fluxcli.plan.planner import SLOWER, USABLE_SHARE, choose_bake, suggest_options, survey
from fluxcli.request.fields import Order
from quant.checkpoint import Checkpoint, inspect
from quant.spec import BAKEABLE, SCHEMES, QuantSpec
from tests.support.helpers import BAKED, ROOT, machine, order, plan_for, survey_for, tiny
from tests.support.invariant import assert_failed, call

GOLDEN = ROOT / "tests" / "golden_plans.txt"
DEV = "black-forest-labs/FLUX.1-dev"
CARDS = [
    "6GiB:sm75",
    "8GiB:sm86",
    "8GiB:sm89",
    "10GiB:sm86",
    "12GiB:sm86",
    "12GiB:sm89",
    "16GiB:sm89",
    "16GiB:sm120",
    "24GiB:sm86",
    "24GiB:sm89",
    "32GiB:sm120",
    "48GiB:sm89",
    "80GiB:sm90",
]


UNION_PRO_2 = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"
PICTURE_CARDS = ["8GiB:sm89", "12GiB:sm89", "16GiB:sm89", "24GiB:sm89"]
MEGAPIXEL = 1 << 20
PICTURES = {  # what a request with pictures changes in its workload
    "union-pro-2": {
        "controls": ("controlnet",),
        "control_steps": (22,),
        "input_pixels": (MEGAPIXEL,),
    },
    "kontext": {"reference_tokens": 4096, "input_pixels": (MEGAPIXEL,)},
    "redux": {"extra_text_tokens": 729},
    "negative": {"passes": 2},
    "img2img": {"steps": 17, "input_pixels": (MEGAPIXEL,)},
}


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def dev() -> Checkpoint:
    return read_known_shapes(DEV)


@pytest.fixture(scope="module")
def variants(dev) -> list[Checkpoint]:
    """The model with everything that can be baked from it."""
    return bake_all(dev)


def bake_all(source: Checkpoint) -> list[Checkpoint]:
    specs = [QuantSpec(name, SCHEMES[name].text_encoder) for name in BAKEABLE]
    return [*(pretend_baked(source, spec) for spec in specs), source]


def request(**changes: object) -> Order:
    return order("a fox", **changes)


def card(text: str, *, ram_gib: int = 64) -> Hardware:
    return replace(describe_card(text), ram_bytes=ram_gib * GIB, ram_free_bytes=ram_gib * GIB)


def chosen(found: list[Candidate]) -> Candidate | None:
    return next((candidate for candidate in found if candidate.verdict == "chosen"), None)


def cost_of(asked: Order, folder: Checkpoint, dtypes: dict, spec: QuantSpec | None = None) -> Cost:
    """What a request costs in 16 bit, or as `spec` packs it."""
    workload = costs.make_workload(asked.request)
    return costs.estimate_cost(
        workload, folder, dtypes=dtypes, spec=spec, lines=placement.SIXTEEN_BIT_LINES
    )


# --- properties over a grid


@pytest.mark.parametrize("size", [512, 1024, 2048])
@pytest.mark.parametrize("sm", ["sm75", "sm86", "sm89"])
def test_never_over_budget_and_more_memory_is_never_slower_or_worse(size, sm, variants):
    by_precision: dict[str, list[float]] = {}
    qualities = []
    for gib in (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96):
        found = survey_for(request(image_size=size), variants, card(f"{gib}GiB:{sm}"))
        errors = [candidate.error for candidate in found]
        assert errors == sorted(errors) and errors[0] == 0
        for candidate in found:
            assert candidate.why
            if candidate.plan:
                assert max(candidate.plan.peak_bytes.values()) <= gib * GIB * USABLE_SHARE
                assert candidate.plan.reasons and tuple(candidate.plan.peak_bytes) == PHASES
                by_precision.setdefault(candidate.precision, []).append(
                    sum(candidate.plan.seconds.values())
                )
            else:
                assert "GiB" in candidate.why
        best = chosen(found)
        qualities.append(-best.error if best else -math.inf)
        if best:
            assert len(best.plan.reasons) >= 3
    for precision, seconds in by_precision.items():
        assert all(more <= less + 1e-6 for less, more in pairwise(seconds)), precision
    assert qualities == sorted(qualities) and qualities[-1] > -math.inf


@pytest.mark.parametrize("gib, size", [*product((8, 12, 24), (512, 1024))])
def test_the_choice_is_the_best_within_a_quarter_of_the_fastest(gib, size, variants):
    found = survey_for(request(image_size=size), variants, card(f"{gib}GiB:sm89"))
    fastest_s = min(placement.estimate_sure_s(each, each.plan) for each in found if each.plan)
    whole = [each for each in found if each.plan and each.plan.placement.denoise == "resident"]
    fast = [each for each in whole if each.plan.picture_s <= SLOWER * fastest_s and each.is_native]
    assert chosen(found) == min(fast, key=lambda each: each.error)
    assert {candidate.verdict for candidate in found} <= {
        "chosen",
        "fits",
        "too slow",
        "does not fit",
    }


@pytest.mark.parametrize("precision", ["bf16", *BAKEABLE])
def test_less_free_memory_streams_more_and_changes_no_pixel(precision, variants):
    whole, plans = card("24GiB:sm89"), []
    for free in (24, 20, 16, 12, 10, 8, 6, 5):
        found = survey_for(
            request(precision=precision), variants, replace(whole, free_bytes=free * GIB)
        )
        assert {candidate.precision for candidate in found} == {precision}
        plans.append(found[0].plan)
        assert found[0].plan.budget_bytes <= free * GIB
    assert (
        len({each.precision for each in plans}) == 1
        and len({str(each.dtypes) for each in plans}) == 1
    )
    assert all(each.placement.decode != "tiled" for each in plans)
    passing = [len(each.placement.streamed) for each in plans]
    assert passing == sorted(passing) and passing[0] == 0
    automatic = {
        survey_for(request(), variants, replace(whole, free_bytes=free * GIB))[0].precision
        for free in (24, 16, 8)
    }
    assert len(automatic) == 1


def test_a_moment_without_free_memory_is_refused_not_answered_with_another_precision(variants):
    busy = replace(card("24GiB:sm89"), free_bytes=GIB)
    found = survey_for(request(), variants, busy)
    assert [candidate.verdict for candidate in found].count("not now") == 1 and not chosen(found)
    with pytest.raises(DoesNotFit, match=r"1\.0 GiB free"):
        plan_for(request(), variants, busy)


def test_a_slow_bus_makes_streaming_slow(variants):
    usual = card("12GiB:sm89")
    slow_bus = replace(usual, speeds=replace(usual.speeds, bus_bytes=2e9, source="a table's"))
    wide = [
        survey_for(request(precision="bf16"), variants, here)[0].plan for here in (usual, slow_bus)
    ]
    assert wide[1].seconds["denoise"] > 2 * wide[0].seconds["denoise"]
    assert wide[1].speeds == "a table's" and any(
        "a table's" in reason for reason in wide[1].reasons
    )


def test_fp8_is_fast_only_where_the_card_computes_it(variants):
    with_units, without = (
        {
            candidate.precision: candidate.plan.seconds["denoise"]
            for candidate in survey_for(request(), variants, card(text))
        }
        for text in ("24GiB:sm89", "24GiB:sm86")
    )
    assert with_units["fp8"] < with_units["bf16"] and without["fp8"] > without["bf16"]


def test_little_ram_reads_from_files_instead_of_pinning(dev):
    found = survey_for(request(precision="bf16"), [dev], card("8GiB:sm89", ram_gib=8))[0]
    assert found.plan.placement.denoise == "sequential" and found.plan.host_bytes == 0
    plenty = survey_for(request(precision="bf16"), [dev], card("8GiB:sm89"))[0]
    assert plenty.plan.placement.denoise == "streamed" and plenty.plan.host_bytes > 4 * GIB


def test_the_table_under_review(variants):
    """Which precision and placement common cards get; regenerate with `python -m tests.test_plan`
    and read the diff.
    """
    assert golden(variants) == GOLDEN.read_text()


def golden(variants: list[Checkpoint]) -> str:
    rows = []
    for text, size, baked in product(CARDS, (1024, 1536), (True, False)):
        name = f"{text} {size} {'baked' if baked else 'source'}"
        found = survey_for(
            request(image_size=size), variants if baked else variants[-1:], card(text)
        )
        rows += [describe(name, candidate) for candidate in found]
    source = variants[-1]
    parts = {"controlnet": read_known_controlnet(UNION_PRO_2)} | read_known_redux()
    source = replace(source, components=source.components | parts)
    for text, (name, changes) in product(PICTURE_CARDS, PICTURES.items()):
        workload = replace(costs.make_workload(request().request), **changes)
        found = survey(workload, request().resources, [source], card(text))
        rows += [describe(f"{text} {name}", candidate) for candidate in found]
    return "\n".join(rows) + "\n"


def describe(name: str, candidate: Candidate) -> str:
    placed = candidate.plan and candidate.plan.placement
    how = f"{placed.encode}/{placed.level('denoise')}/{placed.decode}" if placed else ""
    if placed and candidate.cost.controls:
        how += f"/{placed.controls}"
    peak = f"{max(candidate.plan.peak_bytes.values()) / GIB:6.2f} GiB" if candidate.plan else ""
    return f"{name:<24} {candidate.precision:<5} {candidate.verdict:<13} {how:<34} {peak}".rstrip()


def test_a_plan_opens_no_file(variants, monkeypatch):
    here, asked = card("12GiB:sm89"), request(offload="none")
    with monkeypatch.context() as patch:
        for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat")):
            patch.setattr(owner, name, lambda *_, **__: pytest.fail("a file was opened"))
        found = survey_for(asked, variants, here)
        suggest_options(asked.request, asked.resources, variants, here)
    assert chosen(found)


# --- the goals


def test_bf16_on_24_fp8_on_12_and_nf4_on_8_gib_keep_every_block_on_the_card(variants):
    for precision, gib, most in (("bf16", 24, 18.5), ("fp8", 12, 10.8), ("nf4", 8, 6.9)):
        found = survey_for(request(precision=precision), variants, card(f"{gib}GiB:sm89"))[0].plan
        assert found.placement.denoise == "resident"
        assert max(found.peak_bytes[phase] for phase in PHASES[:3]) / GIB <= most
        assert found.placement.decode != "tiled"
        assert max(found.peak_bytes.values()) <= gib * GIB * USABLE_SHARE


def test_streaming_keeps_up_with_the_bus(variants):
    """A step takes at most 1.1 times the longer of computing and copying, for every count that a
    plan may have.
    """
    for precision, text in product(("bf16", *BAKEABLE), ("16GiB:sm86", "16GiB:sm89")):
        candidate = survey_for(request(precision=precision), variants, card(text))[0]
        for bus in (12e9, 24e9, 50e9):
            hardware = candidate.hardware
            compute = costs.block_seconds(candidate.cost, hardware, hardware.speeds)
            pinned = costs.Bus(bus_bytes=bus, fed_bytes=bus)
            for count in range(4, 52, 4):
                streamed = costs.choose_streamed(candidate.cost, compute, count, bus=pinned)
                assert len(set(streamed)) == count and list(streamed) == sorted(streamed)
                copying = sum(candidate.cost.blocks[i].nbytes for i in streamed) / bus
                step = costs.step_seconds(candidate.cost, compute, streamed, bus=pinned)
                assert max(sum(compute), copying) <= step + 1e-9
                assert step <= 1.1 * max(sum(compute), copying), (precision, text, bus, count)


# --- dtypes, offers, overrides


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (machine(24), "bfloat16"),
        (machine(24, bf16=False), "float16"),
        (machine(16, "cpu", bf16=False), "float32"),
        (machine(16, "cpu"), "bfloat16"),
    ],
)
def test_the_compute_dtype_follows_the_device(checkpoint, here, expected):
    _, found = plan_for(tiny(), [checkpoint], here)
    assert found.dtypes["transformer"] == expected
    if expected == "float16":  # T5 and the VAE overflow in float16
        assert {found.dtypes[name] for name in ("text_encoder", "text_encoder_2", "vae")} == {
            "float32"
        }


def test_a_cpu_computes_float32_where_that_fits_and_says_slowly_where_not(dev, variants):
    cpu = machine(24, "cpu", bf16=False)
    by_name = {
        candidate.precision: candidate
        for candidate in survey_for(request(image_size=256), [dev], cpu)
    }
    assert by_name["bf16"].dtypes["transformer"] == "bfloat16" and "slowly" in by_name["bf16"].basis
    assert by_name["nf4"].dtypes["transformer"] == "float32"
    assert all(
        candidate.plan.placement.denoise == "resident"
        for candidate in by_name.values()
        if candidate.plan
    )


def test_an_offload_on_the_cpu_is_refused(checkpoint):
    with pytest.raises(UsageError, match="without effect"):
        plan_for(tiny(offload="stream"), [checkpoint], machine(16, "cpu", bf16=False))


@pytest.mark.parametrize("offload", ["none", "stream", "sequential"])
def test_an_offload_leaves_one_placement_or_is_refused_with_the_numbers(offload, variants):
    small, large = card("12GiB:sm89"), card("24GiB:sm89")
    asked = request(precision="bf16", offload=offload)
    found = plan_for(asked, variants, large)[1].placement
    expected = {"none": "resident", "stream": "streamed 56", "sequential": "sequential"}[offload]
    assert found.level("denoise") == expected and (found.encode == "sequential") == (
        offload == "sequential"
    )
    if offload == "none":
        with pytest.raises(DoesNotFit, match=r"needs 1\d\.\d GiB"):
            plan_for(asked, variants, small)
        hint = suggest_options(asked.request, asked.resources, variants, small)
        assert "--offload auto" in hint or "--precision" in hint
    else:
        assert max(plan_for(asked, variants, small)[1].peak_bytes.values()) < 11.5 * GIB


def test_a_limit_is_a_smaller_card(variants):
    limited = survey_for(request(vram_limit=12 * GIB), variants, card("24GiB:sm89"))
    for candidate in limited:
        assert candidate.plan is None or max(candidate.plan.peak_bytes.values()) <= 12 * GIB
    assert limited[0].precision == "bf16" and limited[0].plan.placement.streamed


# The precision of a card, and whether its blocks all stay, for pictures of 1024x1024.
CHOICES = {
    "RTX 3090": ("int8", True),  # 2.0x as fast, as is published
    "RTX 4090": ("bf16", True),
    "RTX 4070 Ti SUPER": ("int8", True),
    "RTX 4060 Ti 16GB": ("int8", True),
    "RTX 5080": ("int8", True),
    "RTX 3060 12GB": ("int8", True),
    "RTX 3080 12GB": ("int8", True),
    "RTX 4070": ("int8", True),
    "RTX 5070": ("int8", True),
    "RTX 3080 10GB": ("w6a8", True),
    "RTX 2080 Ti": ("w6a8", True),
    "RTX 3070": ("w4a8", True),
    "RTX 3060 Ti": ("w4a8", True),
    "RTX 4060": ("w4a8", True),
    "RTX 5060": ("w4a8", True),
    "RTX 2070": ("w4a8", True),
    "RTX 2060 6GB": ("w4a8", False),
    "RX 7600": ("bf16", False),  # which has no product in 8 bit
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_a_card_gets_once_everything_is_baked(name, variants):
    """The same as while nothing is, so that a bake changes no pixel."""
    here = card(name)
    best = chosen(survey_for(request(), variants, here))
    is_whole = best.plan.placement.denoise == "resident"
    assert (best.precision, is_whole) == CHOICES[name]
    assert best.plan.placement.decode != "tiled" or here.capability < (8, 0)
    workload, resources = costs.make_workload(request().request), request().resources
    baked_to = choose_bake(workload, resources, variants[-1], hardware=here)
    assert (baked_to.precision, baked_to.plan.placement) == (best.precision, best.plan.placement)


def test_a_busy_moment_decides_no_bake(dev):
    busy = replace(card("RTX 3070"), free_bytes=GIB)
    workload, resources = costs.make_workload(request().request), request().resources
    assert choose_bake(workload, resources, dev, hardware=busy).precision == "w4a8"
    with pytest.raises(DoesNotFit, match="GiB"):
        choose_bake(workload, resources, dev, hardware=card("1GiB:sm89"))


def test_what_is_dequantized_is_taken_where_nothing_else_is_at_hand(variants):
    """fp8 on a card without its products, nf4 anywhere; beside 16 bit they wait to be asked for."""
    here = card("RTX 3070")
    for name in ("fp8", "nf4"):
        stored = [each for each in variants if each.components["transformer"].precision == name]
        (alone,) = survey_for(request(), stored, here)
        assert (alone.precision, alone.verdict) == (name, "chosen")
        beside = survey_for(request(), [*stored, variants[-1]], here)
        assert chosen(beside).precision == "w4a8"
        (asked,) = survey_for(request(precision=name), [*stored, variants[-1]], here)
        assert asked.verdict == "chosen" and asked.checkpoint is stored[0]


def test_int8_without_a_rotation_ranks_by_its_own_error_and_is_packed_anew_beside_16_bit(variants):
    """A file of an earlier flux, or of others: read, and taken where there is nothing better."""
    rotated = next(each for each in variants if each.components["transformer"].precision == "int8")
    part = rotated.components["transformer"]
    weights = {name: replace(weight, rotation=0) for name, weight in part.weights.items()}
    plain = replace(part, weights=weights)
    unrotated = replace(rotated, components={**rotated.components, "transformer": plain})
    here = card("RTX 3060 12GB")
    (alone,) = survey_for(request(), [unrotated], here)
    assert alone.verdict == "chosen" and alone.error > 7 * SCHEMES["int8"].error
    assert SCHEMES["w4a8"].error < alone.error < SCHEMES["nf4"].error
    beside = chosen(survey_for(request(), [unrotated, variants[-1]], here))
    assert (beside.precision, beside.checkpoint) == ("int8", variants[-1])


def test_of_streamed_ones_a_small_one_is_taken_and_says_why_no_better_one(variants):
    found = survey_for(request(), variants, card("RTX 2060 6GB"))
    assert all(each.plan.placement.denoise == "streamed" for each in found if each.plan)
    assert chosen(found).precision == "w4a8"
    better = {each.precision: each.why for each in found if each.error < chosen(found).error}
    assert "fewer bytes" in better["w6a8"] and "blocks are streamed" in better["w6a8"]
    assert f"not w6a8: {better['w6a8']}" in chosen(found).plan.reasons
    whole = survey_for(request(), variants, card("RTX 4060"))
    better = {each.precision: each.why for each in whole}
    assert better["bf16"] == "48 of 57 blocks are streamed, with w4a8 none is"
    # Its own plan streams nothing; the one by which it was compared does.
    (int8,) = (
        each
        for each in survey_for(request(), variants, card("RTX 2080 Ti"))
        if each.precision == "int8"
    )
    assert int8.plan.placement.denoise == "resident"
    assert int8.why == "where segments cannot grow 8 of 57 blocks are streamed, with w6a8 none is"


def test_what_is_faster_on_a_guess_alone_is_named(variants):
    reason = "int8 may be 1.3 times as fast, but nobody has timed it"
    best = chosen(survey_for(request(), variants, card("24GiB:sm89")))
    assert best.precision == "bf16" and best.plan.reasons[-1] == reason
    timed = chosen(survey_for(request(), variants, card("24GiB:sm86")))
    assert not any("nobody has timed" in said for said in timed.plan.reasons)
    busy = replace(card("24GiB:sm89"), free_bytes=8 * GIB)
    streamed = chosen(survey_for(request(), variants, busy))
    assert streamed.precision == "bf16" and streamed.plan.placement.denoise == "streamed"
    assert not any("nobody has timed" in said for said in streamed.plan.reasons)


def test_what_would_fit_is_said(variants, dev):
    asked, here = request(image_size=2048, offload="none", precision="bf16"), card("12GiB:sm89")
    with pytest.raises(DoesNotFit):
        plan_for(asked, variants, here)
    assert suggest_options(asked.request, asked.resources, variants, here).startswith("--")
    with pytest.raises(DoesNotFit, match="GiB"):
        plan_for(request(), [dev], card("1GiB:sm89"))


def test_small_models_stay_whole(checkpoint):
    _, found = plan_for(tiny(), [checkpoint], machine(16, "cpu", bf16=False))
    assert {"text_encoder_2", "transformer", "vae", "modulation"} <= set(found.placement.keep)
    assert any("small" in reason for reason in found.reasons)


@pytest.mark.parametrize("gib", [0.25, 1, 2, 4, 8])
@pytest.mark.parametrize("text", ["8GiB:sm86", "12GiB:sm89", "24GiB:sm89"])
def test_a_margin_moves_the_placement_and_neither_precision_nor_pixels(text, gib, variants):
    here = card(text)
    _, usual = plan_for(request(), variants, here)
    _, warned = plan_for(request(), variants, here, margin_bytes=int(gib * GIB))
    assert (warned.precision, warned.dtypes, warned.spec) == (
        usual.precision,
        usual.dtypes,
        usual.spec,
    )
    assert (warned.placement.decode == "tiled") == (usual.placement.decode == "tiled")
    if warned.budget_bytes < usual.budget_bytes:
        assert max(warned.peak_bytes.values()) <= usual.budget_bytes - gib * GIB
        assert any("ran out here before" in reason for reason in warned.reasons)
    else:  # too little is left: then what another moment taught forbids nothing
        assert warned == usual


def test_a_margin_makes_more_blocks_stream_and_never_refuses(variants):
    here, asked = card("24GiB:sm89"), request(precision="bf16")
    counts = []
    for gib in (0, 2, 4, 8):
        _, found = plan_for(asked, variants, here, margin_bytes=gib * GIB)
        counts.append(len(found.placement.streamed))
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1]
    assert plan_for(asked, variants, here, margin_bytes=40 * GIB) == plan_for(asked, variants, here)


def test_the_ladder_pins_no_more_ram_than_a_plan_may(dev):
    here = card("12GiB:sm89", ram_gib=12)
    candidate = survey_for(request(precision="bf16"), [dev], here)[0]
    now = replace(
        plan_for(request(precision="bf16"), [dev], here)[1], placement=placement.Placement(keep=())
    )
    for _ in range(9):
        found = placement.step_down(now, "denoise", candidate)
        if found is None:
            break
        now = found.plan
        assert now.host_bytes <= placement.host_limit_now(here)
    assert now.placement.denoise == "sequential"


def test_a_small_limit_on_a_large_card_is_a_small_card(variants):
    found = survey_for(request(precision="nf4", vram_limit=8 * GIB), variants, card("80GiB:sm90"))[
        0
    ]
    assert found.verdict == "chosen" and max(found.plan.peak_bytes.values()) <= 8 * GIB


def test_what_would_pack_in_every_step_is_refused_with_a_reason(dev):
    found = survey_for(request(precision="nf4", offload="sequential"), [dev], card("8GiB:sm89"))[0]
    assert found.plan is None and "packing again" in found.why


def test_guidance_that_does_nothing_or_is_missing_is_refused(checkpoint):
    schnell = {**checkpoint.components["transformer"].config, "guidance_embeds": False}
    part = replace(checkpoint.components["transformer"], config=schnell)
    without = replace(checkpoint, components={**checkpoint.components, "transformer": part})
    with pytest.raises(UsageError, match="without effect"):
        check_abilities(tiny(guidance=3.5).request, without)
    with pytest.raises(UsageError, match="needs a guidance"):
        check_abilities(tiny(guidance=None).request, checkpoint)
    check_abilities(tiny(guidance=None).request, without)
    check_abilities(tiny(guidance=0.0).request, checkpoint)


def test_more_pixels_steps_and_tokens_never_need_less(dev):
    dtypes = dict.fromkeys(dev.components, "bfloat16")
    for a, b, c in product((256, 1024), (4, 28), (64, 256)):
        low = cost_of(request(image_size=a, steps=b, text_tokens=c), dev, dtypes)
        high = cost_of(request(image_size=a + 256, steps=b + 4, text_tokens=c + 64), dev, dtypes)
        assert low.encode_bytes < high.encode_bytes and low.tables_bytes < high.tables_bytes
        assert low.denoise_bytes <= high.denoise_bytes and low.decode_bytes < high.decode_bytes


# --- precision


@pytest.mark.parametrize("to", BAKEABLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_price_of_a_precision_is_that_of_its_files(to, dtype, checkpoint, baked):
    stored = inspect(baked(to, **BAKED[to]))
    dtypes = dict.fromkeys(checkpoint.components, dtype)
    spec = QuantSpec(to, **BAKED[to])
    one, other = cost_of(tiny(), checkpoint, dtypes, spec), cost_of(tiny(), stored, dtypes)
    assert replace(one, stored_bytes=0) == replace(other, stored_bytes=0)
    _, found = plan_for(tiny(), [stored], machine(24))
    assert (found.precision, found.spec) == (to, None) and any(
        "stored" in reason for reason in found.reasons
    )
    assert plan_for(tiny(precision=to), [stored], machine(24))[1] == found


def test_a_precision_that_is_asked_for_is_packed_while_loading(dev):
    _, found = plan_for(request(precision="nf4"), [dev], machine(24))
    assert (found.precision, found.spec) == ("nf4", QuantSpec("nf4", "nf4"))
    assert any("flux quantize" in reason for reason in found.reasons)
    assert json.loads(json.dumps(found.to_json()))["spec"]["to"] == "nf4"


@pytest.mark.parametrize(
    "asked, there",
    [("bf16", "nf4"), ("fp32", "int8"), ("fp16", "fp8"), ("nf4", "fp8"), ("fp8", "nf4")],
)
def test_a_precision_that_the_weights_do_not_have_is_refused(asked, there, baked, capsys):
    folder = baked(there, **BAKED[there])
    result = call(
        capsys, "generate", "x", "-p", "tiny", "-m", str(folder), "--precision", asked, "-q"
    )
    message = assert_failed(result, ExitCode.USAGE)
    assert asked in message and there in message and "--precision auto" in message


def test_what_was_baked_is_found_and_taken_before_packing(baked, monkeypatch):
    paths.baked_folder().mkdir(parents=True)
    for to in BAKEABLE:
        (paths.baked_folder() / f"tiny-{to}").symlink_to(baked(to, **BAKED[to]))
    found = models.list_checkpoints(tiny(), Path(), console.say)
    stored = [each.components["transformer"].precision for each in found]
    assert sorted(stored) == sorted(["", *BAKEABLE])
    here = machine(24, "cpu", bf16=False)
    for precision in BAKEABLE:
        checkpoint, made = plan_for(tiny(precision=precision), found, here)
        assert (checkpoint.components["transformer"].precision, made.spec) == (precision, None)
    assert plan_for(tiny(), found, here)[1].precision == "fp32"


def test_a_damaged_variant_is_left_out_and_named(tiny_folder, capsys):
    broken = paths.baked_folder() / "tiny-nf4"
    (broken / "transformer").mkdir(parents=True)
    (broken / "flux-manifest.json").write_text(
        json.dumps({"model": "bundled/tiny", "recipe": {"to": "nf4"}})
    )
    assert len(models.list_checkpoints(tiny(), Path(), console.say)) == 1
    assert "left out" in capsys.readouterr().err


def test_known_shapes_are_those_of_the_model_classes(dev):
    """What is planned without a download: names and shapes as the real classes have them."""
    from quant.expected import check_keys
    from tests.support.helpers import expected_shapes

    schnell = read_known_shapes("black-forest-labs/FLUX.1-schnell")
    for checkpoint in (dev, schnell, read_known_shapes("black-forest-labs/FLUX.1-Krea-dev")):
        for part in checkpoint.components.values():
            expected, found = expected_shapes(part)
            check_keys(part.name, part.folder, expected=expected, found=found)
    assert sum(part.numel for part in dev.components.values()) == 16_870_599_139
    assert not schnell.takes_guidance and read_known_shapes("somebody/else") is None


if __name__ == "__main__":
    GOLDEN.write_text(golden(bake_all(read_known_shapes(DEV))))
