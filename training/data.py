"""What the bundled model is taught: facts, the sentences that state them, and pictures that show
them.

A fact is five words: colour, shape, background, size, position. Every eighth fact (by hash) is held
out: training never draws it, evaluation and the tests draw only those. The renderer works in
batches of signed distances, in picture coordinates (pixels, y down). Knows nothing about models or
tokens.
"""

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

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
OUTLINE = (
    0.01,
    0.06,
)  # how far an outline reaches inside and outside the edge, of the shorter side
OUTLINE_COLOURS = ("black", "white", "red")  # the first that the picture does not have yet
OUTLINE_RGB = {name: COLOURS[name] for name in OUTLINE_COLOURS}
# half width and half height of the bounding box, in radii
EXTENT = {
    "circle": (1.0, 1.0),
    "square": (0.90, 0.90),
    "triangle": (1.08, 0.95),
    "star": (1.094, 1.04),
}
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
    every = (
        Fact(*words) for words in itertools.product(COLOURS, SHAPES, COLOURS, SIZES, POSITIONS)
    )
    return [fact for fact in every if fact.colour != fact.background]


def held_out_facts(count: int | None = None) -> list[Fact]:
    """The first `count` held-out facts in hash order (all of them: about 750)."""
    held_out = [fact for fact in all_facts() if fact.held_out]
    return sorted(held_out, key=lambda fact: fact.hash)[:count]


def default_background(colour: str) -> str:
    """The background when a sentence names none."""
    return "black" if colour == "white" else "white"


def prompt(fact: Fact) -> str:
    """The plain sentence: 'a small yellow star at the top left on a black background'."""
    place = "" if fact.position == "center" else f" at the {fact.position}"
    return f"{_noun(fact, fact.size)}{place} on {_background(fact)}"


def any_prompt(fact: Fact, rng: random.Random) -> str:
    """One of the sentences that state the fact; seven in ten are the plain one."""
    text = prompt(fact) if rng.random() < 0.7 else _vary(fact, rng)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def _vary(fact: Fact, rng: random.Random) -> str:
    """Another sentence, in other words and another order."""
    noun = _noun(fact, rng.choice((fact.size, *SYNONYMS[fact.size])))
    background = _background(fact)
    place = _place(fact, rng)
    comma = "," if place else ""
    forms = [
        f"{noun}{place} on {background}",
        f"{noun} on {background}{comma}{place}",
        f"{background} with {noun}{place}",
        f"{noun}{place}, {fact.background} background",
    ]
    if fact.background == default_background(fact.colour):
        forms += [f"{noun}{place}", f"{noun}{place}"]  # twice: it comes twice as often
    return rng.choice(OPENINGS) + rng.choice(forms)


def _noun(fact: Fact, size: str) -> str:
    """'a large red star'; a normal size, or none, is not said."""
    words = [fact.colour, fact.shape]
    if size not in ("", "normal"):
        words.insert(0, size)
    return _with_article(" ".join(words))


def _background(fact: Fact) -> str:
    return f"{_with_article(fact.background)} background"


def _with_article(words: str) -> str:
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def _place(fact: Fact, rng: random.Random) -> str:
    """Where the shape is, in one of several ways, with a space in front; sometimes nothing for the
    center.
    """
    if fact.position == "center":
        return rng.choice(("", " in the center", " in the middle", " at the center"))
    words = fact.position.split()
    if len(words) == 2:
        other = {"top": "upper", "bottom": "lower"}[words[0]]
        words[0] = rng.choice((words[0], words[0], other))
        form = rng.choice((" in the {} corner", " in the {}", " at the {}"))
        return form.format(" ".join(words))
    form = rng.choice((" on the {}", " at the {}", " at the {} edge", " on the {} side"))
    return form.format(words[0])


def training_fact(rng: random.Random) -> Fact:
    """A random fact that is not held out.

    Small shapes and stars come more often, for they are the hardest.
    """
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        if rng.random() < 0.06:
            background = default_background(colour)
        fact = Fact(
            colour=colour,
            shape=rng.choices(SHAPES, (3, 3, 3, 5))[0],
            background=background,
            size=rng.choices(list(SIZES), (4, 3, 3))[0],
            position=rng.choice(list(POSITIONS)),
        )
        if not fact.held_out:
            return fact


def outline_colour(fact: Fact) -> str:
    """The colour of a fact's outline: the first of OUTLINE_COLOURS that the fact does not name."""
    return next(name for name in OUTLINE_COLOURS if name not in (fact.colour, fact.background))


def picture_size(longest: int, ratio: str = "1:1") -> tuple[int, int]:
    """(width, height) in pixels.

    The longest side as asked, the other the multiple of 16 that is nearest to the ratio.
    """
    across, down = RATIOS[ratio]
    other = int(longest * min(across, down) / max(across, down) / 16 + 0.5) * 16
    return (longest, other) if across >= down else (other, longest)


def render(
    facts: list[Fact], size: tuple[int, int], rng: random.Random, *, outlined: bool = False
) -> torch.Tensor:
    """(B, 3, H, W) float32 pictures in [-1, 1].

    The rng moves, turns, scales and shades each shape a little: the same for an outlined picture as
    for a plain one, and the same place and size whatever the colours.
    """
    numbers = [_numbers(fact, size, rng) for fact in facts]
    distance = _distance(numbers, size)[:, None]  # (B, 1, H, W)
    inside_px, outside_px = (share * min(size) if outlined else 0.0 for share in OUTLINE)
    drawn = torch.tensor(numbers, dtype=torch.float32)[:, :, None, None]
    color = drawn[:, 6:9]  # (B, 3, 1, 1)
    if outlined:
        lines = [OUTLINE_RGB[outline_colour(fact)] for fact in facts]
        line = torch.tensor(lines, dtype=torch.float32)[:, :, None, None]
        color = line + (color - line) * (0.5 - distance - inside_px).clamp(0, 1)
    background = drawn[:, 9:12]
    cover = (0.5 - distance + outside_px).clamp(0, 1)
    return (background + (color - background) * cover) / 127.5 - 1


def distances(facts: list[Fact], size: tuple[int, int], rng: random.Random) -> torch.Tensor:
    """(B, H, W) signed pixels to the edge of the shape that `render` draws with such an rng."""
    return _distance([_numbers(fact, size, rng) for fact in facts], size)


def _distance(numbers: list[list[float]], size: tuple[int, int]) -> torch.Tensor:
    """(B, H, W) signed pixels to the edge of each shape, negative inside."""
    width, height = size
    drawn = torch.tensor(numbers, dtype=torch.float32)[:, :, None, None]  # (B, 12, 1, 1)
    center_x, center_y, radius, cos, sin, shape = (drawn[:, i] for i in range(6))  # (B, 1, 1)
    from_x = torch.arange(width, dtype=torch.float32)[None, None, :] + 0.5 - center_x  # (B, 1, W)
    from_y = torch.arange(height, dtype=torch.float32)[None, :, None] + 0.5 - center_y  # (B, H, 1)
    x = from_x * cos + from_y * sin  # (B, H, W)
    y = from_y * cos - from_x * sin
    every = torch.stack(_distances(x, y, radius))  # (4, B, H, W)
    which = shape[None].long().expand(1, *every.shape[1:])
    distance = every.gather(0, which)[0]
    # the lines of a point's two sides meet far outside: its bounding box ends the point
    extents = torch.tensor([EXTENT[name] for name in SHAPES])[drawn[:, 5, 0, 0].long()]
    half_width, half_height = (extents[:, i, None, None] * radius for i in (0, 1))
    return distance.maximum(x.abs() - half_width).maximum(y.abs() - half_height)


def _numbers(fact: Fact, size: tuple[int, int], rng: random.Random) -> list[float]:
    """What is drawn of a fact.

    Centre (x, y) and radius in pixels, cosine and sine of the turn, the number of the shape, RGB of
    the shape and of the background.
    """
    width, height = size
    shorter = min(size)
    radius = shorter * SIZES[fact.size] / 2 * rng.uniform(0.97, 1.03)
    half_width, half_height = (radius * share for share in EXTENT[fact.shape])
    right, down = POSITIONS[fact.position]
    free_x = width / 2 - MARGIN * shorter - half_width
    free_y = height / 2 - MARGIN * shorter - half_height
    x = width / 2 + right * free_x + shorter * rng.uniform(-0.015, 0.015)
    y = height / 2 + down * free_y + shorter * rng.uniform(-0.015, 0.015)
    turn = math.radians(rng.uniform(-4, 4))
    shades = []
    for value in (*COLOURS[fact.colour], *COLOURS[fact.background]):
        shades.append(min(255.0, max(0.0, value + rng.uniform(-5, 5))))
    return [x, y, radius, math.cos(turn), math.sin(turn), SHAPES.index(fact.shape), *shades]


def _distances(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
    """Signed distances (B, H, W), negative inside, in the order of SHAPES.

    Each bounding box is centred on 0.
    """
    circle = torch.hypot(x, y) - r
    square = torch.maximum(x.abs(), y.abs()) - 0.9 * r
    slope = math.hypot(1.9, 1.08)  # apex (0, -0.95), base corners (+-1.08, 0.95)
    triangle = torch.maximum(y - 0.95 * r, (x.abs() * 1.9 - (y + 0.95 * r) * 1.08) / slope)
    outer = 1.15 * r
    up = -(y - 0.11 * r)  # a star reaches 1 up but 0.809 down
    angle = torch.atan2(x, up)  # 0 at the top
    wedge = math.pi / 5
    # 0 at an inner corner, wedge at a point
    folded = (torch.remainder(angle, 2 * wedge) - wedge).abs()
    radius = torch.hypot(x, up)
    along = radius * torch.cos(folded)
    across = radius * torch.sin(folded)
    inner = STAR_INNER * outer  # the edge runs from (inner, 0) to outer * (cos wedge, sin wedge)
    edge_x = outer * math.cos(wedge) - inner
    edge_y = outer * math.sin(wedge)
    star = ((along - inner) * edge_y - across * edge_x) / torch.hypot(edge_x, edge_y)
    return [circle, square, triangle, star]
