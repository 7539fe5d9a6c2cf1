"""The arithmetic of one FLUX.1 sample: noise, packing, position ids, timesteps, pixels. Pure functions on tensors.

Formulas as in black-forest-labs/flux, `sampling.py`, and diffusers' FluxPipeline. Pictures are (width, height) in
pixels; latents (1, 16, height/8, width/8); packed latents (1, S, 64) with S = height/16 x width/16.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LATENT_CHANNELS = 16


def noise(seed: int, size: tuple[int, int], *, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    """Packed noise (1, S, 64) of one picture, from a CPU generator of its own: the same on every device."""
    import torch

    width, height = size
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((1, LATENT_CHANNELS, height // 8, width // 8), generator=generator)
    return pack(latents).to(device=device, dtype=dtype)


def pack(latents: "torch.Tensor") -> "torch.Tensor":
    """(B, C, H, W) -> (B, H/2 x W/2, 4C): each 2x2 patch becomes one token."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """(B, S, 4C) -> (B, C, height/8, width/8)."""
    batch, _, channels = tokens.shape
    width, height = size[0] // 8, size[1] // 8
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def image_ids(size: tuple[int, int], *, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    """Positions (S, 3) of the tokens for RoPE: (0, row, column)."""
    import torch

    rows, columns = torch.arange(size[1] // 16), torch.arange(size[0] // 16)
    return torch.cartesian_prod(torch.tensor([0]), rows, columns).to(device=device, dtype=dtype)


def set_timesteps(scheduler: object, steps: int, tokens: int, device: str) -> None:
    """Set the scheduler's sigmas: linear from 1 to 1/steps, shifted by the picture's token count where it asks."""
    import numpy as np

    config = scheduler.config
    low, base = config.base_image_seq_len, config.base_shift
    slope = (config.max_shift - base) / (config.max_image_seq_len - low)
    mu = tokens * slope + base - slope * low
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=device)
    scheduler.set_begin_index(0)


def to_pixels(decoded: "torch.Tensor") -> "torch.Tensor":
    """VAE output (1, 3, H, W) in -1 to 1 -> (H, W, 3) uint8."""
    unit = (decoded[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    return (unit * 255).round().byte().cpu()


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether no element is NaN or infinite."""
    return bool(tensor.isfinite().all())
