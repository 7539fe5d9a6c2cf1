"""Pictures from a picture are diffusers' own: img2img, inpaint and Fill.

What is decoded is at most 1/255 apart from what FluxImg2ImgPipeline, FluxInpaintPipeline and
FluxFillPipeline draw of the same folder, inputs and seed; then the input is pasted.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fluxcli.engine import decode
from fluxcli.engine.engine import Engine
from fluxcli.pictures.canvas import load_canvas, read_mask
from fluxcli.pictures.inputs import load_inputs
from fluxcli.request.fields import Order
from quant.bake import bake
from quant.checkpoint import inspect
from quant.recipe import make_recipe
from quant.spec import QuantSpec
from tests.support.fill import make_fill_model
from tests.support.helpers import engine_of, picture_of, tiny
from tests.support.pictures import count_levels_apart, draw_by_diffusers

MOVED = 8  # of 255: what a feature must do to a picture before its equality says anything


@pytest.fixture(scope="session")
def fill_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fill_model(tiny_folder, tmp_path_factory.mktemp("fill") / "fill")


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that no model has drawn, of another size than any that is."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    painter = np.random.default_rng(3)
    coarse = painter.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((150, 100), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="session")
def mask(photo: Path) -> Path:
    """White in an ellipse off the middle, with a soft edge, of another size than the picture."""
    rows, columns = np.mgrid[0:80, 0:90]
    distance = ((rows - 30) / 30) ** 2 + ((columns - 55) / 28) ** 2
    path = photo.with_name("mask.png")
    Image.fromarray((255 * (1.5 - distance).clip(0, 1)).astype(np.uint8), "L").save(path)
    return path


@pytest.fixture(scope="session")
def pipelines() -> Callable:
    """Pipelines of diffusers by class and folder, each made once."""
    import diffusers

    made: dict = {}

    def find(name: str, folder: Path) -> object:
        if (name, folder) not in made:
            pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            made[name, folder] = pipe
        return made[name, folder]

    return find


@pytest.fixture(scope="session")
def engines() -> Callable:
    """An engine of each folder, made once."""
    made: dict = {}

    def find(folder: Path, order: Order) -> Engine:
        if folder not in made:
            made[folder] = engine_of(inspect(folder), order)
        return made[folder]

    return find


def draw_with(pipe: object, asked: Order, **inputs: object) -> np.ndarray:
    """What a pipeline of diffusers draws of a request; nothing is left to its own defaults."""
    return draw_by_diffusers(pipe, asked, strength=asked.request.strength, **inputs)


def draw_both(engine: Engine, asked: Order) -> tuple[np.ndarray, np.ndarray]:
    """What the engine decodes, and what it makes of that."""
    picture = picture_of(engine, asked)
    for _ in engine.draw([picture]):
        pass
    vae = engine.components.loaded["vae"].module
    latents = decode.unpack(picture.tokens, asked.request.size)
    return decode.to_pixels(decode.decode_latents(vae, latents)).numpy(), picture.pixels


def read(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def test_a_mask_is_what_diffusers_makes_of_it(mask):
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(
        vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    for size in ((64, 48), (37, 91)):
        wanted = processor.preprocess(Image.open(mask), width=size[0], height=size[1])
        white = read_mask(np.asarray(read(mask)), size, invert=False)
        assert (white == wanted[0, 0].numpy().astype(bool)).all()
        assert 0.1 < white.mean() < 0.9


def test_img2img_equals_diffusers(tiny_folder, photo, pipelines, engines):
    pipe = pipelines("FluxImg2ImgPipeline", tiny_folder)
    for size, strength, steps in (((96, 64), 0.6, 5), ((64, 96), 0.35, 4), ((64, 64), 1.0, 3)):
        asked = tiny(
            image=str(photo), strength=strength, steps=steps, width=size[0], height=size[1]
        )
        wanted = draw_with(pipe, asked, image=read(photo))
        decoded, drawn = draw_both(engines(tiny_folder, asked), asked)
        assert count_levels_apart(decoded, wanted) <= 1 and (drawn == decoded).all()
        assert wanted.std() > 1
        if strength < 1:
            turned = read(photo).transpose(Image.Transpose.ROTATE_180)
            assert count_levels_apart(draw_with(pipe, asked, image=turned), wanted) > MOVED


def test_inpaint_equals_diffusers(tiny_folder, photo, mask, pipelines, engines):
    pipe = pipelines("FluxInpaintPipeline", tiny_folder)
    for size, strength, invert in (((96, 64), 0.6, False), ((64, 80), 1.0, True)):
        asked = tiny(
            image=str(photo),
            mask=str(mask),
            mask_invert=invert,
            strength=strength,
            steps=5,
            width=size[0],
            height=size[1],
        )
        white = ImageOps.invert(read(mask)) if invert else read(mask)
        wanted = draw_with(pipe, asked, image=read(photo), mask_image=white)
        decoded, drawn = draw_both(engines(tiny_folder, asked), asked)
        assert count_levels_apart(decoded, wanted) <= 1 and wanted.std() > 1
        assert_pasted(drawn, decoded, asked)
        whole = draw_with(pipe, asked, image=read(photo), mask_image=Image.new("L", (8, 8), 255))
        assert count_levels_apart(whole, wanted) > MOVED


def test_fill_equals_diffusers(fill_folder, photo, mask, pipelines, engines):
    pipe = pipelines("FluxFillPipeline", fill_folder)
    for size, strength in (((96, 64), 1.0), ((64, 80), 0.7)):
        asked = tiny(
            image=str(photo),
            mask=str(mask),
            strength=strength,
            guidance=30.0,
            steps=4,
            width=size[0],
            height=size[1],
        )
        wanted = draw_with(pipe, asked, image=read(photo), mask_image=read(mask))
        decoded, drawn = draw_both(engines(fill_folder, asked), asked)
        assert count_levels_apart(decoded, wanted) <= 1 and wanted.std() > 1
        assert_pasted(drawn, decoded, asked)
        inverted = ImageOps.invert(read(mask))
        other = draw_with(pipe, asked, image=read(photo), mask_image=inverted)
        assert count_levels_apart(other, wanted) > MOVED
        turned = read(photo).transpose(Image.Transpose.ROTATE_180)
        other = draw_with(pipe, asked, image=turned, mask_image=read(mask))
        assert count_levels_apart(other, wanted) > MOVED


def test_expand_is_fill_on_a_larger_canvas(fill_folder, photo, pipelines, engines):
    pipe = pipelines("FluxFillPipeline", fill_folder)
    asked = tiny(
        image=str(photo), expand="50,0,0,25", strength=1.0, guidance=30.0, steps=4, width=128,
        height=80,
    )  # fmt: skip
    canvas = load_canvas(load_inputs(asked.request), asked.request)
    inside = canvas.pixels[:64, 32:]
    assert (inside == np.asarray(read(photo).resize((96, 64), Image.Resampling.LANCZOS))).all()
    whole = Image.fromarray(canvas.pixels)
    around = Image.fromarray(canvas.mask.astype(np.uint8) * 255)
    wanted = draw_with(pipe, asked, image=whole, mask_image=around)
    decoded, drawn = draw_both(engines(fill_folder, asked), asked)
    assert count_levels_apart(decoded, wanted) <= 1 and wanted.std() > 1
    assert (drawn[:64, 32:] == inside).all()
    assert (drawn[:, :32] == decoded[:, :32]).all() and (drawn[64:] == decoded[64:]).all()
    other = draw_with(pipe, asked, image=whole, mask_image=ImageOps.invert(around))
    assert count_levels_apart(other, wanted) > MOVED


def assert_pasted(drawn: np.ndarray, decoded: np.ndarray, asked: Order) -> None:
    """Where the mask is black there is the resized input, elsewhere what was decoded, exactly."""
    request = asked.request
    canvas = load_canvas(load_inputs(request), request)
    resized = read(Path(request.image)).resize(request.size, Image.Resampling.LANCZOS)
    assert 0.1 < canvas.mask.mean() < 0.9
    assert (drawn[~canvas.mask] == np.asarray(resized)[~canvas.mask]).all()
    assert (drawn[canvas.mask] == decoded[canvas.mask]).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["int8", "w6a8", "fp8", "w4a8", "nf4"])
def test_fill_and_masks_in_every_precision(
    tiny_folder, fill_folder, photo, mask, tmp_path, precision
):
    """Pixels are near those in float32, and around the mask those of the input."""
    for folder, guidance in ((tiny_folder, 3.5), (fill_folder, 30.0)):
        asked = tiny(
            image=str(photo), mask=str(mask), strength=1.0, guidance=guidance, steps=4,
            width=96, height=64,
        )  # fmt: skip
        whole = inspect(folder)
        target = tmp_path / folder.name
        list(bake(make_recipe(whole, QuantSpec(to=precision)), target, origin={"model": "x"}))
        _, wanted = draw_both(engine_of(whole, asked), asked)
        decoded, drawn = draw_both(engine_of(inspect(target), asked), asked)
        assert_pasted(drawn, decoded, asked)
        assert 0 < np.abs(drawn.astype(int) - wanted).mean() < 12
