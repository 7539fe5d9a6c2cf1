"""Pictures that a request starts from: which there are, and their pixels when they are needed.

How a file of others becomes pixels (H, W, 3) uint8 stands in `normalize`. Knows nothing of what is
done with them. numpy and PIL are imported inside functions.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxcli.pictures import normalize
from fluxcli.request.fields import GenerationRequest
from quant.files import open_regular

if TYPE_CHECKING:
    import numpy as np

CHUNK_BYTES = 1 << 20
MAX_KNOWN = 4096  # files whose sizes and remarks a process remembers


class _Looked(NamedTuple):
    """What was seen of a file."""

    size: tuple[int, int]  # (width, height) in pixels
    remarks: tuple[str, ...]


# By hash and backdrop: the rows of a batch often share a photo, which is decoded once for them.
_KNOWN: dict[tuple[str, str], _Looked] = {}


@dataclass(frozen=True)
class InputPicture:
    """A picture that was read once, and is read again when its pixels are used.

    `remarks` say what was done to it that its owner may not expect. What is transparent in it lies
    over `backdrop`, a colour by name.
    """

    path: str
    size: tuple[int, int]  # (width, height) in pixels
    sha256: str  # of the file
    remarks: tuple[str, ...] = ()
    backdrop: str = "white"

    def read_pixels(self) -> "np.ndarray":
        """Return the pixels (H, W, 3) uint8; raises `BadInputFile`, also where the file changed."""
        data = normalize.read_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise normalize.refuse(self.path, "it has changed since it was looked at")
        pixels, _ = normalize.read_pixels(data, self.path, backdrop=self.backdrop)
        return pixels


@dataclass(frozen=True)
class InputPictures:
    """All pictures that a request starts from, by what they are for.

    `image` is the first of the references where that is edited within a mask.
    """

    image: InputPicture | None = None
    mask: InputPicture | None = None
    references: tuple[InputPicture, ...] = ()
    redux: tuple[InputPicture, ...] = ()
    controls: tuple[InputPicture, ...] = ()

    @property
    def own_image(self) -> InputPicture | None:
        """The image, unless it is a reference."""
        return None if self.image in self.references else self.image

    def list_all(self) -> list[InputPicture]:
        """Return every picture that is named, in the order of the fields."""
        single = [each for each in (self.own_image, self.mask) if each]
        return [*single, *self.references, *self.redux, *self.controls]

    def __bool__(self) -> bool:
        return bool(self.list_all())


NO_INPUTS = InputPictures()


def load_inputs(request: GenerationRequest) -> InputPictures:
    """Read every picture that a request names; raises `BadInputFile`.

    A mask without an image is one for the first reference.
    """
    image = read_picture(request.image) if request.image else None
    references = tuple(map(read_picture, request.reference))
    if request.mask and references and not image:
        image = references[0]
    return InputPictures(
        image=image,
        mask=read_mask(request.mask) if request.mask else None,
        references=references,
        redux=tuple(read_picture(each.image) for each in request.redux),
        controls=tuple(read_picture(each.image) for each in request.control),
    )


def name_hashes(inputs: InputPictures) -> dict[str, Any]:
    """Return the sha256 of each file by what it is for: what a picture's metadata say of it."""
    found: dict[str, Any] = {}
    for name, picture in (("image", inputs.own_image), ("mask", inputs.mask)):
        if picture:
            found[name] = picture.sha256
    for name in ("references", "redux", "controls"):
        pictures = getattr(inputs, name)
        if pictures:
            found[name] = [picture.sha256 for picture in pictures]
    return found


def list_hashes(named: Mapping[str, Any]) -> list[str]:
    """Return the hashes that `name_hashes` gave, in the order of `InputPictures.list_all`."""
    found: list[str] = []
    for each in fields(InputPictures):
        hashes = named.get(each.name, ())
        if isinstance(hashes, str):
            found.append(hashes)
        elif isinstance(hashes, list):  # a stranger's may be anything
            found += [str(one) for one in hashes]
    return found


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, "" for what cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
                digest.update(chunk)
            return digest.hexdigest()
    except (OSError, ValueError):
        return ""


def read_picture(path: str, *, backdrop: str = "white") -> InputPicture:
    """Look at a file of a picture, all of it; raises `BadInputFile`."""
    data = normalize.read_file(path)
    sha256 = hashlib.sha256(data).hexdigest()
    key = (sha256, backdrop)
    if key not in _KNOWN:
        pixels, remarks = normalize.read_pixels(data, path, backdrop=backdrop)
        height, width, _ = pixels.shape
        if len(_KNOWN) >= MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _Looked((width, height), remarks)
    looked = _KNOWN[key]
    return InputPicture(path, looked.size, sha256, looked.remarks, backdrop=backdrop)


def read_mask(path: str) -> InputPicture:
    """Look at a mask's file. White is painted, so what is transparent in it is black: it stays."""
    return read_picture(path, backdrop="black")


def measure_picture(path: str) -> tuple[int, int]:
    """Return (width, height) in pixels after turning as EXIF says; raises `BadInputFile`."""
    return normalize.measure(normalize.read_file(path), path)


def resize(pixels: "np.ndarray", size: tuple[int, int]) -> "np.ndarray":
    """Return pixels (H, W, 3) uint8 of another (width, height), as diffusers resizes (Lanczos)."""
    import numpy as np
    from PIL import Image

    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def describe_remarks(inputs: InputPictures) -> list[str]:
    """Return what the owners of pictures should know, each with the picture's name."""
    return [f"{each.path}: {remark}" for each in inputs.list_all() for remark in each.remarks]
