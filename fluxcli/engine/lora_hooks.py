"""Low-rank adapters on layers of whatever class, quantized, fused or streamed: they add to outputs.

The layers' own tensors are neither changed nor copied: the adapter's lie in forward hooks, on the
device that computes. Knows modules and `quant.lora`, nothing of requests or plans.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fluxcli.engine.loader import Place
from quant.codecs import Reader
from quant.lora import BIAS, DOWN, NORM, UP, Adapter, Part

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


class Span(NamedTuple):
    """Which columns of a layer's output grow by which rows of the adapter's B."""

    columns: slice
    rows: slice


def attach(
    module: nn.Module,
    adapters: Iterable[Adapter],
    component: str,
    *,
    places: Mapping[str, Place],
    dtype: torch.dtype,
    device: str,
) -> list[RemovableHandle]:
    """Make the module's layers add what the adapters say, in their order.

    `places` tells where in the module the model's layers are; those that are not in it are left
    alone. Returns handles whose `remove` undoes it. Raises `CheckpointError` for values that are
    not finite; then nothing is attached.
    """
    hooks: list[tuple[str, Hook]] = []  # all tensors are read before the first one acts
    for adapter in adapters:
        reader = Reader()
        for part in adapter.active_parts(component):
            spans = _find_spans(part, places)
            if spans:
                stored = reader.read_checked(part.stored)
                tensors = {kind: tensor.to(device, dtype) for kind, tensor in stored.items()}
                scale = adapter.scale * part.factor
                for layer, here in spans.items():
                    hooks.append((layer, _make_hook(tensors, here, scale=scale)))
    return [module.get_submodule(layer).register_forward_hook(hook) for layer, hook in hooks]


def _find_spans(part: Part, places: Mapping[str, Place]) -> dict[str, list[Span]]:
    """By the module's layers: what of their outputs grows by which rows of the part's B."""
    spans: dict[str, list[Span]] = {}
    for name, (start, stop) in part.layers.items():
        if name in places:
            layer, first = places[name]
            columns = slice(first, first + stop - start)
            spans.setdefault(layer, []).append(Span(columns, slice(start, stop)))
    return spans


def _make_hook(tensors: Mapping[str, Tensor], spans: Sequence[Span], *, scale: float) -> Hook:
    """A forward hook for one layer.

    It adds `scale` x (B (A x) + b) to columns of the output, in place; or, where the part is
    another weight for a norm, gives the norm's output with that weight.
    """

    def compute_norm(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        weight = tensors[NORM]
        return nn.functional.rms_norm(inputs[0], weight.shape, weight, module.eps)

    def add_product(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        low = inputs[0].reshape(-1, tensors[DOWN].shape[1]) @ tensors[DOWN].T  # (M, r)
        every_column = output.view(-1, output.shape[-1])  # (M, N)
        for columns, rows in spans:
            added = every_column[:, columns].addmm_(low, tensors[UP][rows].T, alpha=scale)
            if BIAS in tensors:
                added.add_(tensors[BIAS][rows], alpha=scale)

    return compute_norm if NORM in tensors else add_product
