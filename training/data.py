"""What the bundled model is taught: facts, the sentences that state them, and pictures that show them.

A fact is five words: colour, shape, background, size, position. Every eighth fact (by hash) is held out: training never
draws it, evaluation and the tests draw only those. The renderer works in batches of signed distances, in picture
coordinates (pixels, y down). Knows nothing about models or tokens; torch is imported by the renderer alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 160, 70),
    "blue": (35, 75, 215),
    "yellow": (250, 225, 40),
    "black": (15, 15, 18),
    "white": (245, 245, 245),
    "orange": (245, 135, 15),
    "purple": (140, 45, 180),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.30, "normal": 0.44, "large": 0.60}  # diameter / shorter side
POSITIONS = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "center": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
MARGIN = 0.04  # of the shorter side, between an off-centre shape and the edge
STAR_INNER = 0.45  # inner radius / outer radius
# half width and half height of the bounding box, in radii
EXTENT = {"circle": (1.0, 1.0), "square": (0.90, 0.90), "triangle": (1.08, 0.95), "star": (1.094, 1.04)}
SYNONYMS = {"small": ("little", "tiny"), "normal": ("",), "large": ("big", "huge")}
OPENINGS = ("",) * 6 + ("a picture of ", "an image of ", "a drawing of ", "a photo of ")
RATIOS = {"1:1": (1, 1), "16:9": (16, 9), "9:16": (9, 16)}


@dataclass(frozen=True, order=True)
class Fact:
    """What one picture shows."""

    colour: str
    shape: str
    background: str
    size: str = "normal"
    position: str = "center"

    @property
    def hash(self) -> int:
        """A number that depends on the five words alone: the same on every machine."""
        text = "|".join((self.colour, self.shape, self.background, self.size, self.position))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def held_out(self) -> bool:
        """True for the facts that training never draws."""
        return self.hash % 8 == 0


def all_facts() -> list[Fact]:
    """Every fact: 8 colours on 7 others, 4 shapes, 3 sizes, 9 positions."""
    words = itertools.product(COLOURS, SHAPES, COLOURS, SIZES, POSITIONS)
    return [Fact(*w) for w in words if w[0] != w[2]]


def held_out_facts(count: int | None = None) -> list[Fact]:
    """The first `count` held-out facts in hash order (all of them: about 750)."""
    return sorted((f for f in all_facts() if f.held_out), key=lambda f: f.hash)[:count]


def default_background(colour: str) -> str:
    """The background when a sentence names none."""
    return "black" if colour == "white" else "white"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(fact: Fact, rng: random.Random | None = None) -> str:
    size = fact.size if rng is None else rng.choice((fact.size, *SYNONYMS[fact.size]))
    return _article(" ".join(w for w in (size.replace("normal", ""), fact.colour, fact.shape) if w))


def _background(fact: Fact) -> str:
    return f"{_article(fact.background)} background"


def prompt(fact: Fact) -> str:
    """The plain sentence: 'a small yellow star at the top left on a black background'."""
    place = "" if fact.position == "center" else f" at the {fact.position}"
    return f"{_noun(fact)}{place} on {_background(fact)}"


def any_prompt(fact: Fact, rng: random.Random) -> str:
    """One of the sentences that state the fact; seven in ten are the plain one."""
    if rng.random() < 0.7:
        text = prompt(fact)
    else:
        noun, background, place = _noun(fact, rng), _background(fact), _place(fact, rng)
        comma = "," if place else ""
        forms = [
            f"{noun}{place} on {background}",
            f"{noun} on {background}{comma}{place}",
            f"{background} with {noun}{place}",
            f"{noun}{place}, {fact.background} background",
        ]
        if fact.background == default_background(fact.colour):
            forms += [f"{noun}{place}"] * 2
        text = rng.choice(OPENINGS) + rng.choice(forms)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def _place(fact: Fact, rng: random.Random) -> str:
    words = fact.position.split()
    if fact.position == "center":
        return rng.choice(("", " in the center", " in the middle", " at the center"))
    if len(words) == 2:
        words[0] = rng.choice((words[0], words[0], {"top": "upper", "bottom": "lower"}[words[0]]))
        return rng.choice((" in the {} corner", " in the {}", " at the {}")).format(" ".join(words))
    return rng.choice((" on the {}", " at the {}", " at the {} edge", " on the {} side")).format(words[0])


def training_fact(rng: random.Random) -> Fact:
    """A random fact that is not held out; small shapes and stars come more often, for they are the hardest."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        if rng.random() < 0.06:
            background = default_background(colour)
        fact = Fact(
            colour,
            rng.choices(SHAPES, (3, 3, 3, 5))[0],
            background,
            rng.choices(list(SIZES), (4, 3, 3))[0],
            rng.choice(list(POSITIONS)),
        )
        if not fact.held_out:
            return fact


def picture_size(longest: int, ratio: str = "1:1") -> tuple[int, int]:
    """(width, height) in pixels: the longest side as asked, the other the multiple of 16 nearest to the ratio."""
    across, down = RATIOS[ratio]
    other = int(longest * min(across, down) / max(across, down) / 16 + 0.5) * 16
    return (longest, other) if across >= down else (other, longest)


def render(facts: list[Fact], size: tuple[int, int], rng: random.Random) -> torch.Tensor:
    """(B, 3, H, W) float32 pictures in [-1, 1]; the rng moves, turns, scales and shades each shape a little."""
    import torch

    width, height = size
    shorter = min(size)
    columns = []
    for fact in facts:
        radius = shorter * SIZES[fact.size] / 2 * rng.uniform(0.97, 1.03)
        half_w, half_h = (radius * e for e in EXTENT[fact.shape])
        right, down = POSITIONS[fact.position]
        x = width / 2 + right * (width / 2 - MARGIN * shorter - half_w) + shorter * rng.uniform(-0.015, 0.015)
        y = height / 2 + down * (height / 2 - MARGIN * shorter - half_h) + shorter * rng.uniform(-0.015, 0.015)
        turn = math.radians(rng.uniform(-4, 4))
        shades = [
            min(255.0, max(0.0, c + rng.uniform(-5, 5)))
            for name in (fact.colour, fact.background)
            for c in COLOURS[name]
        ]
        columns.append([x, y, radius, math.cos(turn), math.sin(turn), SHAPES.index(fact.shape), *shades])
    p = torch.tensor(columns, dtype=torch.float32)[:, :, None, None]  # (B, 12, 1, 1)
    x = torch.arange(width, dtype=torch.float32)[None, None, :] + 0.5 - p[:, 0]
    y = torch.arange(height, dtype=torch.float32)[None, :, None] + 0.5 - p[:, 1]  # (B, H, 1)
    x, y = x * p[:, 3] + y * p[:, 4], y * p[:, 3] - x * p[:, 4]
    distance = torch.stack(_distances(x, y, p[:, 2]))  # (4, B, H, W)
    distance = distance.gather(0, p[None, :, 5].long().expand(1, *distance.shape[1:]))[0]
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    return (p[:, 9:12] + (p[:, 6:9] - p[:, 9:12]) * cover) / 127.5 - 1


def _distances(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
    """Signed distances (B, H, W), negative inside, in the order of SHAPES; each bounding box is centred on 0."""
    import torch

    circle = torch.hypot(x, y) - r
    square = torch.maximum(x.abs(), y.abs()) - 0.9 * r
    slope = math.hypot(1.9, 1.08)  # apex (0, -0.95), base corners (+-1.08, 0.95)
    triangle = torch.maximum(y - 0.95 * r, (x.abs() * 1.9 - (y + 0.95 * r) * 1.08) / slope)
    outer = 1.15 * r
    up = -(y - 0.11 * r)  # a star reaches 1 up but 0.809 down
    angle = torch.atan2(x, up)  # 0 at the top
    wedge = math.pi / 5
    folded = (torch.remainder(angle, 2 * wedge) - wedge).abs()  # 0 at an inner corner, wedge at a point
    radius = torch.hypot(x, up)
    along, across = radius * torch.cos(folded), radius * torch.sin(folded)
    inner = STAR_INNER * outer  # the edge runs from (inner, 0) to outer * (cos wedge, sin wedge)
    edge_x, edge_y = outer * math.cos(wedge) - inner, outer * math.sin(wedge)
    star = ((along - inner) * edge_y - across * edge_x) / torch.hypot(edge_x, edge_y)
    return [circle, square, triangle, star]
