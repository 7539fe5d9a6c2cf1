"""A growing cache of what the transformer learns from: packed latents, and encoded sentences, per picture size.

Encoding a picture costs as much as a share of a training step, so the cache starts small and `grow` adds to it while
training runs. Latents are float16, already shifted and scaled, packed as FLUX packs them: (L, 64) for L = W/16 * H/16.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from training import data
from training.text import Encoders

SENTENCES = 2  # per picture
LENGTH = 24  # text tokens of the cached sentences
# (width, height): pictures wanted in the end
WANTED = {(128, 128): 8000, (128, 80): 3000, (80, 128): 3000, (256, 256): 6000, (256, 144): 4000, (144, 256): 4000}


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, H, W) -> (B, H/2 * W/2, 64), as FluxPipeline packs."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, L, 64) -> (B, 16, H, W) of a picture of `size` (width, height) pixels."""
    w, h = size[0] // 16, size[1] // 16
    return tokens.view(len(tokens), h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), 16, h * 2, w * 2)


def positions(size: tuple[int, int]) -> torch.Tensor:
    """(L, 3) RoPE positions of a picture's tokens: 0, row, column."""
    w, h = size[0] // 16, size[1] // 16
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


@dataclass
class Shelf:
    """The pictures of one size; rows below `filled` are valid."""

    latents: torch.Tensor  # (N, L, 64) float16
    pooled: torch.Tensor  # (N, SENTENCES, 96) float32
    tokens: torch.Tensor  # (N, SENTENCES, LENGTH, 128) float16
    facts: list[data.Fact] = field(default_factory=list)

    @property
    def filled(self) -> int:
        """How many rows are valid."""
        return len(self.facts)


class Cache:
    """Shelves for all sizes, filled by a VAE and encoders that no longer change."""

    def __init__(self, vae: torch.nn.Module, encoders: Encoders, seed: int, share: float = 1.0) -> None:
        self.vae, self.encoders, self.rng = vae, encoders, random.Random(seed)
        self.shelves, self.wanted = {}, {size: int(count * share) for size, count in WANTED.items()}
        for size, count in self.wanted.items():
            length = size[0] // 16 * (size[1] // 16)
            self.shelves[size] = Shelf(
                torch.empty(count, length, 64, dtype=torch.float16),
                torch.empty(count, SENTENCES, 96),
                torch.empty(count, SENTENCES, LENGTH, 128, dtype=torch.float16),
            )

    @torch.no_grad()
    def grow(self, size: tuple[int, int], count: int) -> None:
        """Adds `count` pictures of a size, or as many as are still wanted."""
        shelf = self.shelves[size]
        first, last = shelf.filled, min(self.wanted[size], shelf.filled + count)
        if first == last:
            return
        facts = [data.training_fact(self.rng) for _ in range(last - first)]
        pictures = data.render(facts, size, self.rng).contiguous(memory_format=torch.channels_last)
        mean = self.vae.encode(pictures).latent_dist.mean.contiguous()
        shelf.latents[first:last] = pack((mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor).half()
        for k in range(SENTENCES):
            pooled, tokens = self.encoders([data.any_prompt(f, self.rng) for f in facts], LENGTH)
            shelf.pooled[first:last, k], shelf.tokens[first:last, k] = pooled, tokens.half()
        shelf.facts += facts

    def grow_neediest(self, pixels: int) -> None:
        """Adds about `pixels` worth of pictures to the shelf that is least full."""
        size = min(self.wanted, key=lambda s: self.shelves[s].filled / self.wanted[s])
        self.grow(size, max(1, pixels // (size[0] * size[1])))

    def sample(self, size: tuple[int, int], count: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(latents (B, L, 64), pooled (B, 96), tokens (B, length, 128)), float32; other lengths are encoded anew."""
        shelf = self.shelves[size]
        rows = torch.randint(shelf.filled, (count,))
        latents = shelf.latents[rows].float()
        if length == LENGTH:
            which = torch.randint(SENTENCES, (count,))
            return latents, shelf.pooled[rows, which], shelf.tokens[rows, which].float()
        with torch.no_grad():
            return latents, *self.encoders([data.any_prompt(shelf.facts[i], self.rng) for i in rows.tolist()], length)

    def save(self, path: Path) -> None:
        """Writes what is filled."""
        torch.save({size: _rows(shelf) for size, shelf in self.shelves.items()}, path)

    def load(self, path: Path) -> None:
        """Takes back what `save` wrote, as far as there is room."""
        for size, (latents, pooled, tokens, facts) in torch.load(path, weights_only=False).items():
            shelf = self.shelves[size]
            n = min(len(facts), len(shelf.latents))
            shelf.latents[:n], shelf.pooled[:n], shelf.tokens[:n] = latents[:n], pooled[:n], tokens[:n]
            shelf.facts = facts[:n]


def _rows(shelf: Shelf) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[data.Fact]]:
    n = shelf.filled
    return shelf.latents[:n].clone(), shelf.pooled[:n].clone(), shelf.tokens[:n].clone(), shelf.facts
