"""Write safetensors files tensor by tensor, in any order.

The header is made from names, dtypes and shapes, before any data is known. Knows the file format
only; tensors come as buffers. Offsets and sizes are in bytes. Stdlib only.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from quant.files import flush_to_disk
from quant.header import LENGTH_BYTES, read_header
from quant.tensor_info import DTYPE_BITS, TensorInfo

# The data begin at a multiple of 8 bytes, as do those that safetensors' own library writes.
ALIGNED = 8


class SafetensorsWriter:
    """Writes one file, with exactly the tensors that it was told of.

    `nbytes` is the file's size, known from the beginning. The file is opened when the first tensor
    is added, and must not exist before. Call `finish` when all are added, and `close` also where
    that does not happen.
    """

    def __init__(
        self, path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        """Give each tensor its place, wide dtypes first so that all are aligned; writes nothing."""
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        start = 0
        for info in sorted(tensors, key=lambda info: -DTYPE_BITS[info.dtype]):
            stop = start + info.nbytes
            self.infos[info.name] = replace(info, start=start)
            header[info.name] = {
                "dtype": info.dtype,
                "shape": info.shape,
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        padding = -len(text) % ALIGNED
        self._header = text + b" " * padding
        self._data_start = LENGTH_BYTES + len(self._header)
        self.nbytes = self._data_start + start
        self._checksums: dict[str, int] = {}
        self._file: BinaryIO | None = None

    def add(self, name: str, data: memoryview) -> None:
        """Write one tensor's bytes, of which there must be as many as its dtype and shape say."""
        info = self.infos[name]
        assert data.nbytes == info.nbytes and name not in self._checksums, name
        if self._file is None:
            self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed by close
            length = len(self._header).to_bytes(LENGTH_BYTES, "little")
            self._write(length + self._header, at=0)
        self._write(data, at=self._data_start + info.start)
        self._checksums[name] = zlib.crc32(data)

    def _write(self, data: bytes | memoryview, *, at: int) -> None:
        """Write all of the data from byte `at`; an unbuffered file may take less at once."""
        assert self._file is not None
        view = memoryview(data)
        while view.nbytes:
            self._file.seek(at)
            written = self._file.write(view)
            view = view[written:]
            at += written

    def finish(self) -> None:
        """Bring the file to the disk and close it; every tensor must have been added."""
        missing = sorted(set(self.infos) - set(self._checksums))
        assert self._file is not None and not missing, missing[:3]
        flush_to_disk(self._file)
        self.close()

    def close(self) -> None:
        """Close the file, whole or not; does nothing where it is closed or was never opened."""
        if self._file is not None:
            self._file.close()

    def find_damage(self) -> str:
        """The name of the first tensor whose bytes in the file are not those that were written.

        It is "the header" where that has changed, and "" where nothing is damaged. All of the file
        is read; raises `CheckpointError` for a header that cannot be.
        """
        if read_header(self.path) != self.infos:
            return "the header"
        with self.path.open("rb") as file:
            for name, info in self.infos.items():
                file.seek(self._data_start + info.start)
                if zlib.crc32(file.read(info.nbytes)) != self._checksums[name]:
                    return name
        return ""
