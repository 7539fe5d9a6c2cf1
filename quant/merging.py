"""Merge adapters into weights that are baked, and measure how much of each of them arrives there.

Quantizing rounds a weight to coarse steps. A change that is smaller than these is lost among them,
which two figures tell: with D, the change that an adapter makes, and d, the difference of what is
stored with the adapter and without it, the projection <d, D> / <D, D> is 1 where the change arrives
as a whole. The noise ||d - D|| / ||D|| is 1 where nothing of it arrives, and above where rounding
adds more than the change.

Adapters are merged one after the other, and each is compared with what was there before it, so that
their differences add up. Knows no files of checkpoints.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant import codecs
from quant.deltas import merge_weight, place_rows, read_part, split_rows
from quant.files import explain_reading
from quant.lora import Adapter, Part, split_name
from quant.lora_names import DIFF, NORM
from quant.recipe import OutputTensor
from quant.rotated import rotate
from quant.spec import ROTATED, find_rotation

# So many layers of an adapter are named in a manifest, those with the most noise.
NAMED_LAYERS = 5
DIGITS = 4  # of the figures in a manifest


# --- merging


def merge_adapter(adapter: Adapter, output: OutputTensor, values: Tensor) -> Tensor | None:
    """An output tensor's float32 values with what an adapter adds; None where that is nothing.

    `values` are the rows of its sources, one below the other.
    """
    component = output.component
    names = [source.name for source in output.sources]
    if not any(adapter.find_parts(component, name) for name in names):
        return None
    rows = torch.split(values, [source.shape[0] for source in output.sources])
    merged = [
        merge_source(adapter, component, name=name, values=part)
        for name, part in zip(names, rows, strict=True)
    ]
    return codecs.stack_rows(merged)


def merge_source(adapter: Adapter, component: str, *, name: str, values: Tensor) -> Tensor:
    """The float32 values of a component's tensor with what an adapter adds to it."""
    layer, leaf = split_name(name)
    total = values.float()
    for part in adapter.find_parts(component, name):
        total = _merge_part(total, part, layer, leaf=leaf, scale=adapter.scale)
    return total


def order_rows(output: OutputTensor, values: Tensor) -> Tensor:
    """The rows of an output tensor's sources in the order in which they are stored."""
    if not output.swaps_halves:
        return values
    first, second = values.chunk(2)
    return codecs.stack_rows([second, first])


def _merge_part(values: Tensor, part: Part, layer: str, *, leaf: str, scale: float) -> Tensor:
    """The new float32 values of a layer's "weight" or "bias" (`leaf`) after one part of an adapter.

    A norm's new weight replaces them, everything else is added.
    """
    with explain_reading(next(iter(part.stored.pieces.values())).file):
        read = read_part(part, codecs.Reader(), device="cpu", dtype=torch.float32)
    spans = place_rows(part.layers[layer], 0)
    if leaf == "bias":
        biases = read.sum_biases(scale)
        if biases is None:
            return values
        return values + codecs.stack_rows([biases[span.rows] for span in spans])
    if NORM in read.tensors:
        return read.tensors[NORM]
    if len(part.shape) == 1:
        return values + scale * read.tensors[DIFF] if DIFF in read.tensors else values
    return merge_weight(values, read, spans, scale=scale)


# --- measuring


@dataclass
class _Sums:
    """Sums over values, of the change D that was merged and of what arrived of it, d."""

    squared_change: float = 0.0  # <D, D>
    product: float = 0.0  # <d, D>
    squared_noise: float = 0.0  # ||d - D||^2

    def add(self, other: "_Sums") -> None:
        self.squared_change += other.squared_change
        self.product += other.product
        self.squared_noise += other.squared_noise

    @property
    def projection(self) -> float | None:
        """<d, D> / <D, D>; None where nothing was changed."""
        if not self.squared_change:
            return None
        return self.product / self.squared_change

    @property
    def noise(self) -> float | None:
        """||d - D|| / ||D||; None where nothing was changed."""
        if not self.squared_change:
            return None
        return float((self.squared_noise / self.squared_change) ** 0.5)


class Arrival:
    """How much of one adapter arrives in what is stored: sums for each layer that it changes."""

    def __init__(self) -> None:
        self._layers: dict[str, _Sums] = defaultdict(_Sums)

    def add(
        self,
        output: OutputTensor,
        *,
        before: Tensor,
        after: Tensor,
        stored: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> None:
        """Compare an output tensor before and after the adapter with what is stored of both.

        What is stored rotated is compared in its own basis, in which norms are the same.
        """
        read_without, read_with = (_make_row_reader(each, output) for each in stored)
        rotation = find_rotation(before.shape[-1]) if output.scheme in ROTATED else 0
        sums = self._layers[output.name.rpartition(".")[0]]
        for rows in split_rows(slice(0, len(before)), columns=before[0].numel()):
            arrived = (read_with(rows) - read_without(rows)).flatten()
            merged = (after[rows].float() - before[rows].float()).to(arrived.device)
            change = rotate(merged, rotation).flatten()
            sums.squared_change += float(change.dot(change))
            sums.product += float(arrived.dot(change))
            noise = arrived.sub_(change)
            sums.squared_noise += float(noise.dot(noise))

    def describe(self) -> dict[str, Any]:
        """The figures for a manifest: those of all layers together, and the noisiest layers."""
        whole = _Sums()
        noises = {}
        for layer, sums in self._layers.items():
            whole.add(sums)
            if sums.noise is not None:
                noises[layer] = round(sums.noise, DIGITS)
        worst = sorted(noises, key=lambda layer: -noises[layer])[:NAMED_LAYERS]
        return {
            "projection": _round(whole.projection),
            "noise": _round(whole.noise),
            "layers": len(noises),
            "drowned_layers": sum(noise >= 1 for noise in noises.values()),
            "worst_layers": {layer: noises[layer] for layer in worst},
        }


def _round(figure: float | None) -> float | None:
    return None if figure is None else round(figure, DIGITS)


def _make_row_reader(
    stored: Mapping[str, Tensor], output: OutputTensor
) -> Callable[[slice], Tensor]:
    """Return what gives rows, in float32, of an output tensor as it is stored, not rotated back.

    NF4's blocks go over the ends of rows, so that its values are made as a whole.
    """
    shape = output.info.shape
    if output.scheme == "nf4":
        whole = codecs.dequantize(stored, output.scheme, shape, torch.float32)
        return lambda rows: whole[rows]

    def read_rows(rows: slice) -> Tensor:
        part = codecs.cut_stored(stored, rows)
        part_shape = (rows.stop - rows.start, *shape[1:])
        return codecs.dequantize(part, output.scheme, part_shape, torch.float32)

    return read_rows
