"""The canvas of Kontext's references: pictures side by side, resized as diffusers resizes one.

numpy and PIL are imported inside functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stitch(pictures: Sequence["np.ndarray"], size: tuple[int, int]) -> "np.ndarray":
    """Return one picture of `size` (width, height) from pictures (H, W, 3) uint8, left to right.

    Each gets the share of the width that it has when all are equally high. Each is resized once.
    """
    import numpy as np
    from PIL import Image

    width, height = size
    ratios = [picture.shape[1] / picture.shape[0] for picture in pictures]
    canvas = np.empty((height, width, 3), np.uint8)
    left = 0
    for k, picture in enumerate(pictures, 1):
        right = round(width * sum(ratios[:k]) / sum(ratios))
        if right > left:  # a very narrow one may have no share
            resized = Image.fromarray(picture).resize(
                (right - left, height), Image.Resampling.LANCZOS
            )
            canvas[:, left:right] = np.asarray(resized)
        left = right
    return canvas
