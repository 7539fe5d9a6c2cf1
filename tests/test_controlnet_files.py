"""ControlNets are read from folders and files by their headers alone; what does not fit is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint import inspect
from quant.codecs import Reader
from quant.controlnet import check_fit, inspect_controlnet, is_controlnet
from quant.errors import CheckpointError
from quant.expected import list_shapes
from tests.support.controlnets import KINDS, PLAIN, to_xlabs

FIELDS = (
    "num_layers",
    "num_single_layers",
    "num_mode",
    "conditioning_embedding_channels",
    "patch_size",
    "guidance_embeds",
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "axes_dims_rope",
)


def pick_fields(config: dict) -> dict:
    return {field: config.get(field) for field in FIELDS}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_diffusers_class(controlnet, kind):
    component = inspect_controlnet(controlnet(kind))
    stored = load_file(controlnet(kind) / PLAIN)
    assert list_shapes("controlnet", component.config) == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_config_tells_it(controlnet, kind):
    file = Path("map.safetensors")
    shutil.copy(controlnet(kind) / PLAIN, file)
    assert is_controlnet(file)
    found = inspect_controlnet(file)
    assert pick_fields(found.config) == pick_fields(inspect_controlnet(controlnet(kind)).config)


def test_xlabs_names_become_diffusers(controlnet):
    folder = controlnet("xlabs")
    file = to_xlabs(folder, Path("flux-canny-controlnet-v3.safetensors"))
    assert is_controlnet(file)
    found = inspect_controlnet(file)
    assert found.dialect == "XLabs"
    assert pick_fields(found.config) == pick_fields(inspect_controlnet(folder).config)
    state = load_file(folder / PLAIN)
    assert found.weights.keys() == state.keys()
    reader = Reader()
    for name, weight in found.weights.items():
        assert torch.equal(reader.read(weight)[""].view(weight.shape), state[name]), name


def test_a_folder_of_one_file_needs_no_config(controlnet):
    Path("collection").mkdir()
    to_xlabs(controlnet("xlabs"), Path("collection/flux-hed-controlnet-v3.safetensors"))
    assert is_controlnet(Path("collection"))
    assert inspect_controlnet(Path("collection")).dialect == "XLabs"


def test_the_first_unions_names_are_read(controlnet):
    state = load_file(controlnet("union") / PLAIN)
    modes = state.pop("controlnet_mode_embedder.weight")
    save_file(state | {"controlnet_mode_embedder.fc.weight": modes}, "union.safetensors")
    assert inspect_controlnet(Path("union.safetensors")).config["num_mode"] == len(modes)


CHANGES = {
    "no blocks": {"num_layers": 0, "num_single_layers": 0},
    "more than a map": {"extra_condition_channels": 4},
    "in_channels is 128": {"in_channels": 128},
    "num_mode is": {"num_mode": -1},
    "num_mode is 1.5": {"num_mode": 1.5},
    "num_layers is": {"num_layers": 1000000},
    "num_single_layers is": {"num_single_layers": False},
    "missing tensors": {"num_mode": 7},
    "patch_size is 2": {"patch_size": 2},
    "none of XLabs'": {"conditioning_embedding_channels": 16},
    "axes_dims_rope": {"axes_dims_rope": [4, 14]},
    "'AutoencoderKL' instead of": {"_class_name": "AutoencoderKL"},
}


@pytest.mark.parametrize("said", CHANGES)
def test_impossible_configs_are_refused(controlnet, said):
    folder = shutil.copytree(controlnet("single"), Path("changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | CHANGES[said]))
    with pytest.raises(CheckpointError, match=said):
        inspect_controlnet(folder)


HOSTILE = {
    "missing tensors": ["controlnet_blocks.0.weight"],
    "x_embedder.weight is missing": ["x_embedder.weight"],
    "norm_q.weight is missing": ["transformer_blocks.0.attn.norm_q.weight"],
}


@pytest.mark.parametrize("said", HOSTILE)
def test_files_that_lack_tensors_are_refused(controlnet, said):
    state = load_file(controlnet("single") / PLAIN)
    for name in HOSTILE[said]:
        del state[name]
    save_file(state, "x.safetensors")
    with pytest.raises(CheckpointError, match=said):
        inspect_controlnet(Path("x.safetensors"))


def test_misshapen_and_unknown_tensors_are_refused(controlnet):
    state = load_file(controlnet("union") / PLAIN)
    wrong = {
        "misshapen": {"controlnet_x_embedder.weight": torch.ones(128, 68)},
        "unknown": {"controlnet_blocks.7.weight": torch.ones(4, 4)},
        "x_embedder.weight is missing or misshapen": {"x_embedder.weight": torch.ones(())},
        "weights without values": {"controlnet_mode_embedder.weight": torch.ones(0, 128)},
    }
    for said, tensors in wrong.items():
        save_file(state | tensors, "x.safetensors")
        with pytest.raises(CheckpointError, match=said):
            inspect_controlnet(Path("x.safetensors"))


def test_other_files_are_no_controlnets(tiny_folder):
    assert not is_controlnet(tiny_folder)
    assert not is_controlnet(tiny_folder / "transformer")
    assert not is_controlnet(tiny_folder / "transformer" / PLAIN)
    with pytest.raises(CheckpointError, match="not a ControlNet for FLUX"):
        inspect_controlnet(tiny_folder / "transformer" / PLAIN)


def test_a_network_of_another_model_does_not_fit(controlnet, tiny_folder):
    transformer = inspect(tiny_folder).components["transformer"]
    found = inspect_controlnet(controlnet("single"))
    check_fit(found, transformer)
    found.config["num_attention_heads"] = 24
    with pytest.raises(CheckpointError, match="the width 768 instead of 128"):
        check_fit(found, transformer)
