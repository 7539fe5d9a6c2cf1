"""Weights of a model, and where they lie: the tensors of files that store one are put together.

Knows the quantized forms (bitsandbytes' NF4 and int8; fp8 and int8 with scales, also as
optimum-quanto and ComfyUI write them; GGUF's blocks), but no folders, and of the data it reads
nothing but NF4's states. Sizes are in bytes. Stdlib only.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.header import read_tensor_bytes
from quant.markers import FP8_FORMAT, MAX_MARKER_BYTES, READABLE, UNREAD, Marker, read_marker
from quant.spec import (
    BLOCK,
    CHANNEL_SCALE,
    GROUP_SCALE,
    GROUP_SCALES,
    LEVELS,
    MARKER,
    NESTED_BLOCK,
    NF4_ONCE,
    ROW_SCALES,
    SCHEMES,
    STATE,
    lay_out,
)
from quant.tensor_info import GGUF_BITS, TensorInfo

# Of each range its first row and the row after its last.
RowRanges = tuple[tuple[int, int], ...]

FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BIT = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
MAX_STATE_BYTES = 4096
MAX_STATE_ROWS = 1 << 24
MAX_FLOAT32 = 1e38

# A weight's name and the suffix of one of its quantized tensors.
QUANTIZED = re.compile(
    r"(.+\.weight)(\.(?:(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.[a-z0-9_]+)"
    r"|_scale|_s_rel|_s_channel|_codebook)"
)
SCALE = "_scale"
# Of bitsandbytes' int8: the largest absolute value of each row.
SCB = ".SCB"
# The tensors that all rows of a weight share; the others are cut with it.
SHARED = (".quant_map", ".nested_quant_map", STATE, LEVELS)
# What optimum-quanto's tensors of a weight are here.
QUANTO_SUFFIXES = {"_data": "", "_scale": SCALE}

UNREADABLE = "an unreadable pack of 4-bit weights"


@dataclass(frozen=True)
class Piece:
    """Where data are: a tensor of a file, or ranges of its rows in the order given.

    Without ranges it is the whole tensor.
    """

    file: Path
    info: TensorInfo
    rows: RowRanges = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.rows:
            return self.info.shape
        return (_count_rows(self.rows), *self.info.shape[1:])

    @property
    def nbytes(self) -> int:
        return replace(self.info, shape=self.shape).nbytes


@dataclass(frozen=True)
class Weight:
    """One tensor of a model, by the name it has in diffusers.

    `shape` is that of its values. `scheme` says how they are quantized, "" for not at all. `pieces`
    say where the tensors are that store it, by the suffixes of their names; "" has the values or
    their codes. So many columns as `rotation` says were rotated together, 0 for none, and `group`
    values of a row share a scale, 0 for all.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    pieces: dict[str, Piece]
    rotation: int = 0
    group: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())

    @property
    def info(self) -> TensorInfo:
        """The tensor as it is before it is quantized, named as the weight.

        A quantized one is taken for bfloat16. One in GGUF's blocks is not: its dtype is their type.
        """
        if self.scheme and self.scheme not in GGUF_BITS:
            return TensorInfo(self.name, "BF16", self.shape)
        return TensorInfo(self.name, self.pieces[""].info.dtype, self.shape)

    def take_rows(self, name: str, ranges: RowRanges) -> "Weight":
        """Ranges of the rows as a weight of another name; without ranges, all rows.

        Raises `CheckpointError` where the quantized form cannot be cut at these rows.
        """
        if not ranges:
            return replace(self, name=name)
        pieces = {suffix: self._cut(suffix, ranges) for suffix in self.pieces}
        shape = (_count_rows(ranges), *self.shape[1:])
        return replace(self, name=name, shape=shape, pieces=pieces)

    def _cut(self, suffix: str, ranges: RowRanges) -> Piece:
        """What the stored tensor with this suffix has for these rows of the weight.

        A stored tensor may have fewer rows than the weight (NF4's scales, one for 64 values) or
        more (its codes, one row for two values); it is cut in the same proportions.
        """
        piece = self.pieces[suffix]
        if suffix in SHARED or math.prod(piece.shape) == 1:
            return piece
        rows = []
        for start, stop in ranges:
            first, first_rest = divmod(start * piece.shape[0], self.shape[0])
            last, last_rest = divmod(stop * piece.shape[0], self.shape[0])
            if first_rest or last_rest:
                why = f"{self.name} cannot be cut into its layers"
                raise CheckpointError(UNREADABLE, piece.file, why=why)
            rows.append((first, last))
        return replace(piece, rows=tuple(rows))


def _count_rows(ranges: RowRanges) -> int:
    return sum(stop - start for start, stop in ranges)


def group_weights(
    pieces: Mapping[str, Piece],
    *,
    unscaled: bool = False,
    markers: Mapping[str, object] | None = None,
) -> dict[str, Weight]:
    """The weights that tensors of files store, by name; `pieces` are by the tensors' names.

    With `unscaled`, fp8 matrices need no scale, as in a file that has no scale at all. `markers`
    are those of a header's metadata, by the names of layers. Raises `CheckpointError` for a weight
    some of whose tensors are missing, odd, or of another shape, and for an unknown marker.
    """
    end = ".weight._data"
    quanto_layers = {name.removesuffix(end) for name in pieces if name.endswith(end)}
    groups: dict[str, dict[str, Piece]] = {}
    for stored, piece in pieces.items():
        layer, _, leaf = stored.rpartition(".")
        # optimum-quanto also stores scales of activations, 1 where only weights are quantized.
        if layer in quanto_layers and leaf in ("input_scale", "output_scale"):
            continue
        # bitsandbytes says with every int8 weight in which order it is stored; that is always rows.
        if leaf == "weight_format":
            continue
        name, suffix = _split_name(stored, by_quanto=bool(quanto_layers))
        groups.setdefault(name, {})[suffix] = piece
    weights = {}
    for name, parts in groups.items():
        described = _read_described(name, parts, markers or {})
        weights[name] = _make_weight(name, parts, described, unscaled=unscaled)
    return weights


def _read_described(
    name: str, pieces: dict[str, Piece], markers: Mapping[str, object]
) -> Marker | None:
    """What a weight's marker says, None without one; takes its tensor out of `pieces`.

    Raises `CheckpointError` for one that is not known.
    """
    layer = name.removesuffix(".weight")
    piece = pieces.pop(MARKER, None)
    if piece is None and layer not in markers:
        return None
    if piece is None:
        return read_marker(layer, markers[layer], file=next(iter(pieces.values())).file)
    described = None
    if piece.info.nbytes <= MAX_MARKER_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            described = json.loads(read_tensor_bytes(piece.file, piece.info))
    return read_marker(layer, described, file=piece.file)


def _split_name(stored: str, *, by_quanto: bool) -> tuple[str, str]:
    """The name of the weight that a tensor belongs to, and the tensor's suffix."""
    owner, _, leaf = stored.rpartition(".")
    if f".{leaf}" in (SCB, MARKER):
        return f"{owner}.weight", f".{leaf}"
    if by_quanto and owner.endswith(".weight") and leaf in QUANTO_SUFFIXES:
        return owner, QUANTO_SUFFIXES[leaf]
    match = QUANTIZED.fullmatch(stored)
    if match:
        return match[1], match[2]
    return stored, ""


def _make_weight(
    name: str, pieces: dict[str, Piece], marker: Marker | None, *, unscaled: bool
) -> Weight:
    """The weight that these pieces store, by suffix; raises `CheckpointError`."""
    if "" not in pieces:
        file = next(iter(pieces.values())).file
        why = f"{name} has only its scales"
        raise CheckpointError("a packed weight is missing", file, why=why)
    values = pieces[""]
    if not values.info.numel:
        why = f"{name[:60]} is {list(values.shape)}"
        raise CheckpointError("weights without values", values.file, why=why)
    if marker and marker.format == GROUP_SCALES:
        return _make_grouped_weight(name, pieces, marker)
    scale = pieces.get(SCALE) or pieces.get(SCB)
    if scale and len(pieces) == 2:
        return _make_scaled_weight(name, pieces, scale, marker)
    if len(pieces) > 1:
        return _make_nf4_weight(name, pieces)
    scheme = _find_scheme(name, values, unscaled=unscaled)
    return Weight(name, values.shape, scheme=scheme, pieces=pieces)


def _find_scheme(name: str, values: Piece, *, unscaled: bool) -> str:
    """The scheme of a weight that one tensor stores alone, "" where it is not quantized.

    Raises `CheckpointError` for a matrix of 8-bit codes, unless it is fp8 and `unscaled`.
    """
    dtype = values.info.dtype
    if dtype in GGUF_BITS:
        return dtype
    if dtype in FLOATS:
        return ""
    # Biases and norms are in fp8, too, where everything was cast.
    if dtype in ("F8_E4M3", "F8_E5M2") and len(values.shape) != 2:
        return ""
    if dtype not in EIGHT_BIT or len(values.shape) != 2:
        why = f"{name[:60]} is {dtype}, which is no dtype of weights"
        raise CheckpointError("weights that are no numbers of FLUX.1", values.file, why=why)
    if unscaled and dtype == "F8_E4M3":
        return "fp8"
    # Nothing computes in it: it is read as a dtype like the 16-bit ones.
    if unscaled and dtype == "F8_E5M2":
        return ""
    why = f"{name} is {dtype} and has no scale beside it"
    raise CheckpointError("quantized weights without scales", values.file, why=why)


def _make_scaled_weight(
    name: str, pieces: dict[str, Piece], scale: Piece, marker: Marker | None
) -> Weight:
    """A matrix in fp8 or int8 with one scale, or one for each row; raises `CheckpointError`."""
    values = pieces[""]
    dtype = values.info.dtype
    scheme = {"F8_E4M3": "fp8", "I8": "int8"}.get(dtype)
    file = next(iter(pieces.values())).file
    if scheme is None or len(values.shape) != 2:
        why = f"{name} is {dtype} with scales in {scale.info.dtype}"
        what = "weights packed in a way that is not read"
        raise CheckpointError(what, file, why=why, hint=READABLE)
    if math.prod(scale.shape) not in (1, values.shape[0]) or scale.info.dtype not in FLOATS:
        raise CheckpointError("impossible scales", file, why=f"of {name}: {scale.shape}")
    rotation = 0
    if marker:
        wanted = ROW_SCALES if scheme == "int8" else FP8_FORMAT
        rotation = marker.rotation
        if marker.format != wanted or (rotation and values.shape[1] % rotation):
            why = f"{name[:60]} is {dtype} {list(values.shape)} and is marked {marker}"
            raise CheckpointError(UNREAD, file, why=why, hint=READABLE)
    return Weight(name, values.shape, scheme=scheme, pieces=pieces, rotation=rotation)


def _make_grouped_weight(name: str, pieces: dict[str, Piece], marker: Marker) -> Weight:
    """A matrix in w6a8 or w4a8: 4-bit codes have their levels beside them.

    Raises `CheckpointError` unless its tensors are those of its shape.
    """
    codes = pieces[""]
    scheme = "w4a8" if LEVELS in pieces else "w6a8"
    columns = 0
    if len(codes.shape) == 2:
        columns = codes.shape[1] * 8 // SCHEMES[scheme].bits
    groups = columns // marker.group
    rows = codes.shape[0]
    wanted = {"": (rows, codes.shape[-1]), GROUP_SCALE: (rows, groups), CHANNEL_SCALE: (rows,)}
    if scheme == "w4a8":
        wanted[LEVELS] = (16,)
    shapes = {suffix: piece.shape for suffix, piece in pieces.items()}
    is_whole = columns and groups * marker.group == columns
    if shapes != wanted or not is_whole or not marker.rotation or columns % marker.rotation:
        why = f"{name[:60]} is {shapes} and is marked {marker}"
        raise CheckpointError(UNREAD, codes.file, why=why[:160], hint=READABLE)
    return Weight(
        name,
        (rows, columns),
        scheme=scheme,
        pieces=pieces,
        rotation=marker.rotation,
        group=marker.group,
    )


def _make_nf4_weight(name: str, pieces: dict[str, Piece]) -> Weight:
    """A matrix in bitsandbytes' NF4, whose scales may be quantized, too.

    Raises `CheckpointError` unless its tensors are those that its state's shape makes.
    """
    file = pieces[""].file
    nested = any("nested" in suffix for suffix in pieces)
    scheme = "nf4" if nested else NF4_ONCE
    _check_nf4_suffixes(name, pieces, scheme)
    state = pieces[STATE]
    try:
        shape = _read_shape_in_state(state, nested=nested)
    except OSError as error:
        why = error.strerror or "read error"
        raise CheckpointError("cannot read weights", state.file, why=why) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"{name[:60]}: {str(error)[:80]}"
        raise CheckpointError("hostile or damaged quant state", state.file, why=why) from error
    for info in lay_out(scheme, TensorInfo("", "BF16", shape)):
        piece = pieces[info.name]
        # The text of a state may have any length.
        fits = info.name == STATE or math.prod(piece.shape) == info.numel
        if piece.info.dtype != info.dtype or not fits or piece.rows:
            stored = f"{name}{info.name} is {piece.info.dtype} {list(piece.shape)}"
            why = f"{stored} for a weight of {list(shape)}"
            raise CheckpointError(UNREADABLE, file, why=why[:160])
    return Weight(name, shape, scheme=scheme, pieces=pieces)


def _check_nf4_suffixes(name: str, pieces: dict[str, Piece], scheme: str) -> None:
    """Raise `CheckpointError` unless a weight has the tensors of its scheme and no other."""
    wanted = {info.name for info in lay_out(scheme, TensorInfo("", "BF16", (2, BLOCK)))}
    odd = sorted(wanted ^ set(pieces))
    if odd:
        says = "has no" if odd[0] in wanted else "also has"
        why = f"{name} {says} {odd[0].lstrip('._')}"
        hint = "of bitsandbytes' packs nf4 and int8 are read"
        raise CheckpointError(UNREADABLE, pieces[""].file, why=why, hint=hint)


def _read_shape_in_state(piece: Piece, *, nested: bool) -> tuple[int, int]:
    """The weight's shape, from bitsandbytes' state: JSON, whose values are all checked.

    Raises `ValueError`, `TypeError`, `KeyError`, `AttributeError` or `RecursionError` for a state
    that is none of NF4's, `OSError` for a file that cannot be read.
    """
    if piece.info.nbytes > MAX_STATE_BYTES:
        raise ValueError("it is too large")
    state: dict[str, Any] = json.loads(read_tensor_bytes(piece.file, piece.info).decode("utf-8"))
    known: dict[str, tuple[object, ...]] = {
        "quant_type": ("nf4",),
        "blocksize": (BLOCK,),
        "dtype": ("bfloat16", "float16", "float32"),
    }
    if nested:
        known["nested_blocksize"] = (NESTED_BLOCK,)
        known["nested_dtype"] = ("float32",)
    for key, values in known.items():
        if state[key] not in values:
            raise ValueError(f"{key} is {state[key]!r:.40}")
    shape = state["shape"]
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"shape is {shape!r:.40}")
    for size in shape:
        if type(size) is not int or not 0 < size < MAX_STATE_ROWS:
            raise ValueError(f"shape is {shape!r:.40}")
    if nested:
        offset = state["nested_offset"]
        # The comparison is false for NaN too; larger values are infinite in float32.
        if type(offset) is not float or not abs(offset) < MAX_FLOAT32:
            raise ValueError(f"nested_offset is {offset!r:.40}")
    return shape[0], shape[1]
