"""Previews: the running estimate becomes the picture, costs it nothing, and leaves no file."""

import json
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fluxcli
from fluxcli.engine import decode, preview
from fluxcli.engine.engine import Engine
from fluxcli.events import Notice, Preview, Saved, from_json, to_json
from fluxcli.pictures import previews
from fluxcli.pictures.image import read_metadata
from fluxcli.pictures.names import Destination, parse_target
from fluxcli.request.job import Job, Row
from fluxcli.run.session import Session
from quant.checkpoint import inspect
from tests.support.helpers import engine_of, picture_of, read_pixels, tiny
from tests.support.invariant import call, files

SMALL = ("-p", "tiny", "--steps", "3", "--size", "64", "--text-tokens", "16", "--seed", "1")
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return engine_of(inspect(tiny_folder), tiny(image_size=128, steps=10, text_tokens=24))


def shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX), float)


def test_a_straight_line_is_estimated_from_any_step():
    start, end = torch.randn(1, 16, 64), torch.randn(1, 16, 64)
    for now, then in ((1.0, 0.9), (0.7, 0.2), (0.1, 0.0)):
        before, after = ((1 - sigma) * start + sigma * end for sigma in (now, then))
        found = preview.estimate(before, after, torch.tensor([now, then]))
        assert torch.allclose(found, start, atol=1e-4)


def test_estimates_come_near_to_the_picture(engine):
    order = tiny(image_size=128, steps=10, text_tokens=24, seed=3)
    picture = picture_of(engine, order)
    picture.preview_every = 1
    events = list(engine.draw([picture]))
    found = [each.pixels for each in events if isinstance(each, preview.Estimated)]
    assert [each.shape for each in found] == [(16, 16, 3)] * 9  # after the last step none
    away = [np.abs(each - shrink(picture.pixels, (16, 16))).mean() for each in found]
    assert away[-1] < 30 and away[0] > away[-1]
    yellow = tiny(prompt="a large yellow star on a black background", image_size=128, steps=10)
    other = picture_of(engine, yellow)
    list(engine.draw([other]))
    assert np.abs(found[-1] - shrink(other.pixels, (16, 16))).mean() > 1.5 * away[-1]


def test_a_preview_changes_no_pixel_and_stands_in_no_metadata(capsys):
    for name, more in (("with", ("--preview-every", "1")), ("without", ())):
        assert call(capsys, "generate", PROMPT, *SMALL, *more, "-o", f"{name}.png").returncode == 0
    assert np.array_equal(read_pixels(Path("with.png")), read_pixels(Path("without.png")))
    metadata = [read_metadata(Path(f"{name}.png")) for name in ("with", "without")]
    assert metadata[0] == metadata[1]
    assert set(files(Path())) == {"with.png", "without.png"}


def session_events(*orders: object, batch: bool = False) -> Session:
    rows = tuple(Row(k if batch else 0, order) for k, order in enumerate(orders, 1))
    return Session().run(Job(rows, batch=batch, prompt_cache=False))


def test_the_file_lies_beside_the_picture_as_long_as_that_is_not_there():
    seen = []
    for event in session_events(tiny(output="out/x.png", preview_every=1, image_size=96)):
        if isinstance(event, Preview):
            assert from_json(json.loads(json.dumps(to_json(event)))) == event
            with Image.open(event.path) as image:
                assert image.format == "JPEG" and image.size == (264, 264)
            seen.append((event.path, event.index, event.total, event.seed, event.row))
        if isinstance(event, Saved):
            assert set(files(Path())) == {"out/x.png"}
    assert seen == [("out/x.preview.jpg", index, 3, 7, 0) for index in (1, 2)]


def test_steps_that_a_strength_leaves_out_do_not_count():
    Image.new("RGB", (64, 64), "red").save("photo.png")
    order = tiny(image="photo.png", strength=0.5, steps=10, preview_every=2, output="x.png")
    found = [each for each in session_events(order) if isinstance(each, Preview)]
    assert [(each.index, each.total) for each in found] == [(2, 5), (4, 5)]


def test_rows_have_previews_of_their_own():
    orders = [tiny(output="out/", preview_every=2, seed=seed) for seed in (1, 2)]
    found = [each for each in session_events(*orders, batch=True) if isinstance(each, Preview)]
    assert [(each.row, each.seed, each.index) for each in found] == [(1, 1, 2), (2, 2, 2)]
    assert found[0].path != found[1].path
    assert len(files(Path("out"))) == 2 and not list(Path("out").glob("*.preview*"))


def test_a_run_that_is_closed_leaves_no_preview():
    with closing(session_events(tiny(output="x.png", preview_every=1))) as events:
        next(each for each in events if isinstance(each, Preview))
        assert Path("x.preview.jpg").exists()
    assert not files(Path())


def test_files_of_others_are_not_replaced():
    for name in ("x.preview.jpg", "y.png"):
        Path(name).write_text("mine")
    for output in ("x.png", "y-{seed}.png"):
        for event in session_events(tiny(output=output, preview_every=1)):
            if isinstance(event, Preview):
                assert event.path in ("x-2.preview.jpg", "y-7.preview.jpg")
    assert Path("x.preview.jpg").read_text() == Path("y.png").read_text() == "mine"
    assert not list(Path().glob("*-*.preview.jpg"))


@pytest.mark.parametrize("write", ["names.write_first_free", "write_atomically"])
def test_where_none_can_be_written_the_picture_is_all_the_same(write, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(f"fluxcli.pictures.previews.{write}", fail)  # the first, or those after it
    events = list(session_events(tiny(output="x.png", preview_every=1)))
    said = [each.message for each in events if isinstance(each, Notice)]
    assert said.count("no preview can be written: the disk is full") == 1
    assert set(files(Path())) == {"x.png"}


def test_of_a_picture_for_stdout_they_lie_in_the_current_folder():
    order = tiny(output="-", preview_every=1)
    file = previews.PreviewFile()
    pixels = np.zeros((8, 4, 3), np.uint8)
    path = file.write(pixels, Destination(parse_target(order.output), order))
    assert path == Path("a-red-circle-on-a-blue-background-7.preview.jpg") and path.exists()
    file.remove()
    file.remove()
    assert not path.exists()


def test_the_command_says_where_and_programs_are_told(capsys):
    made = call(capsys, "generate", PROMPT, *SMALL, "--preview-every", "1", "-o", "x.png", "--json")
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert [line.get("path") for line in lines[:-1]] == ["x.preview.jpg"] * 2
    assert lines[-1]["images"][0]["path"] == "x.png"
    assert made.stderr.count("x.preview.jpg") == 1


def test_python_gets_images():
    with fluxcli.Flux("tiny", size=64, steps=3, text_tokens=16, seed=1) as flux:
        events = list(flux.events(PROMPT, preview_every=2, count=2))
    found = [each for each in events if isinstance(each, fluxcli.PreviewReady)]
    assert [(each.position, each.index, each.steps) for each in found] == [(1, 2, 3), (2, 2, 3)]
    assert found[0].image.size == (8, 8)


# --- TAEF1

FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


@pytest.fixture
def tiny_vae(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Random weights in TAEF1's shape, in a mirror."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = AutoencoderTiny(latent_channels=16).eval()
    folder = Path("mirror", preview.TINY_REPOSITORY)
    folder.mkdir(parents=True)
    save_file(module.state_dict(), folder / preview.TINY_FILE)
    monkeypatch.setenv("FLUX_MIRROR", str(Path("mirror").absolute()))
    preview._load_tiny.cache_clear()
    return module


def draw_one(previewer: preview.Previewer, size: tuple[int, int] = (64, 32)) -> np.ndarray:
    before, after = torch.full((1, size[0] * size[1] // 256, 64), 2.0), torch.ones(1, 1, 64)
    return previewer.draw(before, after.expand_as(before), torch.tensor([1.0, 0.5]), size)


def test_taef1_decodes_where_its_weights_are(tiny_vae):
    previewer = preview.Previewer(FLUX_VAE)
    assert not previewer.problem
    pixels = draw_one(previewer)  # the estimate is 0 everywhere
    with torch.no_grad():
        expected = decode.to_pixels(tiny_vae.decode(torch.zeros(1, 16, 4, 8)).sample).numpy()
    assert pixels.shape == (32, 64, 3) and pixels.std() > 1
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert draw_one(previewer, (1024, 32)).shape == (16, 512, 3)


def test_the_bundled_models_latents_are_none_of_taef1s(tiny_vae, tiny_folder):
    config = inspect(tiny_folder).components["vae"].config
    previewer = preview.Previewer(config)
    assert previewer.tiny is None and previewer.projection is preview.BUNDLED
    assert draw_one(previewer).shape == (4, 8, 3)


def test_damaged_weights_are_told_and_the_projection_is_used(tiny_vae):
    Path("mirror", preview.TINY_REPOSITORY, preview.TINY_FILE).write_bytes(b"x" * 100)
    previewer = preview.Previewer(FLUX_VAE)
    assert "TAEF1" in previewer.problem and previewer.projection is preview.FLUX
    bias = decode.to_pixels(torch.tensor(preview.FLUX.bias)[None, :, None, None])[0, 0]
    assert np.array_equal(draw_one(previewer)[0, 0], bias.numpy())


def test_what_is_no_number_is_shown_as_grey():
    previewer = preview.Previewer(FLUX_VAE)
    nothing = torch.full((1, 4, 64), float("nan"))
    assert (previewer.draw(nothing, nothing, torch.tensor([1.0, 0.5]), (32, 32)) == 128).all()
