"""ControlNets for FLUX.1: where one is a folder in diffusers' layout, and where it is one file.

InstantX, Shakker-Labs and Jasper publish folders with diffusers' names, which people own as single
files, too; XLabs files with names of its own, which are BFL's for the blocks. Where there is no
config.json, tensors and their shapes imply the config. Works from headers alone. Stdlib only.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint import Component, inspect_component
from quant.config import HINT_PATCH, check_config, complete, is_class_of, read_json
from quant.dialects import (
    guess_kind,
    has_bfl_blocks,
    infer_bfl_config,
    infer_diffusers_config,
    map_bfl_layers,
    rename_weights,
    translate_layers,
)
from quant.errors import CheckpointError, ForeignFile
from quant.expected import HINT_CONVOLUTIONS, check_tensors
from quant.header import read_whole_header
from quant.kinds import CONTROLNET, find_part
from quant.single_file import OLD_SCALE_END, SCALE_END, group_stored
from quant.weights import Piece, Weight

NAME = CONTROLNET  # of such a component, by whatever key a checkpoint has it
FOREIGN = "not a ControlNet for FLUX.1"
# Keys of the first union network were those of a layer more.
RENAMED = ((r"^controlnet_mode_embedder\.fc\.", "controlnet_mode_embedder."),)
MODES = "controlnet_mode_embedder.weight"
HINT_OUTPUT = "input_hint_block.conv_out.weight"


def is_controlnet(path: Path) -> bool:
    """Whether a folder or a file seems to be a ControlNet: by its config's class, or its keys."""
    try:
        if path.is_dir():
            if os.path.lexists(path / "model_index.json"):
                return False
            config = path / "config.json"
            if os.path.lexists(config):
                return is_class_of(NAME, read_json(config, "").get("_class_name"))
            file = _find_only_file(path)
            return file is not None and is_controlnet(file)
        return find_part(read_whole_header(path).tensors) == CONTROLNET
    except CheckpointError:
        return False


def inspect_controlnet(path: Path) -> Component:
    """The ControlNet in a folder or a file, checked; raises `CheckpointError`.

    `ForeignFile` for a file that is something else.
    """
    component = read_controlnet(path)
    check_tensors(NAME, path, config=component.config, weights=component.weights)
    return component


def read_controlnet(path: Path) -> Component:
    """As `inspect_controlnet`, of which the tensors are not checked."""
    return _inspect_folder(path) if path.is_dir() else _inspect_file(path)


def check_fit(controlnet: Component, transformer: Component, *, name: str) -> None:
    """Raise `CheckpointError`, which names it, for a ControlNet of a transformer of other sizes."""
    mine = _measure(complete(NAME, controlnet.config))
    its = _measure(complete("transformer", transformer.config))
    for what, size in mine.items():
        if size != its[what]:
            why = f"{what} {size} instead of {its[what]}"
            raise CheckpointError("a ControlNet of another model", name, why=why)


def _measure(values: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in which a ControlNet and its transformer must agree."""
    return {
        "it has the width": values["num_attention_heads"] * values["attention_head_dim"],
        "it takes texts of the width": values["joint_attention_dim"],
        "it takes pooled texts of the width": values["pooled_projection_dim"],
    }


def _inspect_folder(folder: Path) -> Component:
    """A folder with a config; or one that has nothing but a file, as some repositories are."""
    if os.path.lexists(folder / "config.json"):
        return inspect_component(NAME, folder)
    file = _find_only_file(folder)
    if file is None:
        why = "it has neither a config.json nor one .safetensors file"
        raise ForeignFile(FOREIGN, folder, why=why)
    return _inspect_file(file)


def _find_only_file(folder: Path) -> Path | None:
    """The only weight file of a folder, None where there are several or none."""
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _inspect_file(path: Path) -> Component:
    """A ControlNet from one file; its tensors imply the config."""
    header = read_whole_header(path)
    if find_part(header.tensors) != CONTROLNET:
        raise ForeignFile(FOREIGN, path, why=guess_kind(header.tensors, header.metadata))
    stored = {
        name.replace(OLD_SCALE_END, SCALE_END): Piece(path, info)
        for name, info in header.tensors.items()
    }
    if len(stored) < len(header.tensors):
        raise CheckpointError("a tensor under two names", path)
    _, grouped = group_stored(NAME, path, header=header, stored=stored)
    if has_bfl_blocks(grouped):
        dialect = "XLabs"
        config = infer_bfl_config(grouped)
        weights = translate_layers(grouped, _map_xlabs_layers(config))
    else:
        dialect = "diffusers"
        weights = rename_weights(grouped, RENAMED)
        config = infer_diffusers_config(weights)
    config = check_config(NAME, path, _complete_config(config, weights))
    component = Component(NAME, path, config=config, weights=weights, dialect=dialect)
    if component.precision:
        component = replace(component, dialect=f"{dialect}, {component.precision}")
    return component


def _complete_config(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> dict[str, Any]:
    """The config of a ControlNet, from what its blocks imply, and from its other weights."""
    found = dict(config)
    del found["out_channels"]
    found["_class_name"] = "FluxControlNetModel"
    found["num_mode"] = _count_rows(weights, MODES)
    channels = _count_rows(weights, HINT_OUTPUT)
    found["conditioning_embedding_channels"] = channels
    found["patch_size"] = HINT_PATCH if channels else 1
    return found


def _count_rows(weights: Mapping[str, Weight], name: str) -> int | None:
    """The first dimension of a weight, None where there is no such weight."""
    if name not in weights or not weights[name].shape:
        return None
    return weights[name].shape[0]


def _map_xlabs_layers(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """XLabs' layers by their names, and diffusers' layers that they are.

    Its hint block is a sequence in which each convolution is followed by an activation.
    """
    layers = map_bfl_layers(config)
    layers["pos_embed_input"] = ("controlnet_x_embedder",)
    for i in range(config["num_layers"]):
        layers[f"controlnet_blocks.{i}"] = (f"controlnet_blocks.{i}",)
    middle = [f"input_hint_block.blocks.{i}" for i in range(HINT_CONVOLUTIONS)]
    hint = ["input_hint_block.conv_in", *middle, "input_hint_block.conv_out"]
    for i, ours in enumerate(hint):
        layers[f"input_hint_block.{2 * i}"] = (ours,)
    return layers
