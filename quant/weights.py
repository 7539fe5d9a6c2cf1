"""Logical weights: one tensor of the model by its diffusers name, and the pieces that store it in files.

Knows the packed forms (bitsandbytes' NF4 and int8; fp8 and int8 rows, also optimum-quanto's and ComfyUI's; GGUF's
blocks), no folders. Stdlib only.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quant.errors import CheckpointError
from quant.header import GGUF_BITS, TensorInfo
from quant.spec import BLOCK, NESTED_BLOCK, NF4_ONCE, STATE, layout

MAX_STATE_BYTES, FLOATS = 4096, ("F64", "F32", "F16", "BF16")
PACKED = re.compile(r"(.+\.weight)(\.(?:(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.[a-z0-9_]+)|_scale)")
SCB = ".SCB"  # bitsandbytes' int8: the largest of each row
SHARED = (".quant_map", ".nested_quant_map", STATE)  # pieces that every row of a pack needs
UNREADABLE = "an unreadable pack of 4-bit weights"
PACKS = "read are float8_e4m3fn and int8 with a scale per matrix or row, nf4, and GGUF"
QUANTO = {"_data": "", "_scale": "_scale"}


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, or ranges of its rows in the order given."""

    file: Path
    info: TensorInfo
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        first = sum(stop - start for start, stop in self.rows)
        return (first, *self.info.shape[1:]) if self.rows else self.info.shape

    @property
    def nbytes(self) -> int:
        return replace(self.info, shape=self.shape).nbytes


@dataclass(frozen=True)
class Weight:
    """One tensor of a model: `shape` is that of its values, `scheme` "" or how they are packed, pieces by suffix."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    pieces: dict[str, Piece]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())

    @property
    def info(self) -> TensorInfo:
        """The tensor unpacked, in 16 bit where it is packed here; GGUF's as it is."""
        stored = not self.scheme or self.scheme in GGUF_BITS
        return TensorInfo(self.name, self.pieces[""].info.dtype if stored else "BF16", self.shape)

    def part(self, name: str, ranges: tuple[tuple[int, int], ...]) -> "Weight":
        """Ranges of the rows under another name, () for all; raises `CheckpointError` where a pack cannot be cut so."""
        pieces = {suffix: self._cut(suffix, piece, ranges) for suffix, piece in self.pieces.items()}
        rows = sum(stop - start for start, stop in ranges)
        return Weight(name, (rows, *self.shape[1:]) if ranges else self.shape, self.scheme, pieces)

    def _cut(self, suffix: str, piece: Piece, ranges: tuple[tuple[int, int], ...]) -> Piece:
        if not ranges or suffix in SHARED or math.prod(piece.shape) == 1:
            return piece
        count = piece.shape[0]
        if any(edge * count % self.shape[0] for pair in ranges for edge in pair):
            raise CheckpointError(UNREADABLE, piece.file, why=f"{self.name} cannot be cut into its layers")
        rows = tuple((start * count // self.shape[0], stop * count // self.shape[0]) for start, stop in ranges)
        return replace(piece, rows=rows)


def group_weights(pieces: Mapping[str, Piece], *, raw: bool = False) -> dict[str, Weight]:
    """The logical weights that a file's tensors make; raises `CheckpointError` for a pack that is not whole.

    `raw` allows fp8 matrices without any scale: those of a file that has none at all.
    """
    modules = {name.removesuffix(".weight._data") for name in pieces if name.endswith(".weight._data")}
    groups: dict[str, dict[str, Piece]] = {}
    for name, piece in pieces.items():
        owner, _, leaf = name.rpartition(".")
        if owner in modules and leaf in ("input_scale", "output_scale"):
            continue  # optimum-quanto's scales of activations are 1 where only weights are quantized
        ours = owner + QUANTO[leaf] if modules and owner.endswith(".weight") and leaf in QUANTO else name
        base, suffix = match.groups() if (match := PACKED.fullmatch(ours)) else (ours, "")
        if f".{leaf}" == SCB:
            base, suffix = f"{owner}.weight", SCB
        if leaf != "weight_format":  # of bitsandbytes' int8: always rows
            groups.setdefault(base, {})[suffix] = piece
    return {name: _weight(name, parts, raw) for name, parts in groups.items()}


def _weight(name: str, parts: dict[str, Piece], raw: bool) -> Weight:
    first = next(iter(parts.values()))
    if "" not in parts:
        raise CheckpointError("a packed weight is missing", first.file, why=f"{name} has only its scales")
    dtype, shape = parts[""].info.dtype, parts[""].shape
    scale = parts.get("_scale") or parts.get(SCB)
    if scale and len(parts) == 2 and dtype in ("F8_E4M3", "I8") and len(shape) == 2:
        if math.prod(scale.shape) not in (1, shape[0]) or scale.info.dtype not in FLOATS:
            raise CheckpointError("impossible scales", first.file, why=f"of {name}: {scale.shape}")
        return Weight(name, shape, "fp8" if dtype == "F8_E4M3" else "int8", parts)
    if scale and len(parts) == 2:
        why = f"{name} is {dtype} with scales in {scale.info.dtype}"
        raise CheckpointError("weights packed in a way that is not read", first.file, why=why, hint=PACKS)
    if set(parts) != {""}:
        return _nf4(name, parts)
    if dtype in GGUF_BITS or (raw and dtype == "F8_E4M3" and len(shape) == 2):
        return Weight(name, shape, dtype if dtype in GGUF_BITS else "fp8", parts)
    if dtype in ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0") and len(shape) == 2 and not (raw and dtype == "F8_E5M2"):
        why = f"{name} is {dtype} and has no scale beside it"
        raise CheckpointError("quantized weights without scales", first.file, why=why)
    return Weight(name, shape, "", parts)


def _nf4(name: str, parts: dict[str, Piece]) -> Weight:
    """A weight packed by bitsandbytes: NF4, blocks of 64, scales in float32 or quantized again."""
    file, scheme = parts[""].file, "nf4" if any("nested" in suffix for suffix in parts) else NF4_ONCE
    wanted = {info.name for info in layout(scheme, TensorInfo("", "BF16", (2, BLOCK)))}
    if odd := sorted(wanted ^ set(parts)):
        why = f"{name} {'has no' if odd[0] in wanted else 'also has'} {odd[0].lstrip('._')}"
        raise CheckpointError(UNREADABLE, file, why=why, hint="of bitsandbytes' packs nf4 and int8 are read")
    state = parts[STATE]
    try:
        shape = _shape_in_state(state, nested=scheme == "nf4")
    except OSError as error:
        raise CheckpointError("cannot read weights", state.file, why=error.strerror or "read error") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what, why = "hostile or damaged quant state", f"{name[:60]}: {str(error)[:80]}"
        raise CheckpointError(what, state.file, why=why) from error
    for info in layout(scheme, TensorInfo("", "BF16", shape)):
        piece = parts[info.name]
        same = info.name == STATE or math.prod(piece.shape) == info.numel
        if piece.info.dtype != info.dtype or not same or piece.rows:
            why = f"{name}{info.name} is {piece.info.dtype} {list(piece.shape)} for a weight of {list(shape)}"
            raise CheckpointError(UNREADABLE, file, why=why[:160])
    return Weight(name, shape, scheme, parts)


def _shape_in_state(piece: Piece, *, nested: bool) -> tuple[int, int]:
    """The weight's shape by its state blob, all of whose values are checked."""
    if piece.info.nbytes > MAX_STATE_BYTES:
        raise ValueError("it is too large")
    with piece.file.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + piece.info.start)
        state = json.loads(file.read(piece.info.nbytes).decode("utf-8"))
    known = {"quant_type": ("nf4",), "blocksize": (BLOCK,), "dtype": ("bfloat16", "float16", "float32")}
    known |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)} if nested else {}
    for key, values in known.items():
        if state[key] not in values:
            raise ValueError(f"{key} is {state[key]!r:.40}")
    shape, offset = state["shape"], state["nested_offset"] if nested else 0.0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 24 for n in shape):
        raise ValueError(f"shape is {shape!r:.40}")
    if type(offset) is not float or not abs(offset) < 1e38:  # NaN too, and what is infinite in float32
        raise ValueError(f"nested_offset is {offset!r:.40}")
    return shape[0], shape[1]
