"""Edges of a photo, white on black, by Canny's method: what ControlNets of kind canny are shown.

Gaussian, gradient, thinning to its ridges, and two thresholds (Canny 1986, "A Computational
Approach to Edge Detection"). Pixels are arrays (H, W, 3) or (H, W) of uint8. numpy is imported
inside functions.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# The thresholds that OpenCV's examples and diffusers' use, of a Sobel gradient |dx| + |dy|.
LOW = 100.0
HIGH = 200.0
SIGMA_PX = 1.0  # that of training/edges.py; OpenCV leaves blurring to its caller
# tan 22.5 and tan 67.5 degrees: between them a gradient is diagonal.
FLAT = 0.41421356
STEEP = 2.41421356
# Of a map of edges: pixels are within so many levels of black or white, few are white, none is
# coloured. A JPEG or a resized map has some that are not.
MAP_LEVELS = 32
MAP_SHARE = 0.9
MAP_DARK_SHARE = 0.6
GRAY_LEVELS = 16
GRAY_SHARE = 0.99


def find_edges(
    pixels: "np.ndarray", *, low: float = LOW, high: float = HIGH, sigma_px: float = SIGMA_PX
) -> "np.ndarray":
    """Return the edges of a picture (H, W, 3) as (H, W) of 0 and 255.

    An edge begins where the gradient is more than `high`, and goes on while it is more than `low`.
    Of the three colours the strongest gradient counts, as in OpenCV: red on green of the same
    brightness has an edge.
    """
    import numpy as np

    across, down = _differentiate(_blur(pixels.astype(np.float32), sigma_px))
    strengths = abs(across) + abs(down)
    strongest = strengths.argmax(axis=2)[..., None]
    across, down, strength = (
        np.take_along_axis(values, strongest, axis=2)[..., 0]
        for values in (across, down, strengths)
    )
    ridges = _thin(strength, across, down)
    strong = ridges & (strength > high)
    return _grow(strong, ridges & (strength > low)).astype(np.uint8) * 255


def is_gray(pixels: "np.ndarray") -> bool:
    """Whether a picture (H, W, 3) has no colours, as maps of depth and edges have none."""
    spread = pixels.max(axis=2).astype(int) - pixels.min(axis=2)
    return bool((spread <= GRAY_LEVELS).mean() >= GRAY_SHARE)


def is_edge_map(pixels: "np.ndarray") -> bool:
    """Whether a picture (H, W, 3) is a ready map: white lines on black, and nothing else."""
    if not is_gray(pixels):
        return False
    levels = pixels.max(axis=2)
    dark = (levels <= MAP_LEVELS).mean()
    bright = (levels >= 255 - MAP_LEVELS).mean()
    return bool(bright > 0 and dark >= MAP_DARK_SHARE and dark + bright >= MAP_SHARE)


def _blur(colours: "np.ndarray", sigma_px: float) -> "np.ndarray":
    """Return (H, W, 3) convolved with a Gaussian; a picture goes on beyond its border."""
    import numpy as np

    radius = int(3 * sigma_px + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma_px**2)).astype(np.float32)
    weights /= weights.sum()
    for axis in (0, 1):
        length = colours.shape[axis]
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (radius, radius)
        padded = np.pad(colours, padding, mode="edge")
        colours = np.zeros_like(colours)
        for first, weight in enumerate(weights):
            colours += weight * padded.take(range(first, first + length), axis=axis)
    return colours


def _differentiate(colours: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
    """Return the derivatives (H, W, 3) to the right and downwards, by Sobel's operator."""
    import numpy as np

    padded = np.pad(colours, ((1, 1), (1, 1), (0, 0)), mode="edge")
    columns = padded[:, 2:] - padded[:, :-2]
    rows = padded[2:] - padded[:-2]
    across = columns[:-2] + 2 * columns[1:-1] + columns[2:]
    down = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
    return across, down


def _thin(strength: "np.ndarray", across: "np.ndarray", down: "np.ndarray") -> "np.ndarray":
    """Return where (H, W) the strength is greatest along the gradient: non-maximum suppression.

    Of two neighbours that are equally strong the second is left out.
    """
    import numpy as np

    padded = np.pad(strength, 1)

    def look(row: int, column: int) -> "np.ndarray":
        height, width = strength.shape
        return padded[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    is_level = abs(down) < FLAT * abs(across)
    is_upright = abs(down) > STEEP * abs(across)
    is_falling = across * down > 0  # towards the lower right
    directions = [is_level, is_upright, is_falling]
    before = np.select(directions, [look(0, -1), look(-1, 0), look(-1, -1)], look(-1, 1))
    behind = np.select(directions, [look(0, 1), look(1, 0), look(1, 1)], look(1, -1))
    return (strength > before) & (strength >= behind)


def _grow(strong: "np.ndarray", weak: "np.ndarray") -> "np.ndarray":
    """Return the pixels of `weak` that touch `strong` ones, or others that do: hysteresis."""
    import numpy as np

    height, width = strong.shape
    found = np.pad(strong, 1)
    open_ = np.pad(weak, 1)
    around = np.array([r * (width + 2) + c for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c])
    flat = found.ravel()
    left = open_.ravel()
    front = np.flatnonzero(flat)
    while front.size:
        touched = np.unique((front[:, None] + around).ravel())
        front = touched[left[touched] & ~flat[touched]]
        flat[front] = True
    return found[1 : 1 + height, 1 : 1 + width]
