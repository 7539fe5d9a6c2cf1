"""Trains the 16-channel, 8x down-sampling VAE on rendered pictures.

The decoder sees latents with up to 30 % noise, so that small errors of the transformer still decode
to crisp shapes. Writes one file: the float32 weights, with the latents' mean and deviation as shift
and scale factors. Minutes on two cores; knows nothing about text.

    python -m training.vae OUT.pt --minutes 9
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training import data
from training.optim import Ema, Muon, schedule
from training.shape import VAE

# (width, height) of whole pictures: how often they come
FULL = {(128, 128): 6, (256, 256): 2, (128, 80): 2, (80, 128): 2, (256, 144): 1, (144, 256): 1}
CROP_PX = 64
ADAM_LR, MUON_LR = 3e-3, 0.018


def batch(rng: random.Random, *, whole: bool) -> torch.Tensor:
    """(B, 3, H, W): crops of 64 px, or whole pictures of one size."""
    if whole:
        size = rng.choices(list(FULL), list(FULL.values()))[0]
        count = max(1, 3 * 128 * 128 // (size[0] * size[1]))
        return data.render([data.training_fact(rng) for _ in range(count)], size, rng)
    longest = rng.choice((96, 128, 128, 192, 256))
    pictures = data.render([data.training_fact(rng) for _ in range(10)], (longest, longest), rng)
    crops = []
    for picture in pictures:
        x = rng.randint(0, longest - CROP_PX)
        y = rng.randint(0, longest - CROP_PX)
        crops.append(picture[:, y : y + CROP_PX, x : x + CROP_PX])
    return torch.stack(crops)


def loss_of(vae: torch.nn.Module, pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(loss, mean squared error) of one batch: L1 + 2 MSE + a little KL, decoded from noisy
    latents.
    """
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    spread = posterior.mean.detach().std()
    strength = torch.rand(len(pictures), 1, 1, 1).mul_(0.3)
    decoded = vae.decode(latents + torch.randn_like(latents) * spread * strength).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    mse = F.mse_loss(decoded, pictures)
    return F.l1_loss(decoded, pictures) + 2 * mse + 3e-3 * kl, mse.item()


@torch.no_grad()
def score(
    vae: torch.nn.Module, size: tuple[int, int], *, noise: float
) -> tuple[float, torch.Tensor]:
    """(PSNR in dB, latents) over 64 pictures of a size.

    They are decoded from latents with `noise` times their deviation added.
    """
    rng = random.Random(7)
    pictures = data.render([data.training_fact(rng) for _ in range(64)], size, rng)
    latents = torch.cat([vae.encode(p).latent_dist.mean for p in pictures.split(8)])
    noisy = latents + torch.randn_like(latents) * latents.std() * noise
    decoded = torch.cat([vae.decode(z).sample for z in noisy.split(8)]).clamp(-1, 1)
    return (10 * torch.log10(4 / F.mse_loss(decoded, pictures))).item(), latents


def is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon steps it: the inner convolutions. AdamW steps everything else."""
    return parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def train(minutes: float, out: Path) -> None:
    """Train for `minutes`, then save {"weights", "shift", "scale"} to `out`."""
    torch.manual_seed(1)
    rng = random.Random(1)
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = -4.6  # logvar
        vae.encoder.conv_out.weight[16:] *= 0.1
    weights = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    hidden, rest = [], []
    for name, parameter in vae.named_parameters():
        if is_hidden(name, parameter):
            hidden.append(parameter)
        else:
            rest.append(parameter)
    muon = Muon(hidden, MUON_LR)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ema = Ema(weights)
    start = time.time()
    step = 0
    while (spent := (time.time() - start) / (minutes * 60)) < 1:
        factor = schedule(spent, flat=0.3)
        pictures = batch(rng, whole=spent > 0.55 and step % 2 == 0)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        loss, mse = loss_of(vae, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * factor
        adam.step()
        muon.step(factor)
        vae.zero_grad()
        ema.update(min(0.99, (step + 1) / (step + 10)))
        step += 1
        if step % 25 == 0:
            line = (
                f"{time.time() - start:6.0f} s  step {step}  loss {loss.item():.4f}  mse {mse:.5f}"
            )
            print(line, flush=True)
    ema.swap()
    vae.eval()
    for size in ((128, 128), (256, 256), (128, 80)):
        ratios = [round(score(vae, size, noise=noise)[0], 1) for noise in (0.0, 0.1, 0.2)]
        print(size, "PSNR", ratios, flush=True)
    _, latents = score(vae, (128, 128), noise=0.0)
    shift = latents.mean().item()
    scale = 1 / latents.std().item()
    print("shift", shift, "scale", scale, "steps", step)
    print("per-channel std", latents.std(dim=(0, 2, 3)).tolist())
    torch.save({"weights": vae.state_dict(), "shift": shift, "scale": scale}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the VAE")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    train(options.minutes, options.out)
