"""The plan's bytes against counted ones: live storages of the real engine, for the full-size model
on FakeTensors.

The counter knows nothing of planner.py, placement.py or costs.py.
"""

from pathlib import Path

import pytest

from benchmarks.counting import Counter, pretend_baked
from fluxcli.engine.cards import describe_card
from fluxcli.plan.placement import GIB, PHASES, MemoryPlan
from quant.checkpoint import Checkpoint, inspect
from quant.spec import ROTATED, QuantSpec
from tests.support.helpers import BAKED, order, plan_for, tiny
from tests.support.simulate import blocked, every_placement, follow, full_size, on_card

MIB = 2**20
BAKES = {"nf4": QuantSpec("nf4", "nf4"), "fp8": QuantSpec("fp8")}
BAKES |= {scheme: QuantSpec(scheme, "int8") for scheme in ROTATED}
OFTEN = [("12GiB:sm86", {"precision": "int8"})]  # card, request
COMBINATIONS = [
    *OFTEN,
    ("6GiB:sm89", {"precision": "bf16", "image_size": 1536}),
    ("8GiB:sm89", {"gguf": "Q8_0", "image_size": 512}),
    ("8GiB:sm89", {"precision": "fp8", "image_size": 1536, "aspect_ratio": "16:9"}),
    ("16GiB:sm89", {"precision": "bf16", "image_size": 1344, "aspect_ratio": "4:7"}),
    ("6GiB:sm89", {"precision": "nf4", "offload": "sequential"}),
    ("24GiB:sm89", {"precision": "bf16"}),
    ("12GiB:sm89", {"precision": "bf16"}),
    ("8GiB:sm86", {"precision": "bf16", "text_tokens": 256}),
    ("24GiB:sm75", {"precision": "fp16"}),
    ("12GiB:sm89", {"precision": "fp8"}),
    ("10GiB:sm86", {"precision": "w6a8"}),
    ("8GiB:sm89", {"precision": "w4a8"}),
    ("8GiB:sm89", {"precision": "nf4"}),
    ("6GiB:sm89", {"precision": "nf4", "image_size": 1536}),
]


def planned_and_counted(
    card: str, wanted: dict, monkeypatch: pytest.MonkeyPatch
) -> tuple[MemoryPlan, Counter]:
    """The plan of a request on a card, and the counter after two pictures of it."""
    with full_size(monkeypatch) as dev:
        kind, wanted = (
            wanted.get("gguf"),
            {key: value for key, value in wanted.items() if key != "gguf"},
        )
        request = order("x", steps=2, seed=1, **wanted)
        precision = request.resources.precision
        folders = [pretend_baked(dev, BAKES[precision]) if precision in BAKES else dev]
        folders = [blocked(dev, kind)] if kind else folders
        here = describe_card(card)
        checkpoint, made = plan_for(request, folders, here)
        counter, engine = Counter(), on_card(checkpoint, made, here)
        follow(engine, request, counter)
        # with the VAE there, or loaded anew
        follow(engine, order("x", steps=2, seed=2, **wanted), counter)
    return made, counter


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        *OFTEN,
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in COMBINATIONS
            if each not in OFTEN
        ),
    ],
    ids=str,
)
def test_the_plan_is_within_five_percent_of_what_is_counted(card, wanted, monkeypatch):
    made, counter = planned_and_counted(card, wanted, monkeypatch)
    for phase in PHASES:
        predicted = made.live_bytes[phase]
        slack = 24 * MIB  # of small things, where nearly everything is evicted
        assert counter.peaks[phase] <= predicted * 1.01 + slack, (
            phase,
            made.placement.level(phase),
        )
        assert predicted <= counter.peaks[phase] * 1.05 + slack, (
            phase,
            made.placement.level(phase),
        )
    arena = made.host_bytes
    # beside it one tensor and its block
    assert arena <= counter.host + MIB and counter.host < arena + 600 * MIB


# --- under a budget


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.mark.parametrize(
    "precision",
    [
        "nf4",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("fp32", "fp8", "int8")),
    ],
)
def test_under_its_budget_the_engine_completes_every_placement_that_was_planned(
    precision, checkpoint, baked, monkeypatch
):
    """Every placement, from all in memory to everything passing through: the same pixels."""
    if precision in BAKED:
        checkpoint = inspect(baked(precision, **BAKED[precision]))
    every_placement(tiny(precision=precision), checkpoint, monkeypatch, step_kib=128)


if __name__ == "__main__":  # the table of docs/memory.md
    for name, asked in COMBINATIONS:
        with pytest.MonkeyPatch.context() as patch:
            plan_, counted = planned_and_counted(name, asked, patch)
        cells = [
            f"{plan_.live_bytes[phase] / GIB:.2f} / {counted.peaks[phase] / GIB:.2f}"
            for phase in PHASES
        ]
        what = ", ".join(f"{key} {value}" for key, value in asked.items() if key != "precision")
        blocks = plan_.placement.level("denoise")
        print(
            f"| {name} | {asked.get('precision', '')} {what} | {blocks} | "
            + " | ".join(cells)
            + " |",
            flush=True,
        )
