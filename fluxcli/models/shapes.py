"""The published model's tensors without its files: names and shapes, for planning and for naming.

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
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight

# The model whose sizes stand for those of files that do not say theirs.
PUBLISHED = "black-forest-labs/FLUX.1-dev"
KNOWN = re.compile(r"black-forest-labs/FLUX\.1-(dev|schnell|Krea-dev)")
# A name of the table that stands for several: "transformer_blocks.{19}.attn.to_q.weight".
REPEATED = re.compile(r"(?P<start>[^{}]*)\{(?P<count>\d+)\}(?P<end>[^{}]*)")


def read_known_shapes(model: str = PUBLISHED) -> Checkpoint | None:
    """Return a published model as a checkpoint whose weights have no files; else None."""
    if not KNOWN.fullmatch(model):
        return None
    takes_guidance = "schnell" not in model
    table = json.loads((BUNDLED / "shapes" / "flux1.json").read_text(encoding="utf-8"))
    components = {
        name: _read_component(name, part, takes_guidance=takes_guidance)
        for name, part in table.items()
    }
    return Checkpoint(Path(), components, dict(READ["scheduler"]))


def _read_component(name: str, part: dict[str, Any], *, takes_guidance: bool) -> Component:
    weights = {}
    for pattern, shape in part["tensors"].items():
        if "guidance" in pattern and not takes_guidance:
            continue
        for tensor in _expand(pattern):
            info = TensorInfo(tensor, "BF16", tuple(shape))
            weights[tensor] = Weight(tensor, info.shape, "", pieces={"": Piece(Path(), info)})
    config = dict(part["config"])
    if name == "transformer":
        config["guidance_embeds"] = takes_guidance
    return Component(name, Path(), config, weights=weights)


def _expand(pattern: str) -> Iterator[str]:
    """Yield the names that a name of the table stands for: itself, or one for each block."""
    repeated = REPEATED.fullmatch(pattern)
    if not repeated:
        yield pattern
        return
    for block in range(int(repeated["count"])):
        yield f"{repeated['start']}{block}{repeated['end']}"
