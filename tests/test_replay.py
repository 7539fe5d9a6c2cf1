"""`flux replay` and `flux inspect`: what a picture says of itself, and what an override changes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluxcli
from fluxcli.cli.replay import _list_differences, restore_order
from fluxcli.errors import BadInputFile, ExitCode
from fluxcli.pictures.image import encode, read_metadata
from fluxcli.request import presets
from fluxcli.request.fields import Order
from fluxcli.request.settings import coerce
from tests.support.helpers import read_pixels
from tests.support.invariant import assert_failed, call, files

SAID = {
    "steps": st.integers(1, 60).map(str),
    "guidance": st.floats(0, 50).map(str),
    "text_tokens": st.integers(1, 512).map(str),
    "quality": st.integers(1, 100).map(str),
    "format": st.sampled_from(["jpg", "png", "webp"]),
    "aspect_ratio": st.sampled_from(["1:1", "16:9", "9:16"]),
}
patient = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def picture(drawn, capsys) -> Path:
    """A picture of the tiny preset with two things said: 3 steps and 16:9."""
    result = call(
        capsys, "generate", "a fox", "-p", "tiny", "--steps", "3", "--ar", "16:9", "--seed", "5"
    )
    drawn.clear()
    return Path(result.stdout.strip())


def stored(config_folder, preset, said):
    """What a picture made with `preset` and options `said` carries."""
    values = presets.merge({"preset": preset, "seed": "5"} | said, config_folder, {}).values
    return Order.from_settings("a fox", values).to_json()


@patient
@given(said=st.fixed_dictionaries({}, optional=SAID))
def test_a_picture_replays_as_it_was_made(config_folder, said):
    metadata = stored(config_folder, "draft", said)
    assert restore_order(Path("x.png"), metadata, given={}).to_json() == metadata


@patient
@given(
    said=st.fixed_dictionaries({}, optional=SAID), override=st.fixed_dictionaries({}, optional=SAID)
)
def test_an_override_changes_only_what_it_says(config_folder, said, override):
    metadata = stored(config_folder, "draft", said)
    expected = stored(config_folder, "draft", said | override)
    assert restore_order(Path("x.png"), metadata, given=override).to_json() == expected


@patient
@given(
    said=st.fixed_dictionaries({}, optional=SAID), override=st.fixed_dictionaries({}, optional=SAID)
)
@pytest.mark.parametrize("preset", ["quality", "krea"])
def test_under_another_preset_what_was_said_stays_and_what_the_preset_said_changes(
    config_folder, preset, said, override
):
    draft = presets.merge({"preset": "draft"}, config_folder, {}).values
    changed = {
        key: value for key, value in said.items() if coerce(key, value, where="") != draft[key]
    }
    expected = stored(config_folder, preset, changed | override)
    replayed = restore_order(
        Path("x.png"), stored(config_folder, "draft", said), given={"preset": preset} | override
    )
    assert replayed.to_json() == expected


def test_the_final_of_a_draft(config_folder):
    draft = stored(config_folder, "draft", {"aspect_ratio": "16:9", "guidance": "2.5"})
    final = restore_order(Path("x.jpg"), draft, given={"preset": "quality"})
    assert (final.request.steps, final.request.size, final.output.format, final.preset) == (
        50,
        (1024, 576),
        "png",
        "quality",
    )
    assert (final.request.seed, final.request.guidance, final.request.prompt) == (5, 2.5, "a fox")


def test_a_model_without_guidance_is_given_none(config_folder):
    final = restore_order(
        Path("x.jpg"), stored(config_folder, "dev", {}), given={"preset": "schnell"}
    )
    assert (final.request.guidance, final.request.steps, final.request.model) == (
        None,
        4,
        "black-forest-labs/FLUX.1-schnell",
    )


def test_a_size_in_another_form_replaces_the_one_that_was_said(config_folder):
    pixels = stored(config_folder, "draft", {"width": "512", "height": "256"})
    square = {"aspect_ratio": "1:1", "image_size": "320"}
    for given_ in ({}, {"preset": "quality"}):
        assert restore_order(Path("x"), pixels, given=given_).request.size == (512, 256)
        assert restore_order(Path("x"), pixels, given=given_ | square).request.size == (
            320,
            320,
        )
    ratio = stored(config_folder, "draft", {"aspect_ratio": "16:9"})
    assert restore_order(
        Path("x"), ratio, given={"preset": "dev", "width": "512", "height": "256"}
    ).request.size == (
        512,
        256,
    )


def test_a_users_preset_with_pixels_and_one_that_is_gone(config_folder):
    mine = config_folder / "presets" / "mine.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text("width = 512\nheight = 256\nsteps = 9\n")
    metadata = stored(config_folder, "mine", {"aspect_ratio": "16:9"})
    assert restore_order(Path("x"), metadata, given={"preset": "draft"}).request.size == (640, 368)
    plain = stored(config_folder, "mine", {})
    assert restore_order(Path("x"), plain, given={"preset": "draft"}).request.size == (640, 640)
    mine.unlink()
    assert restore_order(Path("x"), plain, given={}).request.steps == 9
    gone = restore_order(Path("x"), plain, given={"preset": "draft"})
    assert (gone.request.steps, gone.request.size) == (9, (512, 256))


def test_the_variables_and_settings_of_today_do_not_change_a_picture_of_yesterday(
    config_folder, monkeypatch
):
    metadata = stored(config_folder, "draft", {})
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text("steps = 3\noutput = 'pics/'\n")
    monkeypatch.setenv("FLUX_GUIDANCE", "9")
    replayed = restore_order(Path("x"), metadata, given={})
    assert replayed.to_json() == metadata | {"output": "pics/"}


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": 0},
        {"steps": "x"},
        {"steps": None},
        {"prompt": 3},
        {"prompt": ""},
        {"prompt": "\ud800"},
        {"preset": []},
        {"unknown": 1},
        {"width": 512},
        {"seed": 2**64},
        {"guidance": "nan"},
        {"format": "gif"},
        {"metadata": 3},
    ],
    ids=str,
)
def test_metadata_that_flux_does_not_write_is_a_bad_file(damage, config_folder):
    with pytest.raises(BadInputFile, match=r"damaged metadata \(x\.png\)"):
        restore_order(Path("x.png"), stored(config_folder, "tiny", {}) | damage, given={})


@pytest.mark.parametrize("missing", ["prompt", "preset"])
def test_metadata_without_a_prompt_or_preset_is_a_bad_file(missing, config_folder):
    metadata = stored(config_folder, "tiny", {})
    del metadata[missing]
    with pytest.raises(BadInputFile, match=missing):
        restore_order(Path("x.png"), metadata, given={"preset": "dev"})


def test_a_foreign_picture_chooses_neither_place_nor_number(config_folder):
    hostile = stored(config_folder, "tiny", {}) | {"output": "/tmp/owned.png", "count": 9999}
    for given_ in ({}, {"preset": "dev"}):
        replayed = restore_order(Path("x.png"), hostile, given=given_)
        assert (replayed.output.output, replayed.output.count) == (None, 1)


def test_replay_writes_the_same_pixels_under_the_next_name(picture, drawn, capsys):
    result = call(capsys, "replay", str(picture), "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a-fox-5-2.png\n", "")
    assert (read_pixels(picture) == read_pixels(Path("a-fox-5-2.png"))).all()
    assert read_metadata(picture) == read_metadata(Path("a-fox-5-2.png"))
    assert (drawn[0].request.steps, drawn[0].request.size) == (3, (128, 80))


def test_replay_takes_another_prompt_and_every_option(picture, drawn, capsys):
    result = call(
        capsys, "replay", str(picture), "--prompt", "a hen", "--seed=8", "-n2", "-o{slug}-{n}.webp"
    )
    assert result.stdout.split() == ["a-hen-1.webp", "a-hen-2.webp"]
    assert [(r.request.prompt, r.request.seed, r.request.steps) for r in drawn] == [
        ("a hen", 8, 3),
        ("a hen", 9, 3),
    ]
    assert_failed(call(capsys, "replay", str(picture), "--prompt", " "), ExitCode.USAGE)


def test_check_says_identical_or_different_and_writes_nothing(picture, capsys):
    before = files(Path())
    assert call(capsys, "replay", str(picture), "--check").stdout == f"{picture}: identical\n"
    other = call(capsys, "replay", str(picture), "--check", "--seed", "6")
    assert (other.returncode, other.stdout) == (1, f"{picture}: different\n")
    assert files(Path()) == before


@pytest.mark.parametrize(
    "options", [["-o", "x.png"], ["--json"], ["--events"], ["--preview-every", "2"], ["--show"]]
)
def test_check_excludes_what_would_write(options, picture, drawn, capsys):
    assert "--check" in assert_failed(
        call(capsys, "replay", str(picture), "--check", *options), ExitCode.USAGE
    )
    assert not drawn


def test_another_model_is_said(picture, drawn, capsys, monkeypatch):
    monkeypatch.setattr("quant.checkpoint.Checkpoint.fingerprint", "another")
    result = call(capsys, "replay", str(picture))
    assert result.returncode == 0 and "not the one that made the picture" in result.stderr


def test_inspect_prints_the_metadata(picture, capsys):
    result = call(capsys, "inspect", str(picture))
    assert json.loads(result.stdout) == read_metadata(picture) and result.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "replay"])
@pytest.mark.parametrize("kind", ["bare", "text", "folder", "hostile"])
def test_what_carries_no_request_is_exit_4(command, kind, picture, drawn, capsys):
    path = Path("x.png")
    pixels = read_pixels(picture)
    if kind in ("bare", "hostile"):
        metadata = read_metadata(picture) | {"model": "a text"} if kind == "hostile" else None
        path.write_bytes(encode(pixels, "png", quality=80, metadata=None))
        if metadata:
            path.write_bytes(picture.read_bytes().replace(b'"request":', b'"requesT":'))
    elif kind != "none":
        path.mkdir() if kind == "folder" else path.write_text("no picture")
    before = files(Path())
    assert_failed(call(capsys, command, str(path)), ExitCode.INPUT_FILE)
    assert files(Path()) == before and not drawn


def test_a_model_folder_is_stored_so_that_any_folder_finds_it(
    drawn, capsys, tiny_folder, tmp_path, monkeypatch
):
    import shutil

    shutil.copytree(tiny_folder, "mymodel")
    result = call(
        capsys,
        "generate",
        "a fox",
        "-p",
        "tiny",
        "-m",
        "./mymodel",
        "--seed",
        "1",
        "-o",
        "out/a.png",
    )
    assert result.returncode == 0, result.stderr
    picture = Path("out/a.png").resolve()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert call(capsys, "replay", str(picture), "--check").stdout.strip().endswith(": identical")


def test_a_check_refuses_what_it_would_ignore(picture, capsys):
    for option in (
        ["--force"],
        ["--quality", "3"],
        ["--no-metadata"],
        ["--dry-run"],
        ["-n", "2"],
        ["-o", "x.png"],
    ):
        result = call(capsys, "replay", str(picture), "--check", *option)
        assert "--check excludes" in assert_failed(result, ExitCode.USAGE)


def test_a_check_says_what_differs_here(picture, capsys, monkeypatch):
    same = call(capsys, "replay", str(picture), "--check")
    assert same.stdout.endswith(": identical\n") and " here " not in same.stderr
    own = fluxcli.versions()
    monkeypatch.setattr(fluxcli, "versions", lambda: own | {"python": "3.99.1", "torch": "9.9"})
    result = call(capsys, "replay", str(picture), "--check")
    said = result.stderr.splitlines()
    assert f"flux: made with Python {own['python']}, here is 3.99.1" in said
    assert f"flux: made with torch {own['torch']}, here is 9.9" in said
    changed = call(capsys, "replay", str(picture), "--check", "--seed", "6")
    assert changed.returncode == 1 and changed.stdout.endswith(": different\n")


def test_every_difference_has_a_sentence(picture):
    """Each value that a picture says of how it was computed, as it is and as strangers write it."""
    here = read_metadata(picture)
    here["lora"] = {"/a/style.safetensors": "0123 x 1.0"}
    assert list(_list_differences(here, here)) == []
    counted = {"fingerprint", "style.safetensors", *here["compute"], *here["versions"]}
    for strange in ({}, dict.fromkeys(here, 5), {name: {} for name in here}):
        lines = list(_list_differences(strange, here))
        assert len(lines) == len(counted) and all("here" in line for line in lines)
        assert "the adapter style.safetensors was not there, here it is 0123 x 1.0" in lines
    then = here | {"compute": here["compute"] | {"device": "cuda", "tiled": True}}
    assert list(_list_differences(then, here)) == [
        "made on cuda, here is cpu",
        "decoded in tiles: yes, here: no",
    ]
    then = here | {"model": here["model"] | {"parts": {"controlnet": "0123"}}}
    said = ["ControlNets and the like were controlnet 0123, here none"]
    assert list(_list_differences(then, here)) == said


def test_a_replay_can_be_a_dry_run(picture, drawn, capsys):
    result = call(capsys, "replay", str(picture), "--dry-run")
    assert result.returncode == 0 and "128x80, 3 steps" in result.stdout and drawn == []


def test_a_pipe_is_no_picture(capsys, tmp_path):
    import os

    os.mkfifo("fifo.png")
    for command in ("inspect", "replay"):
        assert "regular file" in assert_failed(
            call(capsys, command, "fifo.png"), ExitCode.INPUT_FILE
        )
