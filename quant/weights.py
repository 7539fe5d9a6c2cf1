"""Weights of a model, and where they lie: the tensors of files that store one are put together.

Knows the quantized forms (bitsandbytes' NF4 and int8; fp8 and int8 with scales, also as
optimum-quanto and ComfyUI write them; GGUF's blocks), but no folders, and of the data it reads
nothing but NF4's states. Sizes are in bytes. Stdlib only.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.header import read_tensor_bytes
from quant.markers import (
    FP8_FORMAT,
    MAX_MARKER_BYTES,
    READABLE,
    UNREAD,
    Marker,
    parse_marker,
    read_marker,
)
from quant.spec import (
    BLOCK,
    CHANNEL_SCALE,
    FLOAT4_BFL,
    GROUP_FORMAT,
    GROUP_SCALE,
    LEVELS,
    MARKER,
    MXFP8,
    NESTED_BLOCK,
    NF4_ONCE,
    OVERALL_SCALE,
    ROW_FORMAT,
    SCALE_TILE,
    SCALED_BLOCKS,
    STATE,
    TILED,
    find_tiles,
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
    r"|_scale(?:_2)?|_s_rel|_s_channel|_codebook|_correction)"
)
SCALE = "_scale"
# Of bitsandbytes' int8: the largest absolute value of each row.
SCB = ".SCB"
# By which activations are multiplied before the product, where a converter smoothed them.
SMOOTHING = ".pre_quant_scale"
# What follows a layer's name and belongs to its weight.
OF_LAYER = (SCB, MARKER, SMOOTHING)
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

    def bytes_in(self, scheme: str) -> int:
        """Bytes that it takes at most in memory in a scheme: its own, or one it is quantized to.

        Others may store more than flux would: scales of smaller groups, or in wider dtypes.
        """
        stored_bytes = self.nbytes if self.scheme else 0
        return max(stored_bytes, sum(info.nbytes for info in lay_out(scheme, self.info)))

    @property
    def info(self) -> TensorInfo:
        """The tensor as it is before it is quantized, named as the weight.

        A quantized one is taken for bfloat16. One in GGUF's blocks is not: its dtype is their type.
        """
        if self.scheme and self.scheme not in GGUF_BITS:
            return TensorInfo(self.name, "BF16", self.shape)
        return TensorInfo(self.name, self.pieces[""].info.dtype, self.shape)

    @property
    def kind(self) -> tuple[object, ...]:
        """What weights have in common that can be rows of one layer, beside their scheme."""
        scales = self.pieces.get(GROUP_SCALE)
        return self.rotation, self.group, scales.info.dtype if scales else ""

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
        if suffix == SCALE and self.scheme in TILED:
            return replace(piece, rows=find_tiles(ranges))
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
    are those of a header's metadata by the names of layers, None where it has none. Raises
    `CheckpointError` for a weight some of whose tensors are missing, odd, or of another shape, and
    for an unknown marker.
    """
    end = ".weight._data"
    quanto_layers = {name.removesuffix(end) for name in pieces if name.endswith(end)}
    groups: dict[str, dict[str, Piece]] = {}
    for stored, piece in pieces.items():
        layer, _, leaf = stored.rpartition(".")
        # Scales of activations, which are 1 in optimum-quanto's files of quantized weights; BFL's
        # are for products in float4.
        has_scale = layer in quanto_layers or f"{layer}.weight_scale" in pieces
        if has_scale and leaf in ("input_scale", "output_scale"):
            continue
        # bitsandbytes says with every int8 weight in which order it is stored; that is always rows.
        if leaf == "weight_format":
            continue
        name, suffix = _split_name(stored, by_quanto=bool(quanto_layers))
        groups.setdefault(name, {})[suffix] = piece
    known = markers or {}
    is_marked = markers is not None or any(MARKER in parts for parts in groups.values())
    weights = {}
    for name, parts in groups.items():
        marker = _read_marker(name, parts, known)
        if marker is None and is_marked:
            _refuse_unmarked(name, parts)
        weights[name] = _make_weight(name, parts, marker, unscaled=unscaled)
    return weights


def _read_marker(
    name: str, pieces: dict[str, Piece], markers: Mapping[str, object]
) -> Marker | None:
    """What a weight's marker says, None without one; takes its tensor out of `pieces`.

    It may be in the header's metadata, too. Raises `CheckpointError` for one that is not known, and
    where the two contradict each other.
    """
    layer = name.removesuffix(".weight")
    found = []
    piece = pieces.pop(MARKER, None)
    if piece:
        data = b""
        if piece.info.nbytes <= MAX_MARKER_BYTES:
            data = _read_bytes(piece)
        found.append(parse_marker(layer, data, file=piece.file))
    if name.endswith(".weight") and layer in markers:
        where = piece or next(iter(pieces.values()))
        found.append(read_marker(layer, markers[layer], file=where.file))
    if not found:
        return None
    if piece and not pieces:
        why = f"{name[:60]} has only its marker"
        raise CheckpointError("a packed weight is missing", piece.file, why=why)
    if found[0] != found[-1]:
        why = f"{layer[:60]} is marked {_describe(found[0])}, and {_describe(found[-1])}"
        where = next(iter(pieces.values()))
        raise CheckpointError(UNREAD, where.file, why=why, hint=READABLE)
    return found[0]


def _read_bytes(piece: Piece) -> bytes:
    """The data of a small tensor; raises `CheckpointError`."""
    try:
        return read_tensor_bytes(piece.file, piece.info)
    except OSError as error:
        why = error.strerror or "read error"
        raise CheckpointError("cannot read weights", piece.file, why=why) from error


def _describe(marker: Marker) -> str:
    """What a marker says, for people."""
    text = marker.format
    if marker.rotation:
        text += f" rotated by {marker.rotation}"
    if marker.group:
        text += f" in groups of {marker.group}"
    return text


def _refuse_unmarked(name: str, pieces: Mapping[str, Piece]) -> None:
    """Raise `CheckpointError` for integers without a marker in a file that has markers.

    Whether they are rotated, nothing says. bitsandbytes' and optimum-quanto's have none anywhere.
    """
    values = pieces.get("")
    if values and values.info.dtype in ("I8", "U8"):
        why = f"{name[:60]} is {values.info.dtype} and has no marker, as others have"
        raise CheckpointError(UNREAD, values.file, why=why, hint=READABLE)


def _split_name(stored: str, *, by_quanto: bool) -> tuple[str, str]:
    """The name of the weight that a tensor belongs to, and the tensor's suffix."""
    owner, _, leaf = stored.rpartition(".")
    if f".{leaf}" in OF_LAYER:
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
    if SMOOTHING in pieces:
        why = f"{name[:60]} is for activations that were multiplied ({SMOOTHING[1:]})"
        raise CheckpointError(UNREAD, values.file, why=why, hint=READABLE)
    if marker and marker.format == GROUP_FORMAT:
        return _make_grouped_weight(name, pieces, marker)
    if marker and marker.format in TILED:
        return _make_block_weight(name, pieces, marker.format)
    if OVERALL_SCALE in pieces and not marker:
        return _make_block_weight(name, pieces, FLOAT4_BFL)
    scale = pieces.get(SCALE) or pieces.get(SCB)
    if scale and len(pieces) == 2:
        return _make_scaled_weight(name, pieces, scale, marker)
    if marker:
        raise _explain_misfit(name, pieces, marker.format, unscaled=unscaled)
    if GROUP_SCALE in pieces:
        why = f"{name[:60]} has {name.rpartition('.')[2]}{GROUP_SCALE} and no marker"
        raise CheckpointError(UNREAD, values.file, why=why, hint=READABLE)
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
        raise CheckpointError(UNREAD, file, why=why, hint=READABLE)
    has_one = math.prod(scale.shape) == 1
    if not (has_one or _is_column(scale, values.shape[0])) or scale.info.dtype not in FLOATS:
        raise CheckpointError("impossible scales", file, why=f"of {name}: {scale.shape}")
    rotation = 0
    if marker:
        rotation = marker.rotation
        if marker.format != (ROW_FORMAT if scheme == "int8" else FP8_FORMAT):
            raise _refuse_marked(name, values, marker.format)
        _check_rotation(name, values, columns=values.shape[1], rotation=rotation)
    return Weight(name, values.shape, scheme=scheme, pieces=pieces, rotation=rotation)


def _is_column(scale: Piece, rows: int) -> bool:
    """Whether a tensor has one value for each row; one row of them would be for the columns."""
    return math.prod(scale.shape) == rows and scale.shape[0] == rows


def _refuse_marked(name: str, values: Piece, form: str) -> CheckpointError:
    """The error for a weight whose marker says another form than it has."""
    why = f"{name[:60]} is {values.info.dtype} {list(values.shape)} and is marked {form}"
    return CheckpointError(UNREAD, values.file, why=why, hint=READABLE)


def _explain_misfit(
    name: str, pieces: Mapping[str, Piece], form: str, *, unscaled: bool
) -> CheckpointError:
    """The error for a weight marked as fp8 or int8 that is more or less than codes and a scale."""
    if len(pieces) > 1:
        _check_suffixes(name, pieces, wanted=("", SCALE), of=form)
    _find_scheme(name, pieces[""], unscaled=unscaled)
    return _refuse_marked(name, pieces[""], form)


def _check_suffixes(
    name: str, pieces: Mapping[str, Piece], *, wanted: Collection[str], of: str
) -> None:
    """Raise `CheckpointError` unless a weight has the tensors of its form, and no other."""
    odd = sorted(set(wanted) ^ set(pieces))
    if odd:
        says = "has no" if odd[0] in wanted else "also has"
        why = f"{name[:60]} is {of} and {says} {name.rpartition('.')[2]}{odd[0]}"
        raise CheckpointError(UNREAD, pieces[""].file, why=why, hint=READABLE)


def _check_rotation(name: str, values: Piece, *, columns: int, rotation: int) -> None:
    """Raise `CheckpointError` where groups of `rotation` columns do not fill a weight's."""
    if rotation and columns % rotation:
        why = f"{name[:60]} has {columns} columns and is marked as rotated by {rotation}"
        raise CheckpointError(UNREAD, values.file, why=why, hint=READABLE)


def _retype(piece: Piece, dtype: str, shape: tuple[int, ...]) -> Piece:
    """The same bytes as a tensor of another dtype of that size, or of another shape."""
    return replace(piece, info=replace(piece.info, dtype=dtype, shape=shape))


def _make_grouped_weight(name: str, pieces: dict[str, Piece], marker: Marker) -> Weight:
    """A matrix in w6a8 or w4a8: how many bits a code has, the width of its rows tells.

    4-bit codes mostly have their levels beside them; without, they are the integers from -8 on.
    Raises `CheckpointError` unless its tensors are those of its shape.
    """
    wanted = ["", GROUP_SCALE, CHANNEL_SCALE]
    if LEVELS in pieces:
        wanted.append(LEVELS)
    _check_suffixes(name, pieces, wanted=wanted, of=marker.format)
    codes = pieces[""]
    scales = pieces[GROUP_SCALE]
    if codes.info.dtype != "I8" or len(codes.shape) != 2 or len(scales.shape) != 2:
        raise _refuse_marked(name, codes, marker.format)
    rows = codes.shape[0]
    columns = scales.shape[1] * marker.group
    bits_of_a_row = codes.shape[1] * 8
    scheme = {4 * columns: "w4a8", 6 * columns: "w6a8"}.get(bits_of_a_row, "")
    if not scheme or not _is_usual_group(scheme, marker.group, columns=columns):
        raise _refuse_marked(name, codes, _describe(marker))
    if scheme == "w6a8":
        _check_suffixes(name, pieces, wanted=wanted[:3], of="w6a8")
    _check_rotation(name, codes, columns=columns, rotation=marker.rotation)
    if scales.info.dtype == "U8":  # bytes of float8, as older converters store them
        scales = _retype(scales, "F8_E4M3", scales.shape)
    levels = pieces.get(LEVELS)
    channels = pieces[CHANNEL_SCALE]
    is_possible = (
        scales.shape == (rows, columns // marker.group)
        and scales.info.dtype in (*FLOATS, "F8_E4M3")
        and _is_column(channels, rows)
        and channels.info.dtype in FLOATS
        and (levels is None or (levels.shape == (16,) and levels.info.dtype in FLOATS))
    )
    if not is_possible:
        raise CheckpointError("impossible scales", codes.file, why=f"of {name[:60]}")
    channels = _retype(channels, channels.info.dtype, (rows,))
    return Weight(
        name,
        (rows, columns),
        scheme=scheme,
        pieces=pieces | {GROUP_SCALE: scales, CHANNEL_SCALE: channels},
        rotation=marker.rotation,
        group=marker.group,
    )


def _is_usual_group(scheme: str, group: int, *, columns: int) -> bool:
    """Whether a scale may be for so many values of a row, as comfy-kitchen has it."""
    if scheme == "w6a8":
        return group % 16 == 0 and columns % 32 == 0
    return group >= 4 and columns % 16 == 0 and (16 % group == 0 or group % 16 == 0)


def _make_block_weight(name: str, pieces: dict[str, Piece], scheme: str) -> Weight:
    """A matrix in nvfp4, in ComfyUI's form or in BFL's, or in mxfp8.

    Raises `CheckpointError` unless its tensors are those of its shape.
    """
    wanted = ["", SCALE] if scheme == MXFP8 else ["", SCALE, OVERALL_SCALE]
    _check_suffixes(name, pieces, wanted=wanted, of=scheme)
    codes = pieces[""]
    if codes.info.dtype != ("F8_E4M3" if scheme == MXFP8 else "U8") or len(codes.shape) != 2:
        raise _refuse_marked(name, codes, scheme)
    rows, columns = codes.shape
    if scheme != MXFP8:
        columns *= 2
    if columns % SCALED_BLOCKS[scheme]:
        raise _refuse_marked(name, codes, scheme)
    scales = pieces[SCALE]
    stored = (rows, columns // SCALED_BLOCKS[scheme])
    if scheme in TILED:
        stored = (_round_up(stored[0], SCALE_TILE[0]), _round_up(stored[1], SCALE_TILE[1]))
    overall = pieces.get(OVERALL_SCALE)
    is_possible = (
        math.prod(scales.shape) == math.prod(stored)
        and scales.info.dtype in ("U8", "F8_E8M0" if scheme == MXFP8 else "F8_E4M3")
        and (overall is None or math.prod(overall.shape) == 1)
        and (overall is None or overall.info.dtype in FLOATS)
    )
    if not is_possible:
        raise CheckpointError("impossible scales", codes.file, why=f"of {name}: {scales.shape}")
    # The exponents of mxfp8 are read as integers.
    scales = _retype(scales, "U8" if scheme == MXFP8 else "F8_E4M3", stored)
    return Weight(name, (rows, columns), scheme=scheme, pieces=pieces | {SCALE: scales})


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


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
