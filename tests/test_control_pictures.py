"""ControlNets beside a picture to start from and a mask: diffusers' img2img and inpaint pipelines.

Also BFL's control models with a mask, and what is made of the pictures that they are shown.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluxcli.engine import control_maps, decode, depth
from fluxcli.events import Notice
from fluxcli.models.parts import resolve_parts
from fluxcli.pictures.canny import find_edges
from fluxcli.request.fields import Order
from quant.checkpoint import inspect
from tests.support.controls import (
    SIDE_PX,
    draw_map,
    draw_mask,
    draw_photo,
    make_control_model,
    open_image,
)
from tests.support.helpers import draw, engine_of, tiny
from tests.support.pictures import count_levels_apart, draw_by_diffusers

STRENGTH = 0.75
MOVED = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("pictures")
    return {
        "map": draw_map(here / "map.png"),
        "other": draw_map(here / "other.png", seed=5),
        "photo": draw_photo(here / "photo.png"),
        "mask": draw_mask(here / "mask.png"),
    }


@pytest.fixture
def unpasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures as they are decoded, also where a mask is black: diffusers pastes nothing."""
    monkeypatch.setattr(decode, "paste", lambda decoded, _, **__: decoded)


def order(**changes: object) -> Order:
    return tiny(steps=4, width=SIDE_PX, height=SIDE_PX, **changes)


def run(folder: Path, wanted: Order) -> np.ndarray:
    """The picture of an order, its controls' networks looked for as a session does."""
    checkpoint = inspect(folder)
    parts = resolve_parts(wanted.request, checkpoint)
    return draw(engine_of(parts.add_to(checkpoint), wanted), wanted)[1]


def load(pipeline: str, folder: Path, **options: object) -> Any:
    import diffusers

    return getattr(diffusers, pipeline).from_pretrained(
        folder, torch_dtype=torch.float32, **options
    )


def load_networks(*folders: Path) -> Any:
    from diffusers import FluxControlNetModel, FluxMultiControlNetModel

    networks = [
        FluxControlNetModel.from_pretrained(folder, torch_dtype=torch.float32) for folder in folders
    ]
    return networks[0] if len(networks) == 1 else FluxMultiControlNetModel(networks)


@pytest.mark.parametrize("pipeline", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_controlnet_beside_a_picture(
    pipeline: str, count: int, tiny_folder, controlnet: Callable[[str], Path], pictures, unpasted
):
    kinds = ("single", "double")[:count]
    maps = ("map", "other")[:count]
    spans = ("0-1", "0-0.7")[:count]
    images = {name: open_image(path) for name, path in pictures.items()}
    given: dict[str, object] = {"image": str(pictures["photo"]), "strength": STRENGTH}
    inputs: dict[str, object] = {
        "image": images["photo"],
        "strength": STRENGTH,
        "control_image": [images[name] for name in maps],
        "controlnet_conditioning_scale": [0.7] * count,
        "control_guidance_end": [float(span[2:]) for span in spans],
        "control_mode": [None] * count,
    }
    if count == 1:
        inputs |= {name: value[0] for name, value in inputs.items() if isinstance(value, list)}
    if pipeline == "Inpaint":
        given["mask"] = str(pictures["mask"])
        inputs["mask_image"] = images["mask"]
    controls = [
        f"{controlnet(kind)}:{pictures[name]}:0.7:{span}"
        for kind, name, span in zip(kinds, maps, spans, strict=True)
    ]
    pipe = load(
        f"FluxControlNet{pipeline}Pipeline",
        tiny_folder,
        controlnet=load_networks(*map(controlnet, kinds)),
    )
    expected = draw_by_diffusers(pipe, order(), **inputs)
    drawn = run(tiny_folder, order(**given, control=controls))
    assert count_levels_apart(drawn, expected) <= 1 and expected.std() > 1
    assert count_levels_apart(drawn, run(tiny_folder, order(**given))) > MOVED
    other = [text.replace("map.png", "other.png") for text in controls]
    assert count_levels_apart(drawn, run(tiny_folder, order(**given, control=other))) > MOVED
    without = {name: value for name, value in given.items() if name not in ("image", "strength")}
    if pipeline == "Img2Img":
        assert (
            count_levels_apart(drawn, run(tiny_folder, order(**without, control=controls))) > MOVED
        )


def test_a_control_model_paints_what_its_inpaint_pipeline_paints(
    tiny_folder, pictures, tmp_path, unpasted
):
    folder = make_control_model(tiny_folder, tmp_path / "depth")
    images = {name: open_image(path) for name, path in pictures.items()}
    expected = draw_by_diffusers(
        load("FluxControlInpaintPipeline", folder),
        order(),
        control_image=images["map"],
        image=images["photo"],
        mask_image=images["mask"],
        strength=STRENGTH,
    )
    given = {
        "image": str(pictures["photo"]),
        "mask": str(pictures["mask"]),
        "strength": STRENGTH,
    }
    drawn = run(folder, order(**given, control=f"depth:{pictures['map']}"))
    assert count_levels_apart(drawn, expected) <= 1 and expected.std() > 1
    assert (
        count_levels_apart(drawn, run(folder, order(**given, control=f"depth:{pictures['other']}")))
        > MOVED
    )


# --- maps


def notices(folder: Path, wanted: Order) -> list[str]:
    checkpoint = inspect(folder)
    parts = resolve_parts(wanted.request, checkpoint)
    events, _ = draw(engine_of(parts.add_to(checkpoint), wanted), wanted)
    return [event.message for event in events if isinstance(event, Notice)]


def test_of_a_photo_edges_are_computed_and_a_map_is_taken_as_it_is(pictures):
    photo = np.asarray(open_image(pictures["photo"]))
    computed = control_maps.make_map("canny", photo, (SIDE_PX, SIDE_PX))
    assert np.array_equal(computed.pixels[..., 0], find_edges(photo)) and computed.pixels.any()
    assert computed.remarks == ("a photo: its edges are computed",)
    ready = np.asarray(open_image(pictures["map"]))
    taken = control_maps.make_map("canny", ready // 255 * 255, (SIDE_PX, SIDE_PX))
    assert np.array_equal(taken.pixels, ready)
    for kind in ("pose", "me/canny", "tile"):
        assert control_maps.make_map(kind, photo, (SIDE_PX, SIDE_PX)) == (photo, ())


def test_edges_are_computed_at_the_size_that_is_drawn():
    photo = np.asarray(open_image(draw_photo(Path("wide.png"), size=(400, 200))))
    made = control_maps.make_map("canny", photo, (SIDE_PX, SIDE_PX))
    assert made.pixels.shape == (SIDE_PX, SIDE_PX, 3) and set(np.unique(made.pixels)) == {0, 255}
    fitted, computed = made.remarks
    assert "200 px of its width" in fitted and "edges are computed" in computed


def test_a_photo_without_edges_is_said():
    plain = np.full((32, 32, 3), (200, 30, 30), np.uint8)
    made = control_maps.make_map("canny", plain, (64, 64))
    assert not made.pixels.any() and "nothing is controlled" in made.remarks[0]


def test_depth_without_a_model_is_a_map_and_says_what_gets_one(pictures):
    photo = np.asarray(open_image(pictures["photo"]))
    made = control_maps.make_map("depth", photo, (SIDE_PX, SIDE_PX))
    assert np.array_equal(made.pixels, photo)
    assert f"flux models download {depth.MODELS[0]}" in made.remarks[0]
    gray = np.repeat(photo[..., :1], 3, axis=2)
    taken = control_maps.make_map("depth", gray, (SIDE_PX, SIDE_PX))
    assert np.array_equal(taken.pixels, gray) and "no colours" in taken.remarks[0]


def write_depth_model(folder: Path) -> None:
    """A small Depth Anything of random numbers, as its repository has the files."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_hidden_size=32,
        head_hidden_size=8,
    )
    model = DepthAnythingForDepthEstimation(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_with_a_depth_model_in_the_cache_the_depth_of_a_photo_is_computed(pictures):
    from transformers import AutoModelForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    from fluxcli.models.find import get_repository

    folder = get_repository(depth.MODELS[0]) / "snapshots" / ("a" * 40)
    write_depth_model(folder)
    assert depth.find_depth_model() == folder
    image = open_image(pictures["photo"])
    made = control_maps.make_map("depth", np.asarray(image), (SIDE_PX, SIDE_PX))
    assert made.remarks == ("a photo: its depth is computed",)
    # As transformers' own post-processing has it.
    processor = DPTImageProcessorPil.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (expected,) = processor.post_process_depth_estimation(outputs, [(SIDE_PX, SIDE_PX)])
    near = expected["predicted_depth"]
    levels = ((near - near.min()) / (near.max() - near.min()) * 255).numpy().astype(np.uint8)
    assert count_levels_apart(made.pixels[..., 0], levels) <= 1 and levels.std() > 5
