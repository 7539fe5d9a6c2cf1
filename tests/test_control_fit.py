"""Control pictures of another size or ratio: what is kept of them, and what is said."""

import numpy as np
import pytest
from PIL import Image

from fluxcli.pictures.fitting import find_box, fit_control


def stripes(width: int, height: int) -> np.ndarray:
    """Columns that are brighter to the right, rows that are redder downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = np.linspace(0, 255, width)[None].astype(np.uint8)
    pixels[..., 0] = np.linspace(0, 255, height)[:, None].astype(np.uint8)
    return pixels


def test_a_map_of_the_size_is_taken_as_it_is():
    pixels = stripes(64, 32)
    fitted = fit_control(pixels, (64, 32))
    assert fitted.pixels is pixels and fitted.remark == ""


def test_a_map_of_the_ratio_is_resized_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    pixels = stripes(200, 100)
    fitted = fit_control(pixels, (128, 64))
    values = VaeImageProcessor(vae_scale_factor=16).preprocess(
        Image.fromarray(pixels), height=64, width=128
    )
    expected = ((values[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    assert np.array_equal(fitted.pixels, expected)
    assert fitted.remark == ""


@pytest.mark.parametrize(
    ("given", "size", "box", "lost"),
    [
        ((160, 90), (64, 64), (35, 0, 125, 90), "70 px of its width"),
        ((90, 160), (64, 64), (0, 35, 90, 125), "70 px of its height"),
        ((100, 100), (1024, 576), (0, 22, 100, 78), "44 px of its height"),
        ((3, 3000), (1024, 64), (0, 1499, 3, 1500), "2999 px of its height"),
    ],
)
def test_of_another_ratio_the_centre_is_kept_and_it_says_so(given, size, box, lost):
    pixels = stripes(*given)
    assert find_box(given, size) == box
    fitted = fit_control(pixels, size)
    left, top, right, bottom = box
    image = Image.fromarray(pixels).crop((left, top, right, bottom)).resize(size, 1)
    assert np.array_equal(fitted.pixels, np.asarray(image))
    assert lost in fitted.remark
    keeps = {(160, 90): "--ar 16:9", (90, 160): "--ar 9:16", (100, 100): "--ar 1:1"}
    assert keeps.get(given, "it lost") in fitted.remark
    assert ("--ar" in fitted.remark) is (given in keeps)


def test_beside_a_picture_of_its_ratio_a_map_is_squeezed_as_that_is():
    pixels = stripes(160, 90)
    whole = np.asarray(Image.fromarray(pixels).resize((64, 64), 1))
    fitted = fit_control(pixels, (64, 64), beside=(1600, 900))
    assert np.array_equal(fitted.pixels, whole) and fitted.remark == ""
    cut = fit_control(pixels, (64, 64), beside=(1000, 1000))
    assert np.array_equal(cut.pixels, fit_control(pixels, (64, 64)).pixels) and cut.remark


def test_what_multiples_of_16_cannot_keep_is_no_other_ratio():
    assert find_box((1920, 1080), (1360, 768)) == (0, 0, 1920, 1080)
    assert find_box((1920, 1080), (1024, 1024)) != (0, 0, 1920, 1080)
