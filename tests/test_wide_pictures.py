"""Kontext and Redux at FLUX.1's real widths, with one block of each kind: diffusers' pictures."""

from pathlib import Path

import pytest
import torch

from quant.checkpoint import inspect
from quant.redux import PUBLISHED_CONFIGS, count_tokens
from tests.support.helpers import tiny
from tests.support.pictures import (
    count_levels_apart,
    draw_by_diffusers,
    draw_from,
    make_canvas,
    make_engine,
    make_picture,
    make_prior,
)
from tests.support.wide import write_wide

pytestmark = pytest.mark.exhaustive

MOVED = 8  # of 255
SIZE = {"width": 96, "height": 64, "steps": 2, "guidance": 2.5, "text_tokens": 512}


@pytest.fixture(scope="module")
def wide(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tiny_folder, tmp_path_factory.mktemp("wide") / "kontext")


def test_kontext(wide):
    from diffusers import FluxKontextPipeline

    make_picture(Path("a.png"), (90, 50))
    # Random weights look at all tokens alike: beside 512 of text a reference is a small share.
    size = SIZE | {"text_tokens": 16}
    order = tiny(reference=("a.png",), **size)
    pipe = FluxKontextPipeline.from_pretrained(wide, torch_dtype=torch.float32)
    expected = draw_by_diffusers(
        pipe,
        order,
        image=make_canvas(order),
        max_area=96 * 64,
        _auto_resize=False,
    )
    del pipe
    engine = make_engine(inspect(wide), order)
    apart = count_levels_apart(draw_from(engine, order), expected)
    moved = count_levels_apart(draw_from(engine, tiny(**size)), expected)
    print(f"Kontext, wide: {apart}/255 apart, moved by {moved}/255")
    assert apart <= 1
    assert moved > MOVED


def test_redux_without_a_prompt(wide, tmp_path):
    """diffusers' own zeros, which have the published sizes."""
    from diffusers import FluxPipeline, FluxPriorReduxPipeline

    siglip = PUBLISHED_CONFIGS["image_encoder"] | {"num_hidden_layers": 1}
    make_prior(siglip, 4096).save_pretrained(tmp_path / "redux")
    prior = FluxPriorReduxPipeline.from_pretrained(tmp_path / "redux", torch_dtype=torch.float32)
    image = make_picture(Path("a.png"), (90, 50))
    sequence, pooled = prior(image, return_dict=False)
    del prior
    order = tiny(prompt="", redux=("a.png",), redux_model=(str(tmp_path / "redux"),), **SIZE)
    pipe = FluxPipeline.from_pretrained(
        wide,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        torch_dtype=torch.float32,
    )
    embeddings = {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}
    expected = draw_by_diffusers(pipe, order, prompt=None, **embeddings)
    del pipe
    engine = make_engine(inspect(wide), order)
    assert count_tokens(engine.checkpoint.components["image_encoder"]) == 729
    apart = count_levels_apart(draw_from(engine, order), expected)
    make_picture(Path("b.png"), (40, 70))
    other = tiny(prompt="", redux=("b.png",), redux_model=(str(tmp_path / "redux"),), **SIZE)
    moved = count_levels_apart(draw_from(engine, other), expected)
    print(f"Redux, wide: {apart}/255 apart, moved by {moved}/255")
    assert apart <= 1
    assert moved > MOVED
