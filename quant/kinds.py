"""Which kind of FLUX.1 a model is, by its transformer's config, its pipeline and its files' names.

Kinds differ in what the transformer takes beside the latents: Fill a masked picture and its mask,
Canny and Depth a control picture (as channels), Kontext reference pictures (as tokens). Stdlib
only.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LATENT_CHANNELS = 64  # of packed latents
CONTROL_CHANNELS = 128  # latents and those of a control picture
FILL_CHANNELS = 384  # latents, those of the masked picture, and 16 x 16 of the mask
CHANNELS = (LATENT_CHANNELS, CONTROL_CHANNELS, FILL_CHANNELS)
KINDS = ("dev", "schnell", "fill", "kontext", "canny", "depth")


def find_kind(config: Mapping[str, Any], *, pipeline: str, name: str) -> str:
    """Return the kind of a model whose transformer has this config.

    `pipeline` is the class that its model_index.json names ("" for a single file), `name` that of
    its file or folder, which counts only where nothing else tells kinds apart.
    """
    channels = config["in_channels"]
    if channels == FILL_CHANNELS:
        return "fill"
    if channels == CONTROL_CHANNELS:
        return "depth" if re.search("depth", name, re.IGNORECASE) else "canny"
    if not config["guidance_embeds"]:
        return "schnell"
    if "Kontext" in pipeline or re.search("kontext", name, re.IGNORECASE):
        return "kontext"
    return "dev"


def describe_name(path: Path) -> str:
    """Return the part of a transformer's path that may tell its kind.

    That is the repository in the hub's cache, else the last two names.
    """
    for part in path.parts:
        if part.startswith("models--"):
            return part
    return "/".join(path.parts[-2:])
