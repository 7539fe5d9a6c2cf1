"""Where a module's blocks are while it computes: on the device, or passing through it one by one.

Streamed blocks lie in RAM in one arena of exactly their size, pinned as far as the driver goes, and
come through two slots on the device: while a block computes, the next one is copied on a stream of
its own, by a `Feeder` where not all is pinned. Sequential blocks are read from their file for every
forward and dropped after it: no memory is held, on the device or the host. On the CPU, and on
devices without streams of our own, the copies are plain ones. Knows modules and streams, nothing of
plans. Sizes are in bytes.
"""

import mmap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxcli.engine.feeder import Copy, Feeder, launch
from fluxcli.engine.loader import Filler, LoadedComponent
from fluxcli.engine.pinned import pin
from quant.checkpoint import Component
from quant.spec import QuantSpec

ALIGNMENT = 256  # of tensors in a slot: what every kernel can load from
TENSORS_A_LAYER = 4  # at most, where a layer is quantized; each is aligned
SLOTS = 2
PAGE_BYTES = mmap.PAGESIZE


class Bus:
    """Copies into the slots of a device; here at once, so that there is nothing to wait for."""

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Begin to copy, once what was computed with the slot is done."""
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """Make what is computed from now on wait for the slot's copy."""

    def computed(self, slot: int) -> None:
        """Note that nothing after what was computed so far needs the slot's content."""


class CudaBus(Bus):
    """Copies on a side stream; events, never the host, keep the order."""

    def __init__(self, device: str) -> None:
        self._side = torch.cuda.Stream(device)
        self._main = torch.cuda.current_stream(device)
        self._copied = [torch.cuda.Event() for _ in range(SLOTS)]
        self._computed = [torch.cuda.Event() for _ in range(SLOTS)]
        # The first copies wait for what the device computes now: slots, which are there already,
        # may be its memory.
        for slot in range(SLOTS):
            self.computed(slot)

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        launch(self._make_copy(slot, target, source))

    def _make_copy(self, slot: int, target: Tensor, source: Tensor) -> Copy:
        """A copy on the side stream, after the last computation that needs the slot's content."""
        return Copy(
            target,
            source,
            stream=self._side,
            after=self._computed[slot],
            copied=self._copied[slot],
        )

    def wait(self, slot: int) -> None:
        self._main.wait_event(self._copied[slot])

    def computed(self, slot: int) -> None:
        self._computed[slot].record(self._main)


class FedBus(CudaBus):
    """Copies as `CudaBus` does, from RAM of which not all is pinned: a feeder launches them.

    It launches all of them, in the order in which they are begun: there is one side stream, so a
    copy that waits for a later block must not come before one that the next block needs.
    """

    def __init__(self, device: str, feeder: Feeder) -> None:
        super().__init__(device)
        self._feeder = feeder
        self._launched: list[Future[None] | None] = [None] * SLOTS

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        self._launched[slot] = self._feeder.begin(self._make_copy(slot, target, source))

    def wait(self, slot: int) -> None:
        """Wait for the feeder, too: raises what ended the copy there."""
        launched = self._launched[slot]
        self._launched[slot] = None
        if launched:
            launched.result()
        super().wait(slot)


def make_bus(device: str, feeder: Feeder | None) -> Bus:
    """The bus of a device as torch names it, with its feeder where not all RAM is pinned."""
    if feeder:
        return FedBus(device, feeder)
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
    change_blocks: Callable[[nn.Module], None] | None = None,
) -> LoadedComponent:
    """Load a component; tensors whose names `skip` takes stay on meta. Errors as of `Filler`.

    `blocks`, in the order of the forward, pass through the device: streamed `from_arena`, or each
    from its file. `change_blocks` may give the module's blocks another forward before that.
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
    if change_blocks:
        change_blocks(loaded.module)
    if blocks and from_arena:
        most_bytes = sum(filler.block_bytes(block, skip=skip) for block in blocks)
        conveyor = Conveyor(filler, names_by_block, most_bytes)
        filler.check()
        loaded.pinned_bytes = conveyor.pinned_bytes
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
        padding_bytes += 2 * PAGE_BYTES * len(names_by_block)
        # Pages of the arena that stay untouched take no memory.
        self._arena = torch.empty(most_bytes + padding_bytes, dtype=torch.uint8)
        self._sources = self._fill_arena(filler, names_by_block)  # each block's part of the arena
        self._is_pinned = self._pin_sources(filler.device)

        largest_bytes = max(source.numel() for source in self._sources)
        self._slots = [
            torch.empty(largest_bytes, dtype=torch.uint8, device=filler.device)
            for _ in range(SLOTS)
        ]
        feeder = None if all(self._is_pinned) else filler.feeder
        self._bus = make_bus(filler.device, feeder)
        self._held = [-1] * SLOTS  # the index of the block that each slot holds
        for index, block in enumerate(names_by_block):
            module = filler.module.get_submodule(block)
            _point_into(module, self._slots[index % SLOTS])
            _wrap(module, partial(self._enter, index), partial(self._leave, index))
        for index in range(min(SLOTS, len(self._sources))):
            self._copy(index)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the blocks that the driver has pinned."""
        return self._count_bytes(pinned=True)

    @property
    def unpinned_bytes(self) -> int:
        """Bytes of the blocks that it has not."""
        return self._count_bytes(pinned=False)

    def _count_bytes(self, *, pinned: bool) -> int:
        sources = zip(self._sources, self._is_pinned, strict=True)
        return sum(source.numel() for source, is_pinned in sources if is_pinned == pinned)

    def _fill_arena(
        self, filler: Filler, names_by_block: Mapping[str, Sequence[str]]
    ) -> list[Tensor]:
        """Fill the blocks and move their tensors into the arena; returns each block's part of it.

        No two parts share a page of memory, so that each can be pinned alone.
        """
        sources = []
        start = 0
        for block, names in names_by_block.items():
            # Quantizing is work for the device; what is stored so already goes to RAM at once.
            device = filler.device if filler.quantizes(block) else "cpu"
            for name in names:
                filler.fill(name, device=device)
            module = filler.module.get_submodule(block)
            block_bytes = _move_into(module, self._arena[start:])
            sources.append(self._arena[start : start + block_bytes])
            start += (-(-block_bytes // PAGE_BYTES) + 1) * PAGE_BYTES
        return sources

    def _pin_sources(self, device: str) -> list[bool]:
        """Pin block after block until the driver refuses; returns which blocks are pinned.

        A block (57 to 454 MB of FLUX.1's) is never pinned in part, nor together with the next: one
        copy out of two ranges that were registered apart is not promised to work.
        """
        is_pinned = [False] * len(self._sources)
        for index, source in enumerate(self._sources):
            is_pinned[index] = pin(source, source.numel(), device)
            if not is_pinned[index]:
                break
        return is_pinned

    def _copy(self, index: int) -> None:
        slot = index % SLOTS
        source = self._sources[index]
        self._bus.copy(slot, self._slots[slot][: source.numel()], source)
        self._held[slot] = index

    def _enter(self, index: int) -> None:
        slot = index % SLOTS
        # Another block is there if blocks were skipped, or if the last forward was broken off.
        if self._held[slot] != index:
            self._copy(index)
        self._held[slot] = -1  # if waiting for the copy raises
        self._bus.wait(slot)
        self._held[slot] = index

    def _leave(self, index: int) -> None:
        self._bus.computed(index % SLOTS)
        following = index + SLOTS
        if following >= len(self._sources):
            following = index % SLOTS  # of the next forward
        if following != index:
            self._copy(following)


def _read_around(filler: Filler, block: nn.Module, names: Sequence[str]) -> None:
    """Make the block read its tensors from their file before its forward, and drop them after.

    Their values are checked when they are first read. What the block is given lies in memory that
    the block before it had, so the copies are on the stream that computes.
    """

    def enter() -> None:
        for name in names:
            filler.fill(name)
        filler.check()

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
