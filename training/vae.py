"""Trains the 16-channel, 8x down-sampling VAE on rendered pictures.

The decoder sees latents with up to 30 % noise, so that small errors of the transformer still decode to crisp shapes.
Writes one file: the float32 weights, with the latents' mean and deviation as shift and scale factors.
Minutes on two cores; knows nothing about text.

    python -m training.vae OUT.pt --minutes 9
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from training import data
from training.export import VAE
from training.optim import Ema, Muon, schedule

FULL = ((128, 128), (256, 256), (128, 80), (80, 128), (256, 144), (144, 256))


def batch(rng: random.Random, whole: bool) -> torch.Tensor:
    """(B, 3, H, W): crops of 64 px, or whole pictures of one size."""
    if whole:
        size = rng.choices(FULL, (6, 2, 2, 2, 1, 1))[0]
        count = max(1, 3 * 128 * 128 // (size[0] * size[1]))
        return data.render([data.training_fact(rng) for _ in range(count)], size, rng)
    longest = rng.choice((96, 128, 128, 192, 256))
    pictures = data.render([data.training_fact(rng) for _ in range(10)], (longest, longest), rng)
    crops = []
    for picture in pictures:
        x, y = rng.randint(0, longest - 64), rng.randint(0, longest - 64)
        crops.append(picture[:, y : y + 64, x : x + 64])
    return torch.stack(crops)


def loss_of(vae: torch.nn.Module, pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(loss, mean squared error) of one batch: L1 + 2 MSE + a little KL, decoded from noisy latents."""
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    spread = posterior.mean.detach().std()
    strength = torch.rand(len(pictures), 1, 1, 1).mul_(0.3)
    decoded = vae.decode(latents + torch.randn_like(latents) * spread * strength).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    mse = F.mse_loss(decoded, pictures)
    return F.l1_loss(decoded, pictures) + 2 * mse + 3e-3 * kl, mse.item()


@torch.no_grad()
def score(vae: torch.nn.Module, size: tuple[int, int], noise: float) -> tuple[float, torch.Tensor]:
    """(PSNR in dB, latents) over 64 pictures, decoded from latents with `noise` of their deviation added."""
    rng = random.Random(7)
    pictures = data.render([data.training_fact(rng) for _ in range(64)], size, rng)
    latents = torch.cat([vae.encode(p).latent_dist.mean for p in pictures.split(8)])
    noisy = latents + torch.randn_like(latents) * latents.std() * noise
    decoded = torch.cat([vae.decode(z).sample for z in noisy.split(8)]).clamp(-1, 1)
    return (10 * torch.log10(4 / F.mse_loss(decoded, pictures))).item(), latents


def train(minutes: float, out: Path) -> None:
    """Trains for `minutes`, then saves {"weights", "shift", "scale"} to `out`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    rng = random.Random(1)
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = -4.6  # logvar
        vae.encoder.conv_out.weight[16:] *= 0.1
    weights = [p for p in vae.parameters() if p.requires_grad]
    hidden = [p for n, p in vae.named_parameters() if p.ndim == 4 and "conv_in" not in n and "conv_out" not in n]
    muon = Muon(hidden, 0.018)
    chosen = {id(p) for p in hidden}
    adam = torch.optim.AdamW(
        [p for p in weights if id(p) not in chosen], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    ema, start, step, total = Ema(weights), time.time(), 0, minutes * 60
    while (spent := (time.time() - start) / total) < 1:
        factor = schedule(spent, flat=0.3)
        pictures = batch(rng, whole=spent > 0.55 and step % 2 == 0).contiguous(memory_format=torch.channels_last)
        loss, mse = loss_of(vae, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * factor
        adam.step()
        muon.step(factor)
        vae.zero_grad()
        ema.update(min(0.99, (step + 1) / (step + 10)))
        step += 1
        if step % 25 == 0:
            line = f"{time.time() - start:6.0f} s  step {step}  loss {loss.item():.4f}  mse {mse:.5f}"
            print(line, flush=True)
    ema.swap()
    vae.eval()
    for size in FULL[:3]:
        print(size, "PSNR", [round(score(vae, size, noise)[0], 1) for noise in (0.0, 0.1, 0.2)], flush=True)
    latents = score(vae, (128, 128), 0.0)[1]
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    print("shift", shift, "scale", scale, "steps", step, "per-channel std", latents.std(dim=(0, 2, 3)).tolist())
    torch.save({"weights": vae.state_dict(), "shift": shift, "scale": scale}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the VAE")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    train(options.minutes, options.out)
