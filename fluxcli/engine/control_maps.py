"""Maps that control pictures come to: taken as they are, or computed of a photo.

Pixels are arrays (H, W, 3) of uint8, sizes (width, height) in pixels.
"""

from typing import NamedTuple

import numpy as np

from fluxcli.engine import depth
from fluxcli.models.controls import computed_map
from fluxcli.pictures import canny
from fluxcli.pictures.fitting import fit_control


class ControlMap(NamedTuple):
    """The pixels (H, W, 3) that a control network is shown, and what was done, for people."""

    pixels: np.ndarray
    remarks: tuple[str, ...]


def make_map(
    kind: str,
    pixels: np.ndarray,
    size: tuple[int, int],
    *,
    beside: tuple[int, int] | None = None,
) -> ControlMap:
    """Return the map of a control picture of a kind, fitted to a size.

    `beside` is the size of the picture that is started from, None without one.

    Of a photo for `canny` the edges are computed, for `depth` the depth where a model for that is
    here. Everything else is a map already.
    """
    fitted, was_fitted = fit_control(pixels, size, beside=beside)
    computed, was_computed = fitted, ""
    wanted = computed_map(kind)
    if wanted == "canny":
        computed, was_computed = _make_edges(pixels, fitted)
    if wanted == "depth":
        computed, was_computed = _make_depth(pixels, fitted)
    return ControlMap(computed, tuple(said for said in (was_fitted, was_computed) if said))


def _make_edges(pixels: np.ndarray, fitted: np.ndarray) -> tuple[np.ndarray, str]:
    """The edge map for a picture, and whether it was one: it is told by the pixels as they came."""
    if canny.is_edge_map(pixels):
        return fitted, "white lines on black: taken as edges, as it is"
    edges = canny.find_edges(fitted)
    said = "a photo: its edges are computed"
    if not edges.any():
        said = "its edges were computed, and it has none: nothing is controlled"
    return np.repeat(edges[..., None], 3, axis=2), said


def _make_depth(pixels: np.ndarray, fitted: np.ndarray) -> tuple[np.ndarray, str]:
    """The depth map for a picture, and whether it was one: a map has no colours."""
    if canny.is_gray(pixels):
        return fitted, "it has no colours: taken as a depth map, as it is"
    folder = depth.find_depth_model()
    if folder is None:
        said = "it has colours, but is taken as a depth map: no model that computes one is here"
        return fitted, f"{said} (flux models download {depth.MODELS[0]})"
    return depth.compute_depth(fitted, folder), "a photo: its depth is computed"
