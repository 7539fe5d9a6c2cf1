"""The plan's bytes against what torch's allocator reserves: the real engine at full size on
FakeTensors, under the plan's own cap, with the workspaces of cuDNN and cuBLAS.

The allocator knows nothing of planner.py, placement.py or costs.py. `python -m tests.test_reserved`
prints the table of docs/memory.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.counting import pretend_baked
from fluxcli.engine import classes
from fluxcli.engine.cards import describe_card
from fluxcli.engine.components import Components
from fluxcli.engine.engine import PHASES, Engine, EnginePhase
from fluxcli.engine.picture import Picture
from fluxcli.events import Event, Notice
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware
from fluxcli.plan.placement import GIB, MemoryPlan, make_candidate
from quant import linear
from quant.checkpoint import Checkpoint
from tests.support.allocator import Allocator, ExpandableAllocator
from tests.support.helpers import order, picture_of, plan_for
from tests.support.simulate import full_size
from tests.support.simulate_cuda import CUDA_CARD, CardMemory, pretend_cuda
from tests.test_memory import BAKES

MIB = 2**20
COMBINATIONS: list[tuple[str, dict[str, Any]]] = [  # those of docs/memory.md
    ("24GiB:sm89", {"precision": "bf16"}),
    ("16GiB:sm89", {"precision": "bf16", "image_size": 1344, "aspect_ratio": "4:7"}),
    ("12GiB:sm89", {"precision": "bf16"}),
    ("8GiB:sm86", {"precision": "bf16", "text_tokens": 256}),
    ("6GiB:sm89", {"precision": "bf16", "image_size": 1536}),
    ("24GiB:sm75", {"precision": "fp16"}),
    ("12GiB:sm89", {"precision": "fp8"}),
    ("8GiB:sm89", {"precision": "fp8", "image_size": 1536, "aspect_ratio": "16:9"}),
    ("10GiB:sm86", {"precision": "w6a8"}),
    ("8GiB:sm89", {"precision": "w4a8"}),
    ("8GiB:sm89", {"precision": "nf4"}),
    ("6GiB:sm89", {"precision": "nf4", "image_size": 1536}),
    ("6GiB:sm89", {"precision": "nf4", "offload": "sequential"}),
    ("12GiB:sm86", {"precision": "int8"}),
]
OFTEN = [("8GiB:sm89", {"precision": "nf4"}, False), ("12GiB:sm89", {"precision": "bf16"}, True)]
RARELY = [
    pytest.param(*each, expandable, marks=pytest.mark.exhaustive)
    for each in COMBINATIONS
    for expandable in (False, True)
    if (*each, expandable) not in OFTEN
]


@dataclass
class Simulated:
    """Pictures that were drawn on a simulated card, and what they took."""

    checkpoint: Checkpoint
    hardware: Hardware
    plan: MemoryPlan
    again: MemoryPlan  # for the same picture, made after the last one, with all that stayed loaded
    engine: Engine
    memory: CardMemory
    events: list[Event]

    wanted: dict[str, Any]

    @property
    def workspace_bytes(self) -> int:
        """What the plan has for cuDNN in decode."""
        plan = self.plan
        candidate = make_candidate(
            make_workload(order("x", **self.wanted).request),
            self.checkpoint,
            self.hardware,
            precision=plan.precision,
            spec=plan.spec,
            dtypes=plan.dtypes,
        )
        if plan.placement.decode == "tiled":
            return candidate.cost.workspace_tiled_bytes
        return candidate.cost.workspace_bytes


def draw(
    card: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, expandable: bool
) -> Simulated:
    """Two pictures of two prompts, and after them a second one of the last prompt."""
    for load in (classes.transformer, classes.single_block, classes.vae, classes.clip, classes.t5):
        load()  # what imports while it is counted holds tensors
    with full_size(monkeypatch) as dev:
        asked = order("x", steps=2, seed=1, **wanted)
        precision = asked.resources.precision
        folder = pretend_baked(dev, BAKES[precision]) if precision in BAKES else dev
        hardware = replace(describe_card(card), expandable=expandable)
        checkpoint, plan = plan_for(asked, [folder], hardware)
        for scheme, ways in linear.WAYS.items():
            way = linear.Multiplication(ways[0])
            monkeypatch.setitem(linear.PROBED, (scheme, CUDA_CARD), way)
        kind = ExpandableAllocator if expandable else Allocator
        memory = CardMemory(kind(plan.budget_bytes - CONTEXT_BYTES))
        pretend_cuda(monkeypatch, memory.allocator, hardware.total_bytes)
        phases = [replace(phase, run=partial(_tell, memory, phase)) for phase in PHASES]
        engine = Engine(checkpoint, plan, hardware, phases=phases)
        events: list[Event] = []
        with torch.no_grad(), memory:
            for prompt, seed in (("one", 1), ("two", 2), ("two", 3)):
                picture = picture_of(engine, order(prompt, steps=2, seed=seed, **wanted))
                events += engine.draw([picture])
        free_bytes = torch.cuda.mem_get_info(0)[0] + torch.cuda.memory_reserved(0)
        now = replace(hardware, free_bytes=free_bytes)
        again = plan_for(asked, [folder], now)[1]
    return Simulated(
        checkpoint=checkpoint,
        hardware=hardware,
        plan=plan,
        again=again,
        engine=engine,
        memory=memory,
        events=events,
        wanted=wanted,
    )


def _tell(
    memory: CardMemory, phase: EnginePhase, components: Components, pictures: Sequence[Picture]
) -> Iterator[Event]:
    """A phase, of whose beginning the card's memory is told: with the first event at the latest.

    Before the first event of `condition` the encoder is still there, which leaves for it.
    """
    if phase.one_by_one:
        memory.phase = phase.name
    for event in phase.run(components, pictures):
        memory.phase = phase.name
        yield event


@pytest.mark.parametrize(("card", "wanted", "expandable"), [*OFTEN, *RARELY], ids=str)
def test_what_is_reserved_stays_below_the_plan(card, wanted, expandable, monkeypatch):
    check(draw(card, wanted, monkeypatch, expandable=expandable))


def check(done: Simulated) -> None:
    """No placement and no plan of cuDNN's was lost, and nobody reserved more than was planned."""
    plan = done.plan
    memory = done.memory
    assert not [event for event in done.events if isinstance(event, Notice)]
    assert plan.placement == done.engine.plan.placement and not done.engine.out_of_memory
    assert memory.lost_plans == 0
    for phase in plan.peak_bytes:
        planned_bytes = plan.peak_bytes[phase] - CONTEXT_BYTES
        assert memory.reserved_bytes[phase] <= planned_bytes, phase
        live_bytes = plan.live_bytes[phase]
        if phase == "decode":
            live_bytes += done.workspace_bytes
        assert memory.live_bytes[phase] <= live_bytes * 1.01 + 24 * MIB, phase
        assert live_bytes < planned_bytes <= live_bytes * 1.08 + 300 * MIB, phase
    # What stayed in the cache is no other program's.
    assert done.again.placement == plan.placement


def describe(card: str, wanted: dict[str, Any], done: Simulated) -> str:
    """A row of the table of docs/memory.md, with planned, live and reserved GiB of each phase."""
    plan = done.plan
    what = [f"{key} {value}" for key, value in wanted.items() if key != "precision"]
    cells = [card, f"{wanted['precision']} {', '.join(what)}".strip()]
    cells.append("grow" if done.hardware.expandable else "fixed")
    cells.append(f"{plan.placement.level('denoise')}, {plan.placement.decode}")
    for phase in PHASES:
        sizes = (
            plan.peak_bytes[phase.name] - CONTEXT_BYTES,
            done.memory.live_bytes[phase.name],
            done.memory.reserved_bytes[phase.name],
        )
        cells.append(" / ".join(f"{size / GIB:.2f}" for size in sizes))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name, asked in COMBINATIONS:
        for may_grow in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                drawn = draw(name, asked, patch, expandable=may_grow)
            print(describe(name, asked, drawn), flush=True)
            check(drawn)
