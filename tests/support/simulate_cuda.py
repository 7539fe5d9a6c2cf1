"""A card that is not there, and its memory: FakeTensors on "cuda:0", every storage of which is put
into a model of torch's allocator.

Beside the storages there is what a card allocates inside its operators, as far as it is known:
cuBLAS' workspace, and a workspace of cuDNN's for each convolution. Sizes are in bytes.
"""

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.support import guard
from tests.support.allocator import CUBLAS_BYTES, Allocator

CUDA_CARD = "cuda:0"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_int_mm")


class CardMemory(TorchDispatchMode):
    """Allocates and frees what a run does while it is entered; peaks are kept by phase.

    Who drives the run says in `phase` which phase it is in.
    """

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self.allocator = allocator
        self.phase = ""
        self.reserved_bytes: dict[str, int] = {}  # the most, by phase
        self.live_bytes: dict[str, int] = {}  # the most, by phase
        self._live_bytes = 0  # now, as they were asked for
        self.lost_plans = 0  # of cuDNN, for which there was no room
        self._has_cublas = False
        self._known: weakref.WeakSet = weakref.WeakSet()  # storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        given = _on_card((args, kwargs))
        if name in PRODUCTS and given and not self._has_cublas:
            self._has_cublas = True
            self._allocate(CUBLAS_BYTES)
        result = function(*args, **(kwargs or {}))
        made = _on_card(result)
        for tensor in made:
            self._add(tensor.untyped_storage())
        if name == "convolution" and given:
            self._borrow(args[0].nbytes + made[0].nbytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            block = self._allocate(storage.nbytes())
            weakref.finalize(storage, self._free, block, storage.nbytes()).atexit = False

    def _allocate(self, size: int) -> Any:
        block = self.allocator.allocate(size)
        self._live_bytes += size
        reserved_bytes = self.allocator.reserved_bytes
        live_bytes = self._live_bytes
        before_bytes = self.reserved_bytes.get(self.phase, 0)
        self.reserved_bytes[self.phase] = max(before_bytes, reserved_bytes)
        before_bytes = self.live_bytes.get(self.phase, 0)
        self.live_bytes[self.phase] = max(before_bytes, live_bytes)
        return block

    def _free(self, block: Any, size: int) -> None:
        self.allocator.free(block)
        self._live_bytes -= size

    def _borrow(self, workspace_bytes: int) -> None:
        """Allocate cuDNN's workspace of a convolution, and free it.

        It turns rows of pixels into rows of channels and back, in 16 bit: a copy of the input, and
        one of the output. Where there is no room torch takes the next plan of cuDNN's list, which
        needs less and is slower (aten/src/ATen/native/cudnn/Conv_v8.cpp, `try_plans`).
        """
        try:
            block = self._allocate(workspace_bytes)
        except torch.OutOfMemoryError:
            self.lost_plans += 1
        else:
            self._free(block, workspace_bytes)


def _on_card(tree: object) -> list[torch.Tensor]:
    leaves, _ = tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


class _Stream:
    """A stream or an event: what is given to it is done at once."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def record(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, allocator: Allocator, total_bytes: int) -> None:
    """Let torch.cuda answer as a driver would whose card has nothing but this allocator on it."""

    def ask_memory(*_: object) -> tuple[int, int]:
        return total_bytes - allocator.reserved_bytes, total_bytes

    guard.install()
    answers = {
        "_lazy_init": lambda: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
        "get_device_capability": lambda *_: (8, 9),
        "mem_get_info": ask_memory,
        "memory_reserved": lambda *_: allocator.reserved_bytes,
        "max_memory_reserved": lambda *_: allocator.peak_reserved_bytes,
        "max_memory_allocated": lambda *_: allocator.peak_allocated_bytes,
        "reset_peak_memory_stats": lambda *_: allocator.reset_peak(),
        "empty_cache": allocator.empty_cache,
        "set_per_process_memory_fraction": lambda *_: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr("fluxcli.engine.streaming.pin", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attend)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", _normalize)


REAL_ATTENTION = torch.nn.functional.scaled_dot_product_attention
REAL_RMS_NORM = torch.nn.functional.rms_norm


def _attend(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **_: object
):
    """What torch takes on CUDA: flash attention without a mask, else the memory-efficient one."""
    if not query.is_cuda:
        return REAL_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    is_16_bit = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and query.shape[-1] <= 256 and is_16_bit:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, False, 0.0, is_causal, scale=scale)[0]


def _normalize(x, normalized_shape, weight=None, eps=None):
    """One kernel over what is contiguous, as on CUDA: here a product, of the same bytes."""
    if not x.is_cuda:
        return REAL_RMS_NORM(x, normalized_shape, weight, eps)
    return x.contiguous() * weight
