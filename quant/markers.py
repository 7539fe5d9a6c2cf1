"""ComfyUI's markers: the JSON beside each quantized layer that says in which form it is.

A file has them as small tensors, `LAYER.comfy_quant`, or together in its header's metadata, or
both. Weights in 8 bit look alike in several forms, so that a reader which does not know a marker
would make noise of them: what is not known here is refused. Keys and defaults are those of
ComfyUI's loader (`comfy/ops.py`, `comfy/utils.py`) and of convert_to_quant. Stdlib only.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quant.errors import CheckpointError
from quant.header_json import MARKERS, make_dict
from quant.spec import FLOAT4, GROUP, GROUP_FORMAT, MXFP8, ROW_FORMAT

MAX_MARKER_BYTES = 4096
# How large a group may be; the largest of a published file is 256, FLUX.1's widest layer has 15360.
LARGEST_GROUP = 1 << 14
# ComfyUI's group where a marker says that the weight is rotated, and no more.
USUAL_ROTATION = 256
FP8_FORMAT = "float8_e4m3fn"
FORMATS = (FP8_FORMAT, ROW_FORMAT, GROUP_FORMAT, FLOAT4, MXFP8)
# Keys that change nothing of what the codes mean; the sizes are told by the tensors.
DESCRIBING = (
    "bits",
    "format_version",
    "full_precision_matrix_mult",
    "orig_dtype",
    "orig_shape",
    "per_row",
    "version",
)
KNOWN_KEYS = ("format", "params", "convrot", "convrot_groupsize", "group_size", *DESCRIBING)
UNREAD = "weights packed in a way that is not read"
READABLE = (
    "read are float8_e4m3fn, int8_tensorwise, asym_w4a8_int8, nvfp4 and mxfp8, "
    "bitsandbytes' nf4 and int8, and GGUF"
)


class Marker(NamedTuple):
    """What a marker says of a layer's weight."""

    format: str
    rotation: int = 0  # how many columns are rotated together, 0 where none are
    group: int = 0  # how many values of a row share a scale, where the format does not say it


def read_layers(metadata: Mapping[str, str]) -> dict[str, object]:
    """What the metadata of a header says of layers, by their names; {} where it is not ComfyUI's.

    ComfyUI writes it beside marker tensors, or in place of them.
    """
    try:
        return dict(json.loads(metadata[MARKERS], object_pairs_hook=make_dict)["layers"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def add_layers(
    layers: dict[str, object], others: Mapping[str, object], *, file: Path
) -> dict[str, object]:
    """What two parts of metadata say of layers; raises `CheckpointError` where they contradict."""
    for layer, described in others.items():
        if layers.setdefault(layer, described) != described:
            raise _refuse(layer, "is described twice, not alike", file)
    return layers


def parse_marker(layer: str, data: bytes, *, file: Path) -> Marker:
    """Return what a marker's tensor says; raises `CheckpointError` as `read_marker` does."""
    try:
        described = json.loads(data.decode("utf-8"), object_pairs_hook=make_dict)
    except (ValueError, RecursionError) as error:
        why = f"the marker of {layer[:60]} is no JSON"
        raise CheckpointError(UNREAD, file, why=why, hint=READABLE) from error
    return read_marker(layer, described, file=file)


def read_marker(layer: str, described: object, *, file: Path) -> Marker:
    """Return what a marker says; `layer` is whose it is, for errors.

    Raises `CheckpointError` for a form that is not known, for sizes that cannot be, and for an
    unknown key that may change what the codes mean.
    """
    if isinstance(described, str):  # as some converters write it
        described = {"format": described}
    if not isinstance(described, dict):
        raise _refuse(layer, f"has {described!r:.40} for a marker", file)
    nested = described.get("params") or {}
    if not isinstance(nested, dict):
        raise _refuse(layer, f"has {nested!r:.40} for params in its marker", file)
    said = nested | described  # of older converters; what stands outside counts
    name = said.get("format", FP8_FORMAT)
    if name not in FORMATS:
        raise _refuse(layer, f"is {name!s:.40}", file)
    _refuse_unknown_keys(layer, said, file)
    is_rotated = said.get("convrot", name == GROUP_FORMAT)
    if type(is_rotated) is not bool:
        raise _refuse(layer, f"convrot is {is_rotated!r:.40}", file)
    if is_rotated and name not in (ROW_FORMAT, GROUP_FORMAT):
        raise _refuse(layer, f"is {name} with convrot", file)
    if name == GROUP_FORMAT and not is_rotated:
        raise _refuse(layer, f"is {name} without convrot", file)
    rotation = 0
    if is_rotated:
        rotation = _read_size(layer, said, "convrot_groupsize", file=file, usual=USUAL_ROTATION)
        if not _is_power_of_four(rotation):
            raise _refuse(layer, f"convrot_groupsize is {rotation}, no power of 4", file)
    group = 0
    if name == GROUP_FORMAT:
        group = _read_size(layer, said, "group_size", file=file, usual=GROUP)
    return Marker(name, rotation, group)


def _refuse(layer: str, why: str, file: Path) -> CheckpointError:
    return CheckpointError(UNREAD, file, why=f"{layer[:60]} {why}", hint=READABLE)


def _refuse_unknown_keys(layer: str, said: Mapping[str, Any], file: Path) -> None:
    """Raise `CheckpointError` for an unknown key that is `true`, a number but 0, or an object.

    It may say of another transform, as QuIP's `hadamard_quip` does. Texts and lists only describe.
    """
    for key, value in said.items():
        if key not in KNOWN_KEYS and isinstance(value, int | float | dict) and value:
            raise _refuse(layer, f"has {key[:40]} {value!r:.20} in its marker", file)


def _read_size(layer: str, said: Mapping[str, Any], key: str, *, file: Path, usual: int) -> int:
    """A size of a group, `usual` where the marker says none; raises `CheckpointError`."""
    size = said.get(key, usual)
    if type(size) is not int or not 0 < size <= LARGEST_GROUP:
        raise _refuse(layer, f"{key} is {size!r:.40}", file)
    return size


def _is_power_of_four(size: int) -> bool:
    while size % 4 == 0:
        size //= 4
        if size == 1:
            return True
    return False
