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
    hooks: list[tuple[str, Hook]] = []
    for adapter in adapters:
        reader = Reader()
        for part in adapter.active_parts(component):
            spans = _find_spans(part, places)
            if spans:
                stored = reader.read_checked(part.stored)
                tensors = {kind: tensor.to(device, dtype) for kind, tensor in stored.items()}
                for layer, here in spans.items():
                    hook = _make_hook(tensors, here, scale=adapter.scale * part.factor)
                    hooks.append((layer, hook))
    # Every tensor has been read: from here on nothing fails.
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
    """The forward hook of a part for one layer."""
    if NORM in tensors:
        return _make_norm_hook(tensors[NORM])
    return _make_low_rank_hook(
        down=tensors[DOWN],
        up=tensors[UP],
        bias=tensors.get(BIAS),
        spans=spans,
        scale=scale,
    )


def _make_norm_hook(weight: Tensor) -> Hook:
    """A hook that gives the output of a norm with another weight."""

    def compute_norm(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return nn.functional.rms_norm(inputs[0], weight.shape, weight, module.eps)

    return compute_norm


def _make_low_rank_hook(
    *, down: Tensor, up: Tensor, bias: Tensor | None, spans: Sequence[Span], scale: float
) -> Hook:
    """A hook that adds `scale` x (B (A x) + b) to columns of the output, in place.

    `down` is A (r, K), `up` is B (N, r), `bias` is b (N).
    """

    def add_product(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows_of_input = inputs[0].reshape(-1, down.shape[1])  # (M, K)
        low = rows_of_input @ down.T  # (M, r)
        rows_of_output = output.view(-1, output.shape[-1])  # (M, N or more)
        for span in spans:
            target = rows_of_output[:, span.columns]
            target.addmm_(low, up[span.rows].T, alpha=scale)
            if bias is not None:
                target.add_(bias[span.rows], alpha=scale)

    return add_product
