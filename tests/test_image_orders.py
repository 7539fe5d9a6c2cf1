"""What a request with --image means: its size, its steps, its defaults; and what ends it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxcli.errors import ExitCode
from fluxcli.events import Step
from fluxcli.pictures.canvas import load_canvas
from fluxcli.pictures.image import read_metadata
from fluxcli.pictures.inputs import load_inputs
from fluxcli.plan.costs import make_workload
from fluxcli.request.fields import Order
from fluxcli.resolve import resolve_order
from quant.checkpoint import inspect
from tests.support.fill import make_fill_model
from tests.support.helpers import draw_all, engine_of, picture_of, read_pixels, tiny
from tests.support.invariant import assert_failed, call

QUICK = ("-p", "tiny", "--steps", "4", "--text-tokens", "16", "--seed", "7")


def save(name: str, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(name)
    return name


@pytest.fixture
def photo() -> str:
    painter = np.random.default_rng(0)
    return save("photo.png", painter.integers(0, 256, (200, 300, 3), dtype=np.uint8))


@pytest.fixture
def right() -> str:
    """A mask whose right half is white."""
    return save("right.png", np.tile(np.array([[0, 255]], np.uint8), (2, 1)))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, (1248, 832)),
        ({"preset": "draft"}, (784, 528)),
        ({"image_size": "768"}, (768, 512)),
        ({"width": "960"}, (960, 640)),
        ({"height": "512"}, (768, 512)),
        ({"image_size": "640x640"}, (640, 640)),
        ({"width": "512", "height": "768"}, (512, 768)),
        ({"aspect_ratio": "16:9"}, (1024, 576)),
        ({"aspect_ratio": "1:1", "width": "512"}, (512, 512)),
        ({"expand": "0,0,300,0", "preset": "fill", "kind": "fill"}, (1776, 592)),
    ],
)
def test_the_size_follows_the_picture_unless_it_is_given(given, size, photo):
    assert resolve_order("a fox", {"image": photo} | given).request.size == size


def test_a_size_of_a_file_of_settings_says_how_many_pixels(photo, config_folder):
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text("width = 512\nheight = 512\n")
    assert resolve_order("a fox", {"image": photo}).request.size == (624, 416)


@pytest.mark.parametrize(
    ("strength", "steps", "taken"), [(0.6, 28, 17), (1.0, 28, 28), (0.3, 10, 3), (0.01, 28, 1)]
)
def test_strength_leaves_out_the_first_steps_as_in_diffusers(strength, steps, taken, photo):
    request = resolve_order("a fox", {"image": photo, "strength": strength, "steps": steps}).request
    assert request.steps_taken == taken == make_workload(request).steps
    assert resolve_order("a fox", {"image": photo}).request.strength == 0.6


def test_a_strength_that_leaves_no_step_is_exit_2(photo, capsys):
    result = call(capsys, "generate", "a fox", *QUICK, "--image", photo, "--strength", "0")
    error = assert_failed(result, ExitCode.USAGE)
    assert "none of 4 steps would be taken" in error and "--strength 0.6" in error


def test_a_picture_beyond_four_to_one_is_exit_2_unless_a_ratio_is_given(capsys):
    strip = save("strip.png", np.zeros((10, 50, 3), np.uint8))
    error = assert_failed(
        call(capsys, "generate", "a fox", *QUICK, "--image", strip), ExitCode.USAGE
    )
    assert "strip.png, 50x10" in error and "--ar 4:1" in error
    assert resolve_order("a fox", {"image": strip, "aspect_ratio": "4:1"}).request.size[0] == 1024


def test_a_mask_that_paints_nothing_is_exit_4_before_anything_is_computed(photo, drawn, capsys):
    grey = save("grey.png", np.full((9, 9), 127, np.uint8))
    asked = ("generate", "a fox", *QUICK, "--image", photo, "--mask", grey)
    error = assert_failed(call(capsys, *asked), ExitCode.INPUT_FILE)
    assert "grey.png" in error and "none of it is white" in error and "--mask-invert" in error
    white = save("white.png", np.full((9, 9), 128, np.uint8))
    asked = ("generate", "a fox", *QUICK, "--image", photo, "--mask", white, "--mask-invert")
    error = assert_failed(call(capsys, *asked), ExitCode.INPUT_FILE)
    assert "none of it is black" in error and "leave --mask-invert out" in error
    result = call(capsys, *asked[:-1])
    assert result.returncode == 0 and "nothing of it is kept" in result.stderr and drawn


def test_a_mask_finer_than_latents_is_exit_4(photo, capsys):
    dots = np.zeros((128, 160), np.uint8)
    dots[4::8, 4::8] = 255
    name = save("dots.png", dots)
    asked = (
        "generate",
        "a fox",
        *QUICK,
        "--image",
        photo,
        "--mask",
        name,
        "--size",
        "160x128",
        "-q",
    )
    error = assert_failed(call(capsys, *asked), ExitCode.INPUT_FILE)
    assert "finer than the 8x8 pixels of a latent" in error and "-p fill" in error


def test_what_becomes_of_the_pictures_size_is_said(photo, drawn, capsys):
    said = call(capsys, "generate", "a fox", *QUICK, "--image", photo).stderr
    assert "photo.png is 300x200: drawn at 160x112\n" in said
    assert "160x112, 3 of 4 steps, seed 7" in said
    said = call(capsys, "generate", "a fox", *QUICK, "--image", photo, "--ar", "1:1").stderr
    assert "photo.png is 300x200: squeezed to 128x128" in said
    small = save("small.png", np.zeros((128, 128, 3), np.uint8))
    assert "small.png" not in call(capsys, "generate", "a fox", *QUICK, "--image", small).stderr


@pytest.mark.parametrize(
    "name", ["out.png", "out.webp", pytest.param("out.jpg", marks=pytest.mark.exhaustive)]
)
def test_the_file_has_the_input_where_the_mask_is_black_and_is_made_again(
    name, photo, right, capsys
):
    asked = ("generate", "a red circle", *QUICK, "--image", photo, "--mask", right)
    options = ("--quality", "100", "--mask-feather", "6", "--size", "96x64")
    assert call(capsys, *asked, *options, "-o", name).returncode == 0
    order = Order.from_json(read_metadata(Path(name))["request"])
    canvas = load_canvas(load_inputs(order.request), order.request)
    there = read_pixels(Path(name))
    black = ~canvas.mask
    assert black.mean() == 0.5 and (there[:, 54:] != canvas.pixels[:, 54:]).mean() > 0.9
    if name != "out.jpg":
        assert (there[black] == canvas.pixels[black]).all()
    result = call(capsys, "replay", name, "--check")
    assert result.stdout == f"{name}: identical\n", result.stderr


def test_a_replay_has_the_size_of_the_picture_whoever_said_it(photo, capsys):
    for given in (("--size", "96x64"), ("--size", "80"), ()):
        asked = ("generate", "a red circle", *QUICK, "--image", photo, *given, "-o", "made/")
        made = Path(call(capsys, *asked).stdout.strip())
        again = Path(call(capsys, "replay", str(made), "-o", "again/").stdout.strip())
        assert read_pixels(made).shape == read_pixels(again).shape
        assert (read_pixels(made) == read_pixels(again)).all()


def test_steps_are_counted_from_the_first_that_is_taken_and_a_picture_goes_on(
    tiny_folder, photo, right
):
    """Also with a mask, whose latents are made again."""
    engine = engine_of(inspect(tiny_folder))
    asked = tiny(image=photo, mask=right, strength=0.7, steps=6, width=96, height=64)
    whole = picture_of(engine, asked)
    events = list(engine.draw([whole]))
    steps = [(each.index, each.total) for each in events if isinstance(each, Step)]
    assert steps == [(k, 5) for k in range(1, 6)]
    begun = picture_of(engine, asked)
    for event in engine.draw([begun]):
        if isinstance(event, Step) and event.index == 2:
            break
    assert begun.step == 3  # of the request's six
    resumed = picture_of(engine, asked)
    resumed.tokens = begun.tokens.clone()
    resumed.step = begun.step
    events = list(engine.draw([resumed]))
    steps = [(each.index, each.total) for each in events if isinstance(each, Step)]
    assert steps == [(k, 5) for k in range(3, 6)]
    assert (resumed.pixels == whole.pixels).all()
    # What is only to be decoded has its input pasted all the same.
    finished = picture_of(engine, asked)
    finished.tokens = whole.tokens
    finished.step = 6
    for _ in engine.draw([finished]):
        pass
    assert (finished.pixels == whole.pixels).all()


def test_pictures_with_and_without_an_input_go_together(tiny_folder, photo, right):
    engine = engine_of(inspect(tiny_folder))
    base = {"width": 96, "height": 64, "steps": 3}
    orders = [
        tiny(**base),
        tiny(**base, image=photo, strength=0.5),
        tiny(**base, image=photo, strength=1.0, mask=right),
    ]
    together = draw_all(engine, orders)
    for alone, pixels in zip(orders, together, strict=True):
        assert (draw_all(engine, [alone])[0] == pixels).all()
    assert len({pixels.tobytes() for pixels in together}) == 3


# --- presets that models come with


@pytest.fixture(scope="module")
def fill_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Fill model in a folder whose name says nothing."""
    return str(make_fill_model(tiny_folder, tmp_path_factory.mktemp("models") / "mine"))


def test_a_fill_model_takes_the_preset_of_its_kind(photo, right, fill_model):
    inputs = {"image": photo, "mask": right}
    for model in ("black-forest-labs/FLUX.1-Fill-dev", "fill", fill_model):
        order = resolve_order("a fox", inputs | {"model": model})
        request = order.request
        found = (order.preset, request.guidance, request.steps, request.strength)
        assert found == ("fill", 30.0, 50, 1.0)
    order = resolve_order("a fox", inputs | {"model": model, "guidance": "20", "steps": "8"})
    assert (order.request.guidance, order.request.steps, order.preset) == (20.0, 8, "fill")


def test_a_preset_that_is_asked_for_stays(photo, right, fill_model, config_folder):
    asked = {"image": photo, "mask": right, "model": fill_model}
    assert resolve_order("a fox", asked | {"preset": "draft"}).preset == "draft"
    assert resolve_order("a fox", {"model": "bundled/tiny"}).preset == "dev"
    assert resolve_order("a fox", {"model": "nowhere/at-all"}).preset == "dev"
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text('preset = "quality"\n')
    assert resolve_order("a fox", asked).preset == "quality"
