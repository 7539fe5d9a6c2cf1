"""The engine's pixels are diffusers' own.

They are at most 1/255 apart from FluxPipeline's of the same folder, seed and parameters.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.engine.loader import build
from fluxcli.request.fields import Order
from quant.checkpoint import Component, inspect
from tests.support.helpers import ROOT, draw, engine_of, tiny

# the published configs and tokenizers, where a developer has them
REAL = ROOT.parent / "shared" / "flux1-dev"


def diffusers_pixels(folder: Path, requests: list[Order]) -> list[np.ndarray]:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for request in requests:
        width, height = request.request.size
        options = (
            {} if request.request.guidance is None else {"guidance_scale": request.request.guidance}
        )
        image = pipe(
            request.request.prompt,
            width=width,
            height=height,
            num_inference_steps=request.request.steps,
            max_sequence_length=request.request.text_tokens,
            generator=torch.Generator("cpu").manual_seed(request.request.seed),
            **options,
        ).images[0]
        pictures.append(np.asarray(image))
    return pictures


def assert_equal(folder: Path, requests: list[Order]) -> None:
    references = diffusers_pixels(folder, requests)
    engine = engine_of(inspect(folder), requests[0])
    for request, reference in zip(requests, references, strict=True):
        _, pixels = draw(engine, request)
        apart = np.abs(pixels.astype(int) - reference.astype(int)).max()
        assert apart <= 1, (
            f"{request.request.size}, {request.request.steps} steps: {apart}/255 apart"
        )
        assert reference.std() > 1  # a picture, not a plain colour


GRID = [(ratio, steps) for ratio in ("1:1", "21:9", "9:16") for steps in (1, 20)]


def test_dev_style(tiny_folder):
    assert_equal(
        tiny_folder,
        [tiny(aspect_ratio=r, steps=s, image_size=128, text_tokens=24) for r, s in GRID],
    )


def test_schnell_style(tiny_folder, tmp_path):
    """No guidance input, no dynamic shift."""
    folder = shutil.copytree(tiny_folder, tmp_path / "schnell")
    change_json(folder / "transformer" / "config.json", guidance_embeds=False)
    change_json(
        folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0
    )
    path = next((folder / "transformer").glob("*.safetensors"))
    state = {k: v for k, v in load_file(path).items() if "guidance_embedder" not in k}
    save_file(state, path)
    requests = [
        tiny(aspect_ratio=r, steps=s, image_size=128, text_tokens=24, guidance=None)
        for r, s in GRID
    ]
    assert_equal(folder, requests)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.slow
def test_real_widths_and_tokenizers(tmp_path):
    """FLUX.1 [dev]'s configs and tokenizers with one layer of each kind and random weights."""
    if not REAL.is_dir():
        pytest.skip(
            "needs the published configs and tokenizers of FLUX.1 [dev] in ../shared/flux1-dev"
        )
    folder = shutil.copytree(REAL, tmp_path / "real", ignore=shutil.ignore_patterns("*.index.json"))
    change_json(folder / "transformer" / "config.json", num_layers=1, num_single_layers=1)
    change_json(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    change_json(folder / "text_encoder_2" / "config.json", num_layers=1)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        write_random(folder / name, name)
    prompt = "A fox, caf\u00e9 \u2014 \u201cquoted\u201d, 100% \U0001f98a"
    prompt += " and a rather long description of its fur"
    requests = [
        tiny(prompt=prompt, steps=3, text_tokens=64),
        tiny(prompt=prompt, steps=1, text_tokens=128, aspect_ratio="9:16", image_size=96),
    ]
    assert_equal(folder, requests)


def write_random(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    module = build(Component(name, folder, config, {}))
    generator, state = torch.Generator().manual_seed(1), {}
    noise = (torch.randn(1 << 22, generator=generator) * 0.02).to(torch.bfloat16)
    for key, parameter in module.state_dict().items():
        if key == "encoder.embed_tokens.weight":
            continue
        if key.endswith("weight") and parameter.ndim == 1:
            state[key] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            state[key] = noise.repeat(parameter.numel() // noise.numel() + 1)[
                : parameter.numel()
            ].view(parameter.shape)
    stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
    save_file(
        {k: v.clone() for k, v in state.items()},
        folder / f"{stem}.safetensors",
        metadata={"format": "pt"},
    )
