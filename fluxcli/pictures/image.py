"""Pixels to a jpg, png or webp file in memory with its metadata, and the metadata back from a file.

Metadata stands in a file twice: as the A1111 `parameters` text that every viewer reads (a PNG text
or the EXIF UserComment), and as JSON in an XMP packet that also says `trainedAlgorithmicMedia`.
Pixels are arrays (H, W, 3) of uint8, RGB. Knows nothing of how a picture is made or named; numpy
and PIL are imported where a picture is encoded or read.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Collection, Mapping
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxcli.errors import BadInputFile, OutputError, UsageError
from fluxcli.request.fields import is_default_input
from fluxcli.request.inputs import PICTURE_SETTINGS, rename_pictures
from fluxcli.request.settings import coerce, to_json_value

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Metadata = Mapping[str, Any]  # JSON types, see `run.saving.make_metadata`

MAX_PIXELS = 64 * 1024 * 1024
FULL_CHROMA_QUALITY = 90  # from here on a jpg keeps the colours of every pixel
LOSSLESS_QUALITY = 100  # a webp keeps every pixel
OWN_PICTURE = "name a png, jpg or webp that flux has made"
KNOWN_HASHES = 65_536  # of files that were read, remembered by a process

# Settings that were asked for, such as device "auto"; what was taken stands under "compute".
RESOURCES = ("device", "precision", "vram_limit", "offload", "compile", "preview_every")

# What stands in metadata only where a picture is made from others.
MADE_FROM = ("inputs", "controls")

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:flux="urn:flux:1">'
    "<Iptc4xmpExt:DigitalSourceType>"
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    "</Iptc4xmpExt:DigitalSourceType>"
    "<flux:metadata>{json}</flux:metadata>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
XMP_BEGIN = "<flux:metadata>"
XMP_END = "</flux:metadata>"
SURROGATE = re.compile("[\ud800-\udfff]")  # of a path that is no text


# --- to a file


def encode(pixels: "np.ndarray", format: str, *, quality: int, metadata: Metadata | None) -> bytes:
    """Return the bytes of a jpg, png or webp file; without `metadata` it is a bare picture.

    `quality` is from 1 to 100 and means nothing for a png; a webp of 100 is lossless. Raises
    `OutputError` for metadata that the format does not hold: a jpg takes 64 KB.
    """
    from PIL import Image

    image = Image.fromarray(pixels, "RGB")
    options: dict[str, Any] = {}
    if metadata and format == "png":
        options["pnginfo"] = _make_png_texts(metadata)
    elif metadata:
        options["exif"] = _make_exif(metadata)
        options["xmp"] = _make_xmp(metadata).encode()
    if format != "png":
        options["quality"] = quality
    if format == "jpg":
        options["subsampling"] = "4:4:4" if quality >= FULL_CHROMA_QUALITY else "4:2:0"
    if format == "webp":
        options["lossless"] = quality >= LOSSLESS_QUALITY
    buffer = io.BytesIO()
    try:
        image.save(buffer, "jpeg" if format == "jpg" else format, **options)
    except ValueError as error:
        raise OutputError(
            f"the metadata do not fit into a {format}",
            why=str(error),
            hint="--format png, or --no-metadata",
        ) from error
    return buffer.getvalue()


def check_metadata(metadata: Metadata, format: str) -> None:
    """Raise `OutputError` for metadata that no picture of the format could hold."""
    import numpy as np

    encode(np.zeros((8, 8, 3), np.uint8), format, quality=1, metadata=metadata)


def _make_png_texts(metadata: Metadata) -> Any:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("parameters", format_parameters(metadata))
    texts.add_itxt("XML:com.adobe.xmp", _make_xmp(metadata))
    return texts


def _make_exif(metadata: Metadata) -> bytes:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    text = format_parameters(metadata).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text
    return exif.tobytes()


def _make_xmp(metadata: Metadata) -> str:
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    text = SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return XMP.format(json=escape(text, quote=False))


def format_parameters(metadata: Metadata) -> str:
    """Return the text that A1111 and its readers know: the prompt, then a line of settings.

    What is no text, in the name of a model, becomes a question mark.
    """
    request = metadata["request"]
    width, height = metadata["size"]
    settings = [
        f"Steps: {request['steps']}",
        "Sampler: Euler",
        "Schedule type: Simple",
        "CFG scale: 1",
    ]
    if request["guidance"] is not None:
        settings.append(f"Distilled CFG Scale: {request['guidance']:g}")
    settings += [
        f"Seed: {request['seed']}",
        f"Size: {width}x{height}",
        f"Model: {metadata['model']['name']}",
        f"Model hash: {metadata['model']['fingerprint'][:10]}",
        f"Version: flux {metadata['versions']['flux']}",
    ]
    return SURROGATE.sub("?", f"{request['prompt']}\n{', '.join(settings)}")


# --- what identifies a picture


def hash_pixels(pixels: "np.ndarray") -> str:
    """Return the sha256 of the size and the RGB bytes: equal for equal pictures in any format."""
    height, width, _ = pixels.shape
    return hashlib.sha256(f"{width}x{height}:".encode() + pixels.tobytes()).hexdigest()


def hash_request(metadata: Metadata, *, seeded: bool = True) -> str:
    """Return the sha256 of what decides a picture, from its metadata.

    That is the request, the model, the adapters and what it was computed with, but not `RESOURCES`;
    of pictures that it is made from, their content, and not the names of their files.
    For an order that gives no seed (`seeded` is False) the seed is left out, and whether it was
    asked for is put in: so pictures of such an order have equal hashes, whatever seeds they got.
    """
    request = {
        name: value
        for name, value in metadata["request"].items()
        if name not in RESOURCES and not is_default_input(name, value)
    }
    parts = {name: metadata.get(name) for name in ("size", "model", "compute", "lora")}
    parts |= {name: metadata[name] for name in MADE_FROM if name in metadata}
    if "inputs" in parts:
        request |= _without_names(request)
    if not seeded:
        request["seed"] = -1
        parts["seeded"] = metadata.get("seeded")
    parts["request"] = request
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without_names(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request that name pictures, as JSON has them, without the names."""
    try:
        named = {
            name: coerce(name, request[name], where="metadata")
            for name in PICTURE_SETTINGS
            if name in request
        }
    except UsageError:  # of somebody else's picture
        return {}
    renamed = rename_pictures(named, lambda _: "")
    return {name: to_json_value(value) for name, value in renamed.items()}


def carries_hash(path: Path, wanted: Collection[str], *, seeded: bool) -> bool:
    """Return whether a path is a whole picture with one of these hashes of its request."""
    try:
        status = path.stat()
        # Not the time that the file says: a copy may keep it, and a clock may be set back.
        state = (status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)
        hashes = _read_hashes(path.absolute(), *state)
    except (BadInputFile, OSError):
        return False
    return (hashes.with_seed if seeded else hashes.without_seed) in wanted


class RequestHashes(NamedTuple):
    """The hashes of a picture's request, as `hash_request` makes them."""

    with_seed: str
    without_seed: str


@functools.lru_cache(KNOWN_HASHES)
def _read_hashes(path: Path, *_state: int) -> RequestHashes:
    """Return the hashes of the request that a picture's metadata tell.

    They are read once for each state of the file.
    """
    metadata = read_metadata(path)
    return RequestHashes(
        with_seed=hash_request(metadata, seeded=True),
        without_seed=hash_request(metadata, seeded=False),
    )


# --- from a file


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `encode` wrote.

    Raises `BadInputFile` where there is none or the file is no picture.
    """
    with open_picture(path) as image:
        return find_metadata(image, path)


def find_metadata(image: "Image.Image", path: Path) -> dict[str, Any]:
    """Return the metadata of an image that was opened; raises `BadInputFile` without any."""
    packet = image.info.get("xmp", b"").decode("utf-8", "replace")
    text = packet.partition(XMP_BEGIN)[2].rpartition(XMP_END)[0]
    try:
        metadata = json.loads(unescape(text))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("request"), dict):
        raise BadInputFile(
            "no flux metadata",
            which=path,
            why="the picture carries none",
            hint="pictures made with --no-metadata, or edited since, cannot be replayed",
        )
    return metadata


def open_picture(path: Path) -> "Image.Image":
    """Open and fully decode a png, jpg or webp.

    Raises `BadInputFile` for anything else, and for more than `MAX_PIXELS`.
    """
    from PIL import Image

    try:
        if path.exists() and not path.is_file():
            why = "it is no regular file"
            raise BadInputFile("cannot read the picture", which=path, why=why, hint=OWN_PICTURE)
        with path.open("rb") as file:
            image = Image.open(file, formats=("PNG", "JPEG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                why = f"{image.width}x{image.height} pixels"
                raise BadInputFile("picture too large", which=path, why=why, hint=OWN_PICTURE)
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "it is no readable png, jpg or webp"
        raise BadInputFile(
            "cannot read the picture", which=path, why=why, hint=OWN_PICTURE
        ) from error
