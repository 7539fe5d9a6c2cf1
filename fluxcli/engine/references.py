"""Kontext's references: pictures that it edits, as tokens behind the latents, at ids of their own.

As in diffusers' FluxKontextPipeline: the VAE encodes them to the mode of its distribution, so that
no random number is drawn, and the first column of their ids is 1. Several are stitched together.
Sizes are (width, height) in pixels.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from fluxcli.engine.denoise import make_position_ids
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
    latents.reference_ids = make_position_ids(size, first=1)  # (R, 3)
