"""A picture that is not finished: its latents, the step they are at, and the request; kept in a file when memory ends.

The file is a safetensors file with the request as JSON in its metadata. Shapes: packed latents (1, S, 64).
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fluxcli.errors import BadInputFile, UsageError
from fluxcli.pictures import names as output
from fluxcli.request.fields import Order
from quant.errors import CheckpointError
from quant.files import move_if_free, write_atomically
from quant.header import read_header
from quant.lazy import torch

SUFFIX = ".latents.safetensors"


@dataclass
class Latents:
    """Packed latents after `step` of the request's steps; `model` is the checkpoint's fingerprint."""

    order: Order
    tokens: "torch.Tensor"
    step: int = 0
    model: str = ""
    request_hash: str = ""  # what the finished picture will carry, see `image.hash_request`


def save(latents: Latents, target: output.Target, n: int = 1, row: int = 0) -> Path:
    """Write the latents beside where picture `n` of a row would be; raises OSError."""
    from safetensors.torch import save as to_bytes

    described = {"request": latents.order.to_json(), "step": latents.step, "model": latents.model}
    described |= {"request_hash": latents.request_hash}
    data = to_bytes({"latents": latents.tokens.cpu().contiguous()}, {"flux_latents": json.dumps(described)})
    beside = output.Target(Path(), output.DEFAULT_TEMPLATE) if target.stdout else target
    for path in output.candidates(beside, latents.order, n, row):
        place = path.with_name(path.stem + SUFFIX)
        with suppress(FileExistsError):
            if not os.path.lexists(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, data, place=move_if_free)
                return place
    raise AssertionError("names never end")


def load(path: Path) -> Latents:
    """Read what `save` wrote; raises `CheckpointError` or `BadInputFile` for anything else."""
    from safetensors import SafetensorError, safe_open

    info = read_header(path).get("latents")
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})["flux_latents"])
            step, model = described["step"], described["model"]
            order = Order.from_json(described["request"])
            width, height = order.request.size
            fits = info.shape == (1, width * height // 256, 64) and info.dtype in ("F32", "F16", "BF16")
            if not fits or step not in range(order.request.steps + 1):
                raise CheckpointError("damaged latents", which=path, why="they are not of the request's size or steps")
            made = str(described.get("request_hash", ""))
            return Latents(order, file.get_tensor("latents"), int(step), model, made)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError, UsageError) as error:
        why = f"it holds no picture of flux: {str(error)[:80]}"
        raise BadInputFile("no latents to finish", which=path, why=why) from error
