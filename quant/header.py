"""Read and validate the header of a safetensors file, nothing of the data. Stdlib only; sizes are in bytes.

https://github.com/huggingface/safetensors#format: 8 bytes little-endian length N, N bytes of JSON, data without gaps.
"""

import json
import math
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quant.errors import CheckpointError

MAX_HEADER_BYTES = 4 << 20  # 40,000 tensors; the reference allows 100 MB, which take minutes and gigabytes to parse
MAX_DIMENSION, MAX_RANK, PAGE_BYTES = 1 << 48, 8, 4096
DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
              "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}  # fmt: skip
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
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, in file order; raises `CheckpointError` on any defect."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a weight file", path, why="it is no regular file")
        with path.open("rb") as file:
            length = _header_length(path, file.read(8), status.st_size)
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
    if start[:4] == b"GGUF":
        raise CheckpointError("a GGUF file", path, why="this version reads safetensors")
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


def file_identity(path: Path) -> bytes:
    """Bytes that identify a file's content without reading all of it: its size and 64 evenly spread pages."""
    size = os.path.getsize(path)
    pages = [size.to_bytes(8, "little")]
    with path.open("rb") as file:
        for k in range(64):
            file.seek(max(0, size - PAGE_BYTES) * k // 63)
            pages.append(file.read(PAGE_BYTES))
    return b"".join(pages)
