"""Previews as files: small pictures beside the name that a picture will have.

A preview lies at NAME.preview.jpg only while its picture is under way. It takes no name that is
taken already. numpy and PIL are imported inside functions.
"""

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fluxcli.pictures import names
from fluxcli.pictures.names import Destination
from quant.files import write_atomically

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
            self.path = names.write_first_free(data, _list_places(destination))
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


def _list_places(destination: Destination) -> Iterator[Path]:
    """Yield the names that a preview can have beside those its picture would have now, no end."""
    beside = names.move_from_stdout(destination)
    for candidate in names.list_candidates(beside):
        if beside.target.force or not os.path.lexists(candidate):
            yield candidate.with_name(names.join_name(candidate.stem, SUFFIX))
