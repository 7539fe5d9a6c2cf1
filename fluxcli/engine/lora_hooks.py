"""Adapters on layers of whatever class, quantized, fused or streamed: they add to outputs.

The layers' own tensors are neither changed nor copied: the adapter's lie in forward hooks, on the
device that computes. Knows modules and `quant.deltas`, nothing of requests or plans.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from fluxcli.engine.loader import Place
from quant.codecs import Reader
from quant.deltas import ReadPart, Span, measure_norms, place_rows, read_part
from quant.linear import QuantizedLinear
from quant.lora import Adapter, Part
from quant.lora_names import DIFF, NORM

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


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
    first: dict[str, list[Hook]] = {}  # what looks at a layer's own output comes before the others
    then: dict[str, list[Hook]] = {}
    magnitudes: dict[str, list[_Magnitude]] = {}
    widened: dict[str, _WidenedInput] = {}
    for adapter in adapters:
        reader = Reader()
        for part in adapter.active_parts(component):
            found = _find_spans(part, places)
            if not found:
                continue
            read = read_part(part, reader, device=device, dtype=dtype)
            for layer, spans in found.items():
                if NORM in read.tensors:
                    first.setdefault(layer, []).append(_make_norm_hook(read.tensors[NORM]))
                    continue
                if len(part.shape) == 1:
                    hook = _make_norm_diff_hook(read, adapter.scale)
                    then.setdefault(layer, []).append(hook)
                    continue
                magnitude = None
                if read.magnitude is not None:
                    read.check_columns(spans)
                    magnitude = _Magnitude(read, spans, scale=adapter.scale)
                    magnitudes.setdefault(layer, []).append(magnitude)
                hook = _make_linear_hook(read, spans, scale=adapter.scale, magnitude=magnitude)
                own_columns = _count_columns(module.get_submodule(layer))
                if part.shape[1] > own_columns:
                    wide = widened.setdefault(layer, _WidenedInput(own_columns))
                    hook = wide.make_hook(hook)
                then.setdefault(layer, []).append(hook)
    for layer, of_layer in magnitudes.items():
        first.setdefault(layer, []).append(_MagnitudeHook(of_layer))
    # Every tensor has been read: from here on nothing fails.
    handles: list[RemovableHandle] = [
        module.get_submodule(layer).register_forward_pre_hook(wide.cut)
        for layer, wide in widened.items()
    ]
    for hooks in (first, then):
        for layer, of_this in hooks.items():
            owner = module.get_submodule(layer)
            handles += [owner.register_forward_hook(hook) for hook in of_this]
    return handles


def _count_columns(layer: Any) -> int:
    """The size of a linear layer's input."""
    return int(layer.in_features)


def _find_spans(part: Part, places: Mapping[str, Place]) -> dict[str, list[Span]]:
    """By the module's layers: what of their outputs grows by which rows of the part's dW."""
    spans: dict[str, list[Span]] = {}
    for name, ranges in part.layers.items():
        if name in places:
            layer, first_row = places[name]
            spans.setdefault(layer, []).extend(place_rows(ranges, first_row))
    return spans


# --- norms


def _make_norm_hook(weight: Tensor) -> Hook:
    """A hook that gives the output of a norm with another weight."""

    def compute_norm(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return functional.rms_norm(inputs[0], weight.shape, weight, module.eps)

    return compute_norm


def _make_norm_diff_hook(read: ReadPart, scale: float) -> Hook:
    """A hook that adds what a norm gives with a difference for its weight, and one to its bias."""
    weight = read.tensors.get(DIFF)
    if weight is not None:
        weight = weight * scale
    bias = read.sum_biases(scale)

    def add_norm(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total = output
        if weight is not None and isinstance(module, nn.LayerNorm):
            total = total + functional.layer_norm(
                inputs[0], weight.shape, weight, eps=module.eps
            ).to(output)
        elif weight is not None:
            # transformers' norm of T5 has another name for it.
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            total = total + functional.rms_norm(inputs[0], weight.shape, weight, eps).to(output)
        if bias is not None:
            total = total + bias
        return total

    return add_norm


# --- linear layers


def _make_linear_hook(
    read: ReadPart, spans: Sequence[Span], *, scale: float, magnitude: "_Magnitude | None"
) -> Hook:
    """A hook that adds x dW^T and the biases to columns of the output, in place."""
    columns = read.part.shape[1]
    bias = read.sum_biases(scale)
    factor = scale * read.part.factor

    def add_product(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].reshape(-1, columns)  # (M, K)
        rows_of_output = output.view(-1, output.shape[-1])  # (M, N or more)
        gain = None
        if magnitude is not None and magnitude.is_of_columns:
            x = x * magnitude.gain
        elif magnitude is not None:
            gain = magnitude.gain
        if read.delta is not None:
            read.delta.add_product(x, rows_of_output, spans, scale=factor, gain=gain)
        if bias is not None:
            for span in spans:
                rows_of_output[:, span.columns].add_(bias[span.rows])

    return add_product


class _WidenedInput:
    """The input of a layer that has more columns than its weight.

    An adapter multiplies all of them, the layer its own, which come first: so its weight need not
    grow by columns of zeros, in whatever way it is stored.
    """

    def __init__(self, own_columns: int) -> None:
        self._own_columns = own_columns
        self._whole: tuple[Tensor, ...] = ()

    def cut(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Keep the input (B, S, K) for the adapter, and leave the layer its own columns."""
        self._whole = inputs
        return inputs[0][..., : self._own_columns]

    def make_hook(self, hook: Hook) -> Hook:
        """Make a hook that is given the whole input instead of the layer's."""

        def run(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return hook(module, self._whole, output)

        return run


class _Magnitude:
    """The magnitude of a DoRA on one layer.

    `gain` is the magnitude divided by the norms of W + dW: (N,) for rows, (K,) for columns. It is
    computed in the first forward, when the layer has its tensors wherever they are kept.
    """

    def __init__(self, read: ReadPart, spans: Sequence[Span], *, scale: float) -> None:
        magnitude = read.magnitude
        assert magnitude is not None
        self.read = read
        self.spans = spans
        self.is_of_columns = magnitude.ndim == 2
        self.inside, self.blend = read.split_scale(scale)
        self._magnitude = magnitude.flatten()
        self._gain: Tensor | None = None

    @property
    def gain(self) -> Tensor:
        """The factors, once they are measured."""
        assert self._gain is not None, "the hook that measures comes first"
        return self._gain

    def measure(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Compute the gain of the layer, unless it is there."""
        if self._gain is not None:
            return
        norms = measure_norms(
            self.read,
            self.spans,
            read_rows=lambda rows: _read_rows(module, rows),
            inside=self.inside,
        )
        self._gain = (self._magnitude / norms).to(dtype)


def _read_rows(module: nn.Module, rows: slice) -> Tensor:
    """Rows of a linear layer's weight in float32."""
    if isinstance(module, QuantizedLinear):
        return module.dequantize_rows(rows, torch.float32)
    weight: Any = module.weight
    return weight[rows].float()


class _MagnitudeHook:
    """Scales what a layer gives alone, for all its DoRAs together; the bias is left as it is."""

    def __init__(self, magnitudes: Sequence[_Magnitude]) -> None:
        self._magnitudes = magnitudes
        self._multiplier: Tensor | None = None  # (N,) of the layer's output

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._multiplier is None:
            self._multiplier = self._prepare(module, output)
        rows_of_output = output.view(-1, output.shape[-1])
        rows_of_output.mul_(self._multiplier)
        if module.bias is not None:
            rows_of_output.add_(module.bias.to(output) * (1 - self._multiplier))
        for magnitude in self._magnitudes:
            if magnitude.is_of_columns:
                # W (gain x) - W x, without the bias that forward adds.
                x = inputs[0] * (magnitude.gain - 1)
                more = module.forward(x).view(rows_of_output.shape)
                if module.bias is not None:
                    more = more - module.bias.to(output)
                for span in magnitude.spans:
                    target = rows_of_output[:, span.columns]
                    target.add_(more[:, span.columns], alpha=magnitude.blend)

    def _prepare(self, module: nn.Module, output: Tensor) -> Tensor:
        """By what each column of the output is multiplied."""
        multiplier = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        for magnitude in self._magnitudes:
            magnitude.measure(module, output.dtype)
            if not magnitude.is_of_columns:
                for span in magnitude.spans:
                    more = magnitude.blend * (magnitude.gain[span.rows] - 1)
                    multiplier[span.columns] += more
        return multiplier
