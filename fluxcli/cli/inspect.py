"""`flux inspect`: what a picture, a weight file or a model folder is.

Of weights it reads headers alone, and says what is wrong with them under `problems`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxcli.cli import show
from fluxcli.cli.settings import check_there
from fluxcli.errors import ExitCode
from fluxcli.models import loras
from fluxcli.models.find import MODEL_FILES
from fluxcli.models.shapes import read_known_shapes
from quant.checkpoint import (
    COMPONENTS,
    TOKENIZERS,
    Checkpoint,
    Component,
    check_components,
    find_kind_of,
    inspect,
    inspect_component,
)
from quant.controlnet import is_controlnet, read_controlnet
from quant.errors import CheckpointError, ForeignFile
from quant.expected import check_tensors, count_matching
from quant.header import read_header
from quant.kinds import REDUX, find_part
from quant.lora_names import is_lora
from quant.redux import REDUX_PARTS, inspect_redux, is_whole_redux
from quant.single_file import inspect_file, name_component
from quant.tensor_info import TensorInfo

Description = dict[str, Any]


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            help="A picture, a weight file, or the folder of a model or ControlNet.",
            show_default=False,
        ),
    ],
    json_output: Annotated[
        bool, typer.Option("--json", help="JSON on a terminal, too; elsewhere it always is.")
    ] = False,
) -> int:
    """Say what a file is: how a picture was made, or what weights hold and need.

    A short table on a terminal, JSON for programs. Exit 4: the weights are unusable.
    """
    check_there(path)
    if is_controlnet(path):
        described = _describe_controlnet(path)
    elif _is_redux(path):
        described = _describe_redux(path)
    elif path.is_dir():
        described = _describe_folder(path)
    elif path.suffix.lower() in MODEL_FILES:
        described = _describe_file(path)
    else:
        from fluxcli.pictures import image

        show.show_picture(image.read_metadata(path), as_json=json_output)
        return ExitCode.OK
    show.show_weights(described, as_json=json_output)
    # An adapter of which a part is used is still one.
    is_usable = described.get("usable", not described["problems"])
    return ExitCode.OK if is_usable else ExitCode.INPUT_FILE


def _describe_controlnet(path: Path) -> Description:
    """What a ControlNet is; raises `CheckpointError` where not even its config can be told."""
    problems: list[str] = []
    network = read_controlnet(path)
    described = _describe_component(network, problems)
    double, single = network.config["num_layers"], network.config["num_single_layers"]
    described["blocks"] = f"{double} double, {single} single"
    if network.config.get("num_mode") is not None:
        described["modes"] = network.config["num_mode"]
    if network.config.get("conditioning_embedding_channels") is not None:
        described["looks_at"] = "pixels, by XLabs' hint block"
    return {
        "path": str(path),
        "kind": "ControlNet",
        **described,
        "needs": [f"a model of the same width: --control {path}:PICTURE"],
        "problems": problems,
    }


def _is_redux(path: Path) -> bool:
    """Whether a folder or a file has the embedder of Redux."""
    if path.is_dir():
        return is_whole_redux(path)
    if path.suffix.lower() not in MODEL_FILES:
        return False
    with contextlib.suppress(CheckpointError):
        return find_part(read_header(path)) == REDUX
    return False


def _describe_redux(path: Path) -> Description:
    """What the parts of Redux there are; raises `CheckpointError`."""
    problems: list[str] = []
    parts = inspect_redux([path])
    components = {name: _describe_component(part, problems) for name, part in parts.items()}
    needs = [name for name in REDUX_PARTS if name not in parts]
    return {
        "path": str(path),
        "kind": "Redux",
        "components": components,
        "needs": [*needs, f"FLUX.1 [dev]: --redux PICTURE --redux-model {path}"],
        "problems": problems,
    }


def _describe_kind(checkpoint: Checkpoint) -> Description:
    """Which kind of FLUX.1 a model is, and what tells it."""
    if checkpoint.said_kind:
        return {"kind": checkpoint.said_kind, "told_by": "its manifest"}
    return checkpoint.found_kind._asdict()


def _describe_folder(path: Path) -> Description:
    """What a model folder is, or the folder of one component."""
    if (path / "model_index.json").is_file():
        return _describe_model_folder(path)
    problems: list[str] = []
    name = name_component(path)
    return {
        "path": str(path),
        "kind": "part of a model",
        "components": _describe_components({name: path}, problems),
        "needs": ["the other parts of a model folder"],
        "problems": problems,
    }


def _describe_model_folder(path: Path) -> Description:
    every = (*COMPONENTS, *TOKENIZERS, "scheduler")
    missing = [name for name in every if not (path / name).is_dir()]
    problems = [f"{name} is missing" for name in missing]
    folders = {name: path / name for name in COMPONENTS if name not in missing}
    components = _describe_components(folders, problems)
    model: Description = {}
    if not problems:
        try:
            checkpoint = inspect(path)
            model = {"model": _describe_kind(checkpoint)}
            check_components(checkpoint.components)
        except CheckpointError as error:
            problems.append(str(error))
    return {
        "path": str(path),
        "kind": "model folder",
        **model,
        "components": components,
        "needs": missing,
        "problems": problems,
    }


def _describe_components(
    folders: Mapping[str, Path], problems: list[str]
) -> dict[str, Description]:
    """What the components in these folders are; adds to `problems`."""
    found = {}
    for name, folder in folders.items():
        try:
            found[name] = _describe_component(inspect_component(name, folder), problems)
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
    return found


def _describe_file(path: Path) -> Description:
    """What a single file is: an adapter, one or several components, or nothing of FLUX.1."""
    infos = read_header(path)
    if is_lora(infos):
        return loras.describe(path)
    try:
        parts = inspect_file(path)
    except ForeignFile as error:
        return {"path": str(path), "kind": error.why, **_describe_foreign(path, infos)}
    known = read_known_shapes()
    assert known is not None
    problems: list[str] = []
    components = {}
    for name, part in parts.items():
        # Most files say nothing of their configuration: it is taken to be the published one.
        config = part.config or known.components[name].config
        components[name] = _describe_component(replace(part, config=config), problems)
    needs = [name for name in COMPONENTS if name not in parts]
    needs.append("tokenizers: a model folder has them")
    described: Description = {"path": str(path)}
    if len(components) == 1:
        (name,) = components
        described |= {"kind": name, **components[name]}
    else:
        described |= {"kind": "several parts", "components": components}
    if "transformer" in parts:
        described["model"] = find_kind_of(parts["transformer"])._asdict()
    return described | {"needs": needs, "problems": problems}


def _describe_foreign(path: Path, infos: Mapping[str, TensorInfo]) -> Description:
    """The precision and the counts of a file that holds nothing of FLUX.1.

    Raises `CheckpointError` where it holds nothing at all.
    """
    largest = max(infos.values(), key=lambda info: info.numel)
    if not largest.numel:
        why = f"its {len(infos)} tensors hold no values"
        raise CheckpointError("empty safetensors file", path, why=why)
    return {
        "precision": largest.dtype,
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos.values()),
        "truncated": False,
        "needs": ["the folder that it belongs to, with its config.json"],
        "problems": [],
    }


def _describe_component(part: Component, problems: list[str]) -> Description:
    """What a component is; adds to `problems` where it lacks tensors."""
    matched, expected = count_matching(part.name, config=part.config, weights=part.weights)
    try:
        check_tensors(part.name, part.folder, config=part.config, weights=part.weights)
    except CheckpointError as error:
        count = ""
        if matched < expected:
            count = f"only {matched} of its {expected} tensors fit: "
        problems.append(f"{part.name}: {count}{error.why}")
    largest = max(part.weights.values(), key=lambda weight: weight.numel)
    described = {
        "dialect": part.dialect,
        "precision": part.precision or largest.info.dtype,
        "parameters": part.numel,
        "bytes": part.nbytes,
        "tensors": len(part.weights),
        "loads": f"{matched} of {expected}",
        # A file that ends too early is refused when its header is read.
        "truncated": False,
    }
    # Of CLIP its vision half, of T5 its decoder.
    if part.unused:
        described["unused"] = list(part.unused)
    return described
