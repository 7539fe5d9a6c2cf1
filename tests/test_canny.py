"""Edges of photos: Canny's method against a slow one that is written out, and what is a photo."""

import math

import numpy as np
import pytest

from fluxcli.pictures.canny import HIGH, LOW, SIGMA_PX, find_edges, is_edge_map, is_gray


def draw_scene(seed: int, *, noise: int = 12, size: tuple[int, int] = (32, 40)) -> np.ndarray:
    """A disc, a box and a ramp (H, W, 3), with some noise."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    scene = np.zeros((height, width, 3), float) + (x / width * 60)[..., None]
    scene[(y - height * 0.45) ** 2 + (x - width * 0.3) ** 2 < (height * 0.25) ** 2] = (210, 40, 30)
    scene[height // 2 : height - 6, width // 2 : width - 4] = (30, 90, 230)
    made = np.random.default_rng(seed)
    return (scene + made.integers(0, noise + 1, scene.shape)).clip(0, 255).astype(np.uint8)


def reference_edges(pixels: np.ndarray, low: float, high: float, sigma: float) -> np.ndarray:
    """Canny's steps pixel by pixel, in float64, with angles and a stack."""
    height, width, _ = pixels.shape
    radius = int(3 * sigma + 0.5)

    def at(values: np.ndarray, row: int, column: int) -> np.ndarray:
        return values[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]

    kernel = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
    blurred = np.zeros(pixels.shape)
    for row in range(height):
        for column in range(width):
            blurred[row, column] = (
                sum(
                    kernel[i + radius] * kernel[j + radius] * at(pixels, row + i, column + j)
                    for i in range(-radius, radius + 1)
                    for j in range(-radius, radius + 1)
                )
                / sum(kernel) ** 2
            )
    sobel = np.zeros((2, *pixels.shape))
    for row in range(height):
        for column in range(width):
            for k, weight in ((-1, 1), (0, 2), (1, 1)):
                sobel[0, row, column] += weight * (
                    at(blurred, row + k, column + 1) - at(blurred, row + k, column - 1)
                )
                sobel[1, row, column] += weight * (
                    at(blurred, row + 1, column + k) - at(blurred, row - 1, column + k)
                )
    across, down, strength = np.zeros((3, height, width))
    for row in range(height):
        for column in range(width):
            sums = abs(sobel[:, row, column]).sum(axis=0)
            across[row, column], down[row, column] = sobel[:, row, column, sums.argmax()]
            strength[row, column] = sums.max()
    ridges = np.zeros(strength.shape, bool)
    for row in range(height):
        for column in range(width):
            angle = math.degrees(math.atan2(down[row, column], across[row, column])) % 180
            step = (0, 1) if angle < 22.5 or angle > 157.5 else (1, 1)
            if 67.5 < angle < 112.5:
                step = (1, 0)
            elif 112.5 <= angle <= 157.5:
                step = (1, -1)
            ahead, behind = ((row + s * step[0], column + s * step[1]) for s in (1, -1))
            values = [
                strength[r, c] if 0 <= r < height and 0 <= c < width else 0.0
                for r, c in (behind, ahead)
            ]
            ridges[row, column] = values[0] < strength[row, column] >= values[1]
    edges = np.zeros(strength.shape, np.uint8)
    stack = [(r, c) for r, c in np.argwhere(ridges & (strength > high))]
    while stack:
        row, column = stack.pop()
        inside = 0 <= row < height and 0 <= column < width
        if (
            inside
            and not edges[row, column]
            and ridges[row, column]
            and strength[row, column] > low
        ):
            edges[row, column] = 255
            stack += [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return edges


@pytest.mark.parametrize("seed", range(2))
def test_edges_are_those_of_the_method_written_out(seed):
    pixels = draw_scene(seed)
    edges = find_edges(pixels)
    reference = reference_edges(pixels, LOW, HIGH, SIGMA_PX)
    # Ties are broken by the last bit of a float32.
    assert (edges != reference).sum() <= 2
    assert 40 < (reference > 0).sum() < pixels[..., 0].size / 4
    assert set(np.unique(edges)) == {0, 255}


def test_colours_of_the_same_brightness_have_an_edge():
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :20] = (182, 60, 60)
    pixels[:, 20:] = (60, 122, 60)
    edges = find_edges(pixels)
    assert (edges > 0).any(axis=1).all() and not edges[:, :16].any() and not edges[:, 24:].any()


def test_a_weak_edge_stays_where_a_strong_one_leads_to_it():
    """Two bars fade out; only the one that begins strong is followed."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[8:16] = (np.linspace(120, 45, 80).astype(np.uint8))[None, :, None]
    pixels[28:36, 20:60] = 45
    edges = find_edges(pixels)
    assert edges[4:20, 60:76].any() and not edges[24:40].any()
    assert find_edges(pixels, low=20, high=40)[24:40].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 3)])
def test_small_pictures_have_edges_of_their_size(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    assert find_edges(pixels).shape == shape


def test_a_map_is_told_from_a_photo():
    photo = draw_scene(0, size=(96, 128))
    edges = np.repeat(find_edges(photo)[..., None], 3, axis=2)
    assert is_edge_map(edges) and not is_edge_map(photo) and not is_gray(photo)
    # As a JPEG of the map has it, and a drawing of black lines on white, which is none.
    noisy = (
        edges.astype(int) + np.random.default_rng(1).integers(-14, 15, edges.shape[:2])[..., None]
    )
    assert is_edge_map(noisy.clip(0, 255).astype(np.uint8))
    assert not is_edge_map(255 - edges) and is_gray(255 - edges)
    assert not is_edge_map(np.zeros_like(edges))
    gray = np.repeat(photo[..., :1], 3, axis=2)
    assert is_gray(gray) and not is_edge_map(gray)
