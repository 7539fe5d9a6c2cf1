"""True classifier-free guidance: FluxPipeline's own, two passes of the transformer in each step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fluxcli.engine import prompt_cache
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.errors import ExitCode
from fluxcli.models.parts import resolve_parts
from fluxcli.request.fields import Order
from quant.checkpoint import Checkpoint, inspect
from tests.support.controlnets import write_controlnet
from tests.support.helpers import draw, draw_all, engine_of, plan_for, tiny
from tests.support.invariant import assert_failed, call
from tests.support.pictures import count_levels_apart, draw_by_diffusers

NEGATIVE = "a green star on a black background"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return engine_of(checkpoint)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(pipe, order: Order, **more: object) -> np.ndarray:
    """What a pipeline draws of the order."""
    more["negative_prompt"] = order.request.negative_prompt
    return draw_by_diffusers(pipe, order, true_cfg_scale=order.request.true_scale, **more)


@pytest.mark.parametrize(
    "said",
    [
        {"negative_prompt": NEGATIVE},
        {"negative_prompt": "a blue square", "true_cfg": 4.5, "aspect_ratio": "21:9", "steps": 5},
        {"negative_prompt": "", "true_cfg": 4.0, "guidance": 1.0, "seed": 3},
    ],
    ids=["default", "wide", "empty"],
)
def test_it_equals_flux_pipeline(said, engine, pipeline):
    wanted = tiny(**said)
    _, pixels = draw(engine, wanted)
    _, without = draw(engine, tiny(**said | {"negative_prompt": None, "true_cfg": None}))
    expected = reference(pipeline, wanted)
    assert count_levels_apart(pixels, expected) <= 1
    assert expected.std() > 1
    assert count_levels_apart(expected, without) > 8


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A picture of the size of `tiny()`: a yellow disc on grey."""
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    ImageDraw.Draw(image).ellipse((14, 20, 50, 56), fill=(230, 200, 20))
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    image.save(path)
    return path


def test_it_equals_diffusers_pipeline_of_img2img(engine, pipeline, photo):
    from diffusers import FluxImg2ImgPipeline

    said = {"image": str(photo), "strength": 0.7, "steps": 5, "width": 64, "height": 64}
    wanted = tiny(**said, negative_prompt=NEGATIVE)
    pipe = FluxImg2ImgPipeline(**pipeline.components)
    expected = reference(pipe, wanted, image=Image.open(photo), strength=0.7)
    assert count_levels_apart(draw(engine, wanted)[1], expected) <= 1
    assert count_levels_apart(draw(engine, tiny(**said))[1], expected) > 8


def test_it_equals_diffusers_pipeline_with_a_controlnet(checkpoint, pipeline, photo, tmp_path):
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    folder = write_controlnet("single", tmp_path / "net")
    said = {"control": f"kind={folder},image={photo},scale=0.6", "steps": 4}
    wanted = tiny(**said, negative_prompt=NEGATIVE)
    whole = resolve_parts(wanted.request, checkpoint).add_to(checkpoint)
    engine = engine_of(whole, wanted)
    network = FluxControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
    names = ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
    parts = {name: pipeline.components[name] for name in (*names, "transformer")}
    pipe = FluxControlNetPipeline(**parts, controlnet=network)
    expected = reference(
        pipe, wanted, control_image=Image.open(photo), controlnet_conditioning_scale=0.6
    )
    assert count_levels_apart(draw(engine, wanted)[1], expected) <= 1
    assert count_levels_apart(draw(engine, tiny(**said))[1], expected) > 8
    assert (
        count_levels_apart(draw(engine, tiny(steps=4, negative_prompt=NEGATIVE))[1], expected) > 8
    )


def test_three_is_what_holds_where_the_text_alone_is_given(engine):
    _, said = draw(engine, tiny(negative_prompt=NEGATIVE, true_cfg=3.0))
    _, default = draw(engine, tiny(negative_prompt=NEGATIVE))
    _, other = draw(engine, tiny(negative_prompt=NEGATIVE, true_cfg=2.0))
    assert count_levels_apart(said, default) == 0 and count_levels_apart(said, other) > 0


def test_another_negative_prompt_is_another_picture(engine):
    _, one = draw(engine, tiny(negative_prompt=NEGATIVE))
    _, other = draw(engine, tiny(negative_prompt="a blue square"))
    assert count_levels_apart(one, other) > 8


def test_pictures_of_a_group_are_those_drawn_alone(engine):
    orders = [tiny(negative_prompt=NEGATIVE), tiny(), tiny(negative_prompt="a blue square")]
    together = draw_all(engine, orders)
    for pixels, order in zip(together, orders, strict=True):
        assert count_levels_apart(pixels, draw(engine, order)[1]) == 0


def test_there_are_two_tables_and_two_entries_in_the_cache(checkpoint):
    plan = engine_of(checkpoint).plan
    engine = Engine(checkpoint, plan, engine_of(checkpoint).hardware, prompt_cache=True)
    picture = Picture(tiny(negative_prompt=NEGATIVE).request)
    drawing = engine.draw([picture])
    while not picture.tables:
        next(drawing)
    assert picture.negative_table is not None
    assert not torch.equal(picture.tables["transformer"], picture.negative_table)
    drawing.close()
    assert len(prompt_cache.list_entries()) == 2
    # Each is an entry of its own text, whatever that was for.
    turned = tiny(prompt=NEGATIVE, negative_prompt=tiny().request.prompt)
    draw(engine, turned)
    assert len(prompt_cache.list_entries()) == 2


def test_the_encoders_are_loaded_once_for_both_texts(checkpoint):
    engine = engine_of(checkpoint)
    apart_ = replace(engine.plan, placement=replace(engine.plan.placement, keep=()))
    engine.adopt(apart_, engine.hardware)
    events, _ = draw(engine, tiny(negative_prompt=NEGATIVE))
    loads = [event.detail for event in events if getattr(event, "name", "") == "load"]
    assert loads.count("text_encoder") == loads.count("text_encoder_2") == 1


def test_a_plan_counts_both_passes_and_says_so(checkpoint, engine):
    hardware = engine.hardware
    large = {"image_size": 1024, "steps": 28}
    _, once = plan_for(tiny(**large), [checkpoint], hardware)
    _, twice = plan_for(tiny(**large, negative_prompt=""), [checkpoint], hardware)
    assert twice.seconds["denoise"] == pytest.approx(2 * once.seconds["denoise"], rel=0.01)
    assert any("true guidance: 2 passes" in reason for reason in twice.reasons)
    assert not any("true guidance" in reason for reason in once.reasons)


@pytest.mark.parametrize("scale", ["1", "1.0", "0.5", "nan", "101"])
def test_a_scale_that_is_none_is_exit_2(scale, drawn, capsys):
    said = ("generate", "a fox", "-p", "tiny", "--negative-prompt", "fog", "--true-cfg", scale)
    assert "--true-cfg" in assert_failed(call(capsys, *said), ExitCode.USAGE)
    assert not drawn


def test_an_empty_negative_prompt_is_one(drawn, capsys):
    said = ("generate", "a fox", "-p", "tiny", "--negative-prompt", "", "--true-cfg", "2")
    assert call(capsys, *said).returncode == 0
    assert (drawn[0].request.negative_prompt, drawn[0].request.true_scale) == ("", 2.0)
