"""The card that is not there sees what it is for: each fault is made, and must be found.

A detector that sees nothing would let everything pass.
"""

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fluxcli.engine import denoise, pinned
from fluxcli.engine.streaming import CudaBus
from fluxcli.errors import NotFinite
from quant import linear
from quant.checkpoint import inspect
from tests.support.card import Card, MixedDevices, has_kernels
from tests.support.card_demands import Refused
from tests.support.card_driver import installed
from tests.support.helpers import tiny
from tests.support.on_card import OnCardRun, draw_on_card

DEVICE = "cuda:0"


@pytest.fixture
def card():
    with installed(Card()) as card:
        yield card


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def pinned_ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, pin_memory=True)


# --- devices


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.add_(here),
        functional.linear,
        lambda here, there: functional.scaled_dot_product_attention(here, here, there),
    ],
)
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_meet(mix, other):
    with installed(Card(cards=2)):
        with pytest.raises(MixedDevices, match="same device"):
            mix(ones(4, 4), ones(4, 4, device=other))


def test_a_tensor_without_dimensions_and_an_index_may_be_of_the_host(card):
    found = ones(4) * torch.tensor(2.0)
    assert found.is_cuda and found.tolist() == [2] * 4
    card.take_counts()
    assert ones(4)[torch.tensor([0, 1])].shape == (2,)
    assert sum(card.take_counts().waits.values()) == 1


def test_a_copy_between_two_cards_is_a_problem_and_values_are_right():
    with installed(Card(cards=2)) as card:
        there = ones(3).to("cuda:1")
        assert there.device == torch.device("cuda:1") and there.tolist() == [1] * 3
        assert "from cuda:0 to cuda:1" in card.problems[0]


def test_a_card_that_is_not_among_them_does_not_answer():
    with installed(Card(cards=1)):
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.get_device_properties(1)


# --- where the host waits


@pytest.mark.parametrize(
    "ask",
    [
        lambda on_card: on_card.sum().item(),
        lambda on_card: bool(on_card.all()),
        lambda on_card: float(on_card[0]),
        lambda on_card: on_card.tolist(),
        lambda on_card: on_card.cpu(),
        lambda on_card: on_card[on_card > 0],
        lambda on_card: on_card.nonzero(),
        lambda on_card: torch.equal(on_card, on_card),
        lambda on_card: torch.empty(4).copy_(on_card),
        lambda on_card: on_card.copy_(torch.ones(4), non_blocking=True),
        lambda on_card: on_card.copy_(pinned_ones(4)),
        lambda on_card: on_card + torch.tensor([1, 2, 3, 4], device=DEVICE),
        lambda on_card: on_card + torch.ones(4).to(DEVICE),
        lambda on_card: torch.cuda.synchronize(),
        lambda on_card: torch.cuda.current_stream().synchronize(),
        lambda on_card: torch.cuda.current_stream().record_event().synchronize(),
    ],
)
def test_the_host_waits(ask, card):
    on_card = ones(4)
    card.take_counts()
    ask(on_card)
    assert sum(card.take_counts().waits.values()) == 1


def test_the_host_does_not_wait(card):
    on_card = ones(4, 4)
    card.take_counts()
    on_card.mul_(2).add_(torch.zeros(4, device=DEVICE))
    on_card.copy_(pinned_ones(4, 4), non_blocking=True)
    (on_card @ on_card).to(torch.float32)
    counts = card.take_counts()
    assert not counts.waits
    assert counts.launches["mm"] == 1 and counts.moved_bytes["mm"] == 3 * 16 * 2


# --- what kernels demand


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: eight_bit("int8")(ones(1, 64)), ""),
        (lambda: eight_bit("fp8")(ones(5, 64)), ""),
        (lambda: eight_bit("fp8").multiply(fp8(32, 64), scales(32, 4)[:, :1], BF16), "contiguous"),
        (lambda: scaled_mm(fp8(32, 64), fp8(64, 64)), "column-major"),
        (lambda: scaled_mm(fp8(64, 32).T, fp8(64, 64).T), "row-major"),
        (lambda: scaled_mm(fp8(32, 24), fp8(64, 24).T), "multiples of 16"),
        (
            lambda: scaled_mm(fp8(32, 64), fp8(64, 64).T, out_dtype=torch.float16),
            "in torch.float16",
        ),
        (lambda: torch._int_mm(ones(16, 64).char(), ones(64, 64).char().T), "greater than 16"),
        (lambda: torch._int_mm(ones(32, 60).char(), ones(64, 60).char().T), "multiples of 8"),
        (lambda: torch._int_mm(ones(32, 64).char(), ones(64, 64).char()), "layout"),
        (lambda: dequantize_4bit(scales(1, 8)[0, ::2]), "not contiguous"),
        (lambda: dequantize_4bit(scales(1, 4)[0].bfloat16()), "absmax torch.bfloat16"),
    ],
)
def test_operands_that_cuda_refuses(call, says, card):
    with pytest.raises(Refused, match=says) if says else contextlib.nullcontext():
        call()


def test_older_cards_have_no_bfloat16_convolution_and_no_fp8():
    with installed(Card(sm=(7, 5))):
        functional.conv2d(ones(1, 1, 4, 4).half(), ones(1, 1, 3, 3).half())
        with pytest.raises(Refused, match="unable to find an engine"):
            functional.conv2d(ones(1, 1, 4, 4), ones(1, 1, 3, 3))
        with pytest.raises(Refused, match="sm75"):
            scaled_mm(fp8(32, 64), fp8(64, 64).T)


def test_without_a_row_wise_kernel_one_scale_for_a_tensor_is_taken():
    with installed(Card(rowwise=False)):
        with pytest.raises(Refused, match="Rowwise scaling is not currently supported"):
            scaled_mm(fp8(32, 64), fp8(64, 64).T)
        one = ones(1, dtype=torch.float32)
        assert scaled_mm(fp8(32, 64), fp8(64, 64).T, scale_a=one, scale_b=one).shape == (32, 64)


@pytest.mark.parametrize(
    "sm, built_for, runs",
    [
        ((8, 9), ["sm_75", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
    ],
)
def test_a_torch_built_for_other_cards_has_no_kernels(sm, built_for, runs):
    assert has_kernels(sm, built_for) == runs
    with installed(Card(sm=sm, built_for=tuple(built_for))):
        with contextlib.nullcontext() if runs else pytest.raises(RuntimeError, match="no kernel"):
            torch.zeros(1, device=DEVICE)


BF16 = torch.bfloat16


def fp8(*shape: int) -> torch.Tensor:
    return ones(*shape).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    return ones(*shape, dtype=torch.float32)


def scaled_mm(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    """A row-wise product, as `options` change it."""
    default = {"scale_a": scales(len(a), 1), "scale_b": scales(1, b.shape[1]), "out_dtype": BF16}
    return torch._scaled_mm(a, b, **default | options)


def eight_bit(scheme: str) -> linear.QuantizedLinear:
    dtype = torch.int8 if scheme == "int8" else torch.float8_e4m3fn
    part = {"": ones(64, 64).to(dtype), "_scale": scales(64)}
    return linear.make_linear(scheme, [part], shapes=[(64, 64)], bias=None, arithmetic=True)


def dequantize_4bit(absmax: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(128, 1, dtype=torch.uint8, device=DEVICE)
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    return operator(codes, absmax, 64, "nf4", (16, 16), BF16)


# --- streams


def copy_aside(card: Card, target: torch.Tensor, source: torch.Tensor) -> object:
    """Copy on another stream; its event."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    return side.record_event()


def test_a_copy_that_is_waited_for_is_no_race(card):
    target, source = torch.zeros(4, device=DEVICE), pinned_ones(4)
    torch.cuda.synchronize()
    copied = copy_aside(card, target, source)
    torch.cuda.current_stream().wait_event(copied)
    assert (target + 0).tolist() == [1] * 4
    assert card.problems == []


def test_a_copy_that_nobody_waits_for_is_a_race_and_comes_too_late(card):
    target, source = torch.zeros(4, device=DEVICE), pinned_ones(4)
    torch.cuda.synchronize()
    copy_aside(card, target, source)
    assert (target + 0).tolist() == [0] * 4
    assert "race, read after write" in card.problems[0]


def test_a_copy_over_what_is_still_read_is_a_race(card):
    target, source = torch.zeros(4, device=DEVICE), pinned_ones(4)
    torch.cuda.synchronize()
    target + 1
    copied = copy_aside(card, target, source)
    assert "race, write after read" in card.problems[0]
    copied.synchronize()


def test_two_copies_in_no_order_are_a_race(card):
    target, source = torch.zeros(4, device=DEVICE), pinned_ones(4)
    torch.cuda.synchronize()
    copy_aside(card, target, source)
    copy_aside(card, target, source)
    assert "race, write after write" in card.problems[0]


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_freed_under_a_copy_is_a_race_unless_the_allocator_knows(recorded, card):
    target, source = torch.zeros(4, device=DEVICE), pinned_ones(4)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    if recorded:
        target.record_stream(side)
    del target
    assert len(card.problems) == (not recorded)
    assert recorded or "race, freed while in use" in card.problems[0]


def test_memory_of_the_host_that_is_changed_too_early_changes_values(card):
    target, source = torch.zeros(4, device=DEVICE), pinned_ones(4)
    target.copy_(source, non_blocking=True)
    source.zero_()
    assert target.tolist() == [0] * 4


def test_registered_memory_that_is_freed_under_a_copy_is_a_race(card):
    arena, target = torch.ones(4), torch.zeros(4, device=DEVICE)
    torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0)
    target.copy_(arena, non_blocking=True)
    del arena
    target + 1
    assert "race: the host's memory was freed under a copy" in card.problems[0]


def test_a_copy_out_of_two_pieces_of_pinned_memory_is_a_problem(card):
    arena, target = torch.ones(1024), torch.zeros(1024, device=DEVICE)
    half = arena.nbytes // 2
    for piece in range(2):
        torch.cuda.cudart().cudaHostRegister(arena.data_ptr() + piece * half, half, 0)
    target[:512].copy_(arena[:512], non_blocking=True)
    assert card.problems == []
    target.copy_(arena, non_blocking=True)
    assert "leaves the memory that was pinned in one piece" in card.problems[0]
    torch.cuda.synchronize()


# --- the driver


def test_a_refused_pin_is_left_for_the_next_kernel():
    with installed(Card(pinnable_bytes=100)):
        assert torch.cuda.cudart().cudaHostRegister(1, 200, 0) != 0
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.zeros(1, device=DEVICE)
        torch.zeros(1, device=DEVICE)


def test_what_stays_pinned_is_told(card):
    torch.cuda.cudart().cudaHostRegister(1 << 40, 200, 0)
    assert card.pinned == {1 << 40: 200}
    assert torch.cuda.cudart().cudaHostUnregister(1 << 40) == 0 and card.pinned == {}


def test_memory_ends_where_it_is_told_to(card):
    torch.cuda.set_per_process_memory_fraction(0.5)
    kept = torch.empty(8 << 30, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(5 << 30, dtype=torch.uint8, device=DEVICE)
    del kept
    torch.empty(9 << 30, dtype=torch.uint8, device=DEVICE)
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.max_memory_allocated() == 9 << 30


def test_memory_that_nobody_has_written_is_garbage(card):
    assert torch.empty(4, device=DEVICE).isnan().all()


def test_a_launch_fails_where_it_is_told_to(card):
    card.failing = [card.launched[0] + 2]
    torch.zeros(1, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1, device=DEVICE)
    torch.zeros(1, device=DEVICE)


def test_nothing_of_the_card_stays_behind():
    available = torch.cuda.is_available()
    with installed(Card()) as card:
        kept = weakref.ref(ones(4))
    gc.collect()
    assert kept() is None and torch.cuda.is_available() == available
    assert card.memory[0].live_bytes == 0


# --- faults of the engine


def copy_without_waiting(self: CudaBus, slot: int, target: object, source: object) -> None:
    with torch.cuda.stream(self._side):
        target.copy_(source, non_blocking=True)
    target.record_stream(self._side)
    self._copied[slot].record(self._side)


def copy_blocking(self: CudaBus, slot: int, target: object, source: object) -> None:
    target.copy_(source)


def look_at_step(*arguments: object, **options: object) -> torch.Tensor:
    tokens = TAKE_STEP(*arguments, **options)
    assert bool(tokens.isfinite().all())
    return tokens


def make_inputs_on_host(*arguments: object, **options: object) -> dict:
    return {name: tensor.cpu() for name, tensor in MAKE_INPUTS(*arguments, **options).items()}


TAKE_STEP = denoise.take_step
MAKE_INPUTS = denoise._make_inputs


FAULTS = {  # what is put in the place of what, and what is seen then
    "nobody waits for the copy": (CudaBus, "wait", lambda self, slot: None),
    "the copy does not wait for the block": (CudaBus, "copy", copy_without_waiting),
    "the end of a block is not recorded": (CudaBus, "computed", lambda self, slot: None),
}


def draw_streamed(tiny_folder: Path, card: Card | None = None) -> OnCardRun:
    order = tiny(precision="bf16", offload="stream", device="cuda", steps=1)
    return draw_on_card(order, inspect(tiny_folder), card)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_bus_is_a_race(fault, tiny_folder, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    card = Card()
    with contextlib.suppress(NotFinite):  # what was not copied yet is garbage
        draw_streamed(tiny_folder, card)
    assert "race, " in card.problems[0]


@pytest.mark.parametrize(
    "module, name, fault",
    [(CudaBus, "copy", copy_blocking), (denoise, "take_step", look_at_step)],
)
def test_a_step_that_waits_is_seen(module, name, fault, tiny_folder, monkeypatch):
    monkeypatch.setattr(module, name, fault)
    assert draw_streamed(tiny_folder).waits()  # else there are none, see test_on_card.py


def test_inputs_that_stay_on_the_host_are_seen(tiny_folder, monkeypatch):
    monkeypatch.setattr(denoise, "_make_inputs", make_inputs_on_host)
    with pytest.raises(MixedDevices, match="same device"):
        draw_streamed(tiny_folder)


def test_an_arena_that_stays_pinned_is_seen(tiny_folder, monkeypatch):
    monkeypatch.setattr(pinned, "_unpin", lambda *_: None)
    assert "stay pinned" in draw_streamed(tiny_folder).card.problems[0]


# --- what torch does in place, and the time of events


def test_a_module_goes_to_the_card_and_back_with_its_values(card):
    layer = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    expected = layer.weight.clone()
    kept = layer.weight
    assert layer.to(DEVICE).weight.is_cuda
    assert torch.equal(layer.weight.cpu(), expected)
    layer.weight.data = torch.ones(4, 4, device=DEVICE)
    assert layer(ones(1, 4, dtype=torch.float32)).cpu().tolist() == [[4.0] * 4]
    layer.weight.data = expected
    assert kept is layer.weight and not kept.is_cuda and torch.equal(kept, expected)


def test_events_tell_a_time_when_they_are_reached_and_made_for_it(card):
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    ones(4).add_(1)
    ended.record()
    with pytest.raises(torch.AcceleratorError, match="not ready"):
        began.elapsed_time(ended)
    ended.synchronize()
    assert began.elapsed_time(ended) > 0
    with pytest.raises(RuntimeError, match="timing"):
        began.elapsed_time(torch.cuda.Event())
