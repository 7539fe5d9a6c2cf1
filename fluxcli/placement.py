"""Where a module's blocks are while it computes: on the device, or passing through it one after the other.

Streamed blocks lie in one pinned arena of exactly their size and come through two buffers on the device: while a block
computes, the next one is copied on a stream of its own. Sequential blocks are read from their file for every forward
and dropped after it: no memory is held, on the device or the host. Knows modules and streams, nothing of plans; sizes
are in bytes. On the CPU and on devices without streams of our own the copies are plain ones.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fluxcli.loader import Filler
from quant.lazy import nn, torch

ALIGNMENT = 256  # of tensors in a buffer: what every kernel can load from
SLOTS = 2


class Bus:
    """Copies into the slots of a device; here at once, so that there is nothing to wait for."""

    def copy(self, slot: int, target: "torch.Tensor", source: "torch.Tensor") -> None:
        """Begin to copy, once what was computed with the slot is done."""
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """Make what is computed from now on wait for the slot's copy."""

    def computed(self, slot: int) -> None:
        """What was computed so far was the last that needs the slot's content."""


class CudaBus(Bus):
    """Copies on a side stream; events, never the host, keep the order."""

    def __init__(self, device: str) -> None:
        self._side, self._main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        self._copied = [torch.cuda.Event() for _ in range(SLOTS)]
        self._computed = [torch.cuda.Event() for _ in range(SLOTS)]

    def copy(self, slot: int, target: "torch.Tensor", source: "torch.Tensor") -> None:
        self._side.wait_event(self._computed[slot])  # no wait before the first record
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        target.record_stream(self._side)  # the buffer may be freed while a copy is under way
        self._copied[slot].record(self._side)

    def wait(self, slot: int) -> None:
        self._main.wait_event(self._copied[slot])

    def computed(self, slot: int) -> None:
        self._computed[slot].record(self._main)


def bus_of(device: str) -> Bus:
    """The bus of a device as torch names it."""
    return CudaBus(device) if device.startswith("cuda") else Bus()


def load_placed(
    component: "object", *, blocks: Sequence[str], arena: bool, skip: Callable[[str], bool] = lambda name: False,
    **options: object,
) -> "nn.Module":  # fmt: skip
    """The component's module whose `blocks`, in the order of its forward, are streamed (`arena`) or sequential.

    `options` are those of `loader.Filler`; names that `skip` takes stay meta.
    """
    filler = Filler(component, **options)
    passing = tuple(f"{block}." for block in blocks)
    here = [name for name in filler.names if not skip(name)]
    for name in here:
        if not name.startswith(passing):
            filler.fill(name)
    module = filler.finish()
    names = [[name for name in here if name.startswith(start)] for start in passing]
    if arena:
        padding = ALIGNMENT * sum(4 * len(inside) for inside in names)
        Conveyor(filler, blocks, names, sum(filler.nbytes(block, skip) for block in blocks) + padding)
    else:
        Passage(filler, blocks, names)
    return module


@dataclass(frozen=True)
class _Place:
    """A tensor of a block: the module's dictionary that holds it, and where in the block's bytes it is."""

    holder: dict
    leaf: str
    parameter: bool
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    start: int

    def view(self, buffer: "torch.Tensor") -> "torch.Tensor":
        size = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)

    def assign(self, buffer: "torch.Tensor") -> None:
        view = self.view(buffer)
        self.holder[self.leaf] = nn.Parameter(view, requires_grad=False) if self.parameter else view


class Conveyor:
    """Streams blocks through two slots, in turn: a slot is filled again as soon as its block has computed."""

    def __init__(self, filler: Filler, blocks: Sequence[str], names: Sequence[Sequence[str]], size: int) -> None:
        """Fill an arena of `size` bytes block by block, and give every block's tensors their place in its slot."""
        device, self._bus, at = filler.device, bus_of(filler.device), 0
        self._arena = torch.empty(size, dtype=torch.uint8)  # pages that stay untouched take no memory
        sources, places = [], []
        for block, inside in zip(blocks, names, strict=True):
            filler.device = device if filler.packs(block) else "cpu"
            for name in inside:
                filler.fill(name)
            found, used = _move(filler.module.get_submodule(block), self._arena[at:])
            sources.append(self._arena[at : at + used])
            places.append(found)
            at += used
        filler.device = device
        _pin(self._arena, at, device)
        self._sources, self._held = sources, [-1] * SLOTS
        largest = max(source.numel() for source in sources)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        for k, (block, found) in enumerate(zip(blocks, places, strict=True)):
            for place in found:
                place.assign(self._slots[k % SLOTS])
            _around(filler.module.get_submodule(block), k, self._enter, self._leave)
        for k in range(SLOTS)[: len(sources)]:
            self._copy(k)

    def _copy(self, k: int) -> None:
        slot, source = k % SLOTS, self._sources[k]
        self._bus.copy(slot, self._slots[slot][: source.numel()], source)
        self._held[slot] = k

    def _enter(self, k: int) -> None:
        if self._held[k % SLOTS] != k:  # blocks were skipped, or the last forward was not finished
            self._copy(k)
        self._bus.wait(k % SLOTS)

    def _leave(self, k: int) -> None:
        self._bus.computed(k % SLOTS)
        following = k + SLOTS if k + SLOTS < len(self._sources) else k % SLOTS  # of the next forward
        if following != k:
            self._copy(following)


class Passage:
    """Reads each block from its file before it computes and drops it afterwards."""

    def __init__(self, filler: Filler, blocks: Sequence[str], names: Sequence[Sequence[str]]) -> None:
        self._filler, self._names = filler, names
        self._blocks = [filler.module.get_submodule(block) for block in blocks]
        for k, block in enumerate(self._blocks):
            _around(block, k, self._enter, self._leave)

    def _enter(self, k: int) -> None:
        for name in self._names[k]:
            self._filler.fill(name)

    def _leave(self, k: int) -> None:
        for holder, leaf, tensor in _tensors(self._blocks[k]):
            meta = tensor.to("meta")
            holder[leaf] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def _around(block: "nn.Module", k: int, enter: Callable[[int], None], leave: Callable[[int], None]) -> None:
    """Make the block's forward, compiled or not, call `enter` before and `leave` after it."""
    forward = block.forward

    def passing(*arguments: object, **options: object) -> object:
        enter(k)
        result = forward(*arguments, **options)
        leave(k)
        return result

    block.forward = passing


def _move(block: "nn.Module", arena: "torch.Tensor") -> tuple[list[_Place], int]:
    """Move the block's tensors to the arena's start; (their places, bytes used)."""
    places, at = [], 0
    for holder, leaf, tensor in _tensors(block):
        place = _Place(holder, leaf, isinstance(tensor, nn.Parameter), tensor.dtype, tuple(tensor.shape), at)
        place.view(arena).copy_(tensor)
        holder[leaf] = None
        places.append(place)
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return places, at


def _tensors(block: "nn.Module") -> "list[tuple[dict, str, torch.Tensor]]":
    """Every tensor of the block that is not on meta, with the dictionary of its module that holds it."""
    holders = [holder for module in block.modules() for holder in (module._parameters, module._buffers)]
    return [(h, leaf, t) for h in holders for leaf, t in h.items() if t is not None and not t.is_meta]


def _pin(arena: "torch.Tensor", size: int, device: str) -> None:
    """Register exactly `size` bytes of the arena with the driver: torch's allocator rounds up to a power of 2."""
    if not device.startswith("cuda"):
        return
    runtime, address = torch.cuda.cudart(), arena.data_ptr()
    if int(runtime.cudaHostRegister(address, size, 0)) == 0:
        weakref.finalize(arena, _unpin, address)


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
