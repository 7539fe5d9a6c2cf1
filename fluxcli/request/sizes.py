"""Sizes of pictures: from an aspect ratio and a longest side to pixels, and which are possible.

Sizes are (width, height) in pixels, both multiples of 16: the VAE divides them by 8, and the
transformer packs 2x2 patches of that. Stdlib only.
"""

import re

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
