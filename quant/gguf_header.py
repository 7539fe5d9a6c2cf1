"""Read and validate the header of a GGUF file. Knows nothing of models. Stdlib only.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts of tensors and
values, the values by name, then each tensor's name, shape, type and place, then aligned data. The
gguf package's own reader is not used: it believes any count, and a hostile one keeps it busy for
ever. Sizes are in bytes.
"""

import os
import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from quant.errors import CheckpointError
from quant.tensor_info import (
    GGUF_BITS,
    MAX_DIMENSION,
    MAX_RANK,
    TensorInfo,
    gguf_block_values,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 14  # as many tensors, and as many values
MAX_TEXT_BYTES = 4 << 20
# So much of a file is looked at for its header; T5's vocabulary takes 1 MB.
MAX_HEADER_BYTES = 8 << 20
DEFAULT_ALIGNMENT = 32
ARCHITECTURES = ("flux", "t5", "t5encoder", "pig")

# Letters of `struct` for the types of values that are numbers.
NUMBER_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT = 8
LIST = 9

DTYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    30: "BF16",
}
# ggml's other types, for the error.
UNREADABLE_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def is_gguf(path: Path) -> bool:
    """Whether a readable file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GgufHeader(NamedTuple):
    """The tensors of a GGUF file by name, and what texts it says of the model, as its name."""

    tensors: dict[str, TensorInfo]
    texts: dict[str, str]


def parse_gguf_header(path: Path, header: bytes, file_bytes: int) -> GgufHeader:
    """Return the tensors of a GGUF file, in the order of their data, and its texts.

    Shapes are as torch has them, the reverse of GGUF's. `header` is the file's beginning,
    long enough to hold its header, `file_bytes` the size of the whole file. Raises
    `CheckpointError` for any defect, and for the file of another model.
    """
    try:
        data = BytesIO(header)
        tensor_count, value_count = _read_counts(data)
        values: dict[str, object] = {}
        for _ in range(value_count):
            name = _read_text(data)
            if name in values:
                raise ValueError(f"the value {name!r:.60} stands twice")
            values[name] = _read_value(data, kind=_read_number(data, "I"))
            # At once, since the vocabularies of other models are longer than what is looked at.
            if name == "general.architecture" and values[name] not in ARCHITECTURES:
                why = f"its architecture is {values[name]!r:.40}"
                raise CheckpointError("a GGUF of another model", path, why=why)
        tensors = [_read_tensor(path, data) for _ in range(tensor_count)]
        alignment = _check_alignment(values.get("general.alignment", DEFAULT_ALIGNMENT))
        data_start = -(-data.tell() // alignment) * alignment
        placed = [replace(tensor, start=data_start + tensor.start) for tensor in tensors]
        placed.sort(key=lambda tensor: tensor.start)
        _check_places(placed, data_start=data_start, file_bytes=file_bytes, alignment=alignment)
        by_name = {tensor.name: tensor for tensor in placed}
        if len(by_name) < len(placed):
            raise ValueError("a name stands twice")
    except (struct.error, ValueError, OverflowError, RecursionError) as error:
        why = str(error)[:120]
        raise CheckpointError(
            "corrupt GGUF file", path, why=why, hint="download it again"
        ) from error
    texts = {
        key: value
        for key, value in values.items()
        if key.startswith("general.") and isinstance(value, str)
    }
    return GgufHeader(by_name, texts)


def _read_counts(data: BytesIO) -> tuple[int, int]:
    """How many tensors and how many values the header has."""
    _magic, version, tensors, values = _unpack(data, "4sIQQ")
    if version not in VERSIONS or not 0 < tensors <= MAX_ENTRIES or values > MAX_ENTRIES:
        raise ValueError(f"version {version}, {tensors} tensors, {values} values")
    return tensors, values


def _read_tensor(path: Path, data: BytesIO) -> TensorInfo:
    """The next tensor; its `start` counts from the beginning of the data.

    Raises `CheckpointError` for a type that is not read.
    """
    name = _read_text(data)
    rank = _read_number(data, "I")
    if rank > MAX_RANK:
        raise ValueError(f"{name!r:.60} has {rank} dimensions")
    *shape, kind, start = _unpack(data, f"{rank}QIQ")
    dtype = DTYPES.get(kind)
    if dtype is None:
        why = f"{name:.60} is {UNREADABLE_TYPES.get(kind, f'of type {kind}')}"
        hint = "of GGUF's types are read Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, and 16 bit"
        what = "weights packed in a way that is not read"
        raise CheckpointError(what, path, why=why, hint=hint)
    # A row must consist of whole blocks; its length comes first in GGUF's shapes.
    row_values = shape[0] if shape else 1
    if dtype in GGUF_BITS and row_values % gguf_block_values(dtype):
        raise ValueError(f"{name!r:.60} has no whole blocks of {dtype}")
    return TensorInfo(name, dtype, tuple(reversed(shape)), start=start)


def _check_alignment(alignment: object) -> int:
    """Return the data's alignment in bytes; raises `ValueError` unless it is 8, 16, 32, ..."""
    if type(alignment) is not int or alignment < 8 or alignment.bit_count() > 1:
        raise ValueError(f"its alignment is {alignment!r:.40}")
    return alignment


def _check_places(
    tensors: list[TensorInfo], *, data_start: int, file_bytes: int, alignment: int
) -> None:
    """Raise `ValueError` unless the tensors lie aligned in the file, and none over another.

    They must be sorted by their first bytes; gaps between them are allowed.
    """
    free_from = data_start
    for tensor in tensors:
        name = f"{tensor.name!r:.60}"
        if max(tensor.shape, default=0) >= MAX_DIMENSION or tensor.stop > file_bytes:
            why = f"{name} has an impossible shape or place; the file has {file_bytes} bytes"
            raise ValueError(why)
        if tensor.start < free_from or tensor.start % alignment:
            raise ValueError(f"{name} overlaps, or is not aligned")
        free_from = tensor.stop


def _read_value(data: BytesIO, *, kind: int) -> object:
    """The next value; `kind` is the number of its type. Lists are skipped and become None."""
    if kind == TEXT:
        return _read_text(data)
    if kind != LIST:
        return _read_number(data, _number_code(kind))
    item_kind, count = _unpack(data, "IQ")
    if item_kind in (TEXT, LIST):
        # A count that is too large ends where the data end, by struct.error.
        for _ in range(count):
            _read_value(data, kind=item_kind)
    else:
        item_bytes = struct.calcsize(f"<{_number_code(item_kind)}")
        data.seek(count * item_bytes, os.SEEK_CUR)
    return None


def _number_code(kind: int) -> str:
    """The letter in `struct` of a type of numbers; raises `ValueError` for an unknown type."""
    if kind not in NUMBER_CODES:
        raise ValueError(f"a value has type {kind}, which does not exist")
    return NUMBER_CODES[kind]


def _read_text(data: BytesIO) -> str:
    """The next text; raises `ValueError` where it is too long or not UTF-8."""
    length = _read_number(data, "Q")
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"a text has {length} bytes")
    (text,) = _unpack(data, f"{length}s")
    return str(text, "utf-8")


def _read_number(data: BytesIO, code: str) -> Any:
    """The next number, by its letter in `struct`."""
    (number,) = _unpack(data, code)
    return number


def _unpack(data: BytesIO, codes: str) -> tuple[Any, ...]:
    """The next values, little-endian without padding; raises `struct.error` where the data ends."""
    layout = f"<{codes}"
    return struct.unpack(layout, data.read(struct.calcsize(layout)))
