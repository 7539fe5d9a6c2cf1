"""Sizes of pictures: from an aspect ratio and a longest side to pixels, and which are possible.

Sizes are (width, height) in pixels, both multiples of 16: the VAE divides them by 8, and the
transformer packs 2x2 patches of that. Stdlib only.
"""

import math
import re
from collections.abc import Sequence

from fluxcli.errors import UsageError

ASPECT_RATIOS = (
    "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21",
)  # fmt: skip
MULTIPLE_PX = 16
MIN_SIZE_PX = 64
MAX_SIZE_PX = 4096
MAX_AREA_PX = 8 * 1024 * 1024
MAX_RATIO = 4
RATIO = re.compile(r"(\d{1,5}(?:\.\d{1,4})?):(\d{1,5}(?:\.\d{1,4})?)")

# Those that Kontext was trained at (BFL's `util.py`, and PREFERRED_KONTEXT_RESOLUTIONS in
# diffusers' pipeline_flux_kontext.py), all of about a megapixel.
KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184),
    (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752),
    (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip
KONTEXT_AREA_PX = 1024 * 1024
# A picture of fewer pixels gets its references in about as many: a quick look is to be quick.
QUICK_AREA_PX = KONTEXT_AREA_PX // 2

PIXELS = re.compile(r"(\d{1,5})\s*[xX*\u00d7]\s*(\d{1,5})")  # the last is a multiplication sign


def parse_ratio(text: str, *, where: str = "--ar") -> tuple[float, float]:
    """Parse W:H, such as 16:9 or 2.39:1, into (W, H).

    Raises `UsageError`, which names `where` the text stood, for anything that is no ratio from
    1:4 to 4:1.
    """
    match = RATIO.fullmatch(text)
    wide = float(match[1]) if match else 0.0
    high = float(match[2]) if match else 0.0
    if not wide or not high:
        raise UsageError(
            "aspect ratio not possible",
            which=where,
            why=f"{text[:60]!r} is not W:H",
            hint=" ".join(ASPECT_RATIOS),
        )
    if max(wide, high) > MAX_RATIO * min(wide, high):
        limit = f"{MAX_RATIO}:1" if wide > high else f"1:{MAX_RATIO}"
        raise UsageError(
            "aspect ratio not possible",
            which=where,
            why=f"{text[:60]} is beyond {limit}",
            hint=" ".join(ASPECT_RATIOS),
        )
    return wide, high


def size_of(aspect_ratio: str, image_size_px: int) -> tuple[int, int]:
    """Return (width, height) of a ratio: the longest side is exactly `image_size_px`.

    The other side is the multiple of 16 that is nearest to the ratio, at least 16.
    """
    wide, high = parse_ratio(aspect_ratio)
    exact = image_size_px * min(wide, high) / max(wide, high)
    other = _round_side(exact)
    if wide >= high:
        return image_size_px, other
    return other, image_size_px


def parse_size(text: str) -> tuple[int, int] | None:
    """Return (width, height) of a text like 1024x768; None for any other."""
    match = PIXELS.fullmatch(text.strip())
    return (int(match[1]), int(match[2])) if match else None


def add_other_side(aspect_ratio: str, *, width: int | None, height: int | None) -> tuple[int, int]:
    """Return (width, height) of a ratio of which one side is given.

    The other one is the multiple of 16 that is nearest to the ratio, at least 16.
    """
    wide, high = parse_ratio(aspect_ratio)
    if width is not None:
        return width, _round_side(width * high / wide)
    assert height is not None
    return _round_side(height * wide / high), height


def size_like(width: int, height: int, *, area_px: int) -> tuple[int, int]:
    """Return the size of about `area_px` pixels with the ratio of (width, height), of any size.

    Both sides are the multiples of 16 that are nearest to it. Neither passes the longest side that
    a picture can have, nor does rounding lead beyond 4:1. A ratio that is beyond it stays so.
    """
    scale = min(math.sqrt(area_px / (width * height)), MAX_SIZE_PX / max(width, height))
    wide = _round_side(width * scale)
    high = _round_side(height * scale)
    if max(width, height) <= MAX_RATIO * min(width, height):
        wide = min(wide, MAX_RATIO * high)
        high = min(high, MAX_RATIO * wide)
    return wide, high


def _round_side(exact_px: float) -> int:
    return max(MULTIPLE_PX, int(exact_px / MULTIPLE_PX + 0.5) * MULTIPLE_PX)


def check_side(value: int, *, least_px: int, where: str) -> None:
    """Raise `UsageError` with the nearest possible values for a side that no picture can have."""
    if least_px <= value <= MAX_SIZE_PX and value % MULTIPLE_PX == 0:
        return
    multiple_below = value // MULTIPLE_PX * MULTIPLE_PX
    below = min(max(multiple_below, least_px), MAX_SIZE_PX - MULTIPLE_PX)
    raise UsageError(
        "size not possible",
        which=where,
        why=(
            f"{str(value)[:20]} is no multiple of {MULTIPLE_PX} from {least_px} to {MAX_SIZE_PX}; "
            f"the nearest are {below} and {below + MULTIPLE_PX}"
        ),
    )


def check_size(width: int, height: int, *, aspect_ratio: str | None) -> None:
    """Raise `UsageError` if no picture can have these two sides.

    `aspect_ratio` is the ratio that they were rounded from; None if they were asked for as they
    are. The hint for a picture with too many pixels is the largest one of the same shape.
    """
    which = f"{width}x{height}"
    if max(width, height) < MIN_SIZE_PX:
        why = f"the longest side is below {MIN_SIZE_PX}"
        hint = f"--size {MIN_SIZE_PX}"
        raise UsageError("size not possible", which=which, why=why, hint=hint)
    if not aspect_ratio and max(width, height) > MAX_RATIO * min(width, height):
        why = f"it is beyond {MAX_RATIO}:1"
        hint = f"--ar {MAX_RATIO}:1 or 1:{MAX_RATIO}"
        raise UsageError("size not possible", which=which, why=why, hint=hint)
    if width * height > MAX_AREA_PX:
        wide, high = _largest_size(aspect_ratio or f"{width}:{height}")
        options = f"--width {wide} --height {high}"
        if aspect_ratio:
            options = f"--size {max(wide, high)}"
        raise UsageError(
            "size not possible",
            which=which,
            why=f"{width * height:,} pixels are more than {MAX_AREA_PX:,}",
            hint=f"{options} is the largest",
        )


def _largest_size(aspect_ratio: str) -> tuple[int, int]:
    """Return the largest (width, height) of a ratio whose area is allowed."""
    side = MAX_SIZE_PX
    while True:
        width, height = size_of(aspect_ratio, side)
        if width * height <= MAX_AREA_PX:
            return width, height
        side -= MULTIPLE_PX


def fit_kontext(size: tuple[int, int], area_px: int) -> tuple[int, int]:
    """Return (width, height) of what Kontext makes of a picture of this size.

    At `area_px` of a megapixel it is the preferred size whose ratio is nearest, as diffusers
    chooses it, else multiples of 16 in its ratio at about so many pixels.
    """
    # diffusers looks at whole tokens
    width, height = (max(side // MULTIPLE_PX, 1) for side in size)
    return _scale(_find_preferred(width / height), area_px)


def fit_references(sizes: Sequence[tuple[int, int]], area_px: int) -> tuple[int, int]:
    """Return (width, height) of the canvas that takes Kontext's references of these sizes.

    Several stand side by side, in one height; those that are wider together than any preferred size
    keep their ratio. `area_px` are the pixels of the picture that is drawn.
    """
    area_px = area_px if area_px < QUICK_AREA_PX else KONTEXT_AREA_PX
    if len(sizes) == 1:
        return fit_kontext(sizes[0], area_px)
    ratio = sum(width / height for width, height in sizes)
    preferred = _find_preferred(ratio)
    if preferred == KONTEXT_SIZES[-1]:
        exact = (KONTEXT_AREA_PX * ratio) ** 0.5, (KONTEXT_AREA_PX / ratio) ** 0.5
        return _scale(exact, area_px)
    return _scale(preferred, area_px)


def _find_preferred(ratio: float) -> tuple[int, int]:
    _, width, height = min((abs(ratio - wide / high), wide, high) for wide, high in KONTEXT_SIZES)
    return width, height


def _scale(size: tuple[float, float], area_px: int) -> tuple[int, int]:
    """Return a size of about a megapixel at another area."""
    factor = (area_px / KONTEXT_AREA_PX) ** 0.5
    return _round_side(size[0] * factor), _round_side(size[1] * factor)
