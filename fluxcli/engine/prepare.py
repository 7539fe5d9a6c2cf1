"""The second phase: pictures that a request starts from become latents, by the VAE's encoder.

Order and count of the random numbers are diffusers' own: what its pipelines for such requests draw
of the seed's generator, this draws, too. Pictures are (width, height) in pixels; packed latents
(1, S, 64) as in `denoise`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxcli.engine import masks
from fluxcli.engine.components import Components
from fluxcli.engine.control_maps import ControlMap
from fluxcli.engine.decode import is_finite, set_tiles
from fluxcli.engine.denoise import draw_noise, pack
from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.engine.prepare_controls import add_controls, make_maps, to_values
from fluxcli.engine.references import add_references
from fluxcli.errors import BadInputFile
from fluxcli.events import Event, Notice, Phase
from quant.checkpoint import Checkpoint


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture that starts from others its `latents`. Raises `BadInputFile`."""
    known: dict[object, list[ControlMap]] = {}
    for picture in pictures:
        if picture.denoised or picture.latents is not None or not is_needed(picture):
            continue
        maps = known.get(picture.maps_key)
        if maps is None:
            maps = make_maps(picture)
            for shown, made in zip(picture.inputs.controls, maps, strict=True):
                for remark in made.remarks:
                    yield Notice(f"{shown.path}: {remark}")
        known = {picture.maps_key: maps}
        vae = yield from components.load("vae", picture.adapters, phase="prepare")
        yield Phase("prepare")
        set_tiles(vae, tiled=components.plan.placement.prepare == "tiled")
        encoder = Encoder(vae, device=components.plan.device, dtype=components.dtype("vae"))
        picture.latents = prepare(picture, encoder, components.checkpoint, maps=maps)


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

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latents (1, 16, H/8, W/8) on the CPU of values (1, 3, H, W) in -1 to 1.

        They are drawn from the encoder's distribution by the generator, on the CPU so that every
        device draws the same; without one they are its mode.
        """
        distribution = self.vae.encode(values.to(self.device, self.dtype)).latent_dist
        if not is_finite(distribution.parameters) and self.dtype != torch.float32:
            distribution = self.vae.float().encode(values.to(self.device)).latent_dist
            self.vae.to(self.dtype)  # what is encoded next starts as this did
        latents = distribution.mean.float().cpu()
        if generator:
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + distribution.std.float().cpu() * noise
        config = self.vae.config
        return (latents - config.shift_factor) * config.scaling_factor


def prepare(
    picture: Picture, encoder: Encoder, checkpoint: Checkpoint, *, maps: Sequence[ControlMap] = ()
) -> InputLatents:
    """Make latents of all that a picture starts from; `maps` are those of its controls.

    diffusers' pipelines draw for control pictures first, then for the picture to start from, then
    noise.
    """
    request = picture.request
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents = InputLatents()
    if picture.controls:
        add_controls(
            latents,
            picture,
            maps,
            components=checkpoint.components,
            encode=lambda values: pack(encoder.encode(values, generator)),
            generator=generator,
        )
    if picture.inputs.image:
        _prepare_image(latents, picture, encoder, generator=generator, kind=checkpoint.kind)
    elif picture.controls:
        latents.noise = pack(draw_noise(request.size, generator))
    if picture.inputs.references:
        add_references(latents, picture, lambda pixels: pack(encoder.encode(to_values(pixels))))
    return latents


def _prepare_image(
    latents: InputLatents,
    picture: Picture,
    encoder: Encoder,
    *,
    generator: torch.Generator,
    kind: str,
) -> None:
    """Set what a picture begins as, and where it is painted: by its channels in a Fill model."""
    canvas = picture.load_canvas()
    values = to_values(canvas.pixels)
    # Kontext's pipelines take the mode, and draw the noise alone.
    start = encoder.encode(values, None if picture.inputs.references else generator)
    latents.start = pack(start)
    latents.noise = pack(draw_noise(picture.request.size, generator))
    if canvas.mask is None:
        return
    if kind == "fill":
        shown = values * ~torch.from_numpy(canvas.mask)
        masked = pack(encoder.encode(shown, generator))
        latents.channels = torch.cat([masked, pack(masks.to_channels(canvas.mask))], dim=2)
    else:
        latents.mask = pack(masks.to_latents(canvas.mask))
        if not latents.mask.any() and picture.inputs.mask:
            why = "its white is finer than the 8x8 pixels of a latent"
            hint = "a broader mask, or a Fill model: -p fill"
            raise BadInputFile(
                "nothing would be painted", picture.inputs.mask.path, why=why, hint=hint
            )
