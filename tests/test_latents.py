"""Latents that were kept: read as written, refused when they are something else, finished to the
very same pixels.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fluxcli.cli.options import REQUEST_OPTIONS
from fluxcli.engine.denoise import make_noise
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.errors import BadInputFile, ExitCode
from fluxcli.events import Step
from fluxcli.pictures import latents
from fluxcli.pictures import names as output
from fluxcli.pictures.image import read_metadata
from fluxcli.pictures.latents import Latents
from fluxcli.request.fields import Order
from quant.checkpoint import inspect
from quant.errors import CheckpointError
from tests.support.helpers import draw, engine_of, read_pixels, tiny
from tests.support.invariant import Fault, assert_failed, call, files

REQUEST = tiny()
BESIDE = output.Target(Path(), output.DEFAULT_TEMPLATE)
patient = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return engine_of(inspect(tiny_folder))


@pytest.fixture(scope="module")
def drawing(engine: Engine) -> tuple[dict[int, Latents], np.ndarray]:
    """(the latents before and after every step, the pixels) of one uninterrupted run."""
    alone, model = Picture(REQUEST.request), engine.checkpoint.fingerprint
    noise = make_noise(REQUEST.request.seed, REQUEST.request.size, dtype=torch.float32)
    kept = {0: Latents(REQUEST, noise, 0, model)}
    for event in engine.draw([alone]):
        if isinstance(event, Step):
            kept[alone.step] = Latents(REQUEST, alone.tokens, alone.step, model)
    return kept, alone.pixels


def tokens(request: Order = REQUEST, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    width, height = request.request.size
    return torch.randn(1, width * height // 256, 64).to(dtype)


def written(**changes: object) -> Path:
    """A file as `save` writes it, but for some of its parts."""
    parts = {"request": REQUEST.to_json(), "step": 1, "model": "m"} | changes
    described = json.dumps({name: value for name, value in parts.items() if value is not ...})
    save_file({"latents": tokens()}, "x.latents.safetensors", {"flux_latents": described})
    return Path("x.latents.safetensors")


# --- the file


@patient
@given(
    step=st.integers(0, 60),
    seed=st.integers(0, 2**64 - 1),
    sides=st.tuples(st.integers(4, 8), st.integers(4, 8)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    limit=st.none() | st.just(8 << 30),
    guidance=st.none() | st.floats(0, 100),
)
def test_what_is_saved_is_loaded(step, seed, sides, dtype, limit, guidance):
    width, height = (16 * side for side in sides)
    request = tiny(
        seed=seed, steps=60, width=width, height=height, vram_limit=limit, guidance=guidance
    )
    made = Latents(request, tokens(request, dtype), step, "a fingerprint")
    found = latents.load(latents.save(made, BESIDE))
    assert (found.order, found.step, found.model) == (request, step, "a fingerprint")
    assert found.tokens.dtype == dtype and torch.equal(found.tokens, made.tokens)


NAME = "a-red-circle-on-a-blue-background-7.latents.safetensors"
TARGETS = {
    "x.latents.safetensors": output.Target(Path(), "x.png", exact=True, force=True),
    "new/folder/x.y.latents.safetensors": output.Target(Path("new/folder"), "x.y.jpg", exact=True),
    f"pics/{NAME}": output.Target(Path("pics"), output.DEFAULT_TEMPLATE),
    NAME: output.Target(Path(), "-", stdout=True),
}


@pytest.mark.parametrize("expected", TARGETS)
def test_they_lie_where_the_picture_would_and_replace_nothing(expected):
    places = [latents.save(Latents(REQUEST, tokens(), k), TARGETS[expected]) for k in range(3)]
    assert str(places[0]) == expected and len(set(places)) == 3
    assert [latents.load(place).step for place in places] == [0, 1, 2]
    assert len(files(Path())) == 3  # and no temporary one


def test_a_picture_of_that_name_stays(tmp_path):
    Path("x.png").write_bytes(b"old")
    Path("x.latents.safetensors").symlink_to("nowhere")
    place = latents.save(
        Latents(REQUEST, tokens(), 1), output.Target(Path(), "x.png", exact=True, force=True)
    )
    assert str(place) == "x-2.latents.safetensors" and Path("x.png").read_bytes() == b"old"
    assert not Path("nowhere").exists()


def test_a_write_that_fails_anywhere_leaves_a_whole_file_or_none(monkeypatch):
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    for k in range(1, 40):
        with monkeypatch.context() as patch, suppress(OSError):
            fault = Fault(k, full).install(patch)
            latents.save(Latents(REQUEST, tokens(), 1), BESIDE)
        for path in Path().glob("*.safetensors"):
            assert latents.load(path).step == 1
        if fault.count < k:
            return
        for path in Path().iterdir():
            path.unlink()
    raise AssertionError("the writes never ended")


# --- files of something else

DAMAGE = {
    "no prompt": {"request": {k: v for k, v in REQUEST.to_json().items() if k != "prompt"}},
    "no request": {"request": ...},
    "no step": {"step": ...},
    "no model": {"model": ...},
    "a request that is a list": {"request": []},
    "another size": {"request": REQUEST.to_json() | {"image_size": 128}},
    "a size that is none": {"request": REQUEST.to_json() | {"image_size": 1000}},
    "one side only": {"request": REQUEST.to_json() | {"width": 64}},
    "an unknown setting": {"request": REQUEST.to_json() | {"nonsense": 1}},
    "a seed between two": {"request": REQUEST.to_json() | {"seed": 1.5}},
    "text tokens of nothing": {"request": REQUEST.to_json() | {"text_tokens": None}},
    "a device of nothing": {"request": REQUEST.to_json() | {"device": None}},
    "steps in words": {"request": REQUEST.to_json() | {"steps": "many"}},
    "a prompt that is no text": {"request": REQUEST.to_json() | {"prompt": 5}},
    "a blank prompt": {"request": REQUEST.to_json() | {"prompt": " "}},
    "a step before the first": {"step": -1},
    "a step after the last": {"step": REQUEST.request.steps + 1},
    "a step between two": {"step": 1.5},
    "a step in words": {"step": "1"},
    "a step of nothing": {"step": None},
}


def assert_refused(path: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(Path())
    with pytest.raises((BadInputFile, CheckpointError)):
        latents.load(path)
    assert path.name in assert_failed(call(capsys, "decode", str(path)), ExitCode.INPUT_FILE)
    assert files(Path()) == before


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_latents_that_flux_does_not_write_are_exit_4(damage, capsys):
    assert_refused(written(**damage), capsys)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '"x"', "[" * 100_000], ids=lambda text: text[:8]
)
def test_metadata_that_is_no_json_object_is_exit_4(text, capsys):
    save_file({"latents": tokens()}, "x.safetensors", {"flux_latents": text})
    assert_refused(Path("x.safetensors"), capsys)


WRONG = {
    "another name": {"other": tokens()},
    "no batch": {"latents": tokens()[0]},
    "a token less": {"latents": tokens()[:, 1:]},
    "narrower": {"latents": tokens()[..., :32]},
    "integers": {"latents": tokens().long()},
    "float8": {"latents": tokens().to(torch.float8_e4m3fn)},
    "float64": {"latents": tokens().double()},
}


@pytest.mark.parametrize("tensors", WRONG.values(), ids=WRONG)
def test_tensors_that_are_no_latents_are_exit_4(tensors, capsys):
    path = written()
    described = json.dumps({"request": REQUEST.to_json(), "step": 1, "model": "m"})
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        path,
        {"flux_latents": described},
    )
    assert_refused(path, capsys)


def test_files_of_something_else_are_exit_4(capsys, tiny_folder):
    for name, data in {
        "empty": b"",
        "text": b"a fox\n",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    }.items():
        Path(name).write_bytes(data)
        assert_refused(Path(name), capsys)
    Path("weights").symlink_to(next(tiny_folder.glob("vae/*.safetensors")))
    assert_refused(Path("weights"), capsys)
    Path("folder").mkdir()
    assert_refused(Path("folder"), capsys)
    assert "absent" in assert_failed(call(capsys, "decode", "absent"), ExitCode.USAGE)


def test_a_header_whose_metadata_are_no_texts_is_exit_4(capsys):
    info = {"dtype": "F32", "shape": [1, 16, 64], "data_offsets": [0, 4096]}
    for metadata in ({"flux_latents": 5}, [], "x", None):
        header = json.dumps({"__metadata__": metadata, "latents": info}).encode()
        Path("x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4096))
        assert_refused(Path("x.safetensors"), capsys)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_exit_4(share, capsys):
    path = written()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_refused(path, capsys)


# --- flux decode


@pytest.mark.parametrize("step", [1, 3])
def test_kept_latents_are_finished_to_the_pixels_of_the_uninterrupted_run(step, drawing, capsys):
    kept, pixels = drawing
    path = latents.save(kept[step], BESIDE)
    data = path.read_bytes()
    result = call(capsys, "decode", str(path), "-o", "x.png", "-q", "--events")
    assert (result.returncode, result.stderr) == (0, "") and path.read_bytes() == data
    steps = [
        event["index"]
        for event in map(json.loads, result.stdout.splitlines())
        if event["event"] == "step"
    ]
    assert steps == list(range(step + 1, REQUEST.request.steps + 1))
    assert np.array_equal(read_pixels(Path("x.png")), pixels)
    assert read_metadata(Path("x.png"))["request"] == REQUEST.to_json()
    assert "--force" in assert_failed(
        call(capsys, "decode", str(path), "-o", "x.png"), ExitCode.OUTPUT
    )


def test_the_picture_after_a_resumed_one_begins_at_its_beginning(drawing, engine):
    for options in ({"resume": latents.load(latents.save(drawing[0][2], BESIDE))}, {}):
        assert np.array_equal(draw(engine, REQUEST, **options)[1], drawing[1])


def test_options_say_how_and_where_the_picture_is_written(drawing, capsys):
    path = latents.save(drawing[0][3], BESIDE)
    options = ("-o", "pics/", "--format", "jpg", "--quality", "50", "--json")
    found = json.loads(call(capsys, "decode", str(path), *options).stdout)
    (image,) = found["images"]
    assert (image["format"], image["seed"]) == ("jpg", 7) and Path(image["path"]).parent == Path(
        "pics"
    )
    call(capsys, "decode", str(path), "--no-metadata")
    (bare,) = Path().glob("*.png")
    assert b"red circle" not in bare.read_bytes()


@pytest.mark.parametrize("option", ["--json", "--events"])
def test_stdout_is_for_the_picture_or_for_json(option, capsys):
    message = assert_failed(
        call(capsys, "decode", str(written()), "-o", "-", option), ExitCode.USAGE
    )
    assert "exclude each other" in message


def test_a_file_of_many_pictures_is_one(drawing, capsys):
    """What a hostile file says of count and place is not done."""
    hostile = tiny(count=50, output="/tmp/owned.png")
    path = latents.save(Latents(hostile, drawing[0][3].tokens, 3, drawing[0][3].model), BESIDE)
    assert call(capsys, "decode", str(path), "-q").stdout.splitlines() == [
        "a-red-circle-on-a-blue-background-7.png"
    ]


def test_another_model_is_said(drawing, capsys):
    path = latents.save(Latents(REQUEST, drawing[0][3].tokens, 3, "another"), BESIDE)
    assert "expect another picture" in call(capsys, "decode", str(path)).stderr
    assert call(capsys, "decode", str(path), "-q").stderr == ""


HOW = {
    "output",
    "format",
    "quality",
    "no_metadata",
    "force",
    "device",
    "vram_limit",
    "offload",
    "no_wait",
} | {
    "no_worker",
    "no_cache",
}
SHOWN = {"json_output", "events", "quiet", "debug", "show"}


@pytest.mark.parametrize("name", sorted(set(REQUEST_OPTIONS) - HOW - SHOWN))
def test_an_option_that_says_what_is_drawn_is_exit_2_and_named(name, capsys, monkeypatch):
    monkeypatch.setattr(latents, "load", lambda _: pytest.fail("read the file"))
    shown = REQUEST_OPTIONS[name].__metadata__[0]
    names = (
        shown.default,
        *shown.param_decls,
    )  # typer takes the first for a default until it reads the command
    for flag in names:
        message = assert_failed(call(capsys, "decode", "x.safetensors", flag, "4"), ExitCode.USAGE)
        assert f"({names[-1]})" in message and "flux generate" in message


def test_latents_that_are_not_finite_are_exit_9_and_no_picture(drawing, capsys):
    broken = torch.full_like(drawing[0][3].tokens, float("nan"))
    path = latents.save(Latents(REQUEST, broken, 3, drawing[0][3].model), BESIDE)
    assert "NaN" in assert_failed(call(capsys, "decode", str(path), "-q"), ExitCode.NOT_FINITE)
    assert list(files(Path())) == [str(path)]
