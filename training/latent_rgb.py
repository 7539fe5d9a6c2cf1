"""Fits the projection that makes a preview of latents: 16 channels and a bias to RGB.

Pictures of `data.py` are encoded by the bundled VAE; each latent stands for 8x8 pixels, whose mean
colour is what it should become. Least squares in float64. Prints the table of
fluxcli/engine/preview.py, and on held-out facts the share of the variance that it explains and the
mean distance in levels of 255. Seconds.

    python -m training.latent_rgb [presets/tiny/vae] --count 400
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training import data

SIZES = ((128, 128), (128, 80), (80, 128), (256, 256))


def encode(vae: AutoencoderKL, facts: list[data.Fact], rng: random.Random) -> tuple:
    """Latents as the transformer has them (N, 16), and the colours of their pixels (N, 3)."""
    latents, colours = [], []
    for at in range(0, len(facts), 8):
        size = SIZES[at // 8 % len(SIZES)]
        pictures = data.render(facts[at : at + 8], size, rng)  # (B, 3, H, W) in -1 to 1
        with torch.no_grad():
            found = vae.encode(pictures).latent_dist.mode()
        scaled = (found - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(scaled.movedim(1, 3).reshape(-1, 16))
        colours.append(F.avg_pool2d(pictures, 8).movedim(1, 3).reshape(-1, 3))
    return torch.cat(latents).double(), torch.cat(colours).double()


def main() -> None:
    """Fit, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae", nargs="?", type=Path, default=Path("presets/tiny/vae"))
    parser.add_argument("--count", type=int, default=400)
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(options.vae, torch_dtype=torch.float32)
    rng = random.Random(0)
    facts = [data.training_fact(rng) for _ in range(options.count)]
    latents, colours = encode(vae, facts, rng)
    ones = torch.ones(len(latents), 1, dtype=torch.float64)
    fitted = torch.linalg.lstsq(torch.cat([latents, ones], 1), colours).solution
    for row in fitted:
        print("    (" + ", ".join(f"{value:.4f}" for value in row) + "),")
    latents, colours = encode(vae, data.held_out_facts(options.count), rng)
    error = latents @ fitted[:-1] + fitted[-1] - colours
    explained = 1 - float(error.var() / colours.var())
    levels = float(error.abs().mean()) * 127.5
    print(f"explained on held-out facts: {explained:.3f}; mean distance {levels:.1f} of 255 levels")


if __name__ == "__main__":
    main()
