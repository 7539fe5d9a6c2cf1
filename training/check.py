"""Says whether a picture shows a fact, from its pixels alone.

Shares no code with the renderer: colours are judged by the nearest of its own named colours, the shape
by overlap with polygons drawn by Pillow (the best must be the right one, and must overlap well: any blob passes for a
circle otherwise), the position by where the shape lies between the edges. numpy and Pillow only.
"""

from __future__ import annotations

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
# square root of the area over the nominal diameter; limits between the sizes, as shares of the shorter side
SPAN = {"circle": 0.886, "square": 0.90, "triangle": 0.716, "star": 0.664}
LIMITS = (0.363, 0.514)


def name_of(rgb: np.ndarray) -> str | None:
    """The nearest named colour, None if even that is far."""
    name, distance = min(((n, math.dist(rgb, c)) for n, c in NAMED.items()), key=lambda pair: pair[1])
    return name if distance <= FAR else None


def split(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(background RGB, shape RGB or None, mask (H, W) of the shape) of an (H, W, 3) picture."""
    pixels = pixels.astype(np.float64)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    ring = np.concatenate([side.reshape(-1, 3) for side in sides])
    background = np.median(ring, axis=0)
    away = np.linalg.norm(pixels - background, axis=2)
    if (away > STANDS_OUT).sum() < 20:
        return background, None, np.zeros(away.shape, bool)
    shape = np.median(pixels[away > max(STANDS_OUT, 0.7 * np.percentile(away[away > STANDS_OUT], 90))], axis=0)
    axis = shape - background
    mask = (pixels - background) @ axis > 0.5 * (axis @ axis)
    return background, shape, mask


def outline(shape: str, turn: float) -> np.ndarray:
    """(N, 2) corner points around the origin, y down, turned by so many degrees."""
    if shape == "triangle":
        points = np.array([(0, -1.9), (1.08, 0), (-1.08, 0)])
    else:
        corners = {"circle": 72, "square": 4, "star": 10}[shape]
        angles = np.radians(np.arange(corners) * 360 / corners + (45 if shape == "square" else -90))
        radii = np.tile((1.0, 0.45), 5) if shape == "star" else np.ones(corners)
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    a = math.radians(turn)
    return points @ np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))])


def _area_and_center(points: np.ndarray) -> tuple[float, np.ndarray]:
    x, y = points.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    return abs(area), np.array([((x + np.roll(x, -1)) * cross).sum(), ((y + np.roll(y, -1)) * cross).sum()]) / (
        6 * area
    )


def overlap(mask: np.ndarray, shape: str, turn: float) -> float:
    """Intersection over union of the mask and a template of the same area and centre of mass."""
    rows, columns = np.nonzero(mask)
    points = outline(shape, turn)
    area, center = _area_and_center(points)
    scale = math.sqrt(len(rows) / area)
    points = (points - center) * scale + (columns.mean() + 0.5, rows.mean() + 0.5)
    zoom = 4
    canvas = Image.new("L", (mask.shape[1] * zoom, mask.shape[0] * zoom))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points * zoom - 0.5], fill=255)
    template = np.asarray(canvas.resize((mask.shape[1], mask.shape[0]), Image.Resampling.BOX)) >= 128
    return float((mask & template).sum() / max(1, (mask | template).sum()))


def shape_of(mask: np.ndarray) -> tuple[str | None, float]:
    """(best shape, its overlap); None where no template overlaps by MIN_OVERLAP."""
    best, share = max(((s, overlap(mask, s, turn)) for s in SPAN for turn in TURNS), key=lambda pair: pair[1])
    return (best if share >= MIN_OVERLAP else None), share


def _place(low: float, high: float, length: int, names: tuple[str, str]) -> str:
    """Which third of the free way the shape lies in: its gaps to both edges say so, whatever its size."""
    free = length - (high - low)
    if free <= 0:
        return ""
    share = low / free
    return names[0] if share < 0.29 else names[1] if share > 0.71 else ""


def position_of(mask: np.ndarray) -> str:
    """'top left' ... 'center' from the shape's bounding box without its outermost 1 % of pixels."""
    rows, columns = np.nonzero(mask)
    top, bottom = np.quantile(rows, (0.005, 0.995))
    left, right = np.quantile(columns, (0.005, 0.995))
    words = (
        _place(top, bottom + 1, mask.shape[0], ("top", "bottom")),
        _place(left, right + 1, mask.shape[1], ("left", "right")),
    )
    return " ".join(w for w in words if w) or "center"


def size_of(mask: np.ndarray, shape: str) -> str:
    """small, normal or large, by the area that a shape of that kind has."""
    span = math.sqrt(mask.sum()) / SPAN[shape] / min(mask.shape)
    return "small" if span < LIMITS[0] else "normal" if span < LIMITS[1] else "large"


def check(image: Image.Image, fact: Fact) -> dict[str, bool]:
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
