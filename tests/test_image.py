"""Pictures as files: what is written is what is read, for any text, and nothing that is no picture
is read.
"""

import hashlib
import io
import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxcli import versions
from fluxcli.errors import BadInputFile, ExitCode
from fluxcli.pictures.image import encode, hash_pixels, read_metadata
from fluxcli.request.fields import MAX_PROMPT_BYTES, Order
from tests.support.helpers import order, read_pixels

FORMATS = ("png", "jpg", "webp")
SIGNATURES = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "webp": b"RIFF"}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769
HARD = "<&>\"']]></flux:metadata>&lt;&amp;&#x41;\\u0041\\ \r\n\t\x00\x01\x1b\x7f\x85"
HARD += "\u2028\ufeff\ufffe\uffff🦊e\u0301"
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300).filter(str.strip)
patient = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def metadata_of(request: Order, **more: object) -> dict:
    return {
        "request": request.to_json(),
        "size": list(request.request.size),
        "model": {"name": request.request.model, "fingerprint": "0123456789abcdef"},
        "compute": {"device": "cpu", "dtypes": {"vae": "float32"}},
        "versions": versions(),
        **more,
    }


def parameters_in(data: bytes) -> str:
    """The text that A1111's readers show: a PNG text, or the EXIF comment."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            return image.text["parameters"]
        raw = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert raw.startswith(b"UNICODE\0")
    return raw[8:].decode("utf-16-be")


@patient
@given(
    prompt=TEXT,
    model=TEXT.filter(lambda text: "\0" not in text),
    guidance=st.none() | st.floats(0, 100),
    seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 1000),
    more=st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT) | st.booleans(), max_size=3),
)
@example(
    prompt=HARD,
    model=HARD.replace("\0", ""),
    guidance=None,
    seed=2**64 - 1,
    steps=1,
    more={HARD: [HARD]},
)
@example(prompt="<" * MAX_PROMPT_BYTES, model="x", guidance=3.5, seed=0, steps=1, more={})
@example(
    prompt="\x01x" * (MAX_PROMPT_BYTES // 2), model="x", guidance=3.5, seed=0, steps=1, more={}
)
@example(prompt="🦊" * (MAX_PROMPT_BYTES // 4), model="x", guidance=3.5, seed=0, steps=1, more={})
def test_the_metadata_that_is_written_is_read(tmp_path, prompt, model, guidance, seed, steps, more):
    request = order(prompt, model=model, guidance=guidance, seed=seed, steps=steps)
    metadata = {**more, **metadata_of(request)}
    for format in FORMATS:
        path = tmp_path / f"x.{format}"
        path.write_bytes(encode(PIXELS, format, quality=80, metadata=metadata))
        assert read_metadata(path) == metadata
        assert Order.from_json(read_metadata(path)["request"]) == request


@patient
@given(prompt=TEXT, seed=st.integers(0, 2**64 - 1))
@example(prompt=HARD, seed=0)
def test_other_readers_see_prompt_and_settings(prompt, seed):
    metadata = metadata_of(order(prompt, seed=seed, steps=12, guidance=2.5))
    for format in FORMATS:
        text = parameters_in(encode(PIXELS, format, quality=80, metadata=metadata))
        shown, _, line = text.rpartition("\n")
        assert shown == prompt
        fields = dict(part.split(": ", 1) for part in line.split(", "))
        assert (
            fields["Steps"] == "12"
            and fields["Seed"] == str(seed)
            and fields["Size"] == "1024x1024"
        )
        assert fields["Distilled CFG Scale"] == "2.5" and fields["Model hash"] == "0123456789"


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_says_that_a_model_made_it_unless_bare(format, tmp_path):
    metadata = metadata_of(order("a fox"))
    data, bare = (encode(PIXELS, format, quality=80, metadata=m) for m in (metadata, None))
    assert data.startswith(SIGNATURES[format]) and bare.startswith(SIGNATURES[format])
    packet = re.search(rb"<x:xmpmeta.*</x:xmpmeta>", data, re.DOTALL)[0]
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in packet
    assert b"fox" not in bare and b"xmpmeta" not in bare and len(bare) < len(data)
    (tmp_path / "bare").write_bytes(bare)
    with pytest.raises(BadInputFile, match="no flux metadata") as caught:
        read_metadata(tmp_path / "bare")
    assert caught.value.exit_code == ExitCode.INPUT_FILE and caught.value.hint


def test_the_xmp_packet_is_well_formed_for_text_that_xml_can_hold():
    from xml.etree import ElementTree

    prompt = "<b> & \"quotes\" 'too' ]]> 🦊\n"
    data = encode(PIXELS, "png", quality=80, metadata=metadata_of(order(prompt)))
    tree = ElementTree.fromstring(re.search(rb"<x:xmpmeta.*</x:xmpmeta>", data, re.DOTALL)[0])
    assert json.loads(tree.find(".//{urn:flux:1}metadata").text)["request"]["prompt"] == prompt


@pytest.mark.parametrize("with_metadata", [True, False])
def test_pixels_survive_png_exactly_and_metadata_never_changes_them(with_metadata, tmp_path):
    metadata = metadata_of(order("a fox")) if with_metadata else None
    path = tmp_path / "x.png"
    path.write_bytes(encode(PIXELS, "png", quality=1, metadata=metadata))
    assert np.array_equal(read_pixels(path), PIXELS)
    for format in ("jpg", "webp"):
        path.write_bytes(encode(PIXELS, format, quality=80, metadata=metadata))
        with_text = read_pixels(path)
        path.write_bytes(encode(PIXELS, format, quality=80, metadata=None))
        assert np.array_equal(read_pixels(path), with_text)


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_more_quality_is_nearer_and_larger(format, tmp_path):
    path, sizes, errors = tmp_path / "x", [], []
    for quality in (5, 50, 80, 100):
        path.write_bytes(encode(PIXELS, format, quality=quality, metadata=None))
        sizes.append(path.stat().st_size)
        errors.append(np.abs(read_pixels(path).astype(int) - PIXELS).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_a_webp_of_quality_100_is_lossless(tmp_path):
    for quality, is_lossless in ((99, False), (100, True)):
        path = tmp_path / f"{quality}.webp"
        path.write_bytes(encode(PIXELS, "webp", quality=quality, metadata=None))
        assert np.array_equal(read_pixels(path), PIXELS) == is_lossless


def test_the_pixel_hash_is_over_size_and_pixels():
    assert hash_pixels(PIXELS) == hashlib.sha256(b"40x24:" + PIXELS.tobytes()).hexdigest()
    turned = np.ascontiguousarray(PIXELS.reshape(40, 24, 3))
    changed = PIXELS.copy()
    changed[3, 4, 1] ^= 1
    assert len({hash_pixels(p) for p in (PIXELS, turned, changed)}) == 3


@pytest.mark.parametrize("format", FORMATS)
@patient
@given(data=st.data())
def test_a_damaged_picture_is_read_or_refused_never_a_crash(tmp_path, format, data):
    whole = bytearray(encode(PIXELS, format, quality=80, metadata=metadata_of(order("a fox"))))
    cut = data.draw(st.integers(0, len(whole)))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)
    ):
        whole[place] = value
    path = tmp_path / "x"
    path.write_bytes(whole[:cut])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the command line does
        for read in (read_metadata, read_pixels):
            try:
                read(path)
            except BadInputFile as error:
                assert "(" in str(error) and "\n" not in error.why


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.7\n",
        b"<svg xmlns='x'/>",
        b"GIF89a" + b"\0" * 40,
    ],
)
def test_an_extension_that_lies_is_refused(data, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(BadInputFile, match="no readable png, jpg or webp") as caught:
        read_metadata(path)
    assert caught.value.exit_code == ExitCode.INPUT_FILE


def test_a_picture_that_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "x.png"
    whole = encode(PIXELS, "png", quality=80, metadata=None)
    path.write_bytes(whole[:16] + (9000).to_bytes(4, "big") * 2 + whole[24:])
    with pytest.raises(BadInputFile):
        read_pixels(path)
    Image.new("1", (9000, 8000)).save(path)
    with pytest.raises(BadInputFile, match="9000x8000"):
        read_pixels(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadInputFile, match=r"cannot read the picture"):
            read_metadata(path)


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_path_that_is_no_text_survives(format, tmp_path):
    metadata = metadata_of(order("a fox"))
    model = metadata["model"] | {"name": "caf\udce9"}
    made = metadata | {"lora": ["/mnt/caf\udce9.safetensors"], "model": model}
    data = encode(np.zeros((16, 16, 3), np.uint8), format, quality=80, metadata=made)
    path = tmp_path / f"x.{format}"
    path.write_bytes(data)
    assert read_metadata(path) == made
