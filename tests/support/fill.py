"""A Fill model: the bundled one, with random weights for what it does not have."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quant.kinds import FILL_CHANNELS
from tests.support.controls import change_config

# So large that what no training has told what to do decides what is drawn.
SCALE = 12


def make_fill_model(tiny_folder: Path, folder: Path) -> Path:
    """The bundled model with 384 input channels, 64 outputs and the bundled one's index."""
    shutil.copytree(tiny_folder, folder)
    change_config(folder / "transformer", in_channels=FILL_CHANNELS, out_channels=64)
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    own = tensors["x_embedder.weight"]
    made = torch.Generator().manual_seed(0)
    more = torch.randn((own.shape[0], FILL_CHANNELS - own.shape[1]), generator=made)
    more *= SCALE * own.float().std()
    tensors["x_embedder.weight"] = torch.cat([own, more.to(own.dtype)], dim=1)
    save_file(tensors, path, {"format": "pt"})
    return folder
