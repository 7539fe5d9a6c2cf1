"""What files and settings are, for people: a few lines on a terminal, JSON for programs.

Knows how descriptions are laid out, not where they come from. What stands in them may be a
stranger's: any value of any type is shown.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fluxcli.cli import console
from fluxcli.request.fields import is_default_input
from fluxcli.request.settings import ALIASES, FROM_PICTURES

Row = tuple[str, ...]
SHORT_NAMES = {name: alias for alias, name in ALIASES.items()}  # as options and files have them


def show_picture(metadata: Mapping[str, Any], *, as_json: bool) -> None:
    """Print how a picture was made."""
    if as_json or not console.is_terminal(sys.stdout):
        console.data_json(metadata, indent=2)
    else:
        console.table(_list_picture(metadata), None, as_json=False)


def show_weights(described: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a file or folder of weights is."""
    if as_json or not console.is_terminal(sys.stdout):
        console.data_json(described, indent=2)
        return
    console.table(_list_weights(described), None, as_json=False)
    parts = described.get("components")
    if parts:
        head = ("part", "precision", "parameters", "size", "tensors")
        rows = [head, *(_list_part(name, part) for name, part in parts.items())]
        console.table(rows, None, as_json=False)
    console.table([("bad", each) for each in described["problems"]], None, as_json=False)


def describe_value(value: object) -> str:
    """Return a value in words: yes and no, - for nothing, the items of a list."""
    if value is None or value in ([], (), "", {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(describe_value(each) for each in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def describe_bytes(size_bytes: int) -> str:
    """Return a size of files: 5.2 MB, 23.80 GB."""
    if size_bytes < 1e9:
        return f"{size_bytes / 1e6:.1f} MB"
    return f"{size_bytes / 1e9:.2f} GB"


def _list_picture(metadata: Mapping[str, Any]) -> Iterator[Row]:
    request = metadata["request"]
    size = metadata.get("size")
    if isinstance(size, list) and len(size) == 2:
        size = f"{size[0]}x{size[1]}"
    for name in ("prompt", "seed", "steps", "guidance"):
        yield name, describe_value(request.get(name))
    yield "size", describe_value(size)
    yield "model", f"{describe_value(request.get('model'))} (preset {request.get('preset')})"
    if request.get("lora"):
        yield "adapters", describe_value(request["lora"])
    for name in FROM_PICTURES:
        if name in request and not is_default_input(name, request[name]):
            yield name.replace("_", " "), describe_value(request[name])
    for group in ("compute", "versions"):
        said = metadata.get(group)
        if isinstance(said, dict):
            yield group, ", ".join(f"{key} {describe_value(each)}" for key, each in _flat(said))


def _flat(said: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The values that are no groups themselves."""
    return ((key, value) for key, value in said.items() if not isinstance(value, dict))


def _list_weights(described: Mapping[str, Any]) -> Iterator[Row]:
    for name in ("path", "kind", "format", "dialect", "precision", "loads", "base_model"):
        if described.get(name):
            yield name.replace("_", " "), describe_value(described[name])
    if described.get("model"):
        model = described["model"]
        yield "model", f"{model['kind']}, told by {model['told_by']}"
    for name in ("rank", "alpha"):
        if name in described:
            yield name, describe_value(described[name])
    if described.get("targets"):
        layers = [f"{name} {number}" for name, number in described["targets"].items()]
        yield "layers", ", ".join(layers)
    if described.get("unmatched"):
        yield "without effect", console.count(len(described["unmatched"]), "layer")
    if "parameters" in described:
        yield "parameters", _describe_number(described["parameters"])
    if "bytes" in described:
        yield "size", describe_bytes(described["bytes"])
    if described.get("needs"):
        yield "needs", describe_value(described["needs"])


def _list_part(name: str, part: Mapping[str, Any]) -> Row:
    parameters = _describe_number(part["parameters"])
    return name, part["precision"], parameters, describe_bytes(part["bytes"]), part["loads"]


def _describe_number(number: int) -> str:
    if number < 1e9:
        return f"{number / 1e6:.1f} million"
    return f"{number / 1e9:.2f} billion"
