"""Read and validate the header of a safetensors or GGUF file, nothing of the data. Stdlib only.

https://github.com/huggingface/safetensors#format: 8 bytes little-endian length N, N bytes of JSON,
data without gaps. Sizes are in bytes.
"""

import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from quant import gguf_header
from quant.errors import CheckpointError
from quant.header_json import HeaderJson
from quant.tensor_info import DTYPE_BITS, MAX_DIMENSION, MAX_RANK, TensorInfo

# The reference's own bound.
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# How pickles begin: torch.save's zip, then the protocols 2 to 5.
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# How else a file may begin that was saved under the name of weights, and what it is then.
OTHER_FILES = {
    b"<": "it is a web page, as sites answer that want a log-in",
    b"{": "it is JSON text, as sites answer that want a log-in",
    b"[": "it is JSON text, as sites answer that want a log-in",
    b"version https://git-lfs": "it is a git-lfs pointer, which stands for the file",
    b"\x1f\x8b": "it is an archive (gzip)",
    b"7z\xbc\xaf": "it is an archive (7z)",
    b"Rar!": "it is an archive (rar)",
    b"\x89PNG": "it is a picture",
    b"\xff\xd8\xff": "it is a picture",
    b"\0\0\0\0\0\0\0\0": "it begins with zeros, as a download that did not end",
}
# So much of a file is looked at to say what it is; of a text, so many characters are shown.
SAMPLE_BYTES = 256
SHOWN_CHARACTERS = 60
UTF8_MARK = b"\xef\xbb\xbf"
# Letters of `struct` for the dtypes of single numbers; BF16 is read as the float32 it begins.
NUMBER_CODES = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f", "I64": "q", "I32": "i"}
# A file is identified by so many pages of this size, evenly spread.
IDENTITY_PAGES = 64
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Header:
    """What the header of a weight file says: tensors by name, in the order of their data.

    `metadata` has the texts of a safetensors file's `__metadata__`, but for very long ones, and of
    a GGUF those that say what model it is.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    is_gguf: bool


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a weight file by name; raises `CheckpointError` for any defect."""
    return read_whole_header(path).tensors


def read_whole_header(path: Path) -> Header:
    """Return what a weight file's header says.

    Raises `CheckpointError` for any defect, for other files (a pickle, a web page) and where it
    cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(
                "not a weight file", path, why="it is no regular file", hint="download it again"
            )
        with path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            if start.startswith(gguf_header.MAGIC):
                header = start + file.read(gguf_header.MAX_HEADER_BYTES)
                found = gguf_header.parse_gguf_header(path, header, status.st_size)
                return Header(found.tensors, metadata=found.texts, is_gguf=True)
            header_bytes = int.from_bytes(start, "little")
            room_bytes = status.st_size - LENGTH_BYTES
            # This comes before a look at the magic: a JSON of 640 bytes begins like a pickle.
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, room_bytes):
                raise _refuse_other_file(path, start + file.read(SAMPLE_BYTES), status.st_size)
            text = file.read(header_bytes)
    except OSError as error:
        why = error.strerror or "read error"
        raise CheckpointError("cannot read weights", path, why=why) from error
    return _parse(path, text, status.st_size - LENGTH_BYTES - header_bytes)


def _refuse_other_file(path: Path, sample: bytes, file_bytes: int) -> CheckpointError:
    """The error for a file whose first bytes, the `sample`, are no length of a header."""
    if sample[:2] in PICKLES:
        why = "loading it could run any code"
        hint = "convert it with safetensors.torch.save_file in an environment you trust"
        return CheckpointError("refusing a pickle", path, why=why, hint=hint)
    why = _name_other_file(sample)
    if not why and len(sample) < LENGTH_BYTES:
        why = f"it has only {file_bytes} bytes"
    if not why:
        length = int.from_bytes(sample[:LENGTH_BYTES], "little")
        why = f"its header claims {length} bytes, the file has {file_bytes}"
    return CheckpointError("not a safetensors file", path, why=why, hint="download it again")


def _name_other_file(sample: bytes) -> str:
    """What a file is by its beginning, as the reason of a refusal; "" where that is not known."""
    text = sample.removeprefix(UTF8_MARK).lstrip()
    for start, kind in OTHER_FILES.items():
        if text.startswith(start):
            return kind
    shown = text.partition(b"\n")[0][:SHOWN_CHARACTERS].decode("ascii", errors="replace").strip()
    if len(shown) >= LENGTH_BYTES and shown.isprintable() and "\ufffd" not in shown:
        return f"it is a text: {shown}"
    return ""


def _parse(path: Path, text: bytes, data_bytes: int) -> Header:
    """The header from its JSON; the file has `data_bytes` behind it, which it must describe."""
    tensors = []
    metadata: dict[str, str] = {}
    try:
        header = HeaderJson(text)
        for name in header.members():
            if name == "__metadata__":
                metadata = header.read_metadata()
            else:
                tensors.append(_make_tensor(path, name, header.read_entry()))
        header.read_end()
    except (ValueError, RecursionError) as error:
        why = str(error)[:80]
        raise CheckpointError(
            "corrupt safetensors header", path, why=why, hint="download it again"
        ) from error
    if not tensors:
        raise CheckpointError("empty safetensors file", path, why="it holds no tensors")
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_tiling(path, tensors, data_bytes)
    return Header({tensor.name: tensor for tensor in tensors}, metadata=metadata, is_gguf=False)


def _make_tensor(path: Path, name: str, entry: object) -> TensorInfo:
    """The tensor of an entry; raises `CheckpointError` unless its values are sane and agree."""
    if _has_sane_values(entry):
        start, stop = entry["data_offsets"]
        tensor = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), start=start)
        if tensor.stop == stop:
            return tensor
    why = f"tensor {name[:60]!r} has an impossible dtype, shape or place"
    raise CheckpointError("corrupt safetensors header", path, why=why)


def _has_sane_values(entry: object) -> TypeGuard[dict[str, Any]]:
    """Whether an entry has a known dtype, a possible shape and two possible offsets."""
    if not isinstance(entry, dict):
        return False
    dtype = entry.get("dtype")
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return False
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        return False
    if not isinstance(offsets, list) or len(offsets) != 2:
        return False
    # By `type`, because isinstance takes True for an int.
    return all(type(n) is int and 0 <= n < MAX_DIMENSION for n in (*shape, *offsets))


def _check_tiling(path: Path, tensors: list[TensorInfo], data_bytes: int) -> None:
    """Raise `CheckpointError` unless the tensors, sorted by place, fill the data without gaps."""
    covered_bytes = 0
    for tensor in tensors:
        if tensor.start != covered_bytes:
            why = f"{tensor.name[:60]} overlaps or has a gap"
            raise CheckpointError("corrupt safetensors header", path, why=why)
        covered_bytes = tensor.stop
    if covered_bytes == data_bytes:
        return
    what = "weight file is longer than its header says"
    if covered_bytes > data_bytes:
        what = "weight file is truncated"
    why = f"it needs {covered_bytes} bytes of data and has {data_bytes}"
    raise CheckpointError(what, path, why=why, hint="download it again")


def read_tensor_bytes(path: Path, tensor: TensorInfo) -> bytes:
    """The data of one tensor of a safetensors file whose header is valid; raises `OSError`.

    They are fewer bytes where the file has become shorter.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        file.seek(LENGTH_BYTES + header_bytes + tensor.start)
        return file.read(tensor.nbytes)


def read_numbers(path: Path, tensors: Iterable[TensorInfo]) -> dict[str, float]:
    """The values of tensors of one element in a valid safetensors file, by their names.

    Raises `CheckpointError` for a tensor that holds no single number, and `OSError`.
    """
    numbers = {}
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        for tensor in tensors:
            code = NUMBER_CODES.get(tensor.dtype)
            if code is None or tensor.numel != 1:
                why = f"{tensor.name[:60]} is {tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError("no number", path, why=why, hint="download it again")
            file.seek(LENGTH_BYTES + header_bytes + tensor.start)
            data = file.read(tensor.nbytes)
            if len(data) < tensor.nbytes:
                why = "it has become shorter since its header was read"
                raise CheckpointError("weight file is truncated", path, why=why)
            if tensor.dtype == "BF16":
                data = b"\0\0" + data
            (number,) = struct.unpack(f"<{code}", data)
            numbers[tensor.name] = float(number)
    return numbers


def file_identity(path: Path) -> bytes:
    """Bytes that identify a file's content without reading all of it.

    They are its size and 64 evenly spread pages of 4 KiB. Raises `CheckpointError` where it cannot
    be read.
    """
    try:
        file_bytes = os.path.getsize(path)
        parts = [file_bytes.to_bytes(8, "little")]
        last_start = max(0, file_bytes - PAGE_BYTES)
        with path.open("rb") as file:
            for k in range(IDENTITY_PAGES):
                file.seek(last_start * k // (IDENTITY_PAGES - 1))
                parts.append(file.read(PAGE_BYTES))
    except OSError as error:
        why = error.strerror or "read error"
        raise CheckpointError("cannot read", path, why=why) from error
    return b"".join(parts)
