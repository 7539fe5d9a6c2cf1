"""The depth of a photo, by a small model of transformers where the hub's cache has one.

It computes on the CPU, in about a second, so that it takes nothing of what a plan has counted.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from fluxcli.engine.loader import refusing
from fluxcli.models import find

# Under Apache-2.0, 100 MB each; the larger ones are not for commercial use.
MODELS = ("depth-anything/Depth-Anything-V2-Small-hf", "LiheYoung/depth-anything-small-hf")


def find_depth_model() -> Path | None:
    """Return the folder of a depth model that is here, None without one."""
    for model in MODELS:
        for folder in find.list_copies(model):
            if all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
                return folder
    return None


def compute_depth(pixels: np.ndarray, folder: Path) -> np.ndarray:
    """Return a depth map (H, W, 3) uint8 of a photo (H, W, 3) uint8: white is near.

    The nearest point is 255, the farthest 0, as transformers' own pipeline has it. Raises
    `CheckpointError` for a folder that holds no such model.
    """
    from transformers import AutoModelForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    with refusing("cannot use the depth model", folder), torch.inference_mode():
        processor = DPTImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        values = processor(images=pixels, return_tensors="pt")["pixel_values"]
        near = model.eval()(values).predicted_depth  # (1, h, w), more is nearer
        height, width, _ = pixels.shape
        whole = functional.interpolate(
            near[:, None], size=(height, width), mode="bicubic", align_corners=False
        )[0, 0]
        lowest = whole.min()
        shares = (whole - lowest) / (whole.max() - lowest).clamp_(min=1e-6)
    levels = (shares * 255).numpy().astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)
