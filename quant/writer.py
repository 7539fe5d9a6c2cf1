"""Write safetensors files tensor by tensor, in any order, with a header that is known before the first byte.

Knows the file format only. Offsets and sizes are in bytes. Stdlib only; tensors come as buffers.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from quant.header import DTYPE_BITS, TensorInfo, read_header


class SafetensorsWriter:
    """One file with exactly the tensors it was told of; `nbytes` is its size, known at once."""

    def __init__(
        self, path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        """Lay the file out: wide dtypes first, so that each tensor is aligned; nothing is written yet."""
        self.path, self.infos, at, header = path, {}, 0, {"__metadata__": dict(metadata)}
        for info in sorted(tensors, key=lambda info: -DTYPE_BITS[info.dtype]):
            self.infos[info.name] = replace(info, start=at)
            header[info.name] = {
                "dtype": info.dtype,
                "shape": info.shape,
                "data_offsets": [at, at + info.nbytes],
            }
            at += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text.ljust(-(-len(text) // 8) * 8)  # aligned
        self.nbytes = 8 + len(self._header) + at
        self._checksums, self._file = {}, None

    def add(self, name: str, data: memoryview) -> None:
        """Write one tensor's bytes; its size must be the one laid out."""
        info = self.infos[name]
        assert data.nbytes == info.nbytes and name not in self._checksums, name
        if self._file is None:
            self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed by finish or close
            self._write(len(self._header).to_bytes(8, "little") + self._header, 0)
        self._write(data, 8 + len(self._header) + info.start)
        self._checksums[name] = zlib.crc32(data)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view.nbytes:
            self._file.seek(at)
            written = self._file.write(view)
            view, at = view[written:], at + written

    def finish(self) -> None:
        """Bring the file to the disk; every tensor must have been added."""
        assert set(self._checksums) == set(self.infos), sorted(
            set(self.infos) - set(self._checksums)
        )[:3]
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def damaged(self) -> str:
        """The first tensor whose bytes in the reopened file are not those that were written, "" if none."""
        if read_header(self.path) != self.infos:
            return "the header"
        with self.path.open("rb") as file:
            for name, info in self.infos.items():
                file.seek(8 + len(self._header) + info.start)
                if zlib.crc32(file.read(info.nbytes)) != self._checksums[name]:
                    return name
        return ""
