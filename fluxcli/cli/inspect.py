"""`flux inspect`: how a picture was made, or what a weight file or model folder is, from headers alone."""

from pathlib import Path
from typing import Annotated

import typer

from fluxcli import console
from fluxcli.errors import ExitCode
from quant.checkpoint import COMPONENTS, TOKENIZERS, Component, inspect, inspect_component, inspect_file
from quant.config import CLASSES, read_json
from quant.dialects import is_bfl, kind_of
from quant.errors import CheckpointError
from quant.header import read_header

WEIGHTS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A picture, a .safetensors file or a model folder.", show_default=False)],
) -> int:
    """Say what a file is, as JSON: how a picture was made, or what weights hold and still need (exit 4: unusable)."""
    if path.is_dir() or path.suffix.lower() in WEIGHTS:
        described = _folder(path) if path.is_dir() else _file(path)
        console.data_json(described, indent=2)
        return ExitCode.INPUT_FILE if described["problems"] else ExitCode.OK
    from fluxcli import image

    console.data_json(image.read_metadata(path), indent=2)
    return ExitCode.OK


def _folder(path: Path) -> dict:
    """What each part of a model folder (or the folder of one part) is."""
    whole = (path / "model_index.json").is_file()
    parts = {name: path / name for name in COMPONENTS if (path / name).is_dir()} if whole else {_part_of(path): path}
    missing = [name for name in (*COMPONENTS, *TOKENIZERS, "scheduler") if whole and not (path / name).is_dir()]
    components, problems = {}, [f"{name} is missing" for name in missing]
    for name, folder in parts.items():
        try:
            components[name] = _component(inspect_component(name, folder), "diffusers", problems)
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
    if whole and not problems:
        try:
            inspect(path)
        except CheckpointError as error:
            problems.append(str(error))
    kind, needs = ("model folder", missing) if whole else ("part of a model", ["the other parts of a model folder"])
    return {"path": str(path), "kind": kind, "components": components, "needs": needs, "problems": problems}


def _part_of(folder: Path) -> str:
    config = read_json(folder / "config.json", "neither a model folder nor a part of one")
    named = [config.get("_class_name"), config.get("architectures")]
    found = [name for name in COMPONENTS if CLASSES[name] in named or [CLASSES[name]] in named]
    if not found:
        raise CheckpointError("not a part of FLUX.1", which=folder, why=f"it names {named[0] or named[1]!r:.60}")
    return found[0]


def _file(path: Path) -> dict:
    """What a single file is; one that is no FLUX transformer is named and counted."""
    infos, problems = read_header(path), []
    if is_bfl(infos):
        kind, part = "transformer", _component(inspect_file(path), "bfl", problems)
        needs = ["text_encoder", "text_encoder_2", "vae", "tokenizers: a model folder has them"]
    else:
        numel, largest = sum(info.numel for info in infos.values()), max(infos.values(), key=lambda info: info.numel)
        part = {"precision": largest.dtype, "tensors": len(infos), "parameters": numel, "truncated": False}
        kind, needs = kind_of(infos), ["the folder that it belongs to, with its config.json"]
    return {"path": str(path), "kind": kind, **part, "needs": needs, "problems": problems}


def _component(part: Component, dialect: str, problems: list[str]) -> dict:
    from fluxcli.loader import matching

    matched, expected = matching(part)
    if matched < expected:
        problems.append(f"{part.name}: only {matched} of its {expected} tensors are there")
    largest = max(part.weights.values(), key=lambda weight: weight.numel)
    return {
        "dialect": dialect, "precision": part.precision or largest.info.dtype, "parameters": part.numel,
        "bytes": part.nbytes, "tensors": len(part.weights), "loads": f"{matched} of {expected}", "truncated": False,
    }  # fmt: skip
