"""Read, quantize and dequantize one weight.

`quant.nf4` does so for NF4, `quant.rotated` for int8, w6a8 and w4a8. fp8 is quantized by
optimum-quanto with a scale for each row; its import takes seconds, and happens only where something
is quantized. `quant.gguf_blocks` dequantizes GGUF's blocks, `quant.block_scaled` nvfp4 and
mxfp8. Knows nothing of layers, models or folders.

A weight's stored tensors are a dict by what follows the weight's name in a file, as in
`quant.spec.lay_out`: "" for the codes, "_scale" for the scales of fp8 and int8. A weight that is
not quantized is its values under "". The headers of the files were validated before.
"""

import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from quant import block_scaled, gguf_blocks, nf4, rotated
from quant.errors import CheckpointError, MissingLibrary
from quant.gguf_header import MAGIC
from quant.header import LENGTH_BYTES
from quant.spec import (
    CHANNEL_SCALE,
    FAMILIES,
    GROUP_SCALE,
    LEVELS,
    MARKER,
    OVERALL_SCALE,
    ROTATED,
    ROW_SCALE,
    SCALED_BLOCKS,
    SCHEMES,
    STATE,
    TILED,
)
from quant.tensor_info import GGUF_BITS, gguf_block_values
from quant.weights import SCB, SHARED, Piece, Weight

# torch's dtypes by safetensors' names, of those that weights and biases have.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Where the float16 scales are in a block of each of GGUF's types, in bytes.
GGUF_SCALES = {
    "Q4_0": slice(0, 2),
    "Q5_0": slice(0, 2),
    "Q8_0": slice(0, 2),
    "Q4_1": slice(0, 4),
    "Q5_1": slice(0, 4),
    "IQ4_NL": slice(0, 2),
    "IQ4_XS": slice(0, 2),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q2_K": slice(-4, None),
    "Q3_K": slice(-2, None),
    "Q6_K": slice(-2, None),
}
# Values that are quantized at a time.
CHUNK = 1 << 19
# The scale of a row of zeros.
SMALLEST_SCALE = 1e-12
# The factor by which a bound on the error is raised, as it is computed with rounding, too.
SLACK = 1.001
# The largest error of NF4, relative to the weight's norm; Gaussian weights have 0.085 to 0.092.
NF4_BOUND = 0.15
# By how many of its row's scale a value of the rotated schemes is wrong at most: half of the widest
# gap of two levels for the largest scale of a group that is tried, and half a step for rounding.
# int8's scale is 0.85 of the one without clipping at least.
ROTATED_STEPS = {"int8": 0.65, "w6a8": 3.0, "w4a8": 14.0}
# What is read from a state or a codebook, and made of SCB, happens on the host: readers ask for its
# values, and a device divides in another way.
ON_THE_HOST = (SCB, STATE, LEVELS)
NOT_FINITE = "weights that are not finite"
DAMAGED = "the file is damaged: make or download it again"


@dataclass(frozen=True)
class Quantized:
    """A quantized weight as its stored tensors.

    `relative_error` is the norm of the difference of its values to the weight's, divided by the
    norm of the weight.
    """

    stored: dict[str, Tensor]
    relative_error: float


# Fills a buffer of bytes with what a file has from a position on.
Fill = Callable[[Tensor, int], None]
# Makes a tensor of so many bytes and has it filled, part by part.
Bring = Callable[[int, Fill], Tensor]


def fill_from(data: Tensor) -> Fill:
    """Fill buffers from the bytes (n,) of a tensor in RAM."""

    def fill(buffer: Tensor, start: int) -> None:
        buffer.copy_(data[start : start + buffer.numel()])

    return fill


def bring_to_host(size_bytes: int, fill: Fill) -> Tensor:
    """A tensor of so many bytes in RAM, filled at once."""
    data = torch.empty(size_bytes, dtype=torch.uint8)
    fill(data, 0)
    return data


class Reader:
    """Reads the tensors of files, each of which is opened when it is first asked for.

    They are copied, never mapped: a mapped file that becomes shorter, or whose disk fails, ends the
    process with SIGBUS. Files stay open as long as the reader lives.
    """

    def __init__(self, bring: Bring = bring_to_host) -> None:
        """`bring` says where tensors are read to: into RAM, or to a device."""
        self._bring = bring
        self._sources: dict[Path, _Source] = {}

    def read(self, weight: Weight) -> dict[str, Tensor]:
        """The stored tensors of a weight, GGUF's blocks as rows of bytes.

        Row scales are under "_scale", whatever they are called in the file, scales of blocks are
        row after row, and w4a8 has its levels. Raises `CheckpointError` where a file cannot be
        read, or has become shorter.
        """
        stored = {
            suffix: self._read_piece(suffix, piece) for suffix, piece in weight.pieces.items()
        }
        if SCB in stored:
            stored["_scale"] = self._send(stored.pop(SCB).float() / SCHEMES["int8"].largest)
        if weight.scheme in TILED:
            ranges = weight.pieces[""].rows or ((0, weight.shape[0]),)
            columns = weight.shape[1] // SCALED_BLOCKS[weight.scheme]
            stored[ROW_SCALE] = block_scaled.order_scales(stored[ROW_SCALE], ranges, columns)
        if GROUP_SCALE in stored and stored[GROUP_SCALE].dtype != torch.float8_e4m3fn:
            stored[GROUP_SCALE] = stored[GROUP_SCALE].float()
        if weight.scheme == "w4a8" and LEVELS not in stored:
            stored[LEVELS] = torch.arange(-8.0, 8.0)
        return stored

    def read_checked(
        self, weight: Weight, device: str = "cpu", *, checks: "ValueChecks | None" = None
    ) -> dict[str, Tensor]:
        """The stored tensors on a device, but for NF4's state and a codebook, which stay in RAM.

        Raises `CheckpointError` unless all values are finite; with `checks` they may do so later.
        """
        stored = self.read(weight)
        for suffix, tensor in stored.items():
            if suffix not in (STATE, LEVELS):
                stored[suffix] = tensor.to(device)
        where = weight.pieces.get("") or next(iter(weight.pieces.values()))
        if checks is None:
            check_values(weight.name, stored, where)
        else:
            checks.add(weight.name, stored, where)
        return stored

    def _read_piece(self, suffix: str, piece: Piece) -> Tensor:
        """The rows that the piece has of the tensor that holds it."""
        bring = bring_to_host if suffix in ON_THE_HOST else self._bring

        def fill(buffer: Tensor, start: int) -> None:
            self._fill(buffer, piece, start=start)

        data = bring(piece.nbytes, fill)
        if piece.info.dtype in GGUF_BITS:
            return data.view(*piece.shape[:-1], -1)
        return data.view(DTYPES[piece.info.dtype]).view(piece.shape)

    def _fill(self, buffer: Tensor, piece: Piece, *, start: int) -> None:
        """Fill a buffer in RAM with the piece's bytes from `start` on."""
        info = piece.info
        ranges = [(0, info.nbytes)]
        if piece.rows:
            row_bytes = info.nbytes // info.shape[0]
            ranges = [(first * row_bytes, stop * row_bytes) for first, stop in piece.rows]
        rest = memoryview(buffer.numpy().data)
        try:
            if piece.file not in self._sources:
                self._sources[piece.file] = _Source(piece.file)
            for first, stop in ranges:
                skipped = min(start, stop - first)  # what was read into another buffer
                start -= skipped
                part = rest[: stop - first - skipped]
                self._sources[piece.file].read_into(part, info.start + first + skipped)
                rest = rest[len(part) :]
        except OSError as error:
            why = error.strerror or "read error"
            raise CheckpointError("cannot read weights", piece.file, why=why) from error

    def _send(self, tensor: Tensor) -> Tensor:
        """A tensor in RAM, where tensors are read to."""
        data = tensor.view(-1).view(torch.uint8)
        brought = self._bring(data.numel(), fill_from(data))
        return brought.view(tensor.dtype).view(tensor.shape)


class _Source:
    """An open weight file. Its methods and its making raise `OSError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        # Where the data begin, from which offsets count.
        self._data_start = 0
        start = self._file.read(LENGTH_BYTES)
        if not start.startswith(MAGIC):
            self._data_start = LENGTH_BYTES + int.from_bytes(start, "little")

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the data from `start`; raises `CheckpointError` where it ends."""
        with self._lock:
            self._file.seek(self._data_start + start)
            while buffer:
                count = self._file.readinto(buffer)
                if not count:
                    why = "it has become shorter since its header was read"
                    raise CheckpointError("weight file is truncated", self._path, why=why)
                buffer = buffer[count:]


def take_rows(tensor: Tensor, piece: Piece) -> Tensor:
    """The rows that a piece has of the tensor that holds it; all of them without ranges."""
    if not piece.rows:
        return tensor
    return stack_rows([tensor[start:stop] for start, stop in piece.rows])


def stack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of the rows of all; a single tensor is returned as it is, without a copy."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tuple(tensors))


def import_library(scheme: str) -> ModuleType:
    """Import and return the library that quantizes to a scheme; raises `MissingLibrary`.

    The first time may take seconds.
    """
    name = SCHEMES[scheme].library
    try:
        return importlib.import_module(name.replace("-", "."))
    except ImportError as error:
        why = str(error)[:100]
        hint = f"pip install {name}"
        raise MissingLibrary(f"{name} is missing", why=why, hint=hint) from error


def quantize(
    weight: Tensor,
    scheme: str,
    *,
    name: str,
    where: Piece,
    search: bool = True,
    scalar: bool = False,
) -> Quantized:
    """Quantize a (N, K) weight; `name` and `where`, the piece it is from, are for errors.

    `search` looks for NF4's best scales, see `quant.nf4`; `scalar` gives fp8 one scale for all
    rows. Raises `CheckpointError` for values that are not finite, and for a weight that the scheme
    cannot hold: its error is larger than rounding explains.
    """
    check_values(name, {"": weight}, where)
    if scheme == "nf4":
        stored = nf4.quantize(weight, search=search)
        measured = _measure_nf4(weight, stored)
    elif scheme in ROTATED:
        stored, squared_norm, squared_error = rotated.round_weight(weight, scheme)
        scales = stored[ROW_SCALE if scheme == "int8" else CHANNEL_SCALE]
        bound = float(scales.double().norm()) * math.sqrt(weight.shape[1]) * ROTATED_STEPS[scheme]
        measured = _Measured(squared_norm, squared_error, bound)
    else:
        one_scale = None
        if scalar:
            largest = weight.abs().amax().float().clamp(min=SMALLEST_SCALE)
            one_scale = largest / SCHEMES[scheme].largest
        stored, measured = _quantize_rows(weight, scheme, one_scale=one_scale)
    relative_error = 0.0
    if measured.squared_norm:
        relative_error = math.sqrt(measured.squared_error / measured.squared_norm)
    # Comparisons are false for NaN, too.
    is_finite = measured.squared_norm <= torch.finfo(torch.float32).max
    is_within_bound = measured.squared_error <= measured.bound**2
    if not is_finite or not is_within_bound:
        why = f"{name} would differ by {relative_error:.3f} of its norm"
        hint = f"--keep {name}"
        raise CheckpointError(f"weights that {scheme} cannot hold", where.file, why=why, hint=hint)
    return Quantized(stored, relative_error)


@dataclass(frozen=True)
class _Measured:
    """Squared norms of a weight and of its error, and the largest norm that the error may have."""

    squared_norm: float
    squared_error: float
    bound: float


def _measure_nf4(weight: Tensor, stored: dict[str, Tensor]) -> _Measured:
    """Compare a weight with the values of its stored tensors."""
    squared_norm = 0.0
    squared_error = 0.0
    dequantized = nf4.dequantize(stored, tuple(weight.shape), torch.float32)
    # In parts of some rows, so that no copy of the whole is made.
    parts = zip(torch.split(weight, 256), torch.split(dequantized, 256), strict=True)
    for part, other in parts:
        values = part.float()
        squared_norm += _compute_squared_norm(values)
        squared_error += _compute_squared_norm(other.sub_(values))
    return _Measured(squared_norm, squared_error, NF4_BOUND * math.sqrt(squared_norm))


def _quantize_rows(
    weight: Tensor, scheme: str, *, one_scale: Tensor | None
) -> tuple[dict[str, Tensor], _Measured]:
    """Quantize to fp8, with `one_scale` for all rows or, where it is None, one for each.

    It is done in parts of whole rows, so that little memory is taken beside the result.
    """
    quanto = import_library(scheme)
    codes = []
    scales = []
    squared_norm = 0.0
    squared_error = 0.0
    # Parts have two rows or more, unless the weight has one only.
    part_count = max(1, min(weight.shape[0] // 2, weight.numel() // CHUNK))
    for part in weight.tensor_split(part_count):
        values = part.float()
        largest = values.abs().amax(1, keepdim=True)  # (rows, 1)
        scale = largest.div_(SCHEMES[scheme].largest).clamp_(min=SMALLEST_SCALE)
        if one_scale is not None:
            scale = one_scale.expand_as(scale).contiguous()
        # optimum-quanto wants the scale of a matrix of one row without dimensions.
        given = scale if len(values) > 1 else scale.view(())
        quantized = quanto.quantize_weight(
            values, quanto.qfloat8_e4m3fn, 0, given, optimized=False
        )._data
        codes.append(quantized)
        scales.append(scale.flatten())
        squared_norm += _compute_squared_norm(values)
        error = _widen(quantized).mul_(scale).sub_(values)
        squared_error += _compute_squared_norm(error)
    row_scales = torch.cat(scales)
    bound = _compute_bound(weight, row_scales, squared_norm=squared_norm)
    measured = _Measured(squared_norm, squared_error, bound)
    stored_scale = row_scales if one_scale is None else one_scale.reshape(())
    return {"": torch.cat(codes), "_scale": stored_scale}, measured


def _compute_bound(weight: Tensor, scales: Tensor, *, squared_norm: float) -> float:
    """The largest norm of fp8's error that rounding explains.

    In float8_e4m3, whose mantissa has 3 bits, a value is wrong by at most 1/16 of itself, or among
    the subnormals by half of their steps, which is 2^-10 of the scale. `scales` are those of the
    rows (N,).
    """
    steps = float(scales.norm()) * math.sqrt(weight.shape[1])
    return (steps * 2**-10 + math.sqrt(squared_norm) / 16) * SLACK


def _compute_squared_norm(values: Tensor) -> float:
    """The sum of the squares, without a tensor of them."""
    flat = values.view(-1)
    return float(flat.dot(flat))


def _widen(codes: Tensor) -> Tensor:
    """8-bit codes as float32.

    Those of float8_e4m3 go by way of float16, whose exponent has one bit more and a bias larger by
    8: with the sign kept in front and the other 7 bits moved up by 7, they are the float16 of 2^-8
    times the value. That is much faster than torch's cast.
    """
    if codes.dtype != torch.float8_e4m3fn:
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16)
    sign = bits & -(1 << 15)
    magnitude = (bits & 127) << 7
    return (sign | magnitude).view(torch.float16).float().mul_(256)


def dequantize(
    stored: Mapping[str, Tensor],
    scheme: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    rotation: int = 0,
) -> Tensor:
    """The values (N, K) in `dtype` of a weight that is stored in a scheme, "" for none.

    `rotation` says how many of its columns were rotated together, 0 where none were.
    """
    if not scheme:
        return stored[""].to(dtype).view(shape)
    family = FAMILIES[scheme]
    if family == "nf4":
        return nf4.dequantize(stored, shape, dtype)
    if family == "gguf":
        return gguf_blocks.unpack(stored[""], scheme, dtype)
    if scheme in SCALED_BLOCKS:
        return block_scaled.dequantize(stored, scheme, dtype)
    if family in ROTATED:
        return rotated.dequantize(stored, scheme, rotation=rotation, dtype=dtype)
    values = _widen(stored[""])
    if "_scale" in stored:
        values.mul_(stored["_scale"].float().reshape(-1, 1))
    return values.to(dtype)


def cut_stored(stored: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """What is stored of some rows of a weight. NF4, whose blocks are no rows, cannot be cut."""
    cut = {}
    for suffix, tensor in stored.items():
        is_shared = suffix in (*SHARED, MARKER) or tensor.ndim == 0
        cut[suffix] = tensor if is_shared else tensor[rows]
    return cut


def check_values(name: str, stored: Mapping[str, Tensor], where: Piece) -> None:
    """Raise `CheckpointError` for NaN or Inf in the stored tensors, and for a scale of 0 or less.

    `name` and `where`, the piece that they are from, are for errors; its dtype tells GGUF's blocks,
    of which the scales are checked. Integers may have any value.
    """
    for found in _find_ranges(name, stored, where):
        lowest, highest = found.bounds.tolist()
        found.judge(lowest, highest)


class ValueChecks:
    """Checks many weights as `check_values` does, each of them once.

    Values in RAM are checked at once. To ask a device for a number makes the host wait for it:
    values there are measured, and looked at together.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._waiting: list[_Range] = []

    def add(self, name: str, stored: Mapping[str, Tensor], where: Piece) -> None:
        """Check a weight, unless one of its name was checked before."""
        if name in self._seen:
            return
        self._seen.add(name)
        there = {suffix: each for suffix, each in stored.items() if each.device.type != "cpu"}
        here = {suffix: each for suffix, each in stored.items() if suffix not in there}
        if here:
            check_values(name, here, where)
        if there:
            self._waiting += _find_ranges(name, there, where)

    def finish(self) -> None:
        """Look at what was measured; raises `CheckpointError` for the first that is damaged."""
        waiting = self._waiting
        self._waiting = []
        if not waiting:
            return
        bounds = torch.stack([found.bounds for found in waiting]).tolist()
        for found, (lowest, highest) in zip(waiting, bounds, strict=True):
            found.judge(lowest, highest)


class _Range(NamedTuple):
    """The lowest and the highest value of a stored tensor, (2,) float32 on its device."""

    name: str  # of the weight
    suffix: str
    where: Piece
    bounds: Tensor
    may_be_infinite: bool  # in its dtype

    def judge(self, lowest: float, highest: float) -> None:
        """Raise `CheckpointError` for a range that cannot be."""
        if not math.isfinite(lowest) or not math.isfinite(highest):
            why = f"NaN in {self.name}"
            if self.may_be_infinite:
                why = f"NaN or Inf in {self.name}{self.suffix}"
            raise CheckpointError(NOT_FINITE, self.where.file, why=why, hint=DAMAGED)
        is_scale = self.suffix in (ROW_SCALE, CHANNEL_SCALE, OVERALL_SCALE)
        if is_scale and self.may_be_infinite and lowest <= 0:
            why = f"one of {self.name} is 0 or negative"
            raise CheckpointError("impossible scales", self.where.file, why=why)


def _find_ranges(name: str, stored: Mapping[str, Tensor], where: Piece) -> Iterator[_Range]:
    """The ranges of a weight's stored tensors, but for integers; nothing waits for a device."""
    if where.info.dtype in GGUF_SCALES:
        stored = {"": _gguf_scales(stored[""], where.info.dtype)}
    for suffix, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            # It has no Inf; NaN has all bits set, the sign either way.
            has_nan = (tensor.view(torch.uint8) & 127 == 127).any()
            bounds = torch.zeros(2, device=tensor.device).masked_fill_(has_nan, math.nan)
            yield _Range(name, suffix, where, bounds=bounds, may_be_infinite=False)
        elif suffix == ROW_SCALE and tensor.dtype == torch.uint8:
            # Exponents, of which 255 is NaN.
            bounds = torch.zeros(2, device=tensor.device)
            bounds.masked_fill_((tensor == 255).any(), math.nan)
            yield _Range(name, suffix, where, bounds=bounds, may_be_infinite=False)
        elif tensor.is_floating_point() and tensor.numel():
            # aminmax is far faster than isfinite, and gives NaN where there is one. torch has none
            # for float8_e5m2.
            wide = tensor.half() if tensor.dtype == torch.float8_e5m2 else tensor
            bounds = torch.stack(wide.aminmax()).float()
            yield _Range(name, suffix, where, bounds=bounds, may_be_infinite=True)


def _gguf_scales(rows: Tensor, dtype: str) -> Tensor:
    """The scales of GGUF's blocks in float16, from rows of bytes (N, B)."""
    block_bytes = int(GGUF_BITS[dtype] * gguf_block_values(dtype)) // 8
    blocks = rows.reshape(-1, block_bytes)
    return blocks[:, GGUF_SCALES[dtype]].contiguous().view(torch.float16)
