"""The last phase: latents become pixels, by the VAE's decoder, whole or in tiles as the plan says.

Pictures are (width, height) in pixels.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine.components import Components
from fluxcli.engine.picture import Picture
from fluxcli.errors import NotFinite
from fluxcli.events import Event, Notice, Phase
from fluxcli.pictures.canvas import paste
from fluxcli.plan import costs

NOT_FINITE_HINT = "generate with another --precision or --seed; flux models verify checks weights"


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture its `pixels`, where a mask was black those of its input.

    Raises `NotFinite`, and `BadInputFile` for an input that is needed and has gone.
    """
    for picture in pictures:
        if picture.pixels is None:
            decoded = yield from _decode(components, picture)
            picture.pixels = _paste_input(decoded, picture)
            picture.canvas = None


def _paste_input(decoded: np.ndarray, picture: Picture) -> np.ndarray:
    request = picture.request
    if picture.inputs.image and (request.mask or request.expand):
        return paste(decoded, picture.load_canvas(), feather_px=request.mask_feather)
    return decoded


def _decode(components: Components, picture: Picture) -> Generator[Event, None, np.ndarray]:
    """(H, W, 3) uint8; decoded once more in float32 where 16 bit overflow."""
    tokens = picture.tokens
    assert tokens is not None, "a phase was left out"
    seed = f"seed {picture.request.seed}"
    if not is_finite(tokens):
        why = "NaN or Inf in the latents"
        raise NotFinite("the picture is not finite", which=seed, why=why, hint=NOT_FINITE_HINT)
    vae = yield from components.load("vae", picture.adapters)
    yield Phase("decode")
    set_tiles(vae, tiled=components.plan.placement.decode == "tiled")
    latents = unpack(tokens.to(components.plan.device), picture.request.size)
    dtype = components.dtype("vae")
    decoded = decode_latents(vae, latents.to(dtype))
    if not is_finite(decoded) and dtype != torch.float32:
        yield Notice("the VAE overflowed: decoding once more in float32")
        decoded = decode_latents(vae.float(), latents.float())
        vae.to(dtype)  # the next picture starts as this one did
    if not is_finite(decoded):
        why = "NaN or Inf in the pixels, decoded in float32"
        raise NotFinite("the picture is not finite", which=seed, why=why, hint=NOT_FINITE_HINT)
    return to_pixels(decoded).numpy()


def set_tiles(vae: Any, *, tiled: bool) -> None:
    """Make diffusers' VAE work in tiles of `costs.TILE_PX`, or on the whole."""
    vae.use_tiling = tiled
    if tiled:
        vae.tile_sample_min_size = costs.TILE_PX
        vae.tile_latent_min_size = costs.TILE_PX // 8


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Packed latents (B, S, 4C) -> latents (B, C, height/8, width/8)."""
    width, height = size
    grid = tokens.unflatten(1, (height // 16, width // 16))  # (B, rows, columns, 4C)
    patches = grid.unflatten(3, (-1, 2, 2))  # (B, rows, columns, C, 2, 2)
    aligned = patches.permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, 2, columns, 2)
    return aligned.flatten(4).flatten(2, 3)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's output (1, 3, H, W), in -1 to 1, of latents (1, 16, H/8, W/8)."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(scaled, return_dict=False)[0]


def to_pixels(decoded: Tensor) -> Tensor:
    """The VAE's output (1, 3, H, W) in -1 to 1 -> pixels (H, W, 3) uint8 on the CPU."""
    shares = (decoded[0] * 0.5 + 0.5).clamp(0, 1)  # (3, H, W) in 0 to 1
    levels = shares.permute(1, 2, 0).float() * 255
    return levels.round().byte().cpu()


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(tensor.isfinite().all())
