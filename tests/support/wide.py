"""A model of FLUX.1 [dev]'s widths with one block of each kind and random weights, in 2.4 GB."""

import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from fluxcli.engine.loader import build
from fluxcli.models.shapes import read_known_shapes
from quant.checkpoint import Component

NOISE_NUMEL = (1 << 22) - 3  # odd, so that rows of a matrix differ
# Depths of one, and the vocabulary of the bundled model's tokenizers.
CHANGES = {
    "transformer": {"num_layers": 1, "num_single_layers": 1},
    "text_encoder": {"num_hidden_layers": 1},
    "text_encoder_2": {"num_layers": 1},
}
KEPT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def write_wide(tiny: Path, target: Path) -> Path:
    """Write the model, with the tokenizers and the VAE of the bundled one; returns its folder."""
    shutil.copytree(tiny, target)
    known = read_known_shapes()
    assert known
    for name, changes in CHANGES.items():
        folder = target / name
        small = json.loads((folder / "config.json").read_text())
        kept = {key: small[key] for key in KEPT if key in small}
        config = known.components[name].config | kept | changes
        (folder / "config.json").write_text(json.dumps(config))
        for path in folder.glob("*.safetensors"):
            path.unlink()
        write_random(name, folder, config)
    return target


def write_random(name: str, folder: Path, config: dict) -> None:
    """Write random weights of a component: 1 for norms, 0.02 times normal values for others."""
    module = build(Component(name, folder, config, {}))
    generator = torch.Generator().manual_seed(1)
    noise = (torch.randn(NOISE_NUMEL, generator=generator) * 0.02).to(torch.bfloat16)
    state = {}
    for key, parameter in module.state_dict().items():
        if key == "encoder.embed_tokens.weight":  # the shared one once more
            continue
        numel = parameter.numel()
        if key.endswith("weight") and parameter.ndim == 1:
            state[key] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            # Each begins elsewhere: with equal weights for q and k, tokens see themselves alone.
            own = noise.roll(zlib.crc32(key.encode()) % NOISE_NUMEL)
            state[key] = own.repeat(numel // NOISE_NUMEL + 1)[:numel].view(parameter.shape)
    stem = "model" if "encoder" in name else "diffusion_pytorch_model"
    path = folder / f"{stem}.safetensors"
    save_file({key: value.clone() for key, value in state.items()}, path, {"format": "pt"})
