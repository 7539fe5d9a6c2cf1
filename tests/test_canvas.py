"""Inputs at the size that is drawn: resized, masked, expanded, and pasted back."""

import numpy as np
import pytest

from fluxcli.pictures.canvas import Box, make_canvas, paste, place_input
from fluxcli.request.inputs import Expand
from fluxcli.request.sizes import size_like

PHOTO = (6000, 4000)  # 24 megapixels


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    painter = np.random.default_rng(seed)
    return painter.integers(0, 256, (height, width, 3), dtype=np.uint8)


def half(width: int, height: int) -> np.ndarray:
    """A mask whose right half is white."""
    mask = np.zeros((height, width, 3), np.uint8)
    mask[:, width // 2 :] = 255
    return mask


@pytest.mark.parametrize(
    ("picture", "area_px", "size"),
    [
        (PHOTO, 1024 * 1024, (1248, 832)),
        ((4000, 6000), 1024 * 1024, (832, 1248)),
        ((1, 1), 1024 * 1024, (1024, 1024)),
        ((300, 200), 128 * 128, (160, 112)),
        ((3990, 1000), 1024 * 1024, (2048, 512)),  # 2048x512 by the nearest multiples, too
        ((399, 100), 128 * 128, (256, 64)),
        ((375, 100), 90 * 90, (176, 48)),
        ((395, 100), 88 * 88, (176, 48)),
        ((4000, 1000), 8 * 1024 * 1024, (4096, 1024)),  # no side passes 4096
        ((9000, 1000), 1024 * 1024, (3072, 336)),  # which no picture can have: it is refused later
    ],
)
def test_the_size_follows_the_ratio_at_the_presets_pixels(picture, area_px, size):
    assert size_like(*picture, area_px=area_px) == size


def test_rounding_never_leads_beyond_four_to_one():
    for width in range(100, 401, 7):
        wide, high = size_like(width, 100, area_px=128 * 128)
        assert 1 <= wide / high <= 4
        assert abs(wide * high / 128**2 - 1) < 0.25


def test_an_inverted_mask_is_painted_where_it_was_black():
    mask = half(64, 64)
    white = make_canvas(noise(64, 64), mask, size=(32, 32)).mask
    black = make_canvas(noise(64, 64), mask, size=(32, 32), invert=True).mask
    assert (white ^ black).all() and white[:, 16:].all() and not white[:, :16].any()


def test_where_the_mask_is_black_the_input_stays_to_the_last_bit():
    canvas = make_canvas(noise(100, 60), half(50, 50), size=(64, 48))
    drawn = noise(64, 48, seed=1)
    for feather_px in (0, 1, 5, 200):
        pasted = paste(drawn, canvas, feather_px=feather_px)
        assert (pasted[~canvas.mask] == canvas.pixels[~canvas.mask]).all()
    sharp = paste(drawn, canvas)
    assert (sharp[canvas.mask] == drawn[canvas.mask]).all()
    assert (paste(drawn, make_canvas(noise(9, 9), size=(64, 48))) == drawn).all()


def test_a_feathered_edge_rises_evenly_inside_the_white():
    canvas = make_canvas(np.zeros((64, 64, 3), np.uint8), half(64, 64), size=(64, 64))
    drawn = np.full((64, 64, 3), 255, np.uint8)
    row = paste(drawn, canvas, feather_px=8)[32, :, 0].astype(int)
    assert not row[:32].any() and (row[40:] == 255).all()
    steps = np.diff(row[31:41])
    assert (steps > 0).all() and steps.max() - steps.min() < 20


@pytest.mark.parametrize(
    ("expand", "size", "box"),
    [
        (Expand(0, 0, 0, 0), (96, 64), Box(0, 0, 96, 64)),
        (Expand(600, 0, 0, 0), (128, 64), Box(64, 0, 128, 64)),
        (Expand(100, 50, 200, 150), (90, 60), Box(10, 5, 70, 45)),
        (Expand(4096, 0, 4096, 0), (64, 64), Box(30, 0, 34, 64)),
    ],
)
def test_an_input_takes_its_share_of_the_canvas(expand, size, box):
    assert place_input((600, 400), expand, size=size) == box


def test_an_input_never_vanishes():
    box = place_input((1, 1), Expand(4096, 4096, 0, 0), size=(64, 64))
    assert box.size == (1, 1) and (box.right, box.bottom) == (64, 64)


def test_around_an_expanded_input_all_is_painted():
    image = noise(60, 40)
    canvas = make_canvas(image, size=(90, 60), expand=Expand(10, 5, 20, 15))
    inside = np.zeros((60, 90), bool)
    inside[5:45, 10:70] = True
    assert (canvas.mask == ~inside).all()
    assert (canvas.pixels[5:45, 10:70] == image).all()
    assert (canvas.pixels[:5, 10:70] == image[0]).all()  # its edge, repeated


def test_a_mask_beside_expand_is_of_the_input_alone():
    image = noise(60, 40)
    canvas = make_canvas(
        image, half(30, 20), size=(80, 40), expand=Expand(20, 0, 0, 0), invert=True
    )
    assert canvas.mask[:, :50].all() and not canvas.mask[:, 50:].any()


@pytest.mark.parametrize("text", ["0,0,0,0", "0,0,0", "0,0,-1,1", "0,0,4097,0", "0,0,x,0"])
def test_what_paints_nothing_around_is_no_expand(text):
    with pytest.raises(ValueError):
        Expand.parse(text)
    assert str(Expand.parse("0,0,4096,0")) == "0,0,4096,0"
