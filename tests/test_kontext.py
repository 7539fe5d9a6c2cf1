"""Kontext: pictures are edited as diffusers' Kontext pipelines edit them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcli.engine import decode
from fluxcli.pictures.references import stitch
from fluxcli.request.fields import Order
from fluxcli.request.sizes import KONTEXT_SIZES, fit_kontext, fit_references
from fluxcli.resolve import resolve_order
from quant import linear
from quant.checkpoint import inspect
from quant.linear import Multiplication
from quant.single_file import assemble_checkpoint
from tests.support.helpers import tiny
from tests.support.pictures import (
    count_levels_apart,
    draw_by_diffusers,
    draw_from,
    make_canvas,
    make_engine,
    make_picture,
)

EXHAUSTIVE = pytest.mark.exhaustive
MOVED = 8  # of 255: by more than this a reference moves a picture
MEGAPIXEL = 1024 * 1024


@pytest.fixture(scope="session")
def kontext_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as one whose pipeline is Kontext's."""
    folder = tmp_path_factory.mktemp("kontext") / "kontext"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "FluxKontextPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load_pipeline(name: str, folder: Path) -> Any:
    """A pipeline of diffusers over the model of a folder."""
    import diffusers

    pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_with_diffusers(pipe: Any, order: Order, **inputs: object) -> np.ndarray:
    """The pixels that a pipeline of diffusers makes of an order with these inputs."""
    width, height = order.request.size
    options = {"max_area": width * height, "_auto_resize": False} | inputs
    return draw_by_diffusers(pipe, order, **options)


def test_pictures_are_those_of_diffusers(kontext_folder):
    """One reference, several on one canvas, and none; more than 8/255 apart from each other."""
    make_picture(Path("a.png"), (90, 50))
    make_picture(Path("b.png"), (40, 70))
    sides = {"width": 128, "height": 96, "steps": 4, "guidance": 2.5}
    orders = [
        tiny(reference=reference, **sides)
        for reference in ((), ("a.png",), ("b.png",), ("a.png", "b.png"))
    ]
    engine = make_engine(inspect(kontext_folder), orders[0])
    pipe = load_pipeline("FluxKontextPipeline", kontext_folder)
    drawn = []
    for order in orders:
        inputs = {"image": make_canvas(order)} if order.request.reference else {}
        expected = draw_with_diffusers(pipe, order, **inputs)
        pixels = draw_from(engine, order)
        assert count_levels_apart(pixels, expected) <= 1
        assert expected.std() > 1
        assert all(count_levels_apart(pixels, other) > MOVED for other in drawn)
        drawn.append(pixels)


def test_a_mask_edits_only_there(kontext_folder, monkeypatch):
    """As FluxKontextInpaintPipeline, of one reference and of two; then the first one is pasted."""
    sides = {"width": 128, "height": 96, "steps": 4, "guidance": 2.5}
    make_picture(Path("a.png"), (90, 50))
    make_picture(Path("b.png"), (40, 70))
    white = np.zeros((96, 128, 3), np.uint8)
    white[16:80, 40:] = 255
    Image.fromarray(white).save("mask.png")
    image = Image.open("a.png").resize((128, 96), Image.Resampling.LANCZOS)
    pipe = load_pipeline("FluxKontextInpaintPipeline", kontext_folder)
    plain = tiny(reference=("a.png",), **sides)
    engine = make_engine(inspect(kontext_folder), plain)
    unmasked = draw_from(engine, plain)
    drawn = []
    for reference, strength in ((("a.png",), None), (("a.png", "b.png"), None), (("a.png",), 0.6)):
        order = tiny(reference=reference, mask="mask.png", strength=strength, **sides)
        inputs = {"image": image, "mask_image": Image.open("mask.png"), "strength": strength or 1.0}
        if len(reference) > 1:
            inputs["image_reference"] = make_canvas(order)
        expected = draw_with_diffusers(pipe, order, **inputs)
        with monkeypatch.context() as patched:  # diffusers pastes nothing
            patched.setattr(decode, "paste", lambda decoded, _, **__: decoded)
            pixels = draw_from(engine, order)
        assert count_levels_apart(pixels, expected) <= 1
        assert all(count_levels_apart(pixels, other) > MOVED for other in (unmasked, *drawn))
        drawn.append(pixels)
        pasted = draw_from(engine, order)
        assert (pasted[white == 0] == np.asarray(image)[white == 0]).all()
        assert (pasted[white > 0] == pixels[white > 0]).all()


SINGLE_FILES = {
    "bfl bf16": "flux1-kontext-dev.safetensors",
    "comfy scaled": "flux1-dev-kontext_fp8_scaled.safetensors",
    "gguf Q8_0": "flux1-kontext-dev-Q8_0.gguf",
    "gguf Q4_K": "flux1-kontext-dev-Q4_K_M.gguf",
}


@pytest.mark.parametrize(
    "dialect",
    ["bfl bf16", "comfy scaled", "gguf Q4_K", pytest.param("gguf Q8_0", marks=EXHAUSTIVE)],
)
def test_single_files_edit_as_diffusers_does_with_their_values(
    dialect, exported, kontext_folder, tmp_path, monkeypatch
):
    """fp8 is dequantized, as on devices that do not multiply in it: there is no rounding then."""
    monkeypatch.setitem(linear.PROBED, ("fp8", "cpu"), Multiplication("dequantize", "a test"))
    path, values = exported(dialect)
    file = tmp_path / SINGLE_FILES[dialect]
    file.symlink_to(path)
    checkpoint = assemble_checkpoint(file, lambda _: kontext_folder)
    assert checkpoint.kind == "kontext"
    make_picture(Path("a.png"), (90, 50))
    order = tiny(reference=("a.png",), width=96, height=64, steps=2, guidance=2.5)
    engine = make_engine(checkpoint, order)
    pipe = load_pipeline("FluxKontextPipeline", kontext_folder)
    pipe.transformer.load_state_dict(values)
    expected = draw_with_diffusers(pipe, order, image=make_canvas(order))
    pixels = draw_from(engine, order)
    assert count_levels_apart(pixels, expected) <= 1
    without = tiny(width=96, height=64, steps=2, guidance=2.5)
    assert count_levels_apart(draw_from(engine, without), expected) > MOVED


@pytest.mark.exhaustive
def test_a_megapixel_is_that_of_diffusers_with_its_own_sizes(kontext_folder):
    """diffusers resizes the reference itself, to the preferred size."""
    image = make_picture(Path("a.png"), (640, 400))
    order = tiny(reference=("a.png",), width=1248, height=832, steps=2, guidance=2.5)
    pipe = load_pipeline("FluxKontextPipeline", kontext_folder)
    expected = draw_with_diffusers(pipe, order, image=image, _auto_resize=True)
    engine = make_engine(inspect(kontext_folder), order)
    assert count_levels_apart(draw_from(engine, order), expected) <= 1
    without = tiny(width=1248, height=832, steps=2, guidance=2.5)
    assert count_levels_apart(draw_from(engine, without), expected) > MOVED


def test_sizes_are_those_of_diffusers():
    from diffusers.pipelines.flux import pipeline_flux_kontext as theirs

    assert tuple(theirs.PREFERRED_KONTEXT_RESOLUTIONS) == KONTEXT_SIZES
    for width, height in ((4000, 3000), (300, 201), (17, 900), (640, 640), (1000, 430), (5, 3)):
        ratio = max(width // 16, 1) / max(height // 16, 1)
        _, wide, high = min((abs(ratio - w / h), w, h) for w, h in KONTEXT_SIZES)
        assert fit_kontext((width, height), MEGAPIXEL) == (wide, high)
        assert fit_references([(width, height)], MEGAPIXEL * 2) == (wide, high)
    # A small picture has small references, several that are very wide together keep their ratio.
    assert fit_references([(1000, 1000)], 128 * 128) == (128, 128)
    wide, high = fit_references([(1000, 1000)] * 4, MEGAPIXEL)
    assert wide / high == pytest.approx(4, rel=0.05)
    assert wide * high == pytest.approx(MEGAPIXEL, rel=0.05)


def test_a_canvas_shows_its_pictures_from_left_to_right():
    red = np.full((20, 40, 3), (255, 0, 0), np.uint8)
    blue = np.full((50, 50, 3), (0, 0, 255), np.uint8)
    canvas = stitch([red, blue], (96, 32))
    assert canvas.shape == (32, 96, 3)
    assert (canvas[:, :64] == (255, 0, 0)).all()
    assert (canvas[:, 64:] == (0, 0, 255)).all()
    narrow = np.zeros((1000, 1, 3), np.uint8)  # it has no whole pixel's share
    assert stitch([red, narrow], (96, 32)).shape == (32, 96, 3)


def test_the_size_follows_the_first_reference():
    make_picture(Path("wide.png"), (400, 300))
    make_picture(Path("high.png"), (300, 400))
    given = {"preset": "kontext", "reference": ("wide.png", "high.png")}
    assert resolve_order("x", given).request.size == (1184, 880)
    assert resolve_order("x", given | {"image_size": 512}).request.size == (592, 448)
    assert resolve_order("x", given | {"aspect_ratio": "1:1"}).request.size == (1024, 1024)
    assert resolve_order("x", given).request.guidance == 2.5
