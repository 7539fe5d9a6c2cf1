"""Previews: what a picture will be, estimated from its latents in the middle of denoising.

A rectified flow goes from noise to the picture along a line, if the velocity stayed what it is:
x0 = x - sigma v. Latents become colours by a linear projection, a pixel for each 8x8 of the
picture, or by TAEF1, a tiny VAE, where its weights are in the hub's cache. All of it runs on the
CPU in float32, so that a plan needs no memory of the device for it.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine import classes, decode
from fluxcli.engine.picture import Picture
from fluxcli.models import find

TINY_REPOSITORY = "madebyollin/taef1"
TINY_FILE = "diffusion_pytorch_model.safetensors"
TINY_PX = 512  # the longest side of what TAEF1 decodes: a second on two cores

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Projection:
    """Red, green and blue in -1 to 1 as sums of the 16 channels of latents, and a bias.

    `scaling_factor` is that of the VAE's config whose latents it is for.
    """

    scaling_factor: float
    factors: tuple[RGB, ...]  # 16 rows
    bias: RGB


# ComfyUI, comfy/latent_formats.py, class Flux: latent_rgb_factors, latent_rgb_factors_bias.
FLUX = Projection(
    0.3611,
    (
        (-0.0346, 0.0244, 0.0681),
        (0.0034, 0.0210, 0.0687),
        (0.0275, -0.0668, -0.0433),
        (-0.0174, 0.0160, 0.0617),
        (0.0859, 0.0721, 0.0329),
        (0.0004, 0.0383, 0.0115),
        (0.0405, 0.0861, 0.0915),
        (-0.0236, -0.0185, -0.0259),
        (-0.0245, 0.0250, 0.1180),
        (0.1008, 0.0755, -0.0421),
        (-0.0515, 0.0201, 0.0011),
        (0.0428, -0.0012, -0.0036),
        (0.0817, 0.0765, 0.0749),
        (-0.1264, -0.0522, -0.1103),
        (-0.0280, -0.0881, -0.0499),
        (-0.1262, -0.0982, -0.0778),
    ),
    (-0.0329, -0.0718, -0.0851),
)
# python -m training.latent_rgb: explains 94 % of the colours of held-out pictures, and is 17 of 255
# levels off on average.
BUNDLED = Projection(
    0.909,
    (
        (-0.1613, 0.1256, 0.0155),
        (0.2175, 0.0788, -0.4821),
        (-0.2051, -0.1015, -0.1673),
        (-0.0925, -0.0878, -0.0248),
        (-0.0836, -0.0433, 0.0075),
        (0.2418, 0.0667, 0.1089),
        (0.0027, 0.1124, 0.0143),
        (-0.0043, 0.1388, -0.0831),
        (0.2249, 0.3965, 0.0473),
        (-0.1641, -0.1746, -0.1651),
        (-0.2175, -0.1708, -0.0156),
        (0.0320, -0.3117, -0.0334),
        (-0.2503, -0.0787, -0.0695),
        (0.1492, -0.1401, 0.0354),
        (0.0367, 0.0217, 0.0211),
        (-0.3107, 0.0059, -0.2162),
    ),
    (0.1573, -0.0380, -0.1691),
)


@dataclass(frozen=True)
class Estimated:
    """A picture under way will look like this after its last step: pixels (h, w, 3) uint8.

    Their ratio is the picture's, their size smaller.
    """

    picture: Picture
    pixels: np.ndarray


class Previewer:
    """Estimates pictures of one VAE. `problem` says why TAEF1 is there and not used, if so."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Take the VAE's config: FLUX's latents, the bundled model's, or such as are like FLUX's.

        Where TAEF1 is used, it is loaded once for this process.
        """
        is_bundled = config.get("scaling_factor") == BUNDLED.scaling_factor
        self.projection = BUNDLED if is_bundled else FLUX
        self.tiny: Any = None
        self.problem = ""
        path = None if is_bundled else find_tiny()
        if path:
            self.tiny, self.problem = _load_tiny(path)

    @torch.no_grad()
    def draw(
        self, before: Tensor, after: Tensor, sigmas: Tensor, size: tuple[int, int]
    ) -> np.ndarray:
        """Estimate the picture of `size` in pixels, from its tokens (1, S, 64) around a step.

        `sigmas` are the two noise levels that belong to them. Returns pixels (h, w, 3) uint8.
        """
        tokens = estimate(before.float().cpu(), after.float().cpu(), sigmas.float().cpu())
        latents = decode.unpack(tokens, size)  # (1, 16, height/8, width/8)
        if self.tiny is not None:
            shrunk = math.ceil(max(size) / TINY_PX)
            latents = torch.nn.functional.avg_pool2d(latents, shrunk)
            values = self.tiny.decode(latents, return_dict=False)[0]
        else:
            values = project(latents, self.projection)
        # Noise on a bad estimate may be anything; what is no number is grey.
        return decode.to_pixels(values.nan_to_num(0.0)).numpy()


def estimate(before: Tensor, after: Tensor, sigmas: Tensor) -> Tensor:
    """What tokens come to if the velocity stays that of the step from `before` to `after`.

    The step was Euler's: after = before + (sigmas[1] - sigmas[0]) v.
    """
    velocity = (after - before) / (sigmas[1] - sigmas[0])
    return after - sigmas[1] * velocity


def project(latents: Tensor, projection: Projection) -> Tensor:
    """Latents (1, 16, h, w) as the transformer has them -> values (1, 3, h, w) in -1 to 1."""
    factors = torch.tensor(projection.factors)  # (16, 3)
    bias = torch.tensor(projection.bias)
    return torch.einsum("bchw,cr->brhw", latents, factors) + bias[:, None, None]


def find_tiny() -> Path | None:
    """Return the weights of TAEF1 in the hub's cache or the mirror, None where there are none."""
    for folder in find.list_copies(TINY_REPOSITORY):
        if (folder / TINY_FILE).is_file():
            return folder / TINY_FILE
    return None


class _Loaded(NamedTuple):
    module: Any  # None where it cannot be used
    problem: str


@functools.lru_cache(maxsize=1)
def _load_tiny(path: Path) -> _Loaded:
    """Load TAEF1; a preview is not worth an error, so that any is told and remembered."""
    from safetensors.torch import load_file

    try:
        # What the published config says is the class' default, but for the channels of latents.
        module = classes.tiny_vae()(latent_channels=16)
        module.load_state_dict(load_file(path))
        return _Loaded(module.eval(), "")
    except Exception as error:  # noqa: BLE001 - see above
        said = str(error).strip().splitlines() or [type(error).__name__]
        return _Loaded(None, f"previews are made without TAEF1 ({path}): {said[0][:100]}")
