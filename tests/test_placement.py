"""Wherever blocks are, the result is that of all on the device, and copies run ahead."""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.counting import CARD, Counter
from fluxcli.engine import modulation
from fluxcli.engine import streaming as placement
from fluxcli.engine.blocks import single_block
from fluxcli.engine.components import Components
from fluxcli.engine.loader import LoadedComponent
from fluxcli.engine.streaming import Bus, load_component
from fluxcli.plan import costs
from fluxcli.plan.placement import SIXTEEN_BIT_LINES, Placement
from quant.checkpoint import Component, inspect
from quant.single_file import assemble_checkpoint, inspect_transformer
from quant.spec import QuantSpec, is_modulation
from tests.support.helpers import BAKED, engine_of, tiny

PRECISIONS = ["fp32", "bf16", "nf4", "fp8", "int8"]
FILES = [
    "gguf Q4_0",
    "gguf Q6_K",
    "nf4 v2",
    "comfy scaled",
]  # single files, tests/support/exports.py; Q6_K beside F16
WAYS = {  # which blocks of seven pass through, and whether from an arena
    "none": ((), True),
    "two": ((2, 5), True),
    "four": ((1, 3, 4, 6), True),
    "odd": ((0, 2, 5), True),
    "all": (range(7), True),
    "two from their file": ((2, 5), False),
    "all from their file": (range(7), False),
}


@pytest.fixture(scope="module")
def component(tiny_folder: Path) -> Component:
    return inspect(tiny_folder).components["transformer"]


def place(
    component: Component,
    blocks: Sequence[int],
    *,
    arena: bool = True,
    dtype: torch.dtype = torch.float32,
    spec: QuantSpec | None = None,
) -> LoadedComponent:
    """The transformer on the simulated card, every modulation value 0.1."""
    names = [costs.block_names(component)[i] for i in blocks]
    options = {"dtype": dtype, "device": CARD, "spec": spec, "skip": is_modulation}
    model = load_component(component, blocks=names, from_arena=arena, **options)
    modulation.ModulationRow(model.module, component, dtype=dtype, device=CARD)._row.fill_(0.1)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> dict:
    made = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (1, 64, 64),
        "encoder_hidden_states": (1, 16, 128),
        "pooled_projections": (1, 96),
    }
    drawn = {
        name: torch.randn(shape, generator=made).to(CARD, dtype) for name, shape in shapes.items()
    }
    rest = {"timestep": torch.ones(1), "guidance": torch.ones(1), "img_ids": torch.zeros(64, 3)}
    return (
        drawn
        | {name: value.to(CARD, dtype) for name, value in rest.items()}
        | {"txt_ids": torch.zeros(16, 3)}
    )


@torch.no_grad()
def forward(model: LoadedComponent, given: dict) -> torch.Tensor:
    return model.module(**given, return_dict=False)[0]


@dataclass(frozen=True)
class Resident:
    """A precision's component, how it is loaded, and its result with all on the device."""

    component: Component
    dtype: torch.dtype
    spec: QuantSpec | None
    expected: torch.Tensor  # (1, 64, 64)


@pytest.fixture(scope="module")
def resident(
    component: Component, baked: Callable, exported: Callable
) -> Callable[[str], Resident]:
    """The resident result of a precision, computed once."""

    @functools.cache
    def of(precision: str) -> Resident:
        to, _, packs = precision.partition(" ")
        found, spec = component, None
        if precision in FILES:
            found = inspect_transformer(exported(precision)[0])
        elif packs:
            spec = QuantSpec(to, **BAKED[to])
        elif to in BAKED:
            found = inspect(baked(to, **BAKED[to])).components["transformer"]
        dtype = torch.bfloat16 if to == "bf16" else torch.float32
        model = place(found, (), dtype=dtype, spec=spec)
        return Resident(found, dtype, spec, forward(model, inputs(dtype)))

    return of


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "precision", [*PRECISIONS, *(f"{to} packed while loading" for to in BAKED), *FILES]
)
def test_every_placement_gives_the_resident_result_bit_for_bit(resident, precision, way):
    wanted = resident(precision)
    blocks, arena = WAYS[way]
    given = inputs(wanted.dtype)
    model = place(wanted.component, blocks, arena=arena, dtype=wanted.dtype, spec=wanted.spec)
    for _ in range(3):
        assert torch.equal(forward(model, given), wanted.expected)


# --- the order of copies


class Recorded(Bus):
    """A bus that writes down what happens, and copies at once or at the last moment allowed."""

    def __init__(self, *, late: bool) -> None:
        self.late, self.log, self._waiting = late, [], {}

    def copy(self, slot, target, source):
        assert slot not in self._waiting, "a slot was filled twice without use"
        self.log.append(("copy", slot))
        if self.late:
            target.fill_(0xFF)  # NaN until it is there
            self._waiting[slot] = (target, source)
        else:
            target.copy_(source)

    def wait(self, slot):
        self.log.append(("wait", slot))
        if slot in self._waiting:
            target, source = self._waiting.pop(slot)
            target.copy_(source)

    def computed(self, slot):
        self.log.append(("computed", slot))


@pytest.fixture(params=[False, True], ids=["copies at once", "copies at the last moment"])
def bus(request, monkeypatch) -> Iterator[Recorded]:
    recorded = Recorded(late=request.param)
    monkeypatch.setattr(placement, "make_bus", lambda *_: recorded)
    return recorded


def test_the_next_copy_begins_before_a_block_has_computed(component, bus):
    """For every wait but the first two.

    Its copy was begun before the streamed block before it was computed.
    """
    given = inputs()
    expected = forward(place(component, ()), given)
    model = place(component, (1, 3, 4, 6))
    for _ in range(3):
        assert torch.equal(forward(model, given), expected)
    waits = [n for n, (what, _) in enumerate(bus.log) if what == "wait"]
    assert len(waits) == 12
    for before, at in pairwise(waits):
        slot = bus.log[at][1]
        begun = max(n for n, entry in enumerate(bus.log[:at]) if entry == ("copy", slot))
        assert begun < bus.log.index(("computed", bus.log[before][1]), before)
    copies = [slot for what, slot in bus.log if what == "copy"]
    # each once a step, and two ahead
    assert len(copies) == 2 + 12 and copies.count(0) == copies.count(1)


def test_a_slot_is_filled_only_after_its_block_has_computed(component, bus):
    model = place(component, (0, 1, 2, 3, 4, 5))
    forward(model, inputs())
    free = {0: True, 1: True}
    for what, slot in bus.log:
        if what == "copy":
            assert free[slot]
            free[slot] = False
        elif what == "computed":
            free[slot] = True


def test_skipped_blocks_and_broken_forwards_do_no_harm(component, bus):
    """Step caches skip blocks; memory runs out in the middle of a forward."""
    given = inputs()
    expected = forward(place(component, ()), given)
    model = place(component, (1, 3, 4, 6))
    block, bus.late = model.module.single_transformer_blocks[2], False
    real = block.forward

    def broken(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("as if")

    block.forward = broken
    with pytest.raises(torch.OutOfMemoryError):
        forward(model, given)
    block.forward = lambda x, *_: x
    assert not torch.equal(forward(model, given), expected)
    block.forward = real
    bus._waiting.clear()
    assert torch.equal(forward(model, given), expected)


# --- memory


def test_streaming_allocates_nothing_after_it_is_set_up_and_leaves_nothing_behind(component):
    counter, counts = Counter(), {}
    with torch.no_grad(), counter:
        given = inputs()
        before = counter.live[True]
        for blocks in ((), (1, 3, 4, 6)):
            model, counts[blocks] = place(component, blocks), []
            for _ in range(4):
                made, peak = counter.allocations, counter.peaks.pop("", 0)
                forward(model, given)
                counts[blocks].append((counter.allocations - made, counter.live[True]))
                assert peak
            del model
            gc.collect()
            assert counter.live[True] == before
    assert (
        len({live for _, live in counts[()]}) == len({live for _, live in counts[1, 3, 4, 6]}) == 1
    )
    assert {made for made, _ in counts[()]} == {
        made for made, _ in counts[1, 3, 4, 6]
    }  # activations alone


@pytest.mark.parametrize("to", [None, *BAKED, *FILES])
def test_the_card_holds_two_slots_and_the_host_an_arena_of_the_blocks_size(
    component, tiny_folder, baked, exported, to, monkeypatch
):
    made = []
    real = placement.Conveyor.__init__
    monkeypatch.setattr(
        placement.Conveyor,
        "__init__",
        lambda self, *args: (made.append(self), real(self, *args))[1],
    )
    whole = (
        assemble_checkpoint(exported(to)[0], lambda _: tiny_folder)
        if to in FILES
        else inspect(tiny_folder)
    )
    if to in BAKED:
        whole = inspect(baked(to, **BAKED[to]))
    component = whole.components["transformer"]
    blocks = (0, 1, 2, 3)
    counter = Counter()
    with torch.no_grad(), counter:
        kept = place(component, (), dtype=torch.bfloat16)
        resident = counter.live[True]
        del kept
        gc.collect()
        model = place(component, blocks, dtype=torch.bfloat16)
        streamed = counter.live[True]
    workload = costs.make_workload(tiny().request)
    cost = costs.estimate_cost(
        workload, whole, dtypes=_all("bfloat16"), spec=None, lines=SIXTEEN_BIT_LINES
    )
    sizes = cost.blocks
    passing = [sizes[i].nbytes for i in blocks]
    padding = 40 * placement.ALIGNMENT * len(blocks)
    assert abs((resident - streamed) - (sum(passing) - 2 * max(passing))) < padding
    assert abs(made[0]._arena.nbytes - sum(passing)) < 4 * padding and model is not None


def _all(dtype: str) -> dict[str, str]:
    return dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"), dtype)


def test_sequential_blocks_hold_no_memory(component):
    counter = Counter()
    with torch.no_grad(), counter:
        model = place(component, range(7), arena=False)
        forward(model, inputs())
        gc.collect()
        held = [
            p
            for name, p in model.module.named_parameters()
            if "transformer_blocks" in name and not p.is_meta
        ]
    assert held == []
    whole = 4 * sum(weight.numel for weight in component.weights.values())
    assert counter.live[True] < whole / 4


# --- what is around it


def test_compiled_blocks_stream(component, monkeypatch):
    """The block's own forward is compiled, without a break; what streams stays outside of it."""
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    given = inputs()
    expected = forward(place(component, ()), given)
    kind = single_block()
    monkeypatch.setattr(
        kind, "forward", torch.compile(kind.forward, backend="eager", fullgraph=True)
    )
    model = place(component, (2, 3, 4, 6))
    for _ in range(2):
        assert torch.equal(forward(model, given), expected)


def test_what_the_driver_does_not_pin_streams_all_the_same_and_is_said(component, monkeypatch):
    monkeypatch.setattr(placement, "pin", lambda *_: False)
    given = inputs()
    model = place(component, (1, 3, 4, 6))
    assert model.unpinned_bytes > 0 and torch.equal(
        forward(model, given), forward(place(component, ()), given)
    )


def test_only_cuda_has_a_bus_of_its_own():
    for device in ("cpu", "mps", "xpu:0"):
        assert type(placement.make_bus(device, None)) is Bus


STREAMED = {"denoise": "streamed", "decode": "alone"}


@pytest.mark.parametrize(
    "loaded, first, then, placed, stays",
    [
        (False, STREAMED | {"streamed": (1, 2)}, {}, ("resident", ()), False),
        (True, STREAMED | {"streamed": (1, 2)}, {}, ("resident", ()), False),
        (
            True,
            STREAMED | {"streamed": (1, 2)},
            STREAMED | {"streamed": (1,)},
            ("streamed", (1, 2)),
            True,
        ),
        (
            False,
            STREAMED | {"streamed": (1, 2)},
            STREAMED | {"streamed": (1,)},
            ("streamed", (1,)),
            False,
        ),
        (
            True,
            STREAMED | {"streamed": (1,)},
            STREAMED | {"streamed": (1, 2)},
            ("streamed", (1, 2)),
            False,
        ),
    ],
)
def test_a_placement_goes_down_when_it_must_and_up_when_it_can(
    tiny_folder, loaded, first, then, placed, stays
):
    engine = engine_of(inspect(tiny_folder))
    before = replace(engine.plan, placement=Placement(**first))
    components = Components(engine.checkpoint, before, engine.hardware)
    if loaded:
        components.loaded["transformer"] = LoadedComponent(nn.Module(), {})
    components.adopt(replace(engine.plan, placement=Placement(**then)), engine.hardware)
    now = components.plan.placement
    assert (now.denoise, now.streamed) == placed
    assert ("transformer" in components.loaded) == stays
