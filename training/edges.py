"""Edge maps: what the ControlNet `edges` is taught to follow, and what it is judged by.

`canny` is the textbook detector (Canny 1986) in torch: Gaussian, Sobel, thinning, two thresholds;
of the three colours the strongest gradient counts, so that red on purple has an edge too. `trace`
draws the same line from the renderer's signed distance. Maps are white lines on black, (B, H, W)
in 0..1. Knows nothing about models.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from training import data
from training.cache import Size

LOW, HIGH = 100.0, 200.0  # thresholds on the Sobel gradient of 0..255 pixels
SIGMA = 1.0  # of the Gaussian, in pixels
JUDGED_SEED = 1_000_000  # judged map k is rendered with Random(JUDGED_SEED + k)


@dataclass(frozen=True)
class Pair:
    """A prompt's fact, the fact whose edge map is given, and what the two together should show."""

    said: data.Fact
    mapped: data.Fact
    seed: int

    @property
    def shown(self) -> data.Fact:
        """The prompt's colours, in the map's shape, size and place."""
        colours = {"colour": self.said.colour, "background": self.said.background}
        return replace(self.mapped, **colours)


def judged_pairs(count: int, skip: int = 0) -> list[Pair]:
    """Held-out facts in hash order, each with the map of another held-out fact.

    Shape and place differ, and what the two together show is held out too. The first 500 are the
    ones whose maps training throws away.
    """
    held = data.held_out_facts()
    pairs = []
    for k, said in enumerate(held[skip : skip + count], skip):
        seed = JUDGED_SEED + k
        others = list(held)
        random.Random(seed).shuffle(others)
        for mapped in others:
            pair = Pair(said, mapped, seed)
            differs = mapped.shape != said.shape and mapped.position != said.position
            if differs and pair.shown.held_out:
                pairs.append(pair)
                break
    return pairs


def judged_map(pair: Pair, size: Size) -> torch.Tensor:
    """(H, W) the canny map of the picture of the map's own fact, in its own colours."""
    return canny(data.render([pair.mapped], size, random.Random(pair.seed)))[0]


def fingerprint(edges: torch.Tensor) -> bytes:
    """A hash of where a map (H, W) is bright."""
    return hashlib.sha256((edges > 0.5).numpy().tobytes()).digest()


def judged_fingerprints(size: Size, count: int = 500) -> set[bytes]:
    """Of the judged maps: drawn as they are judged, and traced, thin and thick."""
    found = set()
    for pair in judged_pairs(count):
        found.add(fingerprint(judged_map(pair, size)))
        for width in (1.0, 1.5, 2.0):
            distance = data.distances([pair.mapped], size, random.Random(pair.seed))
            found.add(fingerprint(trace(distance, width)[0]))
    return found


def trace(distance: torch.Tensor, width: float) -> torch.Tensor:
    """(B, H, W) lines so many pixels wide along the zeros of signed distances (B, H, W)."""
    return (width / 2 + 0.5 - distance.abs()).clamp(0, 1)


def canny(
    pictures: torch.Tensor, *, sigma: float = SIGMA, low: float = LOW, high: float = HIGH
) -> torch.Tensor:
    """(B, H, W) edges, 0 or 1, of pictures (B, 3, H, W) in [-1, 1]; sigma 0 does not blur."""
    pixels = (pictures + 1) * 127.5
    if sigma > 0:
        pixels = _blur(pixels, sigma)
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    right = padded[..., 2:] - padded[..., :-2]  # (B, 3, H + 2, W)
    down = padded[..., 2:, :] - padded[..., :-2, :]  # (B, 3, H, W + 2)
    gx = right[..., :-2, :] + 2 * right[..., 1:-1, :] + right[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    strongest = (gx.square() + gy.square()).argmax(1, keepdim=True)
    gx = gx.gather(1, strongest)[:, 0]
    gy = gy.gather(1, strongest)[:, 0]
    strength = torch.hypot(gx, gy)  # (B, H, W)
    thin = torch.where(_is_ridge(strength, gx, gy), strength, torch.zeros(()))
    return _connect(thin >= high, thin >= low).float()


def _blur(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """(B, C, H, W) blurred by a Gaussian, edges repeated."""
    reach = math.ceil(3 * sigma)
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-line.square() / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, -1)
    channels = pixels.shape[1]
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel[:, :, None], groups=channels)
    return F.conv2d(across, kernel[:, :, :, None], groups=channels)


def _is_ridge(strength: torch.Tensor, gx: torch.Tensor, gy: torch.Tensor) -> torch.Tensor:
    """(B, H, W) where the gradient is the largest along its direction, of eight."""
    padded = F.pad(strength, (1, 1, 1, 1))
    height, width = strength.shape[1:]

    def shifted(x: int, y: int) -> torch.Tensor:
        return padded[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    angle = torch.remainder(torch.atan2(gy, gx), math.pi)
    sector = torch.remainder((angle / (math.pi / 4)).round(), 4)
    ridge = torch.zeros_like(strength, dtype=torch.bool)
    for k, (x, y) in enumerate(((1, 0), (1, 1), (0, 1), (-1, 1))):
        largest = (strength > shifted(x, y)) & (strength >= shifted(-x, -y))
        ridge |= (sector == k) & largest
    return ridge


def _connect(strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """(B, H, W) the weak pixels that hang together with a strong one."""
    grown = strong & weak
    while True:
        spread = F.max_pool2d(grown.float()[:, None], 3, 1, 1)[:, 0] > 0
        following = spread & weak
        if following.equal(grown):
            return grown
        grown = following
