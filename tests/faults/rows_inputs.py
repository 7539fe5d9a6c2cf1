"""Fault rows of input pictures: bombs, files that are cut, lie or are none, and every kind of
pixels.
"""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.case import PROMPT, QUICK, Case, Ended, fault

SCALE = np.linspace(0, 255, 64).astype(np.uint8)
GREY = np.repeat(SCALE[None], 64, axis=0)
IMAGE = Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY], -1))
BOMB_BYTES = 1 << 30  # what a command may take to refuse one; torch alone takes a third of it


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def start_from(case: Case, name: str | Path, *more: str, **options: object) -> Ended:
    """Draw from a picture; of the bundled model."""
    return case.draw("--image", name, "--strength", "1", *more, "-o", "out.png", **options)


def make_png(width: int, height: int, raw: bytes) -> bytes:
    """A PNG of colours with any header."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        check = zlib.crc32(kind + body)
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
    return data


def make_gif(width: int, height: int) -> bytes:
    screen = struct.pack("<HH", width, height) + bytes(3)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\1\0\0;"


def make_passes() -> bytes:
    """A progressive JPEG of 16 megapixels, one of whose passes is there thousands of times."""
    data = encode(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 5000 + data[-2:]


def make_tiff(*tags: tuple[int, int]) -> bytes:
    """A TIFF of 4x4 grey pixels with more tags."""
    found = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 278: 4, 279: 16} | dict(tags)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(found.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 24) + bytes(range(16)) + directory


PNG, JPEG, TIFF = encode(IMAGE, "PNG"), encode(IMAGE, "JPEG"), encode(IMAGE, "TIFF")
DEFLATED = encode(IMAGE, "TIFF", compression="tiff_adobe_deflate")
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
# Files named in.png, and a word of what is said of each.
HOSTILE = {
    "bomb-png": (make_png(60_000, 60_000, bytes(1 << 20)), "million pixels"),
    "bomb-png-nested": (make_png(20_000, 20_000, zlib.compress(bytes(1 << 26))), "million pixels"),
    "bomb-gif": (make_gif(65_535, 65_535), "million pixels"),
    "bomb-passes": (make_passes(), "passes"),
    "bomb-tiles": (make_tiff((322, 1 << 24), (323, 1 << 24)), "tiles"),
    "cut-png": (PNG[: len(PNG) // 2], "damaged"),
    "cut-png-header": (PNG[:20], "damaged"),
    "cut-jpeg": (JPEG[: len(JPEG) // 2], "damaged"),
    "cut-tiff": (TIFF[: len(TIFF) // 2], "damaged"),
    "corrupt-png": (PNG.replace(b"IDAT", b"IDAX"), "damaged"),
    "corrupt-png-data": (PNG[:60] + bytes(200) + PNG[260:], "damaged"),
    "corrupt-webp": (encode(IMAGE, "WEBP")[:30] + bytes(100), "damaged"),
    "cut-tiff-deflate": (DEFLATED[:150] + bytes(300) + DEFLATED[450:], "damaged"),
    "samples-tiff": (make_tiff((277, 200)), "damaged"),
    "lies-eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
    "lies-pdf": (b"%PDF-1.7\n1 0 obj\n", "PDF"),
    "lies-svg": (SVG, "SVG"),
    "lies-html": (b"<!DOCTYPE html><html><body>not found", "web page"),
    "lies-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "lies-heic": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
    "lies-script": (b"#!/bin/sh\ntouch owned\n", "text"),
    "lies-zip": (b"PK\x03\x04" + bytes(100), "zip"),
    "lies-raw": (make_tiff((254, 1)), "raw file"),
    "empty": (b"", "empty"),
    "zeros": (bytes(4096), "zeros"),
}

for name, (data, word) in HOSTILE.items():

    @fault(f"input-{name}", f"an input picture: {name}", codes=[4], says=word)
    def input_hostile(case: Case, data: bytes = data) -> None:
        case.write("in.png", data)
        start_from(case, "in.png", memory_bytes=BOMB_BYTES)
        assert not (case.folder / "owned").exists()


def _with_alpha() -> Image.Image:
    image = IMAGE.copy()
    image.putalpha(Image.fromarray(GREY))
    return image


def _turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encode(IMAGE, "JPEG", exif=exif)


PALETTE = IMAGE.convert("P")
# Files of all kinds of pixels, and a word of what is said, if anything is.
USUAL = {
    "cmyk": (encode(IMAGE.convert("CMYK"), "JPEG"), "CMYK"),
    "16-bit": (encode(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), ""),
    "16-bit-tiff": (encode(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), ""),
    "palette": (encode(PALETTE, "GIF", transparency=PALETTE.getpixel((0, 0))), "white"),
    "alpha": (encode(_with_alpha(), "PNG"), "white"),
    "exif": (_turned(), ""),
    "one-bit": (encode(IMAGE.convert("1"), "PNG"), ""),
    "animated": (encode(IMAGE, "WEBP", save_all=True, append_images=[IMAGE.rotate(90)]), "first"),
    "jpeg-as-png": (JPEG, ""),
    "one-pixel": (encode(IMAGE.resize((1, 1)), "PNG"), ""),
    "odd-tiff": (make_tiff((65_000, 7)), ""),
}

for name, (data, word) in USUAL.items():

    @fault(f"pixels-{name}", f"an input picture of another kind: {name}", codes=[0], says=word)
    def input_usual(case: Case, data: bytes = data) -> None:
        case.write("in.png", data)
        start_from(case, "in.png")
        assert (case.folder / "out.png").exists()


@fault("place-input-fifo", "an input picture is a FIFO", codes=[4], says="no regular file")
def input_fifo(case: Case) -> None:
    os.mkfifo(case.folder / "in.png")
    start_from(case, "in.png", timeout_s=20)


@fault("place-input-folder", "an input picture is a folder", codes=[4], says="folder")
def input_folder(case: Case) -> None:
    (case.folder / "in.png").mkdir()
    start_from(case, "in.png")


@fault("place-input-device", "an input picture is /dev/zero", codes=[4], says="no regular file")
def input_device(case: Case) -> None:
    start_from(case, "/dev/zero", timeout_s=20)


@fault("place-input-absent", "an input picture is not there", codes=[4], says="no such file")
def input_absent(case: Case) -> None:
    start_from(case, "in.png")


@fault("place-input-loop", "an input picture is a loop of links", codes=[4], says="levels")
def input_loop(case: Case) -> None:
    (case.folder / "in.png").symlink_to("in.png")
    start_from(case, "in.png")


@fault("place-input-of-others", "an input picture may not be read", codes=[0, 4], says="")
def input_of_others(case: Case) -> None:
    case.write("in.png", PNG).chmod(0)
    start_from(case, "in.png")
    if os.geteuid():  # root reads all
        assert case.ended[-1].code == 4 and "permission" in case.ended[-1].stderr


@fault("place-input-huge", "an input picture of 8 TB", codes=[4], says="larger than")
def input_huge(case: Case) -> None:
    with (case.folder / "in.png").open("wb") as file:
        file.truncate(8 << 40)
    start_from(case, "in.png", memory_bytes=BOMB_BYTES)
    (case.folder / "in.png").unlink()


@fault("place-input-hidden-name", "a picture's name would control the terminal", codes=[4])
def input_name(case: Case) -> None:
    case.write("\x1b[31m.png", b"%PDF")
    start_from(case, "\x1b[31m.png")


@fault("place-input-in-a-row", "of three rows one has a damaged picture", codes=[7], says="damaged")
def input_in_a_row(case: Case) -> None:
    case.write("good.png", PNG)
    case.write("bad.png", PNG[:100])
    rows = [f'{{"prompt": "a circle", "image": "{name}.png"}}\n' for name in ("good", "bad")]
    case.write("rows.jsonl", "".join([*rows, '{"prompt": "a square"}\n']))
    case.flux("generate", "--from", "rows.jsonl", "-p", "tiny", *QUICK[:4], "-o", "out/")
    assert len(list((case.folder / "out").iterdir())) == 2


@fault("place-input-mask", "a mask is a PDF", codes=[4], says="PDF")
def input_mask(case: Case) -> None:
    case.write("in.png", PNG)
    case.write("mask.png", b"%PDF-1.7")
    case.flux("generate", PROMPT, "-p", "tiny", *QUICK, "--image", "in.png", "--mask", "mask.png")
