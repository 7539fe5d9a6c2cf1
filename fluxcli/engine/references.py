"""Kontext's references: pictures that it edits, as tokens behind the latents, at ids of their own.

As in diffusers' FluxKontextPipeline: the VAE encodes them to the mode of its distribution, so that
no random number is drawn, and the first column of their ids is 1. Several are stitched together.
Sizes are (width, height) in pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.pictures.references import stitch


def add_references(
    latents: InputLatents, picture: Picture, encode: Callable[[np.ndarray], Tensor]
) -> None:
    """Give latents the tokens and ids of a picture's references.

    `encode` makes tokens (1, R, 64) of pixels (H, W, 3). Raises `BadInputFile`.
    """
    size = picture.request.fit_canvas([each.size for each in picture.inputs.references])
    pixels = stitch([each.read_pixels() for each in picture.inputs.references], size)
    latents.references = encode(pixels)
    latents.reference_ids = make_reference_ids(size)


def make_reference_ids(size: tuple[int, int]) -> Tensor:
    """Positions (R, 3) of a canvas' tokens for the rotary embedding: (1, row, column)."""
    width, height = size
    rows = torch.arange(height // 16)
    columns = torch.arange(width // 16)
    return torch.cartesian_prod(torch.tensor([1]), rows, columns)
