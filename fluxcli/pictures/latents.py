"""Kept latents: what there is of a picture that is not finished, in a file beside its name.

It is a safetensors file with packed latents (1, S, 64) and, as JSON in its metadata, the order they
are of. torch and safetensors are imported where a file is written or read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxcli.errors import BadInputFile, UsageError
from fluxcli.pictures import names
from fluxcli.pictures.names import Destination
from fluxcli.request.fields import Order
from fluxcli.request.target import Target
from quant.errors import CheckpointError, ExplainedError
from quant.header import read_header
from quant.tensor_info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".latents.safetensors"
KEY = "flux_latents"  # of the JSON in the file's metadata
TENSOR = "latents"
DTYPES = ("F32", "F16", "BF16")  # as safetensors spells them
HINT = f"flux decode NAME{SUFFIX} takes what a run that ended early has kept"
PIXELS_PER_TOKEN = 256  # 16x16
CHANNELS = 64

# What a file of somebody else gives rise to when it is read.
FOREIGN = (KeyError, ValueError, TypeError, AttributeError, RecursionError, UsageError)


@dataclass(frozen=True)
class Latents:
    """Packed latents after `step` of the order's steps.

    `model` is the fingerprint of the checkpoint, `request_hash` what the finished picture will
    carry (see `image.hash_request`); both are empty where nobody knows. `seeded` tells whether the
    seed was asked for, `inputs` has the hashes of the pictures that it is made from (see
    `inputs.name_hashes`).
    """

    order: Order
    tokens: "Tensor"  # (1, S, 64)
    step: int = 0
    model: str = ""
    request_hash: str = ""
    seeded: bool = True
    inputs: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None  # where they were read from


def save(latents: Latents, target: Target, *, n: int = 1, row: int = 0) -> Path:
    """Write the latents beside where picture `n` of a row would be, and return where.

    Raises OSError.
    """
    from safetensors.torch import save as to_bytes

    described = {
        "request": latents.order.to_json(),
        "step": latents.step,
        "model": latents.model,
        "request_hash": latents.request_hash,
        "seeded": latents.seeded,
        "inputs": dict(latents.inputs),
    }
    tensors = {TENSOR: latents.tokens.cpu().contiguous()}
    data: bytes = to_bytes(tensors, {KEY: json.dumps(described)})
    places = _list_places(Destination(target, latents.order, n=n, row=row))
    return names.write_first_free(data, places)


def place(destination: Destination) -> Path:
    """Return the best name of a picture's latents."""
    return next(_list_places(destination))


def find_kept(destination: Destination) -> list[Path]:
    """Return the files of latents that lie beside a picture's names, best first."""
    destination = names.move_from_stdout(destination)
    if names.list_open_fields(destination):
        return list(names.list_there(destination, SUFFIX))
    found: list[Path] = []
    for path in _list_places(destination):
        if not path.exists():
            return found
        found.append(path)
    raise AssertionError("the candidates are endless")


def aim_beside(path: Path) -> Target:
    """Return where a picture goes that belongs beside its latents: it has their name, if it can."""
    stem = path.name.removesuffix(SUFFIX)
    return Target(path.parent, stem.replace("{", "{{").replace("}", "}}"))


def _list_places(destination: Destination) -> Iterator[Path]:
    """Yield the names that latents of a picture can have, without end."""
    for path in names.list_candidates(names.move_from_stdout(destination)):
        yield path.with_name(names.join_name(path.stem, SUFFIX))


def load(path: Path) -> Latents:
    """Read what `save` wrote; raises `CheckpointError` or `BadInputFile` for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        header = read_header(path)
    except ExplainedError as error:
        error.hint = error.hint or HINT
        raise
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[KEY])
            order = Order.from_json(described["request"])
            step = described["step"]
            _check(header[TENSOR], order, step=step, path=path)
            return Latents(
                order,
                file.get_tensor(TENSOR),
                step=step,
                model=described["model"],
                request_hash=described.get("request_hash", ""),
                seeded=described.get("seeded", True) is True,
                inputs=dict(described.get("inputs", {})),
                path=path,
            )
    except (*FOREIGN, SafetensorError) as error:
        why = f"it holds no picture of flux: {str(error)[:80]}"
        raise BadInputFile("no latents to finish", which=path, why=why, hint=HINT) from error


def _check(info: TensorInfo, order: Order, *, step: object, path: Path) -> None:
    """Raise `CheckpointError` for latents that cannot be of their order."""
    width, height = order.request.size
    shape = (1, width * height // PIXELS_PER_TOKEN, CHANNELS)
    is_shaped = info.shape == shape and info.dtype in DTYPES
    if not is_shaped or not isinstance(step, int) or not 0 <= step <= order.request.steps:
        why = "they are not of the request's size or steps"
        raise CheckpointError("damaged latents", which=path, why=why, hint=HINT)
