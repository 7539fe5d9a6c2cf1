"""Masks as the transformer and its steps take them, before they are packed like latents.

A mask is (H, W) bool in pixels, True where something is painted. Both layouts are diffusers' own,
of FluxInpaintPipeline and FluxFillPipeline.
"""

import numpy as np
import torch
from torch import Tensor

LATENT_PX = 8  # pixels of a side that become one latent
LATENT_CHANNELS = 16


def to_latents(mask: np.ndarray) -> Tensor:
    """What steps mix by, (1, 16, H/8, W/8): of each 8 x 8 pixels the first decides for all."""
    values = torch.from_numpy(mask[::LATENT_PX, ::LATENT_PX].astype(np.float32))
    return values.expand(1, LATENT_CHANNELS, -1, -1)


def to_channels(mask: np.ndarray) -> Tensor:
    """What a Fill model sees, (1, 64, H/8, W/8): every pixel, by its latent."""
    values = torch.from_numpy(mask.astype(np.float32))
    return torch.pixel_unshuffle(values[None, None], LATENT_PX)
