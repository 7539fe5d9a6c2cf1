"""Counts the bytes of live tensor storages on a simulated card, as a device's allocator holds them.

The card is the device "cpu:0": torch computes there as on "cpu", but copies what is moved there. A
storage is on the card if an operator was told to make it there, or was told nothing and had an
input from there; all else is the host's. The counter sees every operator that torch dispatches. It
watches a real run, or one on FakeTensors for sizes that no test machine has, and knows nothing of
plans or formulas. What an operator allocates inside itself is not seen.
"""

import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quant.checkpoint import Checkpoint, Component
from quant.spec import MARKER, ROTATED, SCHEMES, QuantSpec, find_rotation, lay_out, name_stored
from quant.weights import Piece, Weight

CARD = "cpu:0"


class Counter(TorchDispatchMode):
    """Counts while it is entered; over its budget it raises the allocator's own error.

    Who drives the run says in `phase` which phase it is in.
    """

    def __init__(self, budget: int | None = None) -> None:
        """`budget` is the most bytes that may live on the card."""
        super().__init__()
        self.budget = budget
        self.phase = ""
        self.live = {True: 0, False: 0}  # bytes now, by whether they are on the card
        self.peaks: dict[str, int] = {}  # most bytes on the card by phase
        self.host = 0  # most bytes beside the card
        self.allocations = 0  # on the card
        self.starts: dict[str, int] = {}  # the number of the first allocation of each phase
        self.fail_at: int | None = None  # the number of the allocation that fails
        self._on_card: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by storage

    @property
    def peak(self) -> int:
        """Most bytes on the card in any phase."""
        return max(self.peaks.values(), default=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {tensor.untyped_storage() for tensor in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        on_card = self._is_for_card(kwargs.get("device"), given)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            is_new = storage not in given and storage not in self._on_card
            if is_new and tensor.device.type != "meta":
                self._add(storage, on_card=on_card)
        return result

    def _is_for_card(self, device: object, given: set[torch.UntypedStorage]) -> bool:
        """Whether what an operator makes is on the card: as it was told, else as its inputs."""
        if device is not None:
            return torch.device(device).index == 0
        return any(self._on_card.get(storage, False) for storage in given)

    def _add(self, storage: torch.UntypedStorage, *, on_card: bool) -> None:
        size = storage.nbytes()
        if on_card:
            self._allocate(size)
        self._on_card[storage] = on_card
        self.live[on_card] += size
        if on_card:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live[True])
        else:
            self.host = max(self.host, self.live[False])
        weakref.finalize(storage, self._free, size, on_card).atexit = False

    def _allocate(self, size: int) -> None:
        """Number an allocation on the card; raises torch.OutOfMemoryError where it fails."""
        self.allocations += 1
        self.starts.setdefault(self.phase, self.allocations)
        is_over = self.budget is not None and self.live[True] + size > self.budget
        if is_over or self.allocations == self.fail_at:
            said = f"{self.live[True]} bytes live, {size} more, {self.budget} allowed"
            raise torch.OutOfMemoryError(said)

    def _free(self, size: int, on_card: bool) -> None:
        self.live[on_card] -= size


def _tensors(tree: object) -> list[torch.Tensor]:
    leaves, _ = tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def pretend_baked(checkpoint: Checkpoint, spec: QuantSpec) -> Checkpoint:
    """The same model as if it had been baked: by its headers, there are no such files."""
    components = {}
    for name, part in checkpoint.components.items():
        weights = {}
        for key, weight in part.weights.items():
            scheme = spec.choose_scheme(name, key, weight.shape)
            file = weight.pieces[""].file
            pieces = {}
            for info in lay_out(scheme, weight.info):
                pieces[info.name.removeprefix(key)] = Piece(file, info)
            rotation = group = 0
            if scheme in ROTATED:
                pieces.pop(name_stored(key, MARKER))
                rotation = find_rotation(weight.shape[1])
                group = SCHEMES[scheme].group
            weights[key] = Weight(key, weight.shape, scheme, pieces, rotation=rotation, group=group)
        components[name] = Component(name, part.folder, part.config, weights)
    return replace(checkpoint, components=components)
