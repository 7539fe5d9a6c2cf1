"""Files of other people's pictures to pixels, always in the same way, and whatever is in the files.

Pixels are (H, W, 3) uint8, sRGB: turned as EXIF says, of an animation the first frame, of 16 bits
the upper 8, converted from a profile that the file carries, transparent parts over a colour that
the caller names. What a file is decides its content, not its name. PIL reads only `FORMATS`, which
it decodes by itself: of EPS, PDF and the like it would start another program. How large a picture
is is known before anything is decoded. numpy and PIL are imported inside functions.
"""

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxcli.errors import BadInputFile
from quant.files import read_small_file

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_FILE_BYTES = 512 << 20
MAX_PIXELS = 128 << 20  # a camera of 100 megapixels; in RGB PIL takes four times as many bytes
# A picture that is sent in rough first takes about ten passes over all of its pixels; a hostile
# one takes thousands, each a few bytes of the file.
MAX_JPEG_SCANS = 200
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "PSD",
)  # fmt: skip

HINT = "name a png, jpg or webp"
SHRINK = "make it smaller first"
CONVERT = "convert it to png first"
DAMAGED = "it is damaged: its header cannot be read"
# How files begin that are none of `FORMATS`: what they are, and what to do about it.
BEGINNINGS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the picture", "git lfs pull"),
    (b"%PDF", "it is a PDF document", CONVERT),
    (b"%!PS", "it is a PostScript or EPS document", CONVERT),
    (b"\xc5\xd0\xd3\xc6", "it is an EPS document", CONVERT),
    (b"\xff\x0a", "it is a JPEG XL picture", CONVERT),
    (b"\0\0\0\x0cJXL ", "it is a JPEG XL picture", CONVERT),
    (b"PK\x03\x04", "it is a zip archive", HINT),
    (b"\x1f\x8b", "it is a gzip archive", HINT),
    (b"\x1a\x45\xdf\xa3", "it is a video", HINT),
    # Of `FORMATS` these are, as far as one sees.
    *((each, DAMAGED, HINT) for each in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")),
    *((each, DAMAGED, HINT) for each in (b"II*\0", b"MM\0*")),
)
# The same of files that say their kind behind their first length: heic and mp4 are such.
BRANDS = (
    (rb"hei[cfmsx]|hev[cmsx]|mif1|msf1", "it is a HEIC picture", CONVERT),
    (
        rb"avi[fs]",
        "it is an AVIF picture that is damaged, or that this Pillow cannot read",
        CONVERT,
    ),
    (rb".{4}", "it is a video", HINT),
)
LOOKED_AT_BYTES = 1024  # of a file that is text, for what kind of text it is
TILE_SIDES = (322, 323)  # tags of TIFF: width and height of the tiles that it is stored in
REDUCED = 254  # TIFF's tag NewSubfileType: its lowest bit says that the picture is a thumbnail
ORIENTATION = 274  # EXIF's tag, and TIFF's
TURNED_BY_QUARTERS = (5, 6, 7, 8)  # values of EXIF's orientation: width and height change places


def read_file(path: str) -> bytes:
    """Return what is in the file of a picture; raises `BadInputFile`."""
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise refuse(path, "it is a folder")
        if status.st_size > MAX_FILE_BYTES:  # before any of it is read
            raise refuse(path, f"the file is larger than {MAX_FILE_BYTES / 1e6:.0f} MB", SHRINK)
        data = read_small_file(Path(path), MAX_FILE_BYTES)
    except OSError as error:
        raise refuse(path, (error.strerror or "it cannot be read").lower()) from error
    except ValueError as error:  # NUL or what is no text in its name
        raise refuse(path, "no file can have this name") from error
    if not data:
        raise refuse(path, "the file is empty")
    return data


def refuse(path: str, why: str, hint: str = HINT) -> BadInputFile:
    """Return the error of a file that no picture can be read from."""
    return BadInputFile("cannot use the picture", which=path, why=why, hint=hint)


def measure(data: bytes, path: str) -> tuple[int, int]:
    """Return (width, height) in pixels, turned as EXIF says, from the header where it says that.

    Raises `BadInputFile` as `read_pixels` does, but for what is damaged behind the header.
    """
    with _explaining(path):
        image = _open(data, path)
        width, height = image.size
        is_known_turned = ORIENTATION in getattr(image, "tag_v2", {})  # a TIFF tells its own so
        if is_known_turned or _read_orientation(image) not in TURNED_BY_QUARTERS:
            return width, height
        return height, width


def read_pixels(
    data: bytes, path: str, *, backdrop: str = "white"
) -> tuple["np.ndarray", tuple[str, ...]]:
    """Return the pixels (H, W, 3) uint8 of a picture's file, and remarks for its owner.

    What is transparent lies over `backdrop`, a colour by name. The remarks say what of the file is
    not in the pixels. Raises `BadInputFile`, which names the `path`, and MemoryError.
    """
    import numpy as np
    from PIL import Image

    remarks = []
    with _explaining(path):
        image = _open(data, path)
        # PIL calls the previews that phones put into their photos frames, too.
        is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
        if image.format == "TIFF":
            with _silence_c():
                image.load()
        else:
            image.load()
        if is_animated:
            remarks.append("of its frames the first is taken")
        # PIL turns a TIFF while it decodes.
        orientation = 1 if image.format == "TIFF" else _read_orientation(image)
        profile = image.info.get("icc_profile")
        colours, alpha = _split(image, path)
        del image
        if colours.mode == "CMYK" and not profile:
            remarks.append("its CMYK colours come without a profile: they are taken as they stand")
        colours = _convert_colours(colours, profile)
        if alpha is not None and any(alpha.histogram()[:255]):
            remarks.append(f"what is transparent was put over {backdrop}")
            behind = Image.new("RGB", colours.size, backdrop)
            behind.paste(colours, mask=alpha)
            colours = behind
        method = _find_turn(orientation)
        if method is not None:
            colours = colours.transpose(method)
        return np.array(colours), tuple(remarks)


@contextmanager
def _explaining(path: str) -> Iterator[None]:
    """Turn whatever PIL raises into `BadInputFile`, and let none of its warnings out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadInputFile, MemoryError):
        raise
    except Exception as error:
        # Decoders raise anything at what they do not expect: OSError, SyntaxError, struct.error ...
        said = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise refuse(path, f"it is damaged: {said}") from error


@contextmanager
def _silence_c() -> Iterator[None]:
    """Drop what C code prints: libtiff names an error on stderr before PIL raises it."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _open(data: bytes, path: str) -> "Image.Image":
    """Return the picture with its header read; raises `BadInputFile` for what may not be decoded.

    And whatever PIL raises at a damaged header.
    """
    from PIL import Image, UnidentifiedImageError

    too_many = f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels"
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        why, hint = _name_content(data)
        raise refuse(path, why, hint) from error
    except Image.DecompressionBombError as error:
        raise refuse(path, too_many, SHRINK) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        why = f"{too_many}: {width}x{height}"
        raise refuse(path, why, SHRINK)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise refuse(path, f"it takes more than {MAX_JPEG_SCANS} passes to decode", CONVERT)
    if image.format == "TIFF":
        _check_tiff(getattr(image, "tag_v2", {}), path)
    return image


def _check_tiff(tags: Mapping[int, Any], path: str) -> None:
    """Raise `BadInputFile` for a thumbnail in a camera's raw file, and for tiles that are bombs."""
    if tags.get(REDUCED, 0) & 1:
        why = "it is a camera's raw file, of which only a thumbnail could be read"
        raise refuse(path, why, CONVERT)
    tile_px = math.prod(int(tags.get(side, 1)) for side in TILE_SIDES)
    if tile_px > MAX_PIXELS:
        raise refuse(path, "its tiles are larger than any picture", CONVERT)


def _name_content(data: bytes) -> tuple[str, str]:
    """Return what a file is that is no picture, and what to do about it."""
    for beginning, why, hint in BEGINNINGS:
        if data.startswith(beginning):
            return why, hint
    if data[4:8] == b"ftyp":
        for brand, why, hint in BRANDS:
            if re.match(brand, data[8:12], re.DOTALL):
                return why, hint
    if not data.strip(b"\0"):
        return "it holds nothing but zeros", "download or copy it again"
    return _name_text(data[:LOOKED_AT_BYTES])


def _name_text(head: bytes) -> tuple[str, str]:
    """Return what a file is that begins like this, if it is a text, and what to do about it."""
    try:
        text = head[:-4].decode().lstrip("\ufeff \t\r\n").lower()  # the last character may be cut
    except UnicodeDecodeError:
        return "it is no picture that can be read", HINT
    if "<svg" in text:
        return "it is an SVG drawing", CONVERT
    if text.startswith(("<!doctype html", "<html")):
        return "it is a web page", "download the picture itself"
    return "it is a text", HINT


def _split(image: "Image.Image", path: str) -> tuple["Image.Image", "Image.Image | None"]:
    """Return the colours, in L, RGB, CMYK or LAB, and what is opaque (L), None where all is."""
    if image.mode.startswith("I"):
        return _take_upper_bits(image, path)
    if image.mode == "F":
        raise refuse(path, "its values are floating-point numbers", "save it with 8 or 16 bits")
    alpha = None
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    return image, alpha


def _take_upper_bits(image: "Image.Image", path: str) -> tuple["Image.Image", "Image.Image | None"]:
    """Return grey of 16 bits in 8, as PIL itself does with colours of 16 bits, and its opacity."""
    import numpy as np
    from PIL import Image

    # PIL has 16 bits of a ppm in 32; other whole numbers of 32 bits have no known white.
    if image.mode == "I" and image.format not in ("PPM", "PNG"):
        raise refuse(path, "its values are of 32 bits", "save it with 8 or 16 bits")
    values = np.asarray(image)
    colours = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return colours, None
    return colours, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


def _convert_colours(colours: "Image.Image", profile: bytes | None) -> "Image.Image":
    """Return the colours in sRGB; a profile that cannot be used is as good as none."""
    from PIL import ImageCms

    target = ImageCms.createProfile("sRGB")
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = None
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" in ImageCms.getProfileDescription(source).lower():
                source = None
        elif colours.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        if source:
            converted = ImageCms.profileToProfile(colours, source, target, outputMode="RGB")
            assert converted is not None
            return converted
    return colours.convert("RGB")


def _read_orientation(image: "Image.Image") -> int:
    """Return EXIF's orientation, 1 (upright) where it is damaged: that loses no pixel."""
    with suppress(Exception):
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation in range(1, 9):
            return int(orientation)
    return 1


def _find_turn(orientation: int) -> Any:
    """Return how a picture with this orientation is turned upright, None where it is already."""
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
