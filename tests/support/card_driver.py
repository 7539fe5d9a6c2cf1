"""What takes torch.cuda's place for the card that is not there, and what calls the driver."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401 - it asks torch.cuda while it is imported
import torch

from fluxcli.engine import blocks, classes
from quant import codes, int8_products, kernels, linear
from tests.support.card import Card, OnCard, replace_values
from tests.support.card_streams import Event, Stream

OUT_OF_MEMORY = 2  # of cudaError
NOT_REGISTERED = 713
DRIVER = 13010  # the newest CUDA that it knows


class Runtime:
    """The functions of the CUDA runtime that the project calls, as `torch.cuda.cudart()`."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def cudaHostRegister(self, address: int, size_bytes: int, _flags: int) -> int:  # noqa: N802
        """Pin host memory, as far as the driver likes; a refusal is left for the next kernel."""
        if sum(self._card.pinned.values()) + size_bytes > self._card.pinnable_bytes:
            self._card.left_error = "out of memory"
            return OUT_OF_MEMORY
        self._card.pinned[address] = size_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """Let go of pinned memory; so it is with what was not pinned."""
        if self._card.pinned.pop(address, None) is None:
            self._card.left_error = "part or all of the memory range is not registered"
            return NOT_REGISTERED
        return 0


class Driver:
    """What torch.cuda has, for a `Card`; devices are numbers, names, torch.devices or None."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def functions(self) -> dict[str, Any]:
        """All that takes a place in torch.cuda, by its name there."""
        own = {
            name: getattr(self, name)
            for name in dir(self)
            if not name.startswith("_") and name not in ("functions", "tensor")
        }
        return own | {"_lazy_init": lambda: None, "cudart": lambda: Runtime(self._card)}

    def _index(self, device: Any = None) -> int:
        """The number of a device; raises as torch does where there is none."""
        index = device if isinstance(device, int) else None
        if device is not None and index is None:
            index = torch.device(device).index
        if index is None:
            return self._card.streams.current_index
        if not 0 <= index < len(self._card.memory):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return index

    # --- which cards there are

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(self._card.memory)

    def current_device(self) -> int:
        return self._card.streams.current_index

    def get_arch_list(self) -> list[str]:
        return list(self._card.built_for)

    def get_device_name(self, device: Any = None) -> str:
        return self.get_device_properties(device).name

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        self._index(device)
        return self._card.sm

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return including_emulation or self._card.sm >= (8, 0)

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        index = self._index(device)
        return SimpleNamespace(
            name=f"a card of sm{self._card.sm[0]}{self._card.sm[1]} that is not there",
            total_memory=self._card.memory[index].total_bytes,
            multi_processor_count=128,
            major=self._card.sm[0],
            minor=self._card.sm[1],
            uuid=f"0000-{index}",
            max_threads_per_multi_processor=1536,
            warp_size=32,
        )

    # --- memory

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = self._card.memory[self._index(device)]
        return memory.total_bytes - memory.live_bytes, memory.total_bytes

    def memory_allocated(self, device: Any = None) -> int:
        return self._card.memory[self._index(device)].live_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._card.memory[self._index(device)].peak_bytes

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated(device)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {"num_ooms": self._card.memory[self._index(device)].refusals}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = self._card.memory[self._index(device)]
        memory.peak_bytes = memory.live_bytes

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        memory = self._card.memory[self._index(device)]
        memory.cap_bytes = int(fraction * memory.total_bytes)

    def empty_cache(self) -> None:
        """There is none."""

    # --- streams

    def Stream(self, device: Any = None, **_: object) -> Stream:  # noqa: N802
        return self._card.streams.make(self._index(device))

    def Event(self, enable_timing: bool = False, **_: object) -> Event:  # noqa: N802
        return Event(self._card.streams, enable_timing=enable_timing)

    def current_stream(self, device: Any = None) -> Stream:
        return self._card.streams.current(self._index(device))

    def default_stream(self, device: Any = None) -> Stream:
        return self._card.streams.mains[self._index(device)]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._card.streams.entered.append(stream)
        try:
            yield
        finally:
            self._card.streams.entered.pop()

    def device(self, device: Any) -> Any:
        index = self._index(device)
        if index == self._card.streams.current_index:
            return nullcontext()
        return self.stream(self.default_stream(index))

    def synchronize(self, device: Any = None) -> None:
        self._card.streams.report_wait("torch.cuda.synchronize")
        self._card.streams.finish(self._index(device))


@contextmanager
def installed(card: Card) -> Iterator[Card]:
    """Make the card torch's own, and give it what it is told while this lasts.

    torch reads the device of `torch.tensor` below any mode. What is probed once for a device is
    probed anew, here and afterwards.
    """
    import_libraries()
    _forget_devices()
    is_pinned = torch.Tensor.is_pinned

    def ask(tensor: torch.Tensor, *_: object) -> bool:
        return not isinstance(tensor, OnCard) and card.is_pinned(tensor)

    with (
        mock.patch.multiple(torch.cuda, **Driver(card).functions()),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(kernels, "load_library", lambda: card.kitchen),
        mock.patch.object(kernels, "read_driver", lambda: DRIVER),
        mock.patch.object(torch, "tensor", _make_and_move(torch.tensor)),
        mock.patch.object(torch, "as_tensor", _make_and_move(torch.as_tensor)),
        mock.patch.object(torch.Tensor, "is_pinned", ask),
        mock.patch.object(torch.nn.Parameter, "data", _make_data(), create=True),
        card,
    ):
        try:
            yield card
        finally:
            torch.cuda.synchronize()  # what is still under way holds memory
            if any(memory.live_bytes for memory in card.memory):
                gc.collect()
            _forget_devices()
    assert torch.Tensor.is_pinned is is_pinned


def _forget_devices() -> None:
    """Forget what a device can, and what was made for it."""
    caches = (linear.PROBED, int8_products.CONSTANTS, codes.TABLES, kernels.CODEBOOKS)
    for known in (*caches, blocks.CHOSEN):
        known.clear()


def _make_data() -> property:
    """`Parameter.data`, which takes values that are on a card."""
    plain = torch.Tensor.data

    def write(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        if isinstance(value, OnCard):
            replace_values(parameter, value)
        else:
            plain.__set__(parameter, value)

    return property(plain.__get__, write)


def _make_and_move(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A maker of tensors that makes them on the host, and takes them to a card then."""

    def made(data: object, *, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(data, device=device, **options)
        return make(data, **options).to(device)

    return made


def import_libraries() -> None:
    """Import what the engine imports late, before torch.cuda says that there is a card."""
    for kind in (
        classes.transformer,
        classes.single_block,
        classes.vae,
        classes.scheduler,
        classes.clip,
        classes.t5,
        classes.clip_tokenizer,
        classes.t5_tokenizer,
    ):
        kind()
