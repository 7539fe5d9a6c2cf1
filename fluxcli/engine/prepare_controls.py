"""Control pictures become what ControlNets take beside the latents, or BFL's models in channels.

The order of random numbers is that of diffusers' pipelines: the controls are drawn one after the
other, before the picture that is started from and before its noise. Packed latents are (1, S, 64).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine.control_maps import ControlMap, make_map
from fluxcli.engine.controlnet import takes_pixels
from fluxcli.engine.denoise import draw_noise
from fluxcli.engine.picture import InputLatents, Picture
from quant.checkpoint import Component


def make_maps(picture: Picture) -> list[ControlMap]:
    """Return the map of each control of a picture, at the picture's size."""
    request = picture.request
    started_from = picture.inputs.image
    return [
        make_map(
            ref.kind,
            shown.read_pixels(),
            request.size,
            beside=started_from.size if started_from else None,
        )
        for ref, shown in zip(request.control, picture.inputs.controls, strict=True)
    ]


def add_controls(
    latents: InputLatents,
    picture: Picture,
    maps: Sequence[ControlMap],
    *,
    components: Mapping[str, Component],
    encode: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> None:
    """Fill in `controls` and `channels` of a picture's input latents.

    `encode` makes packed latents of values (1, 3, H, W) in -1 to 1, with the generator's noise. A
    network with a hint block of its own takes the values as they are.
    """
    found = []
    for made, control in zip(maps, picture.controls, strict=True):
        values = to_values(made.pixels)
        if not control.part:
            if picture.request.image and picture.request.mask:
                # FluxControlInpaintPipeline encodes the masked picture, and looks at it no more.
                draw_noise(picture.request.size, generator)
            latents.channels = encode(values)
            found.append(latents.channels)
        elif takes_pixels(components[control.part].config):
            found.append(values)
        else:
            found.append(encode(values))
    latents.controls = tuple(found)


def to_values(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, 3) uint8 -> values (1, 3, H, W) float32 in -1 to 1."""
    shares = torch.from_numpy(pixels.astype(np.float32) / 255)
    return shares.permute(2, 0, 1)[None] * 2 - 1
