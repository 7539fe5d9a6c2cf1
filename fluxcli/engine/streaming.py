"""Where a module's blocks are while it computes: on the device, or passing through it one by one.

Streamed blocks lie in one pinned arena of exactly their size and come through two slots on the
device: while a block computes, the next one is copied on a stream of its own. Sequential blocks are
read from their file for every forward and dropped after it: no memory is held, on the device or the
host. Knows modules and streams, nothing of plans. On the CPU and on devices without streams of our
own the copies are plain ones. Sizes are in bytes.
"""

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxcli.engine.loader import Filler, LoadedComponent
from quant.checkpoint import Component
from quant.spec import QuantSpec

ALIGNMENT = 256  # of tensors in a slot: what every kernel can load from
TENSORS_A_LAYER = 4  # at most, where a layer is quantized; each is aligned
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
        self._side = torch.cuda.Stream(device)
        self._main = torch.cuda.current_stream(device)
        self._copied = [torch.cuda.Event() for _ in range(SLOTS)]
        self._computed = [torch.cuda.Event() for _ in range(SLOTS)]
        # The first copies wait for what the device computes now: slots may be its memory.
        for slot in range(SLOTS):
            self.computed(slot)

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        self._side.wait_event(self._computed[slot])
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        target.record_stream(self._side)  # the slot may be freed while a copy is under way
        self._copied[slot].record(self._side)

    def wait(self, slot: int) -> None:
        self._main.wait_event(self._copied[slot])

    def computed(self, slot: int) -> None:
        self._computed[slot].record(self._main)


def make_bus(device: str) -> Bus:
    """The bus of a device as torch names it."""
    if device.startswith("cuda"):
        return CudaBus(device)
    return Bus()


def _skip_nothing(_: str) -> bool:
    return False


def load_component(
    component: Component,
    *,
    dtype: torch.dtype,
    device: str,
    spec: QuantSpec | None = None,
    skip: Callable[[str], bool] | None = None,
    blocks: Sequence[str] = (),
    from_arena: bool = False,
) -> LoadedComponent:
    """Load a component; tensors whose names `skip` takes stay on meta. Errors as of `Filler`.

    `blocks`, in the order of the forward, pass through the device: streamed `from_arena`, or each
    from its file.
    """
    skip = skip or _skip_nothing
    filler = Filler(component, dtype=dtype, device=device, spec=spec)
    names_by_block: dict[str, list[str]] = {block: [] for block in blocks}
    for name in filler.names:
        if skip(name):
            continue
        block = _find_block(name, blocks)
        if block:
            names_by_block[block].append(name)
        else:
            filler.fill(name)
    loaded = filler.finish()
    if blocks and from_arena:
        most_bytes = sum(filler.block_bytes(block, skip=skip) for block in blocks)
        conveyor = Conveyor(filler, names_by_block, most_bytes)
        loaded.unpinned_bytes = conveyor.unpinned_bytes
    else:
        for block, names in names_by_block.items():
            _read_around(filler, loaded.module.get_submodule(block), names)
    return loaded


def _find_block(name: str, blocks: Sequence[str]) -> str:
    """The block that a tensor belongs to, "" for none of these."""
    for block in blocks:
        if name.startswith(f"{block}."):
            return block
    return ""


class Conveyor:
    """Streams blocks through two slots, in turn.

    A slot is filled again as soon as its block has computed, while the other slot's block computes.
    """

    def __init__(
        self, filler: Filler, names_by_block: Mapping[str, Sequence[str]], most_bytes: int
    ) -> None:
        """Fill an arena block by block, and give every block's tensors their place in its slot.

        The blocks' tensors take at most `most_bytes`, before they are aligned.
        """
        names = sum(len(names) for names in names_by_block.values())
        padding_bytes = ALIGNMENT * TENSORS_A_LAYER * names
        # Pages of the arena that stay untouched take no memory.
        self._arena = torch.empty(most_bytes + padding_bytes, dtype=torch.uint8)
        self._sources: list[Tensor] = []  # each block's part of the arena
        used_bytes = self._fill_arena(filler, names_by_block)
        is_pinned = _pin(self._arena, used_bytes, filler.device)
        self.unpinned_bytes = 0 if is_pinned else used_bytes

        self._bus = make_bus(filler.device)
        largest_bytes = max(source.numel() for source in self._sources)
        self._slots = [
            torch.empty(largest_bytes, dtype=torch.uint8, device=filler.device)
            for _ in range(SLOTS)
        ]
        self._held = [-1] * SLOTS  # the index of the block that each slot holds
        for index, block in enumerate(names_by_block):
            module = filler.module.get_submodule(block)
            _point_into(module, self._slots[index % SLOTS])
            _wrap(module, partial(self._enter, index), partial(self._leave, index))
        for index in range(min(SLOTS, len(self._sources))):
            self._copy(index)

    def _fill_arena(self, filler: Filler, names_by_block: Mapping[str, Sequence[str]]) -> int:
        """Fill the blocks and move their tensors into the arena; returns the bytes they take."""
        used_bytes = 0
        for block, names in names_by_block.items():
            # Quantizing is work for the device; what is stored so already goes to RAM at once.
            device = filler.device if filler.quantizes(block) else "cpu"
            for name in names:
                filler.fill(name, device=device)
            module = filler.module.get_submodule(block)
            block_bytes = _move_into(module, self._arena[used_bytes:])
            self._sources.append(self._arena[used_bytes : used_bytes + block_bytes])
            used_bytes += block_bytes
        return used_bytes

    def _copy(self, index: int) -> None:
        slot = index % SLOTS
        source = self._sources[index]
        self._bus.copy(slot, self._slots[slot][: source.numel()], source)
        self._held[slot] = index

    def _enter(self, index: int) -> None:
        # Another block is there if blocks were skipped, or if the last forward was broken off.
        if self._held[index % SLOTS] != index:
            self._copy(index)
        self._bus.wait(index % SLOTS)

    def _leave(self, index: int) -> None:
        self._bus.computed(index % SLOTS)
        following = index + SLOTS
        if following >= len(self._sources):
            following = index % SLOTS  # of the next forward
        if following != index:
            self._copy(following)


def _read_around(filler: Filler, block: nn.Module, names: Sequence[str]) -> None:
    """Make the block read its tensors from their file before its forward, and drop them after."""

    def enter() -> None:
        for name in names:
            filler.fill(name)

    def leave() -> None:
        _replace_tensors(block, lambda tensor: tensor.to("meta"))

    _wrap(block, enter, leave)


def _wrap(block: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> None:
    """Make the block's forward, compiled or not, call `enter` before and `leave` after it."""
    forward = block.forward

    def wrapped(*arguments: object, **options: object) -> object:
        enter()
        result = forward(*arguments, **options)
        leave()
        return result

    block.forward = wrapped


class _Layout:
    """Views of a buffer's bytes for tensors, one after the other, each aligned."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self.used_bytes = 0

    def view_for(self, tensor: Tensor) -> Tensor:
        """The next view, of the tensor's dtype and shape."""
        start = self.used_bytes
        view = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.used_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return view


def _move_into(block: nn.Module, buffer: Tensor) -> int:
    """Move the block's tensors into the start of the buffer; returns the bytes that they take."""
    layout = _Layout(buffer)
    _replace_tensors(block, lambda tensor: layout.view_for(tensor).copy_(tensor))
    return layout.used_bytes


def _point_into(block: nn.Module, buffer: Tensor) -> None:
    """Make the block's tensors views of the buffer's start, laid out as by `_move_into`."""
    layout = _Layout(buffer)
    _replace_tensors(block, layout.view_for)


def _replace_tensors(block: nn.Module, replacement: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of the block that is not on meta."""
    for module in block.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for leaf, tensor in holder.items():
                if tensor is None or tensor.is_meta:
                    continue
                new = replacement(tensor)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=False)
                holder[leaf] = new


def _pin(arena: Tensor, size_bytes: int, device: str) -> bool:
    """Register exactly the arena's first bytes with the driver; returns whether that was possible.

    torch's own pinned allocator would round up to a power of 2.
    """
    if not device.startswith("cuda"):
        return True
    with torch.cuda.device(device):
        failed = int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), size_bytes, 0))
        if failed:
            # Takes the error that the driver would report to the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)
            return False
    weakref.finalize(arena, _unpin, arena.data_ptr(), device)
    return True


def _unpin(address: int, device: str) -> None:
    # On a device that has failed every call raises; there is nothing left to give back then.
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)
