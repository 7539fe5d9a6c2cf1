"""Control pictures at the size of the picture that they control.

One of the same ratio is resized as diffusers' image processor does, another is cut at the centre
first: stretching it would change the shapes that it is there for. Pixels are arrays (H, W, 3) of
uint8, sizes (width, height) in pixels.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from fluxcli.pictures.inputs import resize
from fluxcli.request.sizes import MAX_RATIO

if TYPE_CHECKING:
    import numpy as np

# Sides are multiples of 16, so that a ratio cannot always be kept: so far apart, two are the same.
SAME_RATIO = 0.03


class Fitted(NamedTuple):
    """A picture at another size, and what was done to it, "" where nothing is to be said."""

    pixels: "np.ndarray"  # (H, W, 3) uint8
    remark: str


def fit_control(
    pixels: "np.ndarray", size: tuple[int, int], *, beside: tuple[int, int] | None = None
) -> Fitted:
    """Return a control picture at a size: cut at the centre to its ratio, and resized.

    One of the ratio of the picture that is started from, whose size is `beside`, is not cut: that
    picture is not either, and the two belong together.
    """
    height, width, _ = pixels.shape
    box = find_box((width, height), size)
    whole = (0, 0, width, height)
    if box == whole or (beside and find_box((width, height), beside) == whole):
        return Fitted(resize(pixels, size), "")
    left, top, right, bottom = box
    lost = f"{left + width - right} px of its width"
    if (left, right) == (0, width):
        lost = f"{top + height - bottom} px of its height"
    remark = f"{width}x{height} is another ratio than {size[0]}x{size[1]}: it lost {lost}"
    if max(width, height) <= MAX_RATIO * min(width, height):
        shared = math.gcd(width, height)
        remark += f" (--ar {width // shared}:{height // shared} keeps them)"
    return Fitted(resize(pixels[top:bottom, left:right], size), remark)


def find_box(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return what stays of a picture for a wanted ratio: (left, top, right, bottom).

    That is all of it where the ratios are nearly the same, else the largest part at its centre.
    """
    width, height = size
    ratio = wanted[0] / wanted[1]
    apart = width / height / ratio
    if 1 / (1 + SAME_RATIO) <= apart <= 1 + SAME_RATIO:
        return 0, 0, width, height
    if apart > 1:
        kept = max(1, round(height * ratio))
        left = (width - kept) // 2
        return left, 0, left + kept, height
    kept = max(1, round(width / ratio))
    top = (height - kept) // 2
    return 0, top, width, top + kept
