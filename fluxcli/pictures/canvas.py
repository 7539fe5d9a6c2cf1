"""What a picture from a picture is drawn on: the input at its size, and where it is painted.

Pixels are arrays (H, W, 3) of uint8, RGB; masks (H, W) of bool, True where something is painted;
sizes (width, height). A mask is black or white by the rule of diffusers' `VaeImageProcessor`:
resized, made grey, white from 128 on. numpy and PIL are imported inside functions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fluxcli.errors import BadInputFile
from fluxcli.pictures.inputs import InputPictures, resize
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.inputs import Expand
from fluxcli.request.sizes import MULTIPLE_PX, size_like

if TYPE_CHECKING:
    import numpy as np

WHITE = 128  # of 255: from here on a mask is white


@dataclass(frozen=True)
class Box:
    """A part of a picture: from (left, top) to before (right, bottom)."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top


@dataclass(frozen=True)
class Canvas:
    """The input at the size that is drawn; `mask` None paints all of it."""

    pixels: "np.ndarray"
    mask: "np.ndarray | None"

    @property
    def size(self) -> tuple[int, int]:
        height, width, _ = self.pixels.shape
        return width, height


def load_canvas(inputs: InputPictures, request: GenerationRequest) -> Canvas:
    """Return what a request with an `image` is drawn on.

    Raises `BadInputFile` for a file that cannot be read any more.
    """
    assert inputs.image, "a request without a picture has no canvas"
    return make_canvas(
        inputs.image.read_pixels(),
        inputs.mask.read_pixels() if inputs.mask else None,
        size=request.size,
        invert=request.mask_invert,
        expand=request.expand,
    )


def make_canvas(
    image: "np.ndarray",
    mask: "np.ndarray | None" = None,
    *,
    size: tuple[int, int],
    invert: bool = False,
    expand: Expand | None = None,
) -> Canvas:
    """Return the input, resized to `size`, and where it is painted.

    With `expand` the input takes its share of the canvas, and what is around it is painted: there
    its edge is repeated, which a model sees where `strength` leaves something of it. `invert` turns
    the mask (h, w, 3) round, before anything is around it.
    """
    import numpy as np

    place = Box(0, 0, *size)
    if expand:
        height, width, _ = image.shape
        place = place_input((width, height), expand, size=size)
    painted = None
    if mask is not None:
        painted = read_mask(mask, place.size, invert=invert)
    pixels = resize(image, place.size)
    if expand:
        if painted is None:
            painted = np.zeros(pixels.shape[:2], bool)
        width, height = size
        around = ((place.top, height - place.bottom), (place.left, width - place.right))
        painted = np.pad(painted, around, constant_values=True)
        pixels = np.pad(pixels, (*around, (0, 0)), mode="edge")
    return Canvas(pixels, painted)


def grow(size: tuple[int, int], expand: Expand | None) -> tuple[int, int]:
    """Return the size that a picture has with what is painted around it, in its own pixels."""
    width, height = size
    if expand is None:
        return size
    return width + expand.left + expand.right, height + expand.top + expand.bottom


def describe_fit(inputs: InputPictures, request: GenerationRequest) -> list[str]:
    """Return what is said of an `image` that is drawn at another size than it has."""
    if inputs.image is None:
        return []
    size = grow(inputs.image.size, request.expand)
    if size == request.size:
        return []
    described = f"{inputs.image.path} is {_name(inputs.image.size)}"
    if request.expand:
        described += f", {_name(size)} with what is painted around it"
    width, height = request.size
    wide, high = size_like(*size, area_px=width * height)
    if max(abs(wide - width), abs(high - height)) > MULTIPLE_PX:
        return [f"{described}: squeezed to {_name(request.size)}, which has another ratio"]
    return [f"{described}: drawn at {_name(request.size)}"]


def describe_mask(inputs: InputPictures, request: GenerationRequest) -> list[str]:
    """Return what is said of a mask that keeps nothing; raises `BadInputFile` where all is kept.

    With `expand` something is painted in any case.
    """
    if inputs.mask is None or request.expand:
        return []
    white = read_mask(inputs.mask.read_pixels(), request.size, invert=request.mask_invert)
    if white.all():
        return [f"{inputs.mask.path}: all of the picture is painted, nothing of it is kept"]
    if not white.any():
        painted = "white"
        hint = "white is painted; --mask-invert paints the black"
        if request.mask_invert:
            painted = "black"
            hint = "leave --mask-invert out"
        why = f"at {_name(request.size)} none of it is {painted}"
        raise BadInputFile("nothing would be painted", inputs.mask.path, why=why, hint=hint)
    return []


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def place_input(input_size: tuple[int, int], expand: Expand, *, size: tuple[int, int]) -> Box:
    """Return where in a canvas of `size` an input is that grows by `expand` of its own pixels."""
    width, height = size
    left, right = _share(width, before=expand.left, own=input_size[0], after=expand.right)
    top, bottom = _share(height, before=expand.top, own=input_size[1], after=expand.bottom)
    return Box(left, top, right, bottom)


def _share(side: int, *, before: int, own: int, after: int) -> tuple[int, int]:
    """Return where the middle one of three lengths begins and ends on a side; it has a pixel."""
    scale = side / (before + own + after)
    begin = min(round(before * scale), side - 1)
    end = max(round((before + own) * scale), begin + 1)
    return begin, end


def read_mask(mask: "np.ndarray", size: tuple[int, int], *, invert: bool) -> "np.ndarray":
    """Return where a mask (h, w, 3) is white at `size`; black, with `invert`."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray(resize(mask, size), "RGB").convert("L")
    white: np.ndarray = np.asarray(grey) >= WHITE
    return ~white if invert else white


def paste(drawn: "np.ndarray", canvas: Canvas, *, feather_px: int = 0) -> "np.ndarray":
    """Return what was drawn with the input where the mask is black, to the last bit.

    `feather_px` lets the input fade out over so many pixels inside the white, so that no black
    pixel changes with it.
    """
    import numpy as np

    if canvas.mask is None:
        return drawn
    if not feather_px:
        return np.where(canvas.mask[:, :, None], drawn, canvas.pixels)
    share = _soften(canvas.mask, feather_px)[:, :, None]
    mixed: np.ndarray = canvas.pixels + share * (drawn.astype(np.float32) - canvas.pixels)
    return mixed.round().astype(np.uint8)


def _soften(mask: "np.ndarray", feather_px: int) -> "np.ndarray":
    """Return how much of each pixel (H, W) is painted, 0 to 1: 0 in the black, rising inside.

    At a straight edge half of the square around a pixel is white, and all of it `feather_px`
    inside: what is above a half, doubled, rises evenly between.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    levels = Image.fromarray(mask.astype(np.uint8) * 255, "L")
    blurred = np.asarray(levels.filter(ImageFilter.BoxBlur(feather_px)), np.float32) / 255
    return np.where(mask, (2 * blurred - 1).clip(0, 1), 0)
