"""ComfyUI's markers: the JSON beside each quantized layer that says in which form it is.

A file has them as small tensors, `LAYER.comfy_quant`, or together in its header's metadata, or
both. Weights in 8 bit look alike in several forms, so that a reader which does not know a marker
would make noise of them: what is not known here is refused. Stdlib only.
"""

from pathlib import Path
from typing import Any, NamedTuple

from quant.errors import CheckpointError
from quant.spec import GROUP, GROUP_SCALES, ROW_SCALES

MAX_MARKER_BYTES = 4096
# How large a group may be by a marker; the largest of a published form is 256.
LARGEST_GROUP = 1 << 16
# ComfyUI's group where a marker says that the weight is rotated, and no more.
USUAL_ROTATION = 256
FP8_FORMAT = "float8_e4m3fn"
FORMATS = (FP8_FORMAT, ROW_SCALES, GROUP_SCALES)
READABLE = "read are float8_e4m3fn and int8 with a scale per matrix or row, w4a8, nf4, and GGUF"
UNREAD = "weights packed in a way that is not read"


class Marker(NamedTuple):
    """What a marker says of a layer's weight."""

    format: str
    rotation: int = 0  # how many columns are rotated together, 0 where none are
    group: int = 0  # how many values of a row share a scale, 0 where all do


def read_marker(layer: str, described: Any, *, file: Path) -> Marker:
    """Return what a marker says; `layer` is whose it is, for errors.

    Raises `CheckpointError` for a form that is not known, and for sizes that cannot be.
    """
    if not isinstance(described, dict) or not isinstance(described.get("format"), str):
        why = f"{layer[:60]} has no form in its marker"
        raise CheckpointError(UNREAD, file, why=why)
    if described["format"] not in FORMATS:
        why = f"{layer[:60]} is {described['format'][:40]}"
        raise CheckpointError(UNREAD, file, why=why, hint=READABLE)
    rotation = 0
    if described.get("convrot"):
        rotation = _read_size(
            layer, described, "convrot_groupsize", file=file, usual=USUAL_ROTATION
        )
    group = 0
    if described["format"] == GROUP_SCALES:
        group = _read_size(layer, described, "group_size", file=file, usual=GROUP)
    return Marker(described["format"], rotation, group)


def _read_size(layer: str, described: dict[str, Any], key: str, *, file: Path, usual: int) -> int:
    """A size of a group, `usual` where the marker says none; raises `CheckpointError`."""
    size = described.get(key, usual)
    if type(size) is not int or not 0 < size <= LARGEST_GROUP:
        why = f"{layer[:60]}: {key} is {size!r:.40}"
        raise CheckpointError(UNREAD, file, why=why)
    return size
