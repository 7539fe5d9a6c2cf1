"""A growing cache of what the transformer learns from: packed latents, and encoded sentences.

Encoding a picture costs as much as a share of a training step, so the cache starts small and `grow`
adds to it while training runs. There is a shelf for each picture size, (width, height) in pixels.
Latents are float16, already shifted and scaled, packed as FLUX packs them: (L, 64) for
L = W/16 * H/16 tokens.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from training import data
from training.text import Encoders

Size = tuple[int, int]  # (width, height) in pixels

SENTENCES = 2  # per picture
LENGTH = 24  # text tokens of the cached sentences
# pictures wanted in the end
WANTED = {
    (128, 128): 8000,
    (128, 80): 3000,
    (80, 128): 3000,
    (256, 256): 6000,
    (256, 144): 4000,
    (144, 256): 4000,
}


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, H, W) -> (B, H/2 * W/2, 64), as FluxPipeline packs."""
    b, c, h, w = latents.shape
    squares = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """(B, L, 64) -> (B, 16, H, W), the latents of a picture of that size."""
    w, h = size[0] // 16, size[1] // 16
    squares = tokens.view(len(tokens), h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(len(tokens), 16, h * 2, w * 2)


def positions(size: Size) -> torch.Tensor:
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


class Sample(NamedTuple):
    """What a batch is made of, float32."""

    latents: torch.Tensor  # (B, L, 64)
    pooled: torch.Tensor  # (B, 96)
    tokens: torch.Tensor  # (B, length, 128)


class Cache:
    """Shelves for all sizes, filled by a VAE and encoders that no longer change."""

    def __init__(
        self, vae: torch.nn.Module, encoders: Encoders, *, seed: int, share: float = 1.0
    ) -> None:
        """`share` is the part of the wanted pictures that this cache holds."""
        self.vae = vae
        self.encoders = encoders
        self.rng = random.Random(seed)
        self.wanted = {size: int(count * share) for size, count in WANTED.items()}
        self.shelves: dict[Size, Shelf] = {}
        for size, count in self.wanted.items():
            length = (size[0] // 16) * (size[1] // 16)
            self.shelves[size] = Shelf(
                latents=torch.empty(count, length, 64, dtype=torch.float16),
                pooled=torch.empty(count, SENTENCES, 96),
                tokens=torch.empty(count, SENTENCES, LENGTH, 128, dtype=torch.float16),
            )

    @torch.no_grad()
    def grow(self, size: Size, count: int) -> None:
        """Add `count` pictures of a size, or as many as are still wanted."""
        shelf = self.shelves[size]
        first = shelf.filled
        last = min(self.wanted[size], first + count)
        if first == last:
            return
        facts = [data.training_fact(self.rng) for _ in range(last - first)]
        pictures = data.render(facts, size, self.rng).contiguous(memory_format=torch.channels_last)
        mean = self.vae.encode(pictures).latent_dist.mean.contiguous()
        config = self.vae.config
        scaled = (mean - config.shift_factor) * config.scaling_factor
        shelf.latents[first:last] = pack(scaled).half()
        for k in range(SENTENCES):
            prompts = [data.any_prompt(fact, self.rng) for fact in facts]
            pooled, tokens = self.encoders(prompts, LENGTH)
            shelf.pooled[first:last, k] = pooled
            shelf.tokens[first:last, k] = tokens.half()
        shelf.facts += facts

    def grow_neediest(self, pixels: int) -> None:
        """Add about `pixels` worth of pictures to the shelf that is least full."""
        size = min(self.wanted, key=lambda each: self.shelves[each].filled / self.wanted[each])
        self.grow(size, max(1, pixels // (size[0] * size[1])))

    def sample(self, size: Size, count: int, *, length: int) -> Sample:
        """Random pictures of a size; sentences of another length than LENGTH are encoded anew."""
        shelf = self.shelves[size]
        rows = torch.randint(shelf.filled, (count,))
        latents = shelf.latents[rows].float()
        if length == LENGTH:
            which = torch.randint(SENTENCES, (count,))
            return Sample(latents, shelf.pooled[rows, which], shelf.tokens[rows, which].float())
        prompts = [data.any_prompt(shelf.facts[i], self.rng) for i in rows.tolist()]
        with torch.no_grad():
            pooled, tokens = self.encoders(prompts, length)
        return Sample(latents, pooled, tokens)

    def save(self, path: Path) -> None:
        """Write what is filled."""
        found = {}
        for size, shelf in self.shelves.items():
            n = shelf.filled
            tensors = (shelf.latents, shelf.pooled, shelf.tokens)
            found[size] = (*(tensor[:n].clone() for tensor in tensors), shelf.facts)
        torch.save(found, path)

    def load(self, path: Path) -> None:
        """Take back what `save` wrote, as far as there is room."""
        saved = torch.load(path, weights_only=False)
        for size, (latents, pooled, tokens, facts) in saved.items():
            shelf = self.shelves[size]
            n = min(len(facts), len(shelf.latents))
            shelf.latents[:n] = latents[:n]
            shelf.pooled[:n] = pooled[:n]
            shelf.tokens[:n] = tokens[:n]
            shelf.facts = facts[:n]
