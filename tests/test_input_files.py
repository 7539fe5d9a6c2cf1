"""Where input pictures come from and go to: stdin, rows, settings, metadata and back, Python."""

import hashlib
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxcli
from fluxcli import api
from fluxcli.errors import ExitCode, OutputError, UsageError
from fluxcli.pictures import kept_inputs, names
from fluxcli.pictures.image import encode, hash_request, read_metadata
from tests.support.invariant import assert_failed, call

START = ("generate", "a red circle on a blue background", "-p", "tiny", "--seed", "1")


def make_photo(path: str, colour: str = "red", size: tuple[int, int] = (64, 64)) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return Path(path)


class Piped:
    """A stdin that has these bytes and is no terminal."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.fixture
def pipe(monkeypatch):
    """Put bytes on stdin."""
    return lambda data: monkeypatch.setattr(sys, "stdin", Piped(data))


# --- stdin


@pytest.mark.parametrize(
    "option, read",
    [
        (["--image", "-"], lambda request: request.image),
        (["--init", "-"], lambda request: request.image),
        (["--redux", "-:0.5"], lambda request: request.redux[0].image),
        (["--image", "photo.png", "--mask", "-"], lambda request: request.mask),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_a_dash_reads_a_picture_from_stdin_into_a_private_file(
    option, read, pipe, drawn, capsys, monkeypatch
):
    monkeypatch.setattr("fluxcli.models.parts.redux.find_redux", lambda *_, **__: {})
    data = make_photo("photo.png", "white").read_bytes()
    pipe(data)
    result = call(capsys, *START, *option, "-o", "x.png")
    assert result.returncode == 0, result.stderr
    path = Path(read(drawn[0].request))
    assert path.is_absolute() and path.parent == kept_inputs.folder()
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "-", "--image", "-"],
        ["generate", "--prompt", "-", "--image", "-"],
        ["generate", "a fox", "--image", "-", "--mask", "-"],
        ["generate", "--from", "-", "--image", "-"],
        ["plan", "-", "--image", "-"],
    ],
    ids=" ".join,
)
def test_stdin_is_read_once(words, pipe, drawn, capsys):
    pipe(make_photo("photo.png").read_bytes())
    error = assert_failed(call(capsys, *words, "-p", "tiny"), ExitCode.USAGE)
    assert "stdin cannot be read twice" in error and not drawn


@pytest.mark.parametrize("data", [b"", b"a prompt", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_on_stdin_is_exit_4_and_not_kept(data, pipe, drawn, capsys):
    pipe(data)
    error = assert_failed(call(capsys, *START, "--image", "-"), ExitCode.INPUT_FILE)
    assert "stdin" in error and kept_inputs.list_kept() == [] and not drawn


def test_a_terminal_is_no_picture(pipe, drawn, capsys, monkeypatch):
    pipe(b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "terminal" in assert_failed(call(capsys, *START, "--image", "-"), ExitCode.USAGE)


@pytest.mark.parametrize("place", ["rows", "variable", "config"])
def test_stdin_is_an_option_alone(place, pipe, drawn, capsys, monkeypatch, config_folder):
    pipe(make_photo("photo.png").read_bytes())
    words = list(START)
    if place == "rows":
        Path("rows.jsonl").write_text('{"prompt": "a fox", "image": "-"}\n')
        result = call(capsys, "generate", "--from", "rows.jsonl", "-p", "tiny")
        assert result.returncode == ExitCode.BATCH and "from stdin" in result.stderr
        return
    if place == "variable":
        monkeypatch.setenv("FLUX_IMAGE", "-")
    else:
        config_folder.mkdir(parents=True)
        (config_folder / "config.toml").write_text('image = "-"\n')
    assert "give a file" in assert_failed(call(capsys, *words), ExitCode.USAGE)
    assert not drawn


# --- rows and settings


def test_pictures_of_rows_count_from_the_file_of_the_rows(drawn, capsys):
    make_photo("set/red.png")
    make_photo("set/masks/m.png", "white")
    absolute = make_photo("elsewhere/blue.png", "blue").absolute()
    Path("set/rows.csv").write_text(
        "prompt,image,mask,strength,mask_feather,negative_prompt,true_cfg\n"
        "a fox,red.png,masks/m.png,0.4,2,fog,2\n"
        f"a hen,{absolute},,,,,\n"
    )
    result = call(capsys, "generate", "--from", "set/rows.csv", "-p", "tiny")
    assert result.returncode == 0, result.stderr
    fox, hen = (each.request for each in sorted(drawn, key=lambda each: each.request.prompt))
    assert (fox.image, fox.mask) == (
        str(Path("set/red.png").absolute()),
        str(Path("set/masks/m.png").absolute()),
    )
    assert (fox.strength, fox.mask_feather, fox.negative_prompt, fox.true_cfg) == (0.4, 2, "fog", 2)
    assert (hen.image, hen.mask, hen.negative_prompt) == (str(absolute), None, None)


def test_the_command_lines_picture_is_that_of_rows_without_one(drawn, capsys):
    here = make_photo("here.png").absolute()
    there = make_photo("set/there.png", "blue").absolute()
    Path("set/rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "image": "there.png"}\n')
    result = call(
        capsys, "generate", "--from", "set/rows.jsonl", "-p", "tiny", "--image", "here.png"
    )
    assert result.returncode == 0, result.stderr
    images = {each.request.prompt: each.request.image for each in drawn}
    assert images == {"a": str(here), "b": str(there)}


def test_a_row_whose_picture_is_missing_fails_alone(drawn, capsys):
    Path("rows.jsonl").write_text('{"prompt": "a fox", "image": "gone.png"}\n{"prompt": "a hen"}\n')
    result = call(capsys, "generate", "--from", "rows.jsonl", "-p", "tiny")
    assert result.returncode == ExitCode.BATCH
    assert "rows.jsonl:1" in result.stderr and "gone.png" in result.stderr
    assert [each.request.prompt for each in drawn] == ["a hen"]


# --- metadata, resume and replay


@pytest.fixture
def begun(drawn, capsys) -> Path:
    """A picture that began with another."""
    make_photo("photo.png")
    result = call(capsys, *START, "--image", "photo.png", "--strength", "0.5", "-o", "x.png")
    assert result.returncode == 0, result.stderr
    drawn.clear()
    return Path("x.png")


def test_metadata_name_the_hash_of_each_input(begun):
    metadata = read_metadata(begun)
    assert metadata["inputs"] == {"image": hash_of("photo.png")}
    assert metadata["request"]["image"] == str(Path("photo.png").absolute())


def hash_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_picture_without_inputs_has_the_metadata_and_the_hash_of_before(drawn, capsys):
    assert call(capsys, *START, "-o", "x.png").returncode == 0
    metadata = read_metadata(Path("x.png"))
    assert not {"inputs", "controls"} & set(metadata) and "parts" not in metadata["model"]
    request = dict(metadata["request"])
    for name in ("image", "mask", "reference", "redux", "control", "negative_prompt", "kind"):
        del request[name]
    assert hash_request(metadata | {"request": request}) == hash_request(metadata)


def test_the_hash_of_a_request_is_of_the_content_and_not_of_the_name(begun):
    metadata = read_metadata(begun)
    moved = metadata | {"request": metadata["request"] | {"image": "/elsewhere/y.png"}}
    other = metadata | {"inputs": {"image": "0" * 64}}
    weaker = metadata | {"request": metadata["request"] | {"strength": 0.4}}
    assert hash_request(moved) == hash_request(metadata)
    assert len({hash_request(each) for each in (metadata, other, weaker)}) == 3


def test_resume_draws_again_what_has_another_input(drawn, capsys):
    make_photo("photo.png")
    Path("rows.jsonl").write_text('{"prompt": "a fox", "image": "photo.png", "seed": 1}\n')
    words = ("generate", "--from", "rows.jsonl", "-p", "tiny", "-o", "out/", "--resume")
    for expected in (1, 0):
        drawn.clear()
        assert call(capsys, *words).returncode == 0
        assert len(drawn) == expected
    drawn.clear()
    make_photo("photo.png", "blue")
    assert call(capsys, *words).returncode == 0
    assert len(drawn) == 1


def test_replay_draws_from_the_same_picture(begun, drawn, capsys):
    result = call(capsys, "replay", str(begun))
    assert result.returncode == 0 and "another picture" not in result.stderr
    assert drawn[0].request.image == str(Path("photo.png").absolute())
    assert call(capsys, "replay", str(begun), "--check").stdout == "x.png: identical\n"


def test_replay_says_that_an_input_has_changed(begun, drawn, capsys):
    make_photo("photo.png", "green")
    result = call(capsys, "replay", str(begun))
    assert result.returncode == 0 and "photo.png is another picture than then" in result.stderr
    checked = call(capsys, "replay", str(begun), "--check")
    assert "made from another picture (image)" in checked.stderr


def test_replay_finds_an_input_that_has_moved(begun, drawn, capsys, tmp_path, monkeypatch):
    shutil.copytree(".", tmp_path / "moved")
    for path in Path().iterdir():
        path.unlink()
    monkeypatch.chdir(tmp_path)
    result = call(capsys, "replay", "moved/x.png")
    assert result.returncode == 0, result.stderr
    assert f"photo.png is now {tmp_path / 'moved' / 'photo.png'}" in result.stderr
    assert drawn[0].request.image == str(tmp_path / "moved" / "photo.png")


def test_a_reference_that_is_edited_within_a_mask_is_one_picture(drawn, capsys):
    make_photo("set/photo.png", "#ff00007f")
    make_photo("set/mask.png", "white")
    inputs = ("--reference", "set/photo.png", "--mask", "set/mask.png")
    made = call(capsys, *START, "--kind", "kontext", *inputs, "-o", "x.png")
    assert made.returncode == 0, made.stderr
    hashes = {"mask": hash_of("set/mask.png"), "references": [hash_of("set/photo.png")]}
    assert read_metadata(Path("x.png"))["inputs"] == hashes
    Path("set/photo.png").rename("photo.png")
    drawn.clear()
    found = call(capsys, "replay", "x.png")
    assert found.returncode == 0 and "photo.png is now" in found.stderr
    assert drawn[0].request.reference == (str(Path("photo.png").absolute()),)


def test_latents_are_finished_with_the_inputs_that_they_were_begun_with(capsys, monkeypatch):
    def save(*_: object) -> str:
        raise OutputError("cannot write the picture", which="x.png", why="the disk is full")

    make_photo("set/photo.png")
    Image.linear_gradient("L").save("set/mask.png")
    masked = (*START, "--image", "set/photo.png", "--mask", "set/mask.png", "--steps", "2")
    with monkeypatch.context() as patch:
        patch.setattr(names, "save", save)
        assert_failed(call(capsys, *masked, "-o", "x.png", "-q"), ExitCode.OUTPUT)
    assert call(capsys, *masked, "-o", "y.png").returncode == 0
    Path("set/photo.png").rename("photo.png")
    found = call(capsys, "decode", "x.latents.safetensors")
    assert found.returncode == 0 and "photo.png is now" in found.stderr
    assert call(capsys, "decode", "x.latents.safetensors", "-q").stderr == ""
    x, y = (np.asarray(Image.open(name)) for name in ("x.png", "y.png"))
    assert np.array_equal(x, y)
    make_photo("photo.png", "green")
    changed = call(capsys, "decode", "x.latents.safetensors")
    assert_failed(changed, ExitCode.INPUT_FILE)
    make_photo("set/photo.png", "green")
    changed = call(capsys, "decode", "x.latents.safetensors")
    assert changed.returncode == 0 and "photo.png is another picture than then" in changed.stderr


@pytest.mark.parametrize("place", ["option", "rows", "source"])
def test_a_tilde_of_nobody_is_a_name_like_any_other(place, drawn, capsys):
    Path("rows.jsonl").write_text('{"prompt": "a fox", "image": "~no-one/x.png"}\n')
    words, code = {
        "option": ((*START, "--image", "~no-one/x.png"), ExitCode.INPUT_FILE),
        "rows": (("generate", "--from", "rows.jsonl", "-p", "tiny"), ExitCode.BATCH),
        "source": (("generate", "--from", "~no-one/x.txt", "-p", "tiny"), ExitCode.USAGE),
    }[place]
    result = call(capsys, *words)
    assert result.returncode == code and "~no-one/x" in result.stderr and not drawn


def test_replay_of_an_input_that_is_gone_is_exit_4_unless_another_is_named(begun, drawn, capsys):
    Path("photo.png").unlink()
    error = assert_failed(call(capsys, "replay", str(begun)), ExitCode.INPUT_FILE)
    assert "photo.png" in error and "--image FILE" in error and not drawn
    make_photo("other.png")
    assert call(capsys, "replay", str(begun), "--image", "other.png").returncode == 0
    assert drawn[0].request.image == str(Path("other.png").absolute())


def test_replay_finds_what_came_from_stdin(pipe, drawn, capsys):
    pipe(make_photo("photo.png").read_bytes())
    assert call(capsys, *START, "--image", "-", "-o", "x.png").returncode == 0
    Path("photo.png").unlink()
    drawn.clear()
    assert call(capsys, "replay", "x.png").returncode == 0
    assert Path(drawn[0].request.image).parent == kept_inputs.folder()
    kept_inputs.clear()
    assert_failed(call(capsys, "replay", "x.png"), ExitCode.INPUT_FILE)


@pytest.mark.parametrize(
    "inputs", [5, {}, {"image": 5}, {"image": []}, {"redux": "x"}, {"image": "../x"}], ids=str
)
def test_a_strangers_hashes_are_no_bug(inputs, begun, drawn, capsys):
    metadata = read_metadata(begun) | {"inputs": inputs}
    pixels = np.zeros((64, 64, 3), np.uint8)
    Path("y.png").write_bytes(encode(pixels, "png", quality=1, metadata=metadata))
    result = call(capsys, "replay", "y.png")
    assert result.returncode in (ExitCode.OK, ExitCode.INPUT_FILE), result.stderr
    assert "Traceback" not in result.stderr


# --- Python


@pytest.fixture
def requests(monkeypatch) -> list:
    """The requests that the Python face resolves."""
    found: list = []
    real = api.resolve_order

    def resolve(prompt, given):
        found.append(real(prompt, given).request)
        return real(prompt, given)

    monkeypatch.setattr(api, "resolve_order", resolve)
    return found


def test_python_takes_paths_and_images(requests):
    photo = make_photo("photo.png").absolute()
    image = Image.new("RGB", (64, 64), "red")
    fluxcli.Flux("tiny", image=photo, mask=image)
    request = requests[-1]
    assert request.image == str(photo)
    kept = Path(request.mask)
    assert kept.parent == kept_inputs.folder()
    with Image.open(kept) as again:
        assert np.array_equal(np.asarray(again), np.asarray(image))


def test_python_takes_pictures_with_what_is_said_of_them(requests):
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    make_photo("r.png")
    fluxcli.Flux(
        "tiny",
        redux=["a.png:0.5", {"image": image, "strength": 0.3}, image],
        control={"kind": "canny", "image": Path("b.png"), "scale": 0.7},
        reference=["r.png", image],
    )
    request = requests[-1]
    assert [each.strength for each in request.redux] == [0.5, 0.3, 1.0]
    assert (request.control[0].kind, request.control[0].scale) == ("canny", 0.7)
    assert request.control[0].image == str(Path("b.png").absolute())
    kept = {request.redux[1].image, request.redux[2].image, request.reference[1]}
    assert kept == {str(each.path) for each in kept_inputs.list_kept()}


@pytest.mark.parametrize(
    "control", [{"kind": "canny"}, {"x": 1}, 5, {"kind": "canny", "image": ""}]
)
def test_what_is_no_picture_is_a_usage_error(control):
    with pytest.raises(UsageError):
        fluxcli.Flux("tiny", control=control)


def test_a_turned_photo_is_turned(requests):
    image = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[274] = 6
    image.save("turned.jpg", exif=exif)
    with Image.open("turned.jpg") as photo:
        fluxcli.Flux("tiny", image=photo)
    with Image.open(requests[-1].image) as kept:
        assert kept.size == (32, 64)
    width, height = requests[-1].size
    assert width < height
