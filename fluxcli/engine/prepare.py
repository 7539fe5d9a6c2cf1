"""The second phase: pictures that a request starts from become latents, by the VAE's encoder.

Order and count of the random numbers are diffusers' own: what its pipelines for such requests draw
of the seed's generator, this draws, too. Pictures are (width, height) in pixels; packed latents
(1, S, 64) as in `denoise`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine.components import Components
from fluxcli.engine.controlnet import takes_pixels
from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.events import Event, Phase
from fluxcli.pictures.inputs import resize
from quant.checkpoint import Checkpoint


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture that starts from others its `latents`. Raises `BadInputFile`."""
    for picture in pictures:
        if picture.denoised or picture.latents is not None or not is_needed(picture):
            continue
        vae = yield from components.load("vae", picture.adapters)
        yield Phase("prepare")
        encoder = Encoder(vae, device=components.plan.device, dtype=components.dtype("vae"))
        picture.latents = prepare(picture, encoder, components.checkpoint)


def is_needed(picture: Picture) -> bool:
    """Whether a picture has inputs that the VAE encodes."""
    inputs = picture.inputs
    return bool(inputs.image or inputs.references or inputs.controls)


class Encoder:
    """The VAE's encoder, for pictures of one run."""

    def __init__(self, vae: Any, *, device: str, dtype: torch.dtype) -> None:
        self.vae = vae
        self.device = device
        self.dtype = dtype

    def encode(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """The latents (1, 16, H/8, W/8) on the CPU of values (1, 3, H, W) in -1 to 1.

        They are drawn from the encoder's distribution by the generator, on the CPU so that every
        device draws the same; without one they are its mode.
        """
        distribution = self.vae.encode(values.to(self.device, self.dtype)).latent_dist
        latents = distribution.mean.float().cpu()
        if generator:
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + distribution.std.float().cpu() * noise
        config = self.vae.config
        return (latents - config.shift_factor) * config.scaling_factor


def prepare(picture: Picture, encoder: Encoder, checkpoint: Checkpoint) -> InputLatents:
    """Make latents of all that a picture starts from.

    diffusers' pipelines draw for control pictures first, then for the picture to start from, then
    noise.
    """
    request = picture.request
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents = InputLatents()
    if picture.controls:
        latents.controls = _prepare_controls(picture, encoder, generator, checkpoint=checkpoint)
    if picture.inputs.image:
        values = to_values(resize(picture.inputs.image.read_pixels(), request.size))
        start = encoder.encode(values, generator)
        latents.start = pack(start)
        latents.noise = pack(torch.randn(start.shape, generator=generator))
    elif picture.controls:
        latents.noise = pack(torch.randn(_latent_shape(request.size), generator=generator))
    return latents


def _prepare_controls(
    picture: Picture, encoder: Encoder, generator: torch.Generator, *, checkpoint: Checkpoint
) -> tuple[Tensor, ...]:
    """Packed latents (1, S, 64) of each control picture; XLabs' networks take its values."""
    prepared = []
    for control, given in zip(picture.controls, picture.inputs.controls, strict=True):
        values = to_values(resize(given.read_pixels(), picture.request.size))
        component = checkpoint.components.get(control.part)
        if component and takes_pixels(component.config):
            prepared.append(values)
        else:
            prepared.append(pack(encoder.encode(values, generator)))
    return tuple(prepared)


def _latent_shape(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    return 1, 16, height // 8, width // 8


def to_values(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, 3) uint8 -> values (1, 3, H, W) float32 in -1 to 1."""
    shares = torch.from_numpy(pixels.astype(np.float32) / 255)
    return shares.permute(2, 0, 1)[None] * 2 - 1


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> tokens (B, H/2 x W/2, 4C), each of a patch of 2 x 2."""
    return torch.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()
