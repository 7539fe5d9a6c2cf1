"""Read and validate the header of a safetensors or GGUF file, nothing of the data. Stdlib only; sizes are in bytes.

https://github.com/huggingface/safetensors#format: 8 bytes little-endian length N, N bytes of JSON, data without gaps.
"""

import io
import json
import math
import os
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from quant.errors import CheckpointError

MAX_HEADER_BYTES = 4 << 20  # 40,000 tensors; the reference allows 100 MB, which take minutes and gigabytes to parse
MAX_DIMENSION, MAX_RANK, PAGE_BYTES = 1 << 48, 8, 4096
DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
              "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}  # fmt: skip
GGUF_BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375,
             "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}  # fmt: skip
GGUF_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
              12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 24: "I8", 25: "I16", 26: "I32", 28: "F64", 30: "BF16"}  # fmt: skip
GGUF_NUMBERS = "BbHhIif?__Qqd"  # by the type of a value, in `struct`'s letters
GGUF_MAGIC, MAX_ENTRIES, ARCHITECTURES = b"GGUF", 1 << 14, ("flux", "t5", "t5encoder", "pig")
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip (torch.save), or pickle protocols


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its name, safetensors dtype, shape and place (`start`, `stop`) behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.nbytes

    @property
    def nbytes(self) -> int:
        return int(self.numel * (DTYPE_BITS.get(self.dtype) or GGUF_BITS[self.dtype])) // 8

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a weight file by name, in file order; raises `CheckpointError` on any defect."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a weight file", path, why="it is no regular file")
        with path.open("rb") as file:
            if (start := file.read(8))[:4] == GGUF_MAGIC:
                return _read_gguf(path, io.BytesIO(start + file.read(MAX_HEADER_BYTES)), status.st_size)
            length = _header_length(path, start, status.st_size)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError("cannot read weights", path, why=error.strerror or "read error") from error
    return _parse(path, text, status.st_size - 8 - length)


def _header_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < 8:
        raise CheckpointError("not a safetensors file", path, why=f"it has only {size} bytes")
    length = int.from_bytes(start, "little")
    if 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        return length
    if start[:2] in PICKLES:  # only now: a header of 640 bytes begins like a pickle
        hint = "convert it with safetensors.torch.save_file in an environment you trust"
        raise CheckpointError("refusing a pickle", path, why="loading it could run any code", hint=hint)
    is_page, is_pointer = start.lstrip().startswith(b"<"), b"version https://git-lfs".startswith(start)
    claim = f"its header claims {length} bytes, the file has {size}"
    why = "it is a web page" if is_page else "it is a git-lfs pointer" if is_pointer else claim
    raise CheckpointError("not a safetensors file", path, why=why, hint="download it again")


def _parse(path: Path, text: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    try:
        pairs = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("corrupt safetensors header", path, why=str(error)[:80]) from error
    if not isinstance(pairs, dict):
        raise CheckpointError("corrupt safetensors header", path, why="it is no JSON object")
    pairs.pop("__metadata__", None)
    if not pairs:
        raise CheckpointError("empty safetensors file", path, why="it holds no tensors")
    found, at = [_tensor(path, name, value) for name, value in pairs.items()], 0
    tensors = {tensor.name: tensor for tensor in sorted(found, key=lambda tensor: (tensor.start, tensor.stop))}
    for tensor in tensors.values():
        if tensor.start != at:
            raise CheckpointError("corrupt safetensors header", path, why=f"{tensor.name[:60]} overlaps or has a gap")
        at = tensor.stop
    if at != data_bytes:
        word = "truncated" if at > data_bytes else "longer than its header says"
        why = f"it needs {at} bytes of data and has {data_bytes}"
        raise CheckpointError(f"weight file is {word}", path, why=why, hint="download it again")
    return tensors


def is_gguf(path: Path) -> bool:
    """Whether a readable file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == GGUF_MAGIC


def _read_gguf(path: Path, data: io.BytesIO, size: int) -> dict[str, TensorInfo]:
    """The tensors by the header in `data`; `start` counts from the first byte, shapes are as torch has them.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's reader never ends on hostile counts.
    """
    try:
        _, version, tensors, values = _numbers(data, "4sIQQ")
        if version not in (2, 3) or not 0 < tensors <= MAX_ENTRIES or values > MAX_ENTRIES:
            raise ValueError(f"version {version}, {tensors} tensors, {values} values")
        known = {_gguf_text(data): _gguf_value(data, *_numbers(data, "I")) for _ in range(values)}
        found = []
        for _ in range(tensors):
            name, (rank,) = _gguf_text(data), _numbers(data, "I")
            *shape, kind, start = _numbers(data, f"{rank if rank <= MAX_RANK else -1}QIQ")
            if (dtype := GGUF_TYPES.get(kind)) is None:
                raise ValueError(f"{name!r:.60} has type {kind}, which is not read")
            if dtype in GGUF_BITS and (not shape or shape[0] % (256 if dtype.endswith("_K") else 32)):
                raise ValueError(f"{name!r:.60} has no whole blocks of {dtype}")
            found.append(TensorInfo(name, dtype, tuple(reversed(shape)), start))
        alignment = known.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment.bit_count() > 1:
            raise ValueError(f"its alignment is {alignment!r:.40}")
        base = -(-data.tell() // alignment) * alignment
        placed = sorted((replace(info, start=base + info.start) for info in found), key=lambda info: info.start)
        for info, before in zip(placed, [base, *(info.stop for info in placed)], strict=False):
            if max(info.shape, default=0) >= MAX_DIMENSION or info.stop > size:
                raise ValueError(f"{info.name!r:.60} has an impossible shape or place; the file has {size} bytes")
            if info.start < before or info.start % alignment:
                raise ValueError(f"{info.name!r:.60} overlaps, or is not aligned")
        if len(by_name := {info.name: info for info in placed}) < len(placed):
            raise ValueError("a name stands twice")
    except (struct.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError("corrupt GGUF file", path, why=str(error)[:120], hint="download it again") from error
    if (architecture := str(known.get("general.architecture", "flux"))) not in ARCHITECTURES:
        raise CheckpointError("a GGUF of another model", path, why=f"its architecture is {architecture!r:.40}")
    return by_name


def _numbers(data: io.BytesIO, kinds: str) -> tuple:
    return struct.unpack(f"<{kinds}", data.read(struct.calcsize(f"<{kinds}")))


def _gguf_text(data: io.BytesIO) -> str:
    (length,) = _numbers(data, "Q")
    return _numbers(data, f"{length if length <= MAX_HEADER_BYTES else -1}s")[0].decode("utf-8")


def _gguf_value(data: io.BytesIO, kind: int) -> object:
    if kind == 8:
        return _gguf_text(data)
    if kind != 9:
        return _numbers(data, GGUF_NUMBERS[kind : kind + 1] or "_")[0]  # "_" is none: `struct` refuses it
    kind, count = _numbers(data, "IQ")  # of a list, which nobody here reads; it ends with the data
    if kind in (8, 9):
        for _ in range(count):
            _gguf_value(data, kind)
    else:
        data.seek(count * struct.calcsize(f"<{GGUF_NUMBERS[kind : kind + 1] or '_'}"), os.SEEK_CUR)
    return None


def _no_duplicates(pairs: list) -> dict:
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _tensor(path: Path, name: str, value: object) -> TensorInfo:
    with suppress(TypeError, KeyError, ValueError):
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        sane = isinstance(shape, list) and len(shape) <= MAX_RANK
        if sane and all(type(n) is int and 0 <= n < MAX_DIMENSION for n in (*shape, start, stop)):
            info = TensorInfo(name, dtype, tuple(shape), start)
            if stop == info.stop:
                return info
    why = f"tensor {name[:60]!r} has an impossible dtype, shape or place"
    raise CheckpointError("corrupt safetensors header", path, why=why)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file, whose header is valid, says of itself; none of a GGUF."""
    if is_gguf(path):
        return {}
    with path.open("rb") as file:
        said = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return {key: value for key, value in said.items() if isinstance(value, str)} if isinstance(said, dict) else {}


def read_scalar(path: Path, info: TensorInfo) -> float:
    """The value of a tensor of one element in a valid safetensors file; raises `CheckpointError` for any other."""
    kind = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f", "I64": "q", "I32": "i"}.get(info.dtype)
    if kind is None or info.numel != 1:
        raise CheckpointError("no number", path, why=f"{info.name[:60]} is {info.dtype} {list(info.shape)}")
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + info.start)
        data = file.read(info.nbytes)
    return float(struct.unpack(f"<{kind}", b"\0\0" * (info.dtype == "BF16") + data)[0])


def file_identity(path: Path) -> bytes:
    """Bytes that identify a file's content without reading all of it: its size and 64 evenly spread pages."""
    size = os.path.getsize(path)
    pages = [size.to_bytes(8, "little")]
    with path.open("rb") as file:
        for k in range(64):
            file.seek(max(0, size - PAGE_BYTES) * k // 63)
            pages.append(file.read(PAGE_BYTES))
    return b"".join(pages)
