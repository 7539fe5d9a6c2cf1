"""The arithmetic of adapters: products with what they add to a weight, and its rows.

dW (N, K) is never made whole: it is multiplied by way of its factors, or some rows of it at a time,
in float32. Knows no modules and no names of layers. Shapes: activations (M, K), products (M, N).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quant.codecs import Reader
from quant.errors import CheckpointError
from quant.lora import CHUNK, KRONECKER_ROWS, Part
from quant.lora_names import (
    BIAS,
    DIFF,
    DIFF_B,
    DORA_SCALE,
    DOWN,
    LOHA,
    LOKR,
    MAGNITUDE,
    UP,
)
from quant.weights import RowRanges, Weight


class Span(NamedTuple):
    """Which columns of a layer's output grow by which rows of dW."""

    columns: slice
    rows: slice


class Delta(Protocol):
    """What an adapter adds to a weight, without its factor."""

    def rows(self, rows: slice) -> Tensor:
        """Rows of dW in float32."""

    def add_product(
        self, x: Tensor, output: Tensor, spans: Sequence[Span], *, scale: float, gain: Tensor | None
    ) -> None:
        """Add scale x (gain *) (x dW^T) to the output, in place.

        `gain` (N,) has a factor for each row of dW.
        """


class LowRank:
    """B A, with A (r, K) and B (N, r)."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self._down = down
        self._up = up

    def rows(self, rows: slice) -> Tensor:
        return self._up[rows].float() @ self._down.float()

    def add_product(
        self, x: Tensor, output: Tensor, spans: Sequence[Span], *, scale: float, gain: Tensor | None
    ) -> None:
        low = x @ self._down.T  # (M, r)
        for span in spans:
            up = self._up[span.rows]
            if gain is not None:
                up = up * gain[span.rows, None]
            output[:, span.columns].addmm_(low, up.T, alpha=scale)


class Kronecker:
    """kron(W1, W2), each of them the product of its factors."""

    def __init__(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self._first = first
        self._second = second
        self._columns = (first[-1].shape[1], second[-1].shape[1])

    def rows(self, rows: slice) -> Tensor:
        first = _multiply(self._first)  # (N1, K1)
        second = _multiply(self._second)  # (N2, K2)
        wanted = torch.arange(rows.start, rows.stop, device=first.device)
        left = first[wanted // len(second)]
        right = second[wanted % len(second)]
        return (left[:, :, None] * right[:, None, :]).flatten(1)

    def add_product(
        self, x: Tensor, output: Tensor, spans: Sequence[Span], *, scale: float, gain: Tensor | None
    ) -> None:
        for part, target in zip(
            torch.split(x, KRONECKER_ROWS), torch.split(output, KRONECKER_ROWS), strict=True
        ):
            product = self._product(part)
            if gain is not None:
                product = product * gain
            for span in spans:
                target[:, span.columns].add_(product[:, span.rows], alpha=scale)

    def _product(self, x: Tensor) -> Tensor:
        """The product (M, N): by W2 along the inner index of the columns, by W1 along the outer."""
        found = x.view(len(x), *self._columns)
        for factor in reversed(self._second):
            found = found @ factor.T
        found = found.transpose(1, 2)  # (M, N2, K1)
        for factor in reversed(self._first):
            found = found @ factor.T
        return found.transpose(1, 2).flatten(1)  # (M, N1 x N2)


class _ByRows:
    """A dW that is multiplied some rows at a time."""

    def rows(self, rows: slice) -> Tensor:
        raise NotImplementedError

    def add_product(
        self, x: Tensor, output: Tensor, spans: Sequence[Span], *, scale: float, gain: Tensor | None
    ) -> None:
        for span in spans:
            target = output[:, span.columns]
            for rows in split_rows(span.rows, columns=x.shape[1]):
                weight = self.rows(rows)
                if gain is not None:
                    weight = weight * gain[rows, None]
                here = slice(rows.start - span.rows.start, rows.stop - span.rows.start)
                target[:, here].addmm_(x, weight.to(x.dtype).T, alpha=scale)


class Hadamard(_ByRows):
    """(W1a W1b) * (W2a W2b), element by element."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self._w1_a, self._w1_b, self._w2_a, self._w2_b = factors

    def rows(self, rows: slice) -> Tensor:
        first = self._w1_a[rows].float() @ self._w1_b.float()
        return first.mul_(self._w2_a[rows].float() @ self._w2_b.float())


class Whole(_ByRows):
    """A matrix of a file, which is read anew for every product."""

    def __init__(self, reader: Reader, stored: Weight, device: str) -> None:
        self._reader = reader
        self._stored = stored
        self._device = device

    def rows(self, rows: slice) -> Tensor:
        piece = replace(self._stored.pieces[DIFF], rows=((rows.start, rows.stop),))
        stored = replace(self._stored, pieces={DIFF: piece})
        return self._reader.read(stored)[DIFF].to(self._device).float()


def _multiply(factors: Sequence[Tensor]) -> Tensor:
    """The product of one or two matrices in float32."""
    product = factors[0].float()
    for factor in factors[1:]:
        product = product @ factor.float()
    return product


def place_rows(ranges: RowRanges, first: int) -> list[Span]:
    """Where ranges of dW's rows are in an output, one after the other from its column `first`."""
    spans = []
    for start, stop in ranges:
        spans.append(Span(slice(first, first + stop - start), slice(start, stop)))
        first += stop - start
    return spans


def split_rows(rows: slice, *, columns: int) -> Iterator[slice]:
    """Ranges of rows, of which each has about `CHUNK` values."""
    step = max(1, CHUNK // max(1, columns))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def read_part(part: Part, reader: Reader, *, device: str, dtype: torch.dtype) -> "ReadPart":
    """Read a part of an adapter; raises `CheckpointError` for values that are not finite."""
    if part.is_read_again:
        # Here it is only checked.
        reader.read_checked(part.stored)
    pieces = dict(part.stored.pieces)
    if part.is_read_again:
        del pieces[DIFF]
    stored = reader.read_checked(replace(part.stored, pieces=pieces)) if pieces else {}
    tensors = {kind: tensor.to(device, dtype) for kind, tensor in stored.items()}
    delta = _make_delta(part, tensors, reader=reader, device=device)
    return ReadPart(part, tensors, delta)


class ReadPart:
    """A part of an adapter with its tensors: dW, None where it changes no matrix, and others."""

    def __init__(self, part: Part, tensors: Mapping[str, Tensor], delta: Delta | None) -> None:
        self.part = part
        self.delta = delta
        self.tensors = tensors

    @property
    def magnitude(self) -> Tensor | None:
        """The norms that the weight gets: (N,) of its rows, or (1, K) of its columns."""
        for kind in (MAGNITUDE, DORA_SCALE):
            if kind in self.tensors:
                found = self.tensors[kind].float()
                is_of_columns = found.ndim == 2 and found.shape[0] == 1 != self.part.shape[0]
                return found if is_of_columns else found.flatten()
        return None

    def split_scale(self, scale: float) -> tuple[float, float]:
        """(by what dW is scaled, by what then the whole difference to the weight is).

        They differ where norms are taken in between: peft scales dW within the norms; ComfyUI, for
        which LyCORIS, kohya's scripts and OneTrainer write, the whole difference.
        """
        if DORA_SCALE in self.tensors:
            return self.part.factor, scale
        return self.part.factor * scale, 1.0

    def check_columns(self, spans: Sequence[Span]) -> None:
        """Raise `CheckpointError` for norms of columns if the spans have not all rows of dW."""
        magnitude = self.magnitude
        here = sum(span.rows.stop - span.rows.start for span in spans)
        if magnitude is not None and magnitude.ndim == 2 and here != self.part.shape[0]:
            name = self.part.stored.name.rstrip(".")
            why = f"{name} has norms of columns over q, k and v, which are layers of their own here"
            file = next(iter(self.part.stored.pieces.values())).file
            raise CheckpointError("a DoRA that does not fit this precision", file, why=why)

    def sum_biases(self, scale: float) -> Tensor | None:
        """What is added to the bias (N,), at a scale of the adapter; None for nothing."""
        found = None
        if BIAS in self.tensors:
            found = self.tensors[BIAS] * (scale * self.part.factor)
        if DIFF_B in self.tensors:
            more = self.tensors[DIFF_B] * scale
            found = more if found is None else found + more
        return found


def _make_delta(
    part: Part, tensors: Mapping[str, Tensor], *, reader: Reader, device: str
) -> Delta | None:
    """dW of a part with these tensors; None where it changes no matrix."""
    if part.is_read_again:
        return Whole(reader, part.stored, device)
    if DOWN in tensors:
        return LowRank(tensors[DOWN], tensors[UP])
    if LOHA[0] in tensors:
        return Hadamard([tensors[name] for name in LOHA])
    if tensors.keys() & set(LOKR):
        first = [tensors[name] for name in LOKR[:3] if name in tensors]
        second = [tensors[name] for name in LOKR[3:] if name in tensors]
        return Kronecker(first, second)
    return None


def measure_norms(
    read: ReadPart,
    spans: Sequence[Span],
    *,
    read_rows: Callable[[slice], Tensor],
    inside: float,
) -> Tensor:
    """The norms of W + `inside` x dW: of its rows (N,), or of its columns (K,), in float32.

    `read_rows` gives rows of a layer's weight in float32, by the columns of its output. Rows that
    are in no span have the norm 1; one of 0 is taken for the smallest number.
    """
    magnitude = read.magnitude
    assert magnitude is not None
    rows_count, columns_count = read.part.shape
    of_rows = torch.ones(rows_count, device=magnitude.device)
    squares = torch.zeros(columns_count, device=magnitude.device)
    for span in spans:
        for rows in split_rows(span.rows, columns=columns_count):
            first = span.columns.start + rows.start - span.rows.start
            weight = read_rows(slice(first, first + rows.stop - rows.start))
            if read.delta is not None:
                weight = weight.add(read.delta.rows(rows), alpha=inside)
            of_rows[rows] = weight.norm(dim=1)
            squares += weight.square().sum(0)
    norms = squares.sqrt() if magnitude.ndim == 2 else of_rows
    return norms.clamp_(min=torch.finfo(torch.float32).tiny)


def merge_weight(values: Tensor, read: ReadPart, spans: Sequence[Span], *, scale: float) -> Tensor:
    """A float32 weight (N, K) with a part of an adapter in it; `spans` place dW's rows in its own.

    Raises `CheckpointError` for norms of columns over rows that lie in several layers.
    """
    inside, blend = read.split_scale(scale)
    merged = values.clone()
    if read.delta is not None:
        for span in spans:
            for rows in split_rows(span.rows, columns=values.shape[1]):
                first = span.columns.start + rows.start - span.rows.start
                here = merged[first : first + rows.stop - rows.start]
                here.add_(read.delta.rows(rows), alpha=inside)
    magnitude = read.magnitude
    if magnitude is None:
        return merged
    read.check_columns(spans)
    norms = measure_norms(read, spans, read_rows=lambda rows: values[rows], inside=inside)
    gain = magnitude / norms
    if magnitude.ndim == 2:
        merged *= gain
    else:
        for span in spans:
            merged[span.columns] *= gain[span.rows, None]
    return values.lerp(merged, blend)
