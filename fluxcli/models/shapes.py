"""Tensors of published models without their files: names and shapes, for planning and for naming.

Knows nothing of where models are. Stdlib only.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxcli.paths import BUNDLED
from quant.checkpoint import Checkpoint, Component
from quant.config import READ
from quant.kinds import CHANNELS_OF, LATENT_CHANNELS
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight

REDUX_PARTS = ("image_encoder", "image_embedder")
# The model whose sizes stand for those of files that do not say theirs.
PUBLISHED = "black-forest-labs/FLUX.1-dev"
KNOWN = re.compile(
    r"black-forest-labs/FLUX\.1-(dev|schnell|Krea-dev|Kontext-dev|Fill-dev|Canny-dev|Depth-dev)"
)
# A name of the table that stands for several: "transformer_blocks.{19}.attn.to_q.weight".
REPEATED = re.compile(r"(?P<start>[^{}]*)\{(?P<count>\d+)\}(?P<end>[^{}]*)")
HINT_CONVOLUTIONS = ("conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out")  # XLabs'


def read_known_shapes(model: str = PUBLISHED) -> Checkpoint | None:
    """Return a published model as a checkpoint whose weights have no files; else None."""
    known = KNOWN.fullmatch(model)
    if not known:
        return None
    kind = known[1].removesuffix("-dev").lower()
    table = _read_table("flux1.json")
    transformer = table["transformer"]
    if kind == "schnell":
        transformer["config"]["guidance_embeds"] = False
        for name in [name for name in transformer["tensors"] if "guidance" in name]:
            del transformer["tensors"][name]
    channels = CHANNELS_OF.get(kind, LATENT_CHANNELS)
    transformer["config"]["in_channels"] = channels
    transformer["tensors"]["x_embedder.weight"][1] = channels
    components = {name: _read_component(name, part) for name, part in table.items()}
    said_kind = kind if kind in CHANNELS_OF else ""
    return Checkpoint(Path(), components, dict(READ["scheduler"]), said_kind=said_kind)


def read_known_controlnet(repository: str) -> Component | None:
    """Return a published ControlNet as a component whose weights have no files; else None.

    Its blocks are those of the transformer. Bytes of what is made so are those of the files.
    """
    known = _read_table("parts.json")["controlnets"].get(repository)
    if known is None:
        return None
    transformer = _read_table("flux1.json")["transformer"]
    config = transformer["config"] | known
    width = config["num_attention_heads"] * config["attention_head_dim"]
    counts = {
        "transformer_blocks": config["num_layers"],
        "single_transformer_blocks": config["num_single_layers"],
    }
    tensors = {}
    for pattern, shape in transformer["tensors"].items():
        part = pattern.partition(".")[0]
        if part in counts:
            tensors[re.sub(r"\{\d+\}", f"{{{counts[part]}}}", pattern)] = shape
        elif part not in ("norm_out", "proj_out"):
            tensors[pattern] = shape
    layers = {
        f"controlnet_blocks.{{{config['num_layers']}}}": [width, width],
        f"controlnet_single_blocks.{{{config['num_single_layers']}}}": [width, width],
        "controlnet_x_embedder": [width, config["in_channels"]],
    }
    hint = config.get("conditioning_embedding_channels")
    if hint:
        layers |= {f"input_hint_block.{name}": [hint, hint, 3, 3] for name in HINT_CONVOLUTIONS}
        layers["input_hint_block.conv_in"][1] = 3
    for name, shape in layers.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if config.get("num_mode"):
        tensors["controlnet_mode_embedder.weight"] = [config["num_mode"], width]
    return _read_component("controlnet", {"config": config, "tensors": tensors})


def read_known_redux() -> dict[str, Component]:
    """Return SigLIP and Redux' embedder, as published, as components without files."""
    table = _read_table("parts.json")
    return {name: _read_component(name, table[name]) for name in REDUX_PARTS}


def _read_table(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((BUNDLED / "shapes" / name).read_text(encoding="utf-8"))
    return table


def _read_component(name: str, part: dict[str, Any]) -> Component:
    weights = {}
    for pattern, shape in part["tensors"].items():
        for tensor in _expand(pattern):
            info = TensorInfo(tensor, "BF16", tuple(shape))
            weights[tensor] = Weight(tensor, info.shape, "", pieces={"": Piece(Path(), info)})
    return Component(name, Path(), dict(part["config"]), weights=weights)


def _expand(pattern: str) -> Iterator[str]:
    """Yield the names that a name of the table stands for: itself, or one for each block."""
    repeated = REPEATED.fullmatch(pattern)
    if not repeated:
        yield pattern
        return
    for block in range(int(repeated["count"])):
        yield f"{repeated['start']}{block}{repeated['end']}"
