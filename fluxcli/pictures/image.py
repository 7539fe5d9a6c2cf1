"""Pixels to a jpg, png or webp file in memory with its metadata, and the metadata back from a file.

Metadata: the A1111 `parameters` text that every viewer reads (PNG text, EXIF UserComment), and an XMP packet with
`trainedAlgorithmicMedia` and all of it as JSON. Pixels are (H, W, 3) uint8, RGB.
"""

import functools
import hashlib
import io
import json
from collections.abc import Collection
from html import escape, unescape
from pathlib import Path

from fluxcli.errors import BadInputFile
from quant.lazy import Image, np

MAX_PIXELS = 64 * 1024 * 1024
WISHES = ("device", "precision", "vram_limit", "offload")  # what came of them is said under "compute"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
    '"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:Iptc4xmpExt='
    '"http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:flux="urn:flux:1"><Iptc4xmpExt:DigitalSourceType>'
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>"
    '<flux:metadata>{json}</flux:metadata></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def encode(pixels: "np.ndarray", format: str, *, quality: int, metadata: dict | None) -> bytes:
    """Encode pixels (H, W, 3) uint8; `metadata` is JSON-able (see `engine.metadata`) or None for a bare picture."""
    from PIL import ExifTags
    from PIL.PngImagePlugin import PngInfo

    image, buffer = Image.fromarray(pixels, "RGB"), io.BytesIO()
    options: dict = {"quality": quality, "subsampling": 0 if quality >= 90 else -1}  # each format takes what it knows
    if metadata:
        text = parameters_text(metadata)
        xmp = XMP.format(json=escape(json.dumps(metadata, ensure_ascii=False, sort_keys=True), quote=False))
        if format == "png":
            info = options["pnginfo"] = PngInfo()
            info.add_itxt("parameters", text)
            info.add_itxt("XML:com.adobe.xmp", xmp)
        else:
            exif = Image.Exif()
            comment = b"UNICODE\0" + text.encode("utf-16-be", "surrogatepass")
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
            options |= {"exif": exif.tobytes(), "xmp": xmp.encode()}
    image.save(buffer, "jpeg" if format == "jpg" else format, **options)
    return buffer.getvalue()


def pixels_sha256(pixels: "np.ndarray") -> str:
    """sha256 of the size and the RGB bytes: equal for equal pictures, whatever the file format."""
    return hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[0]}:".encode() + pixels.tobytes()).hexdigest()


def request_hash(metadata: dict, *, seeded: bool = True) -> str:
    """sha256 of what decides a picture, from its metadata: request, model, adapters, and what it was computed with.

    Without `seeded` any seed does that was not asked for.
    """
    parts = {key: metadata.get(key) for key in ("request", "size", "model", "compute", "lora")}
    parts["request"] = {key: value for key, value in parts["request"].items() if key not in WISHES}
    if not seeded:
        parts |= {"request": parts["request"] | {"seed": -1}, "seeded": metadata.get("seeded")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def carries_hash(path: Path, wanted: Collection[str], *, seeded: bool) -> bool:
    """Return whether a path is a whole picture with one of these request hashes."""
    try:
        status = path.stat()
        hashes = _read_hashes(path.absolute(), status.st_mtime_ns, status.st_size)
    except (BadInputFile, OSError):
        return False
    return hashes[seeded] in wanted


@functools.lru_cache(maxsize=100_000)
def _read_hashes(path: Path, *_: int) -> dict[bool, str]:
    """Return a picture's request hashes, with and without its seed; read once for each state of the file."""
    metadata = read_metadata(path)
    return {seeded: request_hash(metadata, seeded=seeded) for seeded in (True, False)}


def parameters_text(metadata: dict) -> str:
    """The text that A1111 and its readers know: the prompt, then a line of settings."""
    request, (width, height) = metadata["request"], metadata["size"]
    guidance = "" if request["guidance"] is None else f"Distilled CFG Scale: {request['guidance']:g}, "
    return (
        f"{request['prompt']}\nSteps: {request['steps']}, Sampler: Euler, Schedule type: Simple, CFG scale: 1, "
        f"{guidance}Seed: {request['seed']}, Size: {width}x{height}, Model: {metadata['model']['name']}, "
        f"Model hash: {metadata['model']['fingerprint'][:10]}, Version: flux {metadata['versions']['flux']}"
    )


def read_metadata(path: Path) -> dict:
    """The metadata that `encode` wrote; raises `BadInputFile` where there is none or the file is no picture."""
    with open_picture(path) as image:
        packet = image.info.get("xmp", b"").decode("utf-8", "replace")
    text = packet.partition("<flux:metadata>")[2].rpartition("</flux:metadata>")[0]
    try:
        metadata = json.loads(unescape(text))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("request"), dict):
        hint = "pictures made with --no-metadata, or edited since, cannot be replayed"
        raise BadInputFile("no flux metadata", which=path, why="the picture carries none", hint=hint)
    return metadata


def open_picture(path: Path) -> "Image.Image":
    """Open and fully decode a png, jpg or webp; raises `BadInputFile` for anything else, or one too large."""
    try:
        if path.exists() and not path.is_file():
            raise BadInputFile("cannot read the picture", which=path, why="it is no regular file")
        with path.open("rb") as file:
            image = Image.open(file, formats=("PNG", "JPEG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise BadInputFile("picture too large", which=path, why=f"{image.width}x{image.height} pixels")
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "it is no readable png, jpg or webp"
        raise BadInputFile("cannot read the picture", which=path, why=why) from error
