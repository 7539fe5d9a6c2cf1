"""Counts the bytes of live tensor storages on a simulated card, at dispatch level, as a device's allocator holds them.

The card is the device "cpu:0": torch computes there as on "cpu", but copies what is moved there. A storage is on the
card if an operator was told to make it there, or was told nothing and had an input from there; all else is the host's.
It watches a real run, or one on FakeTensors for sizes that no test machine has, and knows nothing of plans or formulas.
What an operator allocates inside itself is not seen. Over `budget` bytes it raises the allocator's own error.
"""

import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quant.checkpoint import Checkpoint, Component
from quant.spec import QuantSpec, layout
from quant.weights import Piece, Weight

CARD = "cpu:0"


class Counter(TorchDispatchMode):
    """`live` bytes and their `peak` (by phase: `peaks`) on the card; `host` is the largest live sum beside it."""

    def __init__(self, budget: int | None = None) -> None:
        super().__init__()
        self.budget, self.phase, self.allocations = budget, "", 0
        self.live, self.peaks, self.starts = {True: 0, False: 0}, {}, {}
        self.host = 0
        self.fail_at: int | None = None  # the allocation on the card that fails
        self._on_card = weakref.WeakKeyDictionary()

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {tensor.untyped_storage() for tensor in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        device = kwargs.get("device")
        on_card = (
            torch.device(device).index == 0 if device is not None
            else any(self._on_card.get(storage, False) for storage in given)
        )  # fmt: skip
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage not in given and storage not in self._on_card:
                self._add(storage, on_card)
        return result

    def _add(self, storage: torch.UntypedStorage, on_card: bool) -> None:
        size = storage.nbytes()
        if on_card:
            self.allocations += 1
            self.starts.setdefault(self.phase, self.allocations)  # the first of each phase
            over = self.budget is not None and self.live[True] + size > self.budget
            if over or self.allocations == self.fail_at:
                raise torch.OutOfMemoryError(f"{self.live[True]} bytes live, {size} more, {self.budget} allowed")
        self._on_card[storage] = on_card
        self.live[on_card] += size
        if on_card:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live[True])
        else:
            self.host = max(self.host, self.live[False])
        weakref.finalize(storage, self._free, size, on_card).atexit = False

    def _free(self, size: int, on_card: bool) -> None:
        self.live[on_card] -= size


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def packed(checkpoint: Checkpoint, spec: QuantSpec) -> Checkpoint:
    """The same model as if it had been baked."""
    parts = {}
    for name, part in checkpoint.components.items():
        weights = {}
        for key, weight in part.weights.items():
            scheme = spec.scheme(name, key, weight.shape)
            stored = layout(scheme, weight.info)
            pieces = {info.name.removeprefix(key): Piece(weight.pieces[""].file, info) for info in stored}
            weights[key] = Weight(key, weight.shape, scheme, pieces)
        parts[name] = Component(name, part.folder, part.config, weights)
    return replace(checkpoint, components=parts)
