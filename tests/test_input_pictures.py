"""Pictures of others: the same pixels whatever the file, and what is no picture is said to be what
it is.
"""

import io
import struct
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from fluxcli.errors import BadInputFile, ExitCode
from fluxcli.pictures import normalize
from fluxcli.pictures.inputs import read_picture
from fluxcli.pictures.normalize import measure, read_file, read_pixels

HEIGHT, WIDTH = 24, 40
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
PIXELS = np.stack([COLUMNS * 6, ROWS * 10, (ROWS + COLUMNS) * 4], -1).astype(np.uint8)
GREY = np.repeat(PIXELS[..., :1], 3, axis=2)
IMAGE = Image.fromarray(PIXELS)
LOSSY = {"JPEG": 12, "AVIF": 12, "GIF": 16}  # by how many levels a smooth picture may differ
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how each orientation comes to be, see PIL


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    if format == "WEBP":
        options["lossless"] = True
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(data: bytes, **options: object) -> np.ndarray:
    """The pixels, which have the size that was measured."""
    pixels, _ = read_pixels(data, "x.png", **options)
    assert pixels.dtype == np.uint8 and pixels.flags.owndata
    assert measure(data, "x.png") == (pixels.shape[1], pixels.shape[0])
    return pixels


def remarks_on(data: bytes, **options: object) -> str:
    return "; ".join(read_pixels(data, "x.png", **options)[1])


def distance(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def make_png(width: int, height: int, *, depth: int = 8, colours: int = 2, raw: bytes) -> bytes:
    """A PNG with any header; `colours` as the standard counts them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@cache
def swapping_profile() -> bytes:
    """A colour profile by which red is green and green is red: sRGB's with two tags exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = data.replace(b"rXYZ", b"XXXX").replace(b"gXYZ", b"rXYZ").replace(b"XXXX", b"gXYZ")
    return exchanged.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@cache
def inverting_profile() -> bytes:
    """A colour profile of CMYK by which black ink is white and paper is black.

    It has one table, from four inks with two levels each to Lab (ICC.1:2010, 10.9: lut8Type).
    """
    corners = [(255 * bool(k & 1), 128, 128) for k in range(16)]  # the last ink changes fastest
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (k % 4 == 0) for k in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity
    table += straight * 4 + b"".join(map(bytes, corners)) + straight * 3
    name = b"desc" + bytes(4) + struct.pack(">I", 9) + b"inverted\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags, at, body = [], 128 + 4 + 3 * 12, b""
    for key, data in ((b"desc", name), (b"wtpt", white), (b"A2B0", table)):
        tags.append(key + struct.pack(">II", at + len(body), len(data)))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I", at + len(body)) + b"lcms" + bytes([2, 0x40, 0, 0])
    header += b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + struct.pack(">I", 3) + b"".join(tags) + body


# --- the same pixels from any file


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_every_orientation_is_turned_upright(format):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[normalize.ORIENTATION] = orientation
        stored = IMAGE.transpose(TURNS[orientation]) if orientation > 1 else IMAGE
        data = encode(stored, format, exif=exif)
        assert distance(read(data), PIXELS) <= LOSSY.get(format, 0), orientation


@pytest.mark.parametrize("format", ["GIF", "BMP", "JPEG2000", "PPM", "QOI"])
def test_formats_without_an_orientation_have_their_pixels(format):
    assert distance(read(encode(IMAGE, format)), PIXELS) <= LOSSY.get(format, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_that_of_8(format):
    stored = Image.fromarray(GREY[..., 0].astype(np.uint16) * 257)
    assert distance(read(encode(stored, format)), GREY) == 0


def test_colours_of_16_bits_are_those_of_8_and_equal_grey_of_16():
    values = np.full((2, 2, 3), 0x7FFF, ">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in values)
    grey = encode(Image.fromarray(np.full((2, 2), 0x7FFF, np.uint16)), "PNG")
    assert distance(read(make_png(2, 2, depth=16, raw=raw)), read(grey)) == 0
    raw = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in PIXELS)
    assert distance(read(make_png(WIDTH, HEIGHT, depth=16, raw=raw)), PIXELS) == 0


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_black_and_white_and_palettes_become_colours(mode):
    stored = IMAGE.convert(mode)
    assert distance(read(encode(stored, "PNG")), np.asarray(stored.convert("RGB"))) == 0


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_taken_as_it_stands_and_said(format):
    data = encode(IMAGE.convert("CMYK"), format, quality=95)
    assert distance(read(data), PIXELS) <= LOSSY.get(format, 0)
    assert "CMYK" in remarks_on(data)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile_is_what_the_profile_says(format):
    paper = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    ink = Image.new("CMYK", (4, 4), (0, 0, 0, 255))
    for stored, level in ((paper, 0), (ink, 255)):
        data = encode(stored, format, icc_profile=inverting_profile())
        assert distance(read(data), np.full((4, 4, 3), level, np.uint8)) <= 3
        assert not remarks_on(data)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_other_profiles_are_converted_and_srgb_is_left_alone(format):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    green = read(encode(red, format, icc_profile=swapping_profile()))
    assert distance(green, np.asarray(Image.new("RGB", (4, 4), (0, 255, 0)))) <= 3
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert distance(read(encode(IMAGE, format, icc_profile=own)), PIXELS) == 0


def test_a_profile_that_is_none_or_of_other_colours_changes_nothing():
    for profile in (b"x" * 200, inverting_profile()):
        assert distance(read(encode(IMAGE, "PNG", icc_profile=profile)), PIXELS) == 0


def test_lab_is_converted():
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 120, 40)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    expected = np.asarray(Image.new("RGB", (4, 4), (200, 120, 40)))
    assert distance(read(encode(lab, "TIFF")), expected) <= 8


# --- what is transparent

OPAQUE = (COLUMNS * 6).astype(np.uint8)
SOFT = IMAGE.copy()
SOFT.putalpha(Image.fromarray(OPAQUE))
HOLED = np.where(PIXELS[..., :1] == 0, 255, PIXELS)  # where red is 0, white


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "QOI", "JPEG2000"])
def test_what_is_transparent_lies_over_white_or_what_is_asked_for(format):
    share = OPAQUE[..., None] / 255
    data = encode(SOFT, format, exact=True)
    for backdrop, level in (("white", 255), ("black", 0)):
        expected = PIXELS * share + level * (1 - share)
        assert distance(read(data, backdrop=backdrop), expected.round()) <= 1
        assert remarks_on(data, backdrop=backdrop) == f"what is transparent was put over {backdrop}"


def test_one_transparent_value_is_transparent_in_every_mode():
    grey = Image.fromarray(GREY[..., 0])
    wide = Image.fromarray(GREY[..., 0].astype(np.uint16) * 257)
    holed_grey = np.where(GREY == 0, 255, GREY)
    for stored in (grey, wide):
        assert distance(read(encode(stored, "PNG", transparency=0)), holed_grey) == 0
    palette = grey.convert("P")
    for format in ("PNG", "GIF"):
        data = encode(palette, format, transparency=palette.getpixel((0, 0)))
        assert distance(read(data), holed_grey) == 0
    alphas = bytes([0] + [255] * 255)
    assert distance(read(encode(palette, "PNG", transparency=alphas)), holed_grey) == 0
    corner = np.array(PIXELS)
    corner[0, 0] = 255
    assert distance(read(encode(IMAGE, "PNG", transparency=(0, 0, 0))), corner) == 0


def test_of_what_is_opaque_nothing_is_said():
    assert not remarks_on(encode(IMAGE.convert("RGBA"), "PNG"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(format):
    data = encode(IMAGE, format, save_all=True, append_images=[IMAGE.rotate(180)])
    assert distance(read(data), PIXELS) <= 16
    assert "first" in remarks_on(data)


def test_previews_in_a_phones_photo_are_not_spoken_of():
    data = encode(IMAGE, "MPO", save_all=True, append_images=[IMAGE.resize((8, 8))])
    assert distance(read(data), PIXELS) <= 12
    assert not remarks_on(data)


def test_the_same_file_gives_the_same_pixels_twice_and_reads_no_name():
    data = encode(IMAGE, "JPEG")
    assert distance(read_pixels(data, "x.pdf")[0], read(data)) == 0


# --- what is none


def refusal(data: bytes) -> BadInputFile:
    """The error of a file; measuring it says the same, or does not see it yet."""
    with pytest.raises(BadInputFile) as caught:
        read_pixels(data, "x.png")
    assert caught.value.exit_code == ExitCode.INPUT_FILE and caught.value.hint
    assert "x.png" in str(caught.value)
    try:
        measure(data, "x.png")
    except BadInputFile as error:
        assert str(error) == str(caught.value)
    return caught.value


def make_gif(width: int, height: int) -> bytes:
    screen = struct.pack("<HH", width, height) + bytes(3)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\1\0\0;"


def make_tiff(*tags: tuple[int, int]) -> bytes:
    """A TIFF of 4x4 grey pixels with more tags, all of 32 bits."""
    found = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 278: 4, 279: 16} | dict(tags)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(found.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 24) + bytes(range(16)) + directory


def make_passes() -> bytes:
    """A progressive JPEG one of whose passes is there hundreds of times."""
    data = encode(IMAGE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 300 + data[-2:]


BROKEN = {
    "a-bomb": (make_png(60_000, 60_000, raw=bytes(100)), "134 million pixels"),
    "a-smaller-bomb": (make_png(12_000, 12_000, raw=bytes(100)), "12000x12000"),
    "a-gif-bomb": (make_gif(65_535, 65_535), "million pixels"),
    "many-passes": (make_passes(), "200 passes"),
    "tile-bomb": (make_tiff((322, 1 << 20), (323, 1 << 20)), "tiles"),
    "raw-of-a-camera": (make_tiff((254, 1)), "raw file"),
    "no-pixels": (make_png(0, 5, raw=b""), "damaged"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
    "eps-of-dos": (b"\xc5\xd0\xd3\xc6" + bytes(26), "EPS"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "html": (b"\n<!DOCTYPE html><html><title>404</title>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
    "json": (b'{"error": "not found"}', "text"),
    "text": ("ein Bild, größer".encode(), "text"),
    "zeros": (bytes(500), "zeros"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
    "jxl": (b"\xff\x0a" + bytes(40), "JPEG XL"),
    "mp4": (b"\0\0\0\x18ftypisom" + bytes(40), "video"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip"),
    "noise": (np.random.default_rng(0).bytes(3000), "no picture"),
    "floats": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "32-bits": (encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "32 bits"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_said_to_be_what_it_is(name):
    data, word = BROKEN[name]
    assert word in str(refusal(data))


def test_the_tiffs_that_are_made_here_are_read_without_the_tags():
    assert read(make_tiff())[3, 3, 0] == 15


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI"]
)
def test_what_is_cut_off_is_refused(format):
    data = encode(IMAGE, format)
    for size_bytes in (len(data) // 3, len(data) * 2 // 3):
        assert refusal(data[:size_bytes])


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "QOI"]),
    where=st.floats(0, 0.999),
    change=st.integers(1, 255),
    profile=st.booleans(),
)
def test_a_changed_byte_gives_a_picture_or_the_one_error(format, where, change, profile):
    more = {"icc_profile": swapping_profile()} if profile else {}
    data = bytearray(encode(SOFT.convert("RGB"), format, **more))
    data[int(where * len(data))] ^= change
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reading in (read_pixels, measure):
            try:
                reading(bytes(data), "x.png")
            except BadInputFile as error:
                assert error.hint


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(normalize.MAX_FILE_BYTES * 4)  # a hole: no disk is taken
    for name, why in (
        ("empty.png", "empty"),
        ("huge.png", "larger than"),
        (".", "folder"),
        ("missing.png", "no such file"),
        ("a\0b", "no file can have"),
    ):
        with pytest.raises(BadInputFile, match=why) as caught:
            read_file(str(tmp_path / name))
        assert caught.value.hint


def test_a_photo_that_many_rows_name_is_decoded_once(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(17).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    decoded = []
    real = normalize.read_pixels

    def read_pixels(*arguments: object, **options: object) -> object:
        decoded.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(normalize, "read_pixels", read_pixels)
    first, second = read_picture(str(path)), read_picture(str(path))
    assert first == second and first.size == (24, 20) and len(decoded) == 1
    Image.fromarray(noise[:10]).save(path)
    assert read_picture(str(path)).size == (24, 10) and len(decoded) == 2
