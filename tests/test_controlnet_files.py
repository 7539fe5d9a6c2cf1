"""ControlNets are read from folders and files by their headers alone; what does not fit is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quant.checkpoint import inspect
from quant.codecs import Reader
from quant.controlnet import check_fit, inspect_controlnet, is_controlnet
from quant.errors import CheckpointError, ForeignFile
from quant.expected import list_shapes
from tests.support.controlnets import KINDS, PLAIN, save_map, to_xlabs
from tests.support.invariant import assert_failed, call

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


def test_a_folder_without_a_network_is_none(tiny_folder):
    with pytest.raises(ForeignFile, match="neither a config"):
        inspect_controlnet(tiny_folder)


def test_a_network_of_another_model_does_not_fit(controlnet, tiny_folder):
    transformer = inspect(tiny_folder).components["transformer"]
    found = inspect_controlnet(controlnet("single"))
    check_fit(found, transformer, name="x")
    found.config["num_attention_heads"] = 24
    with pytest.raises(CheckpointError, match="the width 768 instead of 128"):
        check_fit(found, transformer, name="x")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["union", "xlabs"])
def test_hostile_shapes_are_refused(controlnet, kind, shape):
    names = list(load_file(controlnet(kind) / PLAIN))
    if kind == "xlabs":
        names = list(load_file(to_xlabs(controlnet(kind), Path("real.safetensors"))))
    save_file({name: torch.ones(shape) for name in names}, "x.safetensors")
    with pytest.raises(CheckpointError):
        inspect_controlnet(Path("x.safetensors"))


def test_a_thousand_blocks_are_refused(controlnet):
    state = load_file(controlnet("single") / PLAIN)
    more = {f"transformer_blocks.{i}.x.weight": torch.ones(1) for i in range(999)}
    save_file(state | more, "x.safetensors")
    with pytest.raises(CheckpointError, match="num_layers is 999"):
        inspect_controlnet(Path("x.safetensors"))


# --- the commands


def test_quantize_makes_a_folder_that_acts(controlnet, capsys):
    file = str(to_xlabs(controlnet("xlabs"), Path("flux-canny-controlnet-v3.safetensors")))
    save_map(Path("map.png"))
    options = ("a circle", "-p", "tiny", "--steps", "1", "--size", "64", "--seed", "1")
    options += ("--precision", "int8")
    call(capsys, "generate", *options, "--control", f"{file}:map.png", "-o", "before.png")
    assert call(capsys, "quantize", file, "small", "--to", "int8").returncode == 0
    described = json.loads(call(capsys, "inspect", "small").stdout)
    assert described["kind"] == "ControlNet" and described["precision"] == "int8"
    assert described["looks_at"].startswith("pixels") and described["problems"] == []
    call(capsys, "generate", *options, "--control", "small:map.png", "-o", "after.png")
    assert Image.open("before.png").tobytes() == Image.open("after.png").tobytes()
    error = assert_failed(call(capsys, "quantize", "small", "x", "--to", "nf4"), 4)
    assert "quantized already" in error


def test_a_kind_of_control_is_quantized_by_its_name(capsys):
    assert call(capsys, "quantize", "edges", "small", "--to", "int8").returncode == 0
    assert inspect_controlnet(Path("small")).precision == "int8"


@pytest.mark.parametrize(
    "options",
    [
        ("--to", "nf4", "--lora", "x.safetensors"),
        ("--to", "nf4", "--text-encoder", "nf4"),
        ("--to", "int8", "--layout", "comfy"),
        (),
    ],
)
def test_what_a_controlnet_has_not_is_refused(options, controlnet, capsys):
    call_options = ("quantize", str(controlnet("single")), "x", *options)
    error = assert_failed(call(capsys, *call_options), 2)
    assert "ControlNet" in error and not Path("x").exists()


def test_a_network_of_another_width_is_exit_4(controlnet, capsys):
    save_map(Path("map.png"))
    result = call(
        capsys, "generate", "x", "-p", "tiny", "--control", f"{controlnet('narrow')}:map.png"
    )
    assert "a ControlNet of another model" in assert_failed(result, 4)


def test_replay_says_that_a_network_is_another(controlnet, capsys):
    save_map(Path("map.png"))
    shutil.copytree(controlnet("single"), "network")
    options = ("-p", "tiny", "--steps", "1", "--size", "64", "--control", "./network:map.png")
    assert call(capsys, "generate", "x", *options, "-o", "made.png").returncode == 0
    assert "another" not in call(capsys, "replay", "made.png", "-o", "same.png").stderr
    tensors = load_file(f"network/{PLAIN}")
    tensors["controlnet_blocks.0.bias"] += 0.5
    save_file(tensors, f"network/{PLAIN}")
    said = call(capsys, "replay", "made.png", "-o", "other.png").stderr
    assert "network is not the one that made the picture" in said
    checked = call(capsys, "replay", "made.png", "--check")
    assert checked.returncode == 1 and "made with the controlnet " in checked.stderr


@pytest.mark.parametrize("span", ["0.5-0.51", "0-0.1"])
def test_a_control_that_acts_in_no_step_is_refused(span, controlnet, capsys):
    save_map(Path("map.png"))
    control = f"{controlnet('single')}:map.png:0.8:{span}"
    options = ("-p", "tiny", "--steps", "4", "--control", control)
    error = assert_failed(call(capsys, "generate", "x", *options), 2)
    assert "without effect" in error and span in error and ":0-1" in error
    assert_failed(call(capsys, "plan", "x", *options), 2)


def test_a_union_of_a_file_asks_which_of_its_modes(controlnet, capsys):
    save_map(Path("map.png"))
    for said, words in (("", "none is named"), (",mode=3", "3 is none")):
        control = f"kind={controlnet('union')},image=map.png{said}"
        error = assert_failed(call(capsys, "generate", "x", "-p", "tiny", "--control", control), 2)
        assert f"its modes are 0 to 2, and {words}" in error
