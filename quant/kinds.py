"""Which kind of FLUX.1 a model is, and which part of one a file is: by keys, channels, metadata.

Kinds differ in what the transformer takes beside the latents: Fill a masked picture and its mask,
Canny and Depth a control picture (as channels), Kontext reference pictures (as tokens). Kontext and
dev have the same tensors, and so have Canny and Depth: of these the folder's index tells, else what
the file's metadata call the model, and only then its name. Knows no files. Stdlib only.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LATENT_CHANNELS = 64  # of packed latents
CONTROL_CHANNELS = 128  # latents and those of a control picture
FILL_CHANNELS = 384  # latents, those of the masked picture, and 16 x 16 of the mask
CHANNELS = (LATENT_CHANNELS, CONTROL_CHANNELS, FILL_CHANNELS)
# The kinds of a transformer, and how many channels each takes.
CHANNELS_OF = {
    "dev": LATENT_CHANNELS,
    "schnell": LATENT_CHANNELS,
    "kontext": LATENT_CHANNELS,
    "fill": FILL_CHANNELS,
    "canny": CONTROL_CHANNELS,
    "depth": CONTROL_CHANNELS,
}
KINDS = tuple(CHANNELS_OF)

# What files call the model in their metadata: safetensors by the modelspec standard and by
# trainers, GGUF by its own keys, diffusers in a config.
TITLES = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.description",
    "general.name",
    "general.basename",
    "general.finetune",
    "ss_base_model_version",
    "base_model",
    "_name_or_path",
)
KONTEXT = re.compile(r"kontext", re.IGNORECASE)
CONTROLS = {
    "canny": re.compile(r"canny", re.IGNORECASE),
    "depth": re.compile(r"depth", re.IGNORECASE),
}


class Kind(NamedTuple):
    """A kind, of `KINDS`, and by what it was told, for people."""

    kind: str
    told_by: str


def find_kind(config: Mapping[str, Any], *, pipeline: str, title: str, name: str) -> Kind:
    """Return the kind of a model whose transformer has this config.

    `pipeline` is the class that its model_index.json names ("" for a single file), `title` what the
    file's metadata call it, `name` that of its file or folder, which counts only where nothing else
    tells kinds apart.
    """
    channels = config["in_channels"]
    if channels == FILL_CHANNELS:
        return Kind("fill", f"its {channels} channels")
    if channels == CONTROL_CHANNELS:
        return _find_control(channels, title=title, name=name)
    if not config["guidance_embeds"]:
        return Kind("schnell", "the lack of a guidance input")
    sources = {"its model_index.json": pipeline, "its metadata": title, "its name": name}
    for told_by, text in sources.items():
        if KONTEXT.search(text):
            return Kind("kontext", told_by)
    return Kind("dev", f"its {channels} channels and its guidance input")


def _find_control(channels: int, *, title: str, name: str) -> Kind:
    """Canny or Depth: their transformers differ in nothing but values."""
    for told_by, text in (("its metadata", title), ("its name", name)):
        for kind, pattern in CONTROLS.items():
            if pattern.search(text):
                return Kind(kind, f"its {channels} channels and {told_by}")
    return Kind("canny", f"its {channels} channels; it may be depth, too")


def find_title(metadata: Mapping[str, Any]) -> str:
    """Return what a file's metadata, or a config, call the model; "" for nothing."""
    return ", ".join(str(metadata[key])[:200] for key in TITLES if metadata.get(key))


def describe_name(path: Path) -> str:
    """Return the part of a transformer's path that may tell its kind.

    That is the repository in the hub's cache, else the last two names.
    """
    for part in path.parts:
        if part.startswith("models--"):
            return part
    return "/".join(path.parts[-2:])


# --- parts that are no transformer

REDUX = "redux"
CONTROLNET = "controlnet"
# A tensor that each has.
MARKS = {
    REDUX: ("redux_up.weight",),
    CONTROLNET: ("controlnet_x_embedder.weight", "pos_embed_input.weight"),
}


def find_part(names: Collection[str]) -> str:
    """Return `REDUX` or `CONTROLNET` for a file with tensors of such names, "" for another."""
    for part, marks in MARKS.items():
        if any(mark in names for mark in marks):
            return part
    return ""
