"""`flux inspect`: what a picture, a weight file or a model folder is, as JSON."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from fluxcli.models.shapes import read_known_shapes
from quant.checkpoint import COMPONENTS, TOKENIZERS, Component, inspect, inspect_component
from quant.errors import CheckpointError, ForeignFile
from quant.header import read_header
from quant.lora import is_lora
from quant.single_file import inspect_file, name_component


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A picture, a .safetensors file or a model folder.", show_default=False)],
) -> int:
    """Say what a file is, as JSON: how a picture was made, or what weights hold and still need (exit 4: unusable)."""
    weights = path.is_dir() or path.suffix.lower() in models.MODEL_FILES
    if weights:
        described = _folder(path) if path.is_dir() else _file(path)
    else:
        from fluxcli.pictures import image

        described = image.read_metadata(path)
    console.data_json(described, indent=2)
    return ExitCode.INPUT_FILE if weights and described["problems"] else ExitCode.OK


def _folder(path: Path) -> dict:
    """What each part of a model folder (or the folder of one part) is."""
    whole = (path / "model_index.json").is_file()
    if whole:
        parts = {name: path / name for name in COMPONENTS if (path / name).is_dir()}
    else:
        parts = {name_component(path): path}
    missing = [name for name in (*COMPONENTS, *TOKENIZERS, "scheduler") if whole and not (path / name).is_dir()]
    components, problems = {}, [f"{name} is missing" for name in missing]
    for name, folder in parts.items():
        try:
            components[name] = _component(inspect_component(name, folder), problems)
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
    if whole and not problems:
        try:
            inspect(path)
        except CheckpointError as error:
            problems.append(str(error))
    kind, needs = ("model folder", missing) if whole else ("part of a model", ["the other parts of a model folder"])
    return {"path": str(path), "kind": kind, "components": components, "needs": needs, "problems": problems}


def _file(path: Path) -> dict:
    """What a single file is; one that holds nothing of FLUX.1 is named and counted."""
    infos, problems = read_header(path), []
    if is_lora(infos):
        return lora.describe(path)
    try:
        parts = inspect_file(path)
    except ForeignFile as error:
        numel, largest = sum(info.numel for info in infos.values()), max(infos.values(), key=lambda info: info.numel)
        part = {"precision": largest.dtype, "tensors": len(infos), "parameters": numel, "truncated": False}
        needs = ["the folder that it belongs to, with its config.json"]
        return {"path": str(path), "kind": error.why, **part, "needs": needs, "problems": problems}
    known = read_known_shapes().components
    described = {n: _component(replace(p, config=p.config or known[n].config), problems) for n, p in parts.items()}
    needs = [name for name in COMPONENTS if name not in parts] + ["tokenizers: a model folder has them"]
    one = len(parts) == 1
    kind, shown = (*parts, *described.values()) if one else ("several parts", {"components": described})
    return {"path": str(path), "kind": kind, **shown, "needs": needs, "problems": problems}


def _component(part: Component, problems: list[str]) -> dict:
    from fluxcli.engine.loader import count_matching

    matched, expected = count_matching(part)
    if matched < expected:
        problems.append(f"{part.name}: only {matched} of its {expected} tensors are there")
    largest = max(part.weights.values(), key=lambda weight: weight.numel)
    return {
        "dialect": part.dialect, "precision": part.precision or largest.info.dtype, "parameters": part.numel,
        "bytes": part.nbytes, "tensors": len(part.weights), "loads": f"{matched} of {expected}", "truncated": False,
    }  # fmt: skip
