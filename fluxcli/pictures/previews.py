"""Previews as files: small pictures beside the name that a picture will have.

A preview lies at NAME.preview.jpg only while its picture is under way. It takes no name that is
taken already. numpy and PIL are imported inside functions.
"""

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fluxcli.pictures import names
from fluxcli.pictures.names import Destination
from quant.files import move_if_free, write_atomically

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".preview.jpg"
LEAST_PX = 256  # of the longest side: smaller ones are enlarged
QUALITY = 80


class PreviewFile:
    """The file with the preview of one picture, if there is one yet."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def write(self, pixels: "np.ndarray", destination: Destination) -> Path:
        """Write pixels (h, w, 3) uint8 in the place of the preview before, and return where.

        Raises OSError.
        """
        data = encode(pixels)
        if self.path is None:
            self.path = _write_new(data, destination)
        else:
            write_atomically(self.path, data, place=os.replace)
        return self.path

    def remove(self) -> None:
        """Delete the file; nothing is said where that fails."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()
            self.path = None


def encode(pixels: "np.ndarray") -> bytes:
    """Return a jpg of pixels (h, w, 3) uint8, enlarged where they are few."""
    from PIL import Image

    image = Image.fromarray(pixels)
    factor = -(-LEAST_PX // max(image.size))
    if factor > 1:
        width, height = image.size
        image = image.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def _write_new(data: bytes, destination: Destination) -> Path:
    """Write the first preview beside the name that its picture would have now; raises OSError."""
    beside = names.move_from_stdout(destination)
    for candidate in names.list_candidates(beside):
        path = candidate.with_name(names.join_name(candidate.stem, SUFFIX))
        is_taken = os.path.lexists(candidate) and not beside.target.force
        if is_taken or os.path.lexists(path):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another process was quicker
            write_atomically(path, data, place=move_if_free)
            return path
    raise AssertionError("the candidates are endless")
