"""Where a module's blocks are while it computes: on the device, or passing through it one after the other.

Streamed blocks lie in one pinned arena of exactly their size and come through two buffers on the device: while a block
computes, the next one is copied on a stream of its own. Sequential blocks are read from their file for every forward
and dropped after it: no memory is held, on the device or the host. Knows modules and streams, nothing of plans; sizes
are in bytes. On the CPU and on devices without streams of our own the copies are plain ones.
"""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial

from fluxcli.engine.loader import Filler
from quant.checkpoint import Component
from quant.lazy import Tensor, nn, torch

ALIGNMENT = 256  # of tensors in a buffer: what every kernel can load from
SLOTS = 2


class Bus:
    """Copies into the slots of a device; here at once, so that there is nothing to wait for."""

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
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
        for slot in range(SLOTS):  # the first copies wait for what the device computes now: slots may be its memory
            self.computed(slot)

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        self._side.wait_event(self._computed[slot])
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


def load_component(
    component: Component, *, skip: Callable[[str], bool] = lambda name: False, blocks: Sequence[str] = (),
    arena: bool = False, **options: object,
) -> "nn.Module":  # fmt: skip
    """The component's module in eval mode; names that `skip` takes stay meta. `options` are those of `loader.Filler`.

    `blocks`, in the order of its forward, are streamed (`arena`) or sequential.
    """
    filler = Filler(component, **options)
    passing = tuple(f"{block}." for block in blocks)
    here = [name for name in filler.names if not skip(name)]
    for name in here:
        if not name.startswith(passing):
            filler.fill(name)
    module = filler.finish()
    names = [[name for name in here if name.startswith(start)] for start in passing]
    if arena and blocks:
        padding = ALIGNMENT * sum(4 * len(inside) for inside in names)
        Conveyor(filler, blocks, names, sum(filler.nbytes(block, skip) for block in blocks) + padding)
    else:
        for block, inside in zip(blocks, names, strict=True):
            _read_around(filler, module.get_submodule(block), inside)
    return module


class Conveyor:
    """Streams blocks through two slots, in turn: a slot is filled again as soon as its block has computed."""

    def __init__(self, filler: Filler, blocks: Sequence[str], names: Sequence[Sequence[str]], size: int) -> None:
        """Fill an arena of `size` bytes block by block, and give every block's tensors their place in its slot."""
        device, self._bus, at = filler.device, bus_of(filler.device), 0
        self._arena = torch.empty(size, dtype=torch.uint8)  # pages that stay untouched take no memory
        self._sources, self._held, modules = [], [-1] * SLOTS, list(map(filler.module.get_submodule, blocks))
        for block, inside in zip(blocks, names, strict=True):
            filler.device = device if filler.packs(block) else "cpu"
            for name in inside:
                filler.fill(name)
            used = _lay_out(filler.module.get_submodule(block), self._arena[at:], fill=True)
            self._sources.append(self._arena[at : at + used])
            at += used
        filler.device = device
        filler.module.unpinned_bytes = 0 if _pin(self._arena, at, device) else at
        largest = max(source.numel() for source in self._sources)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        for k, module in enumerate(modules):
            _lay_out(module, self._slots[k % SLOTS], fill=False)
            _around(module, partial(self._enter, k), partial(self._leave, k))
        for k in range(SLOTS)[: len(modules)]:
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


def _read_around(filler: Filler, block: "nn.Module", names: Sequence[str]) -> None:
    """Make the block read its tensors from their file before it computes, and drop them afterwards."""

    def enter() -> None:
        for name in names:
            filler.fill(name)

    _around(block, enter, lambda: _replace(block, lambda tensor: tensor.to("meta")))


def _around(block: "nn.Module", enter: Callable[[], None], leave: Callable[[], None]) -> None:
    """Make the block's forward, compiled or not, call `enter` before and `leave` after it."""
    forward = block.forward

    def passing(*arguments: object, **options: object) -> object:
        enter()
        result = forward(*arguments, **options)
        leave()
        return result

    block.forward = passing


def _lay_out(block: "nn.Module", buffer: Tensor, *, fill: bool) -> int:
    """Make the block's tensors, with their values if `fill`, views of the buffer's start; the bytes that they take."""
    at = 0

    def view_of(tensor: Tensor) -> Tensor:
        nonlocal at
        view = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return view.copy_(tensor) if fill else view

    _replace(block, view_of)
    return at


def _replace(block: "nn.Module", replacement: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of the block that is not on meta."""
    for holder in [holder for module in block.modules() for holder in (module._parameters, module._buffers)]:
        for leaf, tensor in holder.items():
            if tensor is not None and not tensor.is_meta:
                new = replacement(tensor)
                holder[leaf] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def _pin(arena: Tensor, size: int, device: str) -> bool:
    """Register exactly `size` bytes of the arena with the driver: torch's allocator rounds up to a power of 2."""
    if not device.startswith("cuda"):
        return True
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), size, 0)):
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)  # takes the error that the driver would report to the next kernel
            return False
    weakref.finalize(arena, _unpin, arena.data_ptr(), device)
    return True


def _unpin(address: int, device: str) -> None:
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):  # a device that failed stays so
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)
