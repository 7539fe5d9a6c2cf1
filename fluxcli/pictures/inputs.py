"""Pictures that a request starts from: files of others, read and normalized the same way each time.

Whatever the file, the pixels are (H, W, 3) uint8, RGB, turned as its EXIF says, with what is
transparent over white. Knows nothing of what is done with them. numpy and PIL are imported inside
functions.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxcli.errors import BadInputFile
from fluxcli.request.fields import GenerationRequest
from quant.files import read_small_file

if TYPE_CHECKING:
    import numpy as np

MAX_FILE_BYTES = 256 << 20
MAX_INPUT_PIXELS = 256 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
HINT = "a png, jpg or webp"


@dataclass(frozen=True)
class InputPicture:
    """A picture that was read once, and is read again when its pixels are used.

    `remarks` say what was done to it that its owner may not expect.
    """

    path: str
    size: tuple[int, int]  # (width, height) in pixels
    sha256: str  # of the file
    remarks: tuple[str, ...] = ()

    def read_pixels(self) -> "np.ndarray":
        """Return the pixels (H, W, 3) uint8; raises `BadInputFile`, also where the file changed."""
        data = _read_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise _refuse(self.path, "it has changed since it was looked at")
        pixels, _ = _normalize(self.path, data)
        return pixels


@dataclass(frozen=True)
class InputPictures:
    """All pictures that a request starts from, by what they are for."""

    image: InputPicture | None = None
    mask: InputPicture | None = None
    references: tuple[InputPicture, ...] = ()
    redux: tuple[InputPicture, ...] = ()
    controls: tuple[InputPicture, ...] = ()

    def list_all(self) -> list[InputPicture]:
        """Return every picture, in the order of the fields."""
        single = [each for each in (self.image, self.mask) if each]
        return [*single, *self.references, *self.redux, *self.controls]

    def __bool__(self) -> bool:
        return bool(self.list_all())


NO_INPUTS = InputPictures()


def load_inputs(request: GenerationRequest) -> InputPictures:
    """Read every picture that a request names; raises `BadInputFile`."""
    return InputPictures(
        image=read_picture(request.image) if request.image else None,
        mask=read_picture(request.mask) if request.mask else None,
        references=tuple(map(read_picture, request.reference)),
        redux=tuple(read_picture(each.image) for each in request.redux),
        controls=tuple(read_picture(each.image) for each in request.control),
    )


def name_hashes(inputs: InputPictures) -> dict[str, Any]:
    """Return the sha256 of each file by what it is for: what a picture's metadata say of it."""
    found: dict[str, Any] = {}
    for name in ("image", "mask"):
        picture = getattr(inputs, name)
        if picture:
            found[name] = picture.sha256
    for name in ("references", "redux", "controls"):
        pictures = getattr(inputs, name)
        if pictures:
            found[name] = [picture.sha256 for picture in pictures]
    return found


def read_picture(path: str) -> InputPicture:
    """Look at a file of a picture, all of it; raises `BadInputFile`."""
    data = _read_file(path)
    pixels, remarks = _normalize(path, data)
    height, width, _ = pixels.shape
    return InputPicture(path, (width, height), hashlib.sha256(data).hexdigest(), remarks)


def resize(pixels: "np.ndarray", size: tuple[int, int]) -> "np.ndarray":
    """Return pixels (H, W, 3) uint8 of another (width, height), as diffusers resizes (Lanczos)."""
    import numpy as np
    from PIL import Image

    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _normalize(path: str, data: bytes) -> tuple["np.ndarray", tuple[str, ...]]:
    """Return the pixels (H, W, 3) uint8 of a file's data, and remarks on what was done."""
    import numpy as np
    from PIL import ImageOps

    image = _open(path, data)
    remarks = []
    try:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            from PIL import Image

            remarks.append("what is transparent was put over white")
            over = image.convert("RGBA")
            white = Image.new("RGBA", over.size, "white")
            image = Image.alpha_composite(white, over)
        pixels = np.asarray(image.convert("RGB"))
    except Exception as error:
        raise _refuse(path, str(error)[:80]) from error
    return pixels, tuple(remarks)


def measure_picture(path: str) -> tuple[int, int]:
    """Return (width, height) in pixels after turning as EXIF says; raises `BadInputFile`."""
    from PIL import ExifTags

    image = _open(path, _read_file(path))
    width, height = image.size
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if is_turned else (width, height)


def _read_file(path: str) -> bytes:
    try:
        return read_small_file(Path(path), MAX_FILE_BYTES)
    except OSError as error:
        raise _refuse(path, error.strerror or "it cannot be read") from error
    except ValueError as error:  # NUL or what is no text in its name
        raise _refuse(path, "no file can have this name") from error


def _open(path: str, data: bytes) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise _refuse(path, "it is no picture that can be read") from error
    width, height = image.size
    if width * height > MAX_INPUT_PIXELS:
        raise _refuse(path, f"{width}x{height} pixels are too many")
    return image


def _refuse(path: str, why: str) -> BadInputFile:
    return BadInputFile("cannot use the picture", which=path, why=why, hint=HINT)


def describe_remarks(inputs: InputPictures) -> list[str]:
    """Return what the owners of pictures should know, each with the picture's name."""
    return [f"{each.path}: {remark}" for each in inputs.list_all() for remark in each.remarks]


def fit_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """Return (width, height), multiples of 16, of a picture's ratio at about so many pixels."""
    width, height = size
    factor = (pixels / (width * height)) ** 0.5
    fitted = [max(16, int(side * factor / 16 + 0.5) * 16) for side in (width, height)]
    return fitted[0], fitted[1]
