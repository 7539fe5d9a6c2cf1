"""Kontext's references: pictures that it edits, as tokens behind the latents, at ids of their own.

As in diffusers' FluxKontextPipeline: the VAE encodes them to the mode of its distribution, so that
no random number is drawn, and the first column of their ids is 1. Several are stitched together.
Sizes are (width, height) in pixels.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.pictures.references import stitch
from fluxcli.request.sizes import fit_references


def add_references(
    latents: InputLatents, picture: Picture, encode: Callable[[np.ndarray], Tensor]
) -> None:
    """Give latents the tokens and ids of a picture's references.

    `encode` makes tokens (1, R, 64) of pixels (H, W, 3). Raises `BadInputFile`.
    """
    size = find_canvas_size(picture)
    pixels = stitch([each.read_pixels() for each in picture.inputs.references], size)
    latents.references = encode(pixels)
    latents.reference_ids = make_reference_ids(size)


def find_canvas_size(picture: Picture) -> tuple[int, int]:
    """The size of the canvas that a picture's references take.

    A single one that is edited within a mask has that of the picture, as in diffusers'
    FluxKontextInpaintPipeline.
    """
    inputs = picture.inputs
    if inputs.mask and inputs.image in inputs.references and len(inputs.references) == 1:
        return picture.request.size
    sizes = [each.size for each in inputs.references]
    return fit_references(sizes, math.prod(picture.request.size))


def make_reference_ids(size: tuple[int, int]) -> Tensor:
    """Positions (R, 3) of a canvas' tokens for the rotary embedding: (1, row, column)."""
    width, height = size
    rows = torch.arange(height // 16)
    columns = torch.arange(width // 16)
    return torch.cartesian_prod(torch.tensor([1]), rows, columns)
