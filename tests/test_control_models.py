"""BFL's Canny and Depth models, and their LoRAs, draw what diffusers' control pipelines draw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxcli.errors import UsageError
from fluxcli.events import Notice
from fluxcli.models import loras
from fluxcli.request.fields import Order
from quant.checkpoint import inspect
from quant.errors import CheckpointError
from tests.support.controls import (
    SIDE_PX,
    draw_map,
    draw_mask,
    draw_photo,
    make_control_model,
    open_image,
)
from tests.support.helpers import draw, engine_of, tiny
from tests.support.invariant import call
from tests.support.loras import linear_layers, low_rank, peft_tensors
from tests.support.pictures import count_levels_apart, draw_by_diffusers


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory) -> Path:
    return make_control_model(tiny_folder, tmp_path_factory.mktemp("control") / "canny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("pictures")
    return {
        "map": draw_map(here / "map.png"),
        "other": draw_map(here / "other.png", seed=5),
        "photo": draw_photo(here / "photo.png"),
        "mask": draw_mask(here / "mask.png"),
    }


def order(**changes: object) -> Order:
    return tiny(steps=4, width=SIDE_PX, height=SIDE_PX, guidance=3.5, **changes)


def load(pipeline: type, folder: Path) -> object:
    return pipeline.from_pretrained(folder, torch_dtype=torch.float32)


def open_images(pictures: dict[str, Path]) -> dict[str, Image.Image]:
    return {name: open_image(path) for name, path in pictures.items()}


def test_a_control_model_draws_what_its_pipeline_draws(folder, pictures):
    from diffusers import FluxControlPipeline

    images = open_images(pictures)
    pipe = load(FluxControlPipeline, folder)
    engine = engine_of(inspect(folder), order())
    drawn = {}
    for name in ("map", "other"):
        wanted = order(control=f"canny:{pictures[name]}")
        expected = draw_by_diffusers(pipe, wanted, control_image=images[name])
        _, drawn[name] = draw(engine, wanted)
        assert count_levels_apart(drawn[name], expected) <= 1 and expected.std() > 1
    assert count_levels_apart(drawn["map"], drawn["other"]) > 8


def test_from_a_picture_it_draws_what_the_img2img_pipeline_draws(folder, pictures):
    from diffusers import FluxControlImg2ImgPipeline

    images = open_images(pictures)
    wanted = order(control=f"canny:{pictures['map']}", image=str(pictures["photo"]), strength=0.75)
    expected = draw_by_diffusers(
        load(FluxControlImg2ImgPipeline, folder),
        wanted,
        control_image=images["map"],
        image=images["photo"],
        strength=0.75,
    )
    engine = engine_of(inspect(folder), order())
    _, drawn = draw(engine, wanted)
    assert count_levels_apart(drawn, expected) <= 1 and expected.std() > 1
    for other in (
        order(control=f"canny:{pictures['other']}", image=str(pictures["photo"]), strength=0.75),
        order(control=f"canny:{pictures['map']}"),
    ):
        assert count_levels_apart(draw(engine, other)[1], drawn) > 8


# --- LoRAs


def write_control_lora(path: Path, folder: Path, *, channels: int = 128) -> Path:
    """As BFL's control LoRAs: the input layer for twice the channels, biases and norms."""
    checkpoint = inspect(folder)
    layers = linear_layers(checkpoint, "transformer", r".*(x_embedder|attn\.to_[qkv]|proj_out)")
    rows, _ = layers["x_embedder"]
    pairs = low_rank(layers, size=0.2)
    down, up = low_rank({"x_embedder": (rows, channels)}, rank=64)["x_embedder"]
    # The control picture's columns are strong, so that it is what the picture depends on.
    pairs["x_embedder"] = (torch.cat([down[:, :64] * 0.1, down[:, 64:] * 2], dim=1), up)
    tensors = peft_tensors("transformer", pairs)
    made = torch.Generator().manual_seed(1)
    for name in list(tensors):
        if name.endswith("lora_B.weight"):
            bias = torch.randn(len(tensors[name]), generator=made) * 0.05
            tensors[name.replace("weight", "bias")] = bias
    if channels == 128:
        norm = "transformer_blocks.0.attn.norm_q.weight"
        width = checkpoint.components["transformer"].weights[norm].shape
        tensors[f"transformer.{norm}"] = 1 + 0.5 * torch.randn(width, generator=made)
    save_file(tensors, path)
    return path


def test_a_control_lora_draws_what_the_pipeline_with_it_draws(tiny_folder, pictures, tmp_path):
    from diffusers import FluxControlPipeline

    lora = write_control_lora(tmp_path / "lora.safetensors", tiny_folder)
    images = open_images(pictures)
    pipe = load(FluxControlPipeline, tiny_folder)
    pipe.load_lora_weights(str(lora))
    assert pipe.transformer.config.in_channels == 128
    engine = engine_of(inspect(tiny_folder), order())
    drawn = {}
    for name in ("map", "other"):
        wanted = order(control=f"depth:{pictures[name]}", lora=str(lora))
        expected = draw_by_diffusers(pipe, wanted, control_image=images[name])
        events, drawn[name] = draw(engine, wanted)
        assert count_levels_apart(drawn[name], expected) <= 1 and expected.std() > 1
        assert any("no colours" in str(each.message) for each in events if isinstance(each, Notice))
    assert count_levels_apart(drawn["map"], drawn["other"]) > 8
    # Without it the model is what it was.
    _, plain = draw(engine, order())
    assert count_levels_apart(plain, drawn["map"]) > 8
    assert np.array_equal(plain, draw(engine_of(inspect(tiny_folder), order()), order())[1])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_beside_another_lora_each_sees_its_own_channels(tiny_folder, pictures, tmp_path):
    from diffusers import FluxControlPipeline

    control = write_control_lora(tmp_path / "control.safetensors", tiny_folder)
    style = write_control_lora(tmp_path / "style.safetensors", tiny_folder, channels=64)
    pipe = load(FluxControlPipeline, tiny_folder)
    pipe.load_lora_weights(str(control), adapter_name="control")
    pipe.load_lora_weights(str(style), adapter_name="style")
    pipe.set_adapters(["control", "style"], adapter_weights=[0.9, 0.5])
    wanted = order(control=f"canny:{pictures['map']}", lora=(f"{control}:0.9", f"{style}:0.5"))
    expected = draw_by_diffusers(pipe, wanted, control_image=open_images(pictures)["map"])
    engine = engine_of(inspect(tiny_folder), order())
    _, drawn = draw(engine, wanted)
    assert count_levels_apart(drawn, expected) <= 1 and expected.std() > 1
    _, alone = draw(engine, order(control=f"canny:{pictures['map']}", lora=f"{control}:0.9"))
    assert count_levels_apart(drawn, alone) > 8


def test_a_control_lora_needs_a_control(tiny_folder, tmp_path):
    lora = write_control_lora(tmp_path / "lora.safetensors", tiny_folder)
    engine = engine_of(inspect(tiny_folder), order())
    with pytest.raises(CheckpointError, match=r"needs a control image.*128") as caught:
        draw(engine, order(lora=str(lora)))
    assert "--control" in caught.value.hint


def test_a_control_lora_is_told_by_its_file(tiny_folder, tmp_path):
    for channels, needs in ((128, True), (64, False)):
        path = write_control_lora(tmp_path / "lora.safetensors", tiny_folder, channels=channels)
        described = loras.describe(path)
        assert described["usable"]
        assert ("a control picture: --control" in described["needs"]) is needs


def test_a_control_lora_that_is_not_here_is_planned_as_one(pictures, capsys):
    options = ("plan", "x", "-p", "canny-lora", "--card", "16GiB:sm89")
    control = f"canny:{pictures['map']}"
    result = call(capsys, *options, "--control", control, "--json")
    plans = [each["plan"] for each in json.loads(result.stdout)["candidates"] if each["plan"]]
    reasons = [reason for plan in plans for reason in plan["reasons"]]
    assert reasons and not any("controlnet" in reason for reason in reasons)
    refused = call(capsys, *options, "--control", f"{control}:0.5")
    assert refused.returncode == 2 and "a scale without effect" in refused.stderr


# --- what they cannot do


def test_a_negative_prompt_beside_a_control_in_channels_is_refused(tiny_folder, pictures, tmp_path):
    lora = write_control_lora(tmp_path / "lora.safetensors", tiny_folder)
    wanted = order(control=f"canny:{pictures['map']}", lora=str(lora), negative_prompt="blue")
    with pytest.raises(UsageError, match="no negative prompt"):
        draw(engine_of(inspect(tiny_folder), order()), wanted)


@pytest.mark.parametrize(
    ("control", "words"),
    [
        (["depth:x.png"], "the model has no such control.*canny map"),
        (["pose:x.png"], "the model has no such control"),
        (["canny:x.png", "canny:y.png"], "too many controls"),
        (["canny:x.png:0.5"], "a scale without effect"),
        (["canny:x.png:0-0.5"], "a scale without effect"),
    ],
)
def test_what_would_do_nothing_is_refused(control, words, folder, pictures):
    named = [text.replace("x.png", str(pictures["map"])) for text in control]
    named = [text.replace("y.png", str(pictures["map"])) for text in named]
    engine = engine_of(inspect(folder), order())
    with pytest.raises(UsageError, match=words):
        draw(engine, order(control=named))
