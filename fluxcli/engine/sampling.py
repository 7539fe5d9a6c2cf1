"""The arithmetic of one FLUX.1 sample: tokens, noise, packing, position ids, timesteps, pixels. Knows no placement.

Formulas as in black-forest-labs/flux, `sampling.py`, and diffusers' FluxPipeline. Pictures are (width, height) in
pixels; latents (1, 16, height/8, width/8); packed latents (1, S, 64) with S = height/16 x width/16.
"""

from pathlib import Path

from fluxcli.engine import classes
from fluxcli.engine.loader import refusing
from quant.lazy import Tensor, nn, np, torch


def tokenizers(folder: Path) -> tuple:
    """CLIP's and T5's tokenizers of a model folder; raises `CheckpointError`."""
    with refusing("cannot read the tokenizer", folder / "tokenizer"):
        clip = classes.clip_tokenizer().from_pretrained(folder / "tokenizer", local_files_only=True)
    with refusing("cannot read the tokenizer", folder / "tokenizer_2"):
        t5 = classes.t5_tokenizer().from_pretrained(folder / "tokenizer_2", local_files_only=True)
    return clip, t5


def tokenize(pair: tuple, prompt: str, text_tokens: int) -> tuple[Tensor, Tensor, str]:
    """CLIP's token ids (1, 77), T5's (1, text_tokens), and the text that T5 will not see.

    FLUX.1 masks no padding, so the T5 length changes the picture.
    """
    clip, t5 = pair
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = t5(prompt, max_length=text_tokens, **options).input_ids
    every = t5(prompt, truncation=False).input_ids
    lost = t5.decode(every[text_tokens - 1 :], skip_special_tokens=True) if len(every) > text_tokens else ""
    return clip(prompt, max_length=77, **options).input_ids, ids, lost


def noise(seed: int, size: tuple[int, int], *, dtype: "torch.dtype") -> Tensor:
    """Packed noise (1, S, 64) of one picture on the CPU, from a generator of its own: the same for every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((1, 16, size[1] // 8, size[0] // 8), generator=generator)
    tokens = torch.pixel_unshuffle(latents, 2).flatten(2).mT  # each 2x2 patch becomes one token
    return tokens.to(dtype).contiguous()


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, S, 4C) -> (B, C, height/8, width/8)."""
    patches = tokens.unflatten(1, (size[1] // 16, size[0] // 16)).unflatten(3, (-1, 2, 2))  # (B, H/2, W/2, C, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(size: tuple[int, int]) -> Tensor:
    """Positions (S, 3) of the tokens for RoPE: (0, row, column)."""
    return torch.cartesian_prod(torch.tensor([0]), torch.arange(size[1] // 16), torch.arange(size[0] // 16))


def set_timesteps(scheduler: object, steps: int, tokens: int) -> None:
    """Set the scheduler's sigmas, on the CPU: linear from 1 to 1/steps, shifted by the token count where it asks."""
    config = scheduler.config
    low, base = config.base_image_seq_len, config.base_shift
    slope = (config.max_shift - base) / (config.max_image_seq_len - low)
    mu = tokens * slope + base - slope * low
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduler.set_begin_index(0)


def to_pixels(decoded: Tensor) -> Tensor:
    """VAE output (1, 3, H, W) in -1 to 1 -> (H, W, 3) uint8."""
    return ((decoded[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float() * 255).round().byte().cpu()


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(tensor.isfinite().all())


def step(model: "nn.Module", scheduler: object, latents: Tensor, timestep: Tensor, inputs: dict) -> Tensor:
    """One Euler step: packed latents (1, S, 64) at `timestep` -> at the next one."""
    at = timestep.expand(1).to(latents) / 1000
    velocity = model(hidden_states=latents, timestep=at, return_dict=False, **inputs)[0]
    return scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def decode(vae: "nn.Module", latents: Tensor) -> Tensor:
    """VAE output (1, 3, H, W) of latents (1, 16, H/8, W/8)."""
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
