"""Says whether a picture shows a fact, from its pixels alone.

Shares no code with the renderer: colours are judged by the nearest of its own named colours, the
shape by overlap with polygons drawn by Pillow (the best must be the right one, and must overlap
well: any blob passes for a circle otherwise), the position by where the shape lies between the
edges. numpy and Pillow only.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from training.data import Fact

ATTRIBUTES = ("background", "colour", "position", "size", "shape")
NAMED = {
    "red": (220, 30, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (250, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "orange": (245, 135, 20),
    "purple": (140, 50, 180),
}
FAR = 70.0  # RGB distance: further than this from every named colour has no name
STANDS_OUT = 60.0  # RGB distance from the background that makes a pixel part of the shape
MIN_OVERLAP = 0.80  # intersection over union
TURNS = (-6, -3, 0, 3, 6)  # degrees
# square root of the area over the nominal diameter; limits between the sizes, as shares of the
# shorter side
SPAN = {"circle": 0.886, "square": 0.90, "triangle": 0.716, "star": 0.664}
LIMITS = (0.363, 0.514)
OUTLINES = ("black", "white", "red")  # an outline has the first of these that a fact doesn't name
LINE = (0.02, 0.045)  # depths below a silhouette's edge that an outline fills, of the shorter side
RIM = 0.08  # of the shorter side: so near the picture's edge an outline may be cut off
DEEP = 0.7  # of the greatest depth: the fill's colour is looked for below it
MIN_LINE = 0.6  # share of the pixels in LINE that must have the outline's colour


def name_of(rgb: np.ndarray) -> str | None:
    """The nearest named colour, None if even that is far."""
    name = min(NAMED, key=lambda each: math.dist(rgb, NAMED[each]))
    return name if math.dist(rgb, NAMED[name]) <= FAR else None


def split(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(background RGB, shape RGB or None, mask (H, W) of the shape) of an (H, W, 3) picture."""
    pixels = pixels.astype(np.float64)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    ring = np.concatenate([side.reshape(-1, 3) for side in sides])
    background = np.median(ring, axis=0)
    away = np.linalg.norm(pixels - background, axis=2)
    stands_out = away > STANDS_OUT
    if stands_out.sum() < 20:
        return background, None, np.zeros(away.shape, bool)
    inside = away > max(STANDS_OUT, 0.7 * np.percentile(away[stands_out], 90))
    shape = np.median(pixels[inside], axis=0)
    axis = shape - background
    mask = (pixels - background) @ axis > 0.5 * (axis @ axis)
    return background, shape, mask


def outline(shape: str, turn: float) -> np.ndarray:
    """(N, 2) corner points around the origin, y down, turned by so many degrees."""
    if shape == "triangle":
        points = np.array([(0, -1.9), (1.08, 0), (-1.08, 0)])
    elif shape == "square":
        points = _spread(np.ones(4), 45)
    elif shape == "star":
        points = _spread(np.tile((1.0, 0.45), 5), -90)
    else:
        points = _spread(np.ones(72), -90)
    a = math.radians(turn)
    return points @ np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))])


def _spread(radii: np.ndarray, first: float) -> np.ndarray:
    """(N, 2) points at these radii (N,), evenly around the origin from `first` degrees on."""
    angles = np.radians(np.arange(len(radii)) * 360 / len(radii) + first)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]


def overlap(mask: np.ndarray, shape: str, turn: float) -> float:
    """Intersection over union of the mask and a template of the same area and centre of mass."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    points = outline(shape, turn)
    area, center = _area_and_center(points)
    scale = math.sqrt(len(rows) / area)
    points = (points - center) * scale + (columns.mean() + 0.5, rows.mean() + 0.5)
    zoom = 4
    canvas = Image.new("L", (width * zoom, height * zoom))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points * zoom - 0.5], fill=255)
    template = np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) >= 128
    return float((mask & template).sum() / max(1, (mask | template).sum()))


def _area_and_center(points: np.ndarray) -> tuple[float, np.ndarray]:
    """Area and centre of mass (x, y) of a polygon of corners (N, 2), by the shoelace formula."""
    x, y = points.T
    next_x = np.roll(x, -1)
    next_y = np.roll(y, -1)
    cross = x * next_y - next_x * y
    area = cross.sum() / 2
    moments = np.array([((x + next_x) * cross).sum(), ((y + next_y) * cross).sum()])
    return abs(area), moments / (6 * area)


def shape_of(mask: np.ndarray) -> tuple[str | None, float]:
    """(best shape, its overlap); None where no template overlaps by MIN_OVERLAP."""
    shares = {shape: max(overlap(mask, shape, turn) for turn in TURNS) for shape in SPAN}
    best = max(shares, key=shares.__getitem__)
    return (best if shares[best] >= MIN_OVERLAP else None), shares[best]


def position_of(mask: np.ndarray) -> str:
    """'top left' ... 'center' from the shape's bounding box without its outermost 1 % of pixels."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    top, bottom = np.quantile(rows, (0.005, 0.995))
    left, right = np.quantile(columns, (0.005, 0.995))
    words = [
        _place(top, bottom + 1, length=height, names=("top", "bottom")),
        _place(left, right + 1, length=width, names=("left", "right")),
    ]
    return " ".join(word for word in words if word) or "center"


def _place(low: float, high: float, *, length: int, names: tuple[str, str]) -> str:
    """The name of the edge that the shape is near, or nothing.

    Its gaps to both edges say so, whatever its size: which third of the free way it lies in.
    """
    free = length - (high - low)
    if free <= 0:
        return ""
    share = low / free
    if share < 0.29:
        return names[0]
    if share > 0.71:
        return names[1]
    return ""


def size_of(mask: np.ndarray, shape: str) -> str:
    """small, normal or large, by the area that a shape of that kind has."""
    span = math.sqrt(mask.sum()) / SPAN[shape] / min(mask.shape)
    if span < LIMITS[0]:
        return "small"
    if span < LIMITS[1]:
        return "normal"
    return "large"


def outline_of(pixels: np.ndarray) -> tuple[str | None, str | None, np.ndarray]:
    """(outline's colour or None, fill's colour or None, silhouette (H, W)) of (H, W, 3) pixels.

    The silhouette is what differs from the background. An outline is a band of one named colour
    along its edge that is neither the fill's nor the background's.
    """
    pixels = pixels.astype(np.float64)
    background, _, _ = split(pixels)
    mask = _filled(np.linalg.norm(pixels - background, axis=2) > STANDS_OUT)
    if mask.sum() < 20:
        return None, None, mask
    depth = _depth(mask)
    fill = name_of(np.median(pixels[depth > DEEP * depth.max()], axis=0))
    low, high = (share * min(mask.shape) for share in LINE)
    rim = round(RIM * min(mask.shape))
    band = np.zeros_like(mask)
    band[rim:-rim, rim:-rim] = ((depth >= low) & (depth <= high))[rim:-rim, rim:-rim]
    band = pixels[band]
    if not len(band):
        return None, fill, mask
    line = name_of(np.median(band, axis=0))
    if line is None or line in (fill, name_of(background)):
        return None, fill, mask
    near = np.linalg.norm(band - NAMED[line], axis=1) <= 1.3 * FAR
    return (line if near.mean() >= MIN_LINE else None), fill, mask


def _filled(mask: np.ndarray) -> np.ndarray:
    """(H, W) the mask and its holes: all that is not reached from outside the picture."""
    blocked = np.pad(mask, 1)
    reached = np.zeros_like(blocked)
    reached[0] = reached[-1] = reached[:, 0] = reached[:, -1] = True
    while True:
        spread = reached.copy()
        spread[1:] |= reached[:-1]
        spread[:-1] |= reached[1:]
        spread[:, 1:] |= reached[:, :-1]
        spread[:, :-1] |= reached[:, 1:]
        spread &= ~blocked
        if (spread == reached).all():
            return ~reached[1:-1, 1:-1]
        reached = spread


def _depth(mask: np.ndarray) -> np.ndarray:
    """(H, W) how many times a pixel survives when the mask loses its outermost pixels.

    The cross and the square take turns, which comes near the Euclidean distance. The mask ends
    where the picture does.
    """
    depth = np.zeros(mask.shape, int)
    left = mask.copy()
    while left.any():
        depth += left
        padded = np.pad(left, 1)
        middle = padded[1:-1, 1:-1]
        rows = padded[:-2, 1:-1] & padded[2:, 1:-1]
        columns = padded[1:-1, :-2] & padded[1:-1, 2:]
        smaller = middle & rows & columns
        if depth.max() % 2 == 0:
            corners = padded[:-2, :-2] & padded[:-2, 2:] & padded[2:, :-2] & padded[2:, 2:]
            smaller &= corners
        left = smaller
    return depth


def check_outlined(image: Image.Image, fact: "Fact") -> dict[str, bool]:
    """Whether a picture shows an outline, in the fact's outline colour, and its other words.

    Shape and position are those of the silhouette; its size is not judged, for an outline lies
    partly outside the shape.
    """
    pixels = np.asarray(image.convert("RGB"))
    line, fill, mask = outline_of(pixels)
    background, _, _ = split(pixels)
    wanted = next(name for name in OUTLINES if name not in (fact.colour, fact.background))
    return {
        "any outline": line is not None,
        "outline": line == wanted,
        "background": name_of(background) == fact.background,
        "colour": fill == fact.colour,
        "position": bool(mask.any()) and position_of(mask) == fact.position,
        "shape": bool(mask.any()) and shape_of(mask)[0] == fact.shape,
    }


def check(image: Image.Image, fact: "Fact") -> dict[str, bool]:
    """Which of the five words of the fact the picture shows."""
    background, shape, mask = split(np.asarray(image.convert("RGB")))
    seen = dict.fromkeys(ATTRIBUTES, False)
    seen["background"] = name_of(background) == fact.background
    if shape is None or not mask.any():
        return seen
    seen["colour"] = name_of(shape) == fact.colour
    seen["position"] = position_of(mask) == fact.position
    seen["size"] = size_of(mask, fact.shape) == fact.size
    seen["shape"] = shape_of(mask)[0] == fact.shape
    return seen
