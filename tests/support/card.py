"""A CUDA card that is not there: tensors that say `cuda:0` and compute on the CPU, for real.

`Card` is a dispatch mode; `card_driver.installed` enters it and takes torch.cuda's place. Then
`device="cuda:0"` makes `OnCard` tensors, wrappers around the CPU's. It finds

- mixed devices: an operator over tensors of a card and of the host, or of two cards, raises as
  CUDA does (tensors of the host without dimensions may mix);
- where the host waits for the card: items, truth values, copies to the host, pageable copies;
- what CUDA's kernels demand of their operands, see `card_demands`;
- races between streams, and copies that nobody waits for, see `card_streams`;
- errors that a call leaves for the next kernel, and memory that stays pinned;
- launches and bytes that kernels read and write, by operator.

`problems` has what is wrong and would not raise. A card of `total_bytes` runs out of memory by the
bytes of live tensors; of allocators, speed and the numerics of CUDA's kernels it knows nothing.
"""

import linecache
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from quant.kernels import Library
from tests.support import guard
from tests.support.card_demands import check_operands
from tests.support.card_streams import Races, Streams

ROOT = Path(__file__).resolve().parents[2]
OURS = (f"{ROOT / 'fluxcli'}/", f"{ROOT / 'quant'}/")  # where code is that problems are told of
# Operators that launch no kernel.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty",
    "empty_like", "empty_strided", "expand", "lift_fresh", "mT", "movedim", "narrow", "new_empty",
    "new_empty_strided", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "squeeze_", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold",
    "unsqueeze", "unsqueeze_", "view", "view_as_real",
}  # fmt: skip
# Operators whose result the host has to know, or whose size.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique"}
# What memory holds that nobody has written: NaN in all that has it. Large memory stays untouched.
GARBAGE = 0xFF
SMALL_BYTES = 64 << 20
NO_KITCHEN = Library(None, "comfy-kitchen is not installed")
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"

guard.install()


class MixedDevices(RuntimeError):
    """An operator was given tensors of several devices."""


@dataclass
class Counts:
    """What happened on the cards; by operator, and `waits` by what waited and where."""

    launches: Counter[str] = field(default_factory=Counter)
    moved_bytes: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)  # by dtype, width and mask


@dataclass
class Memory:
    """Bytes of live tensors on one card, and how many there may be."""

    total_bytes: int
    cap_bytes: int
    live_bytes: int = 0
    peak_bytes: int = 0
    refusals: int = 0

    def take(self, size_bytes: int) -> None:
        """Raise torch.OutOfMemoryError where the tensor has no room."""
        if self.live_bytes + size_bytes > min(self.cap_bytes, self.total_bytes):
            self.refusals += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size_bytes} B")
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def give_back(self, size_bytes: int) -> None:
        """A tensor has gone."""
        self.live_bytes -= size_bytes


class OnCard(Tensor):
    """A tensor of a card; `inner` has its values, on the CPU."""

    inner: Tensor
    card: "Card"

    @staticmethod
    def __new__(cls, inner: Tensor, card: "Card", index: int) -> "OnCard":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", index),
            requires_grad=False,
        )
        made.inner = inner
        made.card = card
        return made

    def __repr__(self, **_: object) -> str:
        return f"OnCard({tuple(self.shape)}, {self.dtype}, {self.device})"

    def record_stream(self, stream: Any) -> None:
        self.card.races.record_stream(self.inner.untyped_storage(), stream)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> UntypedStorage:
        return self.inner.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        replace_values(self, value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def is_pinned(self, *_: object) -> bool:
        return False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in WHOLE:  # whose parts have no kernels for a tensor like this
            card = next(each.card for each in _tensors((args, kwargs)) if isinstance(each, OnCard))
            return card.run_whole(name, function, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        card = next(each.card for each in _tensors((args, kwargs)) if isinstance(each, OnCard))
        return card.run(function, args, kwargs)


WHOLE = {"scaled_dot_product_attention", "embedding_bag"}


class Card(TorchDispatchMode):
    """One or more cards of a kind, as a process has them from its start on."""

    def __init__(
        self,
        sm: tuple[int, int] = (8, 9),
        *,
        cards: int = 1,
        total_bytes: int = 24 << 30,
        pinnable_bytes: int = 1 << 40,
        rowwise: bool = True,
        kitchen: Library = NO_KITCHEN,
        built_for: tuple[str, ...] = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    ) -> None:
        """`sm` is their capability; the driver pins `pinnable_bytes` of RAM and no more.

        `rowwise` and `built_for` are of torch: whether it has the row-wise `_scaled_mm`, and the
        architectures that it has kernels for; `kitchen` is comfy-kitchen, as it was found.
        """
        super().__init__()
        self._launching = threading.get_ident()  # the thread that launches kernels
        self.sm = sm
        self.pinnable_bytes = pinnable_bytes
        self.rowwise = rowwise
        self.kitchen = kitchen
        self.built_for = built_for
        self.memory = [Memory(total_bytes, total_bytes) for _ in range(cards)]
        self.problems: list[str] = []
        self.pinned: dict[int, int] = {}  # bytes that the driver was told to pin, by their address
        self.allocated: dict[int, int] = {}  # bytes of tensors that torch's allocator pinned
        self.left_error = ""  # of the driver: the next kernel reports it
        self.launched = [0] * cards  # kernels of each card, all of its life
        self.failing: Container[int] = ()  # the numbers of launches for which there is no memory
        self.streams = Streams(cards, self._count_wait)
        self.races = Races(self.report)
        self._counts = Counts()
        self._known: set[int] = set()  # storages whose bytes were counted

    # --- what happened

    def take_counts(self) -> Counts:
        """What happened since the last time."""
        counts = self._counts
        self._counts = Counts()
        return counts

    def report(self, text: str) -> None:
        """Note a problem, with its place in the project."""
        self.problems.append(f"{text} @ {find_place()}")

    def _count_wait(self, what: str) -> None:
        if threading.get_ident() != self._launching:
            return  # a thread that nobody waits for
        self._counts.waits[f"{what} @ {find_place()}"] += 1

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a host's tensor begins in pinned memory, which is all that torch asks."""
        return self._find_pinned(tensor) is not None

    def _find_pinned(self, tensor: Tensor) -> int | None:
        """The bytes that are pinned from the tensor's first on; None for none."""
        first = tensor.data_ptr()
        for at, size_bytes in [*self.pinned.items(), *self.allocated.items()]:
            if at <= first < at + size_bytes:
                return at + size_bytes - first
        return None

    # --- operators

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run an operator; on a card, if its tensors are there or it is told to make some there."""
        name = function._schema.name.partition("::")[2]
        tensors = list(_tensors((args, kwargs)))
        ours = [each for each in tensors if isinstance(each, OnCard)]
        device = kwargs.get("device")
        if device is not None:
            device = torch.device(device)
        to_card = device is not None and device.type == "cuda"
        if not ours and not to_card:
            return self._run_on_host(name, function, args, kwargs)
        if name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self._copy(args[0], args[1], non_blocking=bool(non_blocking))
        if name == "_to_copy" and device is not None and device.type != "meta":
            return self._move(function, args[0], kwargs, device)

        self._check_devices(name, tensors)
        index = device.index if to_card else ours[0].device.index
        if index is None:
            index = self.streams.current_index
        bare_args, bare_kwargs = _map(_bare, args), _map(_bare, kwargs)
        check_operands(name, self.sm, rowwise=self.rowwise, args=bare_args, options=bare_kwargs)
        if to_card:
            bare_kwargs["device"] = "cpu"
        if name not in VIEWS:
            self._begin(name, index)
        found = function(*bare_args, **bare_kwargs)
        if "empty" in name and found.nbytes < SMALL_BYTES:
            found.untyped_storage().fill_(GARBAGE)
        if device is not None and device.type != "cuda":
            return found
        made = self._wrap(found, index, {id(each.inner): each for each in ours})
        if name not in VIEWS:
            self._count(name, index, reads=ours, writes=_tensors(made))
        if self._waits(name, args):
            self.wait(f"aten.{name}", index)
        return made

    def run_whole(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function of torch as if it were one kernel."""
        tensors = list(_tensors((args, kwargs)))
        self._check_devices(name, tensors)
        ours = [each for each in tensors if isinstance(each, OnCard)]
        if name == "scaled_dot_product_attention":
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            masked = "no mask" if mask is None else "a mask"
            said = f"{ours[0].dtype}, width {ours[0].shape[-1]}, {masked}"
            self._counts.attention[said] += 1
        index = ours[0].device.index
        self._begin(name, index)
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            found = function(*_map(_bare, args), **_map(_bare, kwargs))
        made = self._wrap(found, index, {})
        self._count(name, index, reads=ours, writes=_tensors(made))
        return made

    def _run_on_host(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """An operator of the host alone, which may ask for pinned memory."""
        if name == "_pin_memory":
            made = args[0].clone()
        elif kwargs.get("pin_memory"):
            made = function(*args, **dict(kwargs, pin_memory=False))
        else:
            return function(*args, **kwargs)
        storage = made.untyped_storage()
        self.allocated[made.data_ptr()] = storage.nbytes()
        weakref.finalize(storage, self.allocated.pop, made.data_ptr(), None).atexit = False
        return made

    def _wrap(self, found: Any, index: int, same: dict[int, OnCard]) -> Any:
        """An operator's result, on a card; what it was given it gives back as it is."""

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in same:
                return same[id(value)]
            self._hold(value.untyped_storage(), index)
            return OnCard(value, self, index)

        return _map(wrap, found)

    def _hold(self, storage: UntypedStorage, index: int) -> None:
        """Count a storage's bytes on the card as long as it lives."""
        key = storage._cdata
        if key in self._known:
            return
        size_bytes = storage.nbytes()
        self.memory[index].take(size_bytes)
        self._known.add(key)
        weakref.finalize(storage, self._release, key, index, size_bytes).atexit = False

    def _release(self, key: int, index: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.memory[index].give_back(size_bytes)

    def _check_devices(self, name: str, tensors: list[Tensor]) -> None:
        """Raise `MixedDevices` unless the tensors may meet in a kernel."""
        devices = {each.device for each in tensors if each.dim() or each.is_cuda}
        devices.discard(torch.device("meta"))
        if name in ("index", "index_put_", "_index_put_impl_"):
            devices.discard(torch.device("cpu"))  # torch moves indexes: a copy, and a wait
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise MixedDevices(
                f"Expected all tensors to be on the same device, but {name} found {found}"
                f" @ {find_place()}"
            )

    def _begin(self, name: str, index: int) -> None:
        """A kernel on the card's current stream. Raises what the card or its driver would."""
        if not has_kernels(self.sm, self.built_for):
            raise torch.AcceleratorError(NO_KERNEL)
        error = self.left_error
        if error:
            self.left_error = ""
            raise torch.AcceleratorError(f"CUDA error: {error} (an earlier call's, seen by {name})")
        self.launched[index] += 1
        if sum(self.launched) in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate what a test wanted")
        self.streams.current(index).catch_up()

    def _count(
        self, name: str, index: int, *, reads: Iterable[Tensor], writes: Iterable[Tensor]
    ) -> None:
        """A kernel has read and written these tensors."""
        read = [each for each in reads if isinstance(each, OnCard)]
        written = [each for each in writes if isinstance(each, OnCard)]
        self._counts.launches[name] += 1
        self._counts.moved_bytes[name] += sum(each.nbytes for each in [*read, *written])
        self._note(name, index, reads=read, writes=written)

    def _note(self, what: str, index: int, *, reads: list, writes: list) -> None:
        self.races.note(
            what,
            self.streams.current(index),
            reads=[each.inner.untyped_storage() for each in reads],
            writes=[each.inner.untyped_storage() for each in writes],
        )

    # --- copies, and where the host waits

    def wait(self, what: str, index: int) -> None:
        """The host waits for the card's current stream."""
        self._count_wait(what)
        self.streams.current(index).finish()

    def _waits(self, name: str, args: tuple) -> bool:
        """Whether an operator makes the host wait for its result, or for its size."""
        if name in WAITING or name.startswith(("unique", "_unique")):
            return True
        if name == "repeat_interleave":
            return "output_size" not in args and isinstance(args[-1], Tensor)
        if name in ("index", "index_put_", "_index_put_impl_"):
            indexes = [each for each in args[1] if each is not None]
            # Masks become numbers; what is on the host is copied.
            return any(each.dtype == torch.bool or not each.is_cuda for each in indexes)
        return False

    def _copy(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> Tensor:
        """`target.copy_(source)`, of which one at least is on a card."""
        if isinstance(target, OnCard) and isinstance(source, OnCard):
            if target.device != source.device:
                self.report(f"a copy from {source.device} to {target.device}")
            self._begin("copy_", target.device.index)
            target.inner.copy_(source.inner)
            self._count("copy_", target.device.index, reads=[source], writes=[target])
            return target
        self._transfer(target, source, non_blocking=non_blocking)
        return target

    def _transfer(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        """Copy between a card and the host."""
        to_card = isinstance(target, OnCard)
        ours, host = (target, source) if to_card else (source, target)
        direction = "to the card" if to_card else "to the host"
        pinned_bytes = self._find_pinned(host)
        how = "pageable" if pinned_bytes is None else "pinned"
        if pinned_bytes is not None and pinned_bytes < host.nbytes:
            self.report("a copy that leaves the memory that was pinned in one piece")
        what = f"a {how} copy {direction}"
        index = ours.device.index
        self._counts.launches[direction] += 1
        self._counts.moved_bytes[what] += host.nbytes
        if to_card:
            self._note(what, index, reads=[], writes=[ours])
        else:
            self._note(what, index, reads=[ours], writes=[])
        copy = _LateCopy(_bare(target), _bare(source), card=self, host=host)
        if non_blocking and how == "pinned":
            self.streams.current(index).postpone(copy)
            return
        self.wait(what + (", non_blocking" if non_blocking else ""), index)
        copy()

    def _move(self, function: Callable, source: Tensor, options: dict, device: Any) -> Tensor:
        """`source.to(device, ...)`: another dtype, another device, or both."""
        rest = {
            key: value
            for key, value in options.items()
            if key not in ("device", "non_blocking", "pin_memory")
        }
        if isinstance(source, OnCard) and device.type == "cuda":
            index = source.device.index if device.index is None else device.index
            if index != source.device.index:
                self.report(f"a copy from {source.device} to {device}")
            self._begin("_to_copy", index)
            made = self._wrap(function(source.inner, **rest), index, {})
            self._count("_to_copy", index, reads=[source], writes=[made])
            return made
        empty = torch.empty_like(_bare(source), **rest)
        if device.type == "cuda":
            index = self.streams.current_index if device.index is None else device.index
            made = self._wrap(empty, index, {})
        else:
            made = empty
        non_blocking = bool(options.get("non_blocking"))
        if source.numel():
            self._transfer(made, source, non_blocking=non_blocking and source.dtype == made.dtype)
        return made


class _LateCopy:
    """A copy that may be done later and keeps neither side alive.

    Host memory of torch's pinned allocator is the exception: that keeps it for the copy.
    """

    def __init__(self, target: Tensor, source: Tensor, *, card: Card, host: Tensor) -> None:
        self._sides = _Reference(target), _Reference(source)
        self._host = 1 if host is source else 0
        self._card = card
        self._kept = host if host.untyped_storage().data_ptr() in card.allocated else None

    def __call__(self) -> None:
        sides = [side.find() for side in self._sides]
        if sides[self._host] is None:
            self._card.report("race: the host's memory was freed under a copy")
        elif sides[1 - self._host] is not None:  # else `Races` has said so
            with _disable_current_modes():
                sides[0].copy_(sides[1])


class _Reference:
    """A tensor, as long as something else holds its storage."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._dtype = tensor.dtype
        self._layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    def find(self) -> Tensor | None:
        """The tensor; None if it has gone."""
        storage = self._storage()
        if storage is None:
            return None
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


def replace_values(parameter: Tensor, value: Tensor) -> None:
    """Do what `parameter.data = value` does, where one of them at least is on a card.

    torch would take the value's metadata alone, and leave the tensor that has the numbers.
    """
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=False))


def has_kernels(sm: tuple[int, int], built_for: Iterable[str]) -> bool:
    """Whether a torch built for these architectures has kernels for a card.

    Binaries ("sm_86") run on cards of the same major and no lower minor; "compute_90" is compiled
    by the driver for any later card.
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and sm >= (major, minor):
            return True
        if kind == "sm" and sm[0] == major and sm[1] >= minor:
            return True
    return False


def find_place() -> str:
    """The project's line that is being executed, else a library's other than torch's."""
    elsewhere = "?"
    frame: FrameType | None = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {_line_of(frame)}"
        if elsewhere == "?" and "site-packages" in name and "/torch/" not in name:
            elsewhere = f"{name.partition('site-packages/')[2]}:{frame.f_lineno} {_line_of(frame)}"
        frame = frame.f_back
    return elsewhere


def _line_of(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()[:90]


def _tensors(tree: object) -> Iterator[Tensor]:
    """The tensors among an operator's arguments, or of its result."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _tensors(each)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """An operator's arguments, or its result, with every value changed; torch's takes longer."""
    if type(tree) in (list, tuple):
        return type(tree)([_map(change, each) for each in tree])
    if type(tree) is dict:
        return {key: _map(change, each) for key, each in tree.items()}
    return change(tree)


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value
