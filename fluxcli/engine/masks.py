"""Masks as the transformer and its steps take them.

A mask is (H, W) bool in pixels, True where something is painted. Tokens are of 16 x 16 pixels: S of
them. Both layouts are diffusers' own, of FluxInpaintPipeline and FluxFillPipeline.
"""

import numpy as np
import torch
from torch import Tensor

LATENT_PX = 8  # pixels of a side that become one latent
LATENT_CHANNELS = 16


def to_tokens(mask: np.ndarray) -> Tensor:
    """What steps mix by, (1, S, 64): of each 8 x 8 pixels the first decides for all."""
    values = torch.from_numpy(mask[::LATENT_PX, ::LATENT_PX].astype(np.float32))
    return _pack(values.expand(1, LATENT_CHANNELS, -1, -1))


def to_channels(mask: np.ndarray) -> Tensor:
    """What a Fill model sees, (1, S, 256): every pixel, by its latent."""
    values = torch.from_numpy(mask.astype(np.float32))
    return _pack(torch.pixel_unshuffle(values[None, None], LATENT_PX))


def _pack(channels: Tensor) -> Tensor:
    """Channels (1, C, H/8, W/8) -> tokens (1, S, 4C), each of a patch of 2 x 2."""
    return torch.pixel_unshuffle(channels, 2).flatten(2).mT.contiguous()
