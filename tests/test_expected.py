"""The tensors that a config asks for are those of the classes of diffusers and transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.engine.loader import build
from fluxcli.models.shapes import read_known_shapes
from quant.checkpoint import COMPONENTS, check_components, inspect
from quant.errors import CheckpointError
from quant.expected import list_shapes
from quant.single_file import assemble_checkpoint

CHANGED = [
    ("transformer", {"guidance_embeds": False, "num_layers": 1}),
    ("transformer", {"num_attention_heads": 3, "joint_attention_dim": 40}),
    ("text_encoder", {"hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 900}),
    ("text_encoder_2", {"is_gated_act": False}),
    ("text_encoder_2", {"num_heads": 3, "relative_attention_num_buckets": 16}),
    ("vae", {"layers_per_block": 2, "use_quant_conv": True, "use_post_quant_conv": True}),
    ("vae", {"mid_block_add_attention": False, "block_out_channels": [16, 16, 32, 64]}),
]


def shapes_of(component, config: dict) -> dict:
    from dataclasses import replace

    module = build(replace(component, config=config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_bundled_and_the_published_model_have_the_shapes_of_their_classes(name, tiny_folder):
    for checkpoint in (inspect(tiny_folder), read_known_shapes()):
        component = checkpoint.components[name]
        assert list_shapes(name, component.config) == shapes_of(component, component.config)


@pytest.mark.parametrize(("name", "values"), CHANGED, ids=str)
def test_other_values_give_the_shapes_that_the_classes_have(name, values, tiny_folder):
    component = inspect(tiny_folder).components[name]
    config = component.config | values
    assert list_shapes(name, config) == shapes_of(component, config)


def test_parts_of_two_models_do_not_fit_together(tiny_folder):
    components = inspect(tiny_folder).components
    check_components(components)
    published = read_known_shapes().components
    for name in ("text_encoder", "text_encoder_2"):
        with pytest.raises(CheckpointError, match=f"{name} of another model"):
            check_components(components | {name: published[name]})


@pytest.fixture
def model(tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, "model"))


def test_a_folder_with_variants_is_read_as_without(model, tiny_folder):
    transformer = model / "transformer"
    tensors = load_file(transformer / "diffusion_pytorch_model.safetensors")
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        f"diffusion_pytorch_model-0000{n}-of-00002.bf16.safetensors": names[n - 1 :: 2]
        for n in (1, 2)
    }
    weight_map = {name: file for file, part in parts.items() for name in part}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, transformer / file)
    index = transformer / "diffusion_pytorch_model.safetensors.index.bf16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"x": torch.ones(1)}, vae.with_name("diffusion_pytorch_model.bf16.safetensors"))
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(CheckpointError, match="weights do not match vae"):  # bf16 comes first
        check_components(inspect(model).components)
    vae.with_name("diffusion_pytorch_model.bf16.safetensors").unlink()
    found = inspect(model).components
    check_components(found)
    original = inspect(tiny_folder).components
    for name in COMPONENTS:
        assert found[name].numel == original[name].numel


def test_a_transformers_file_and_folder_are_that_of_the_whole_model(model, tiny_folder):
    whole = inspect(tiny_folder).components["transformer"]
    folder = model / "transformer"
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        found = assemble_checkpoint(path, lambda _: tiny_folder).components
        assert found["transformer"].weights.keys() == whole.weights.keys()
        changed = {"_diffusers_version"}
        config = found["transformer"].config
        assert {k: config[k] for k in config.keys() - changed} == {
            k: whole.config[k] for k in config.keys() - changed
        }
        check_components(found)


@pytest.mark.parametrize(
    ("part", "class_name"),
    [
        ("transformer", "FluxTransformer2DModelWithMasking"),
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("text_encoder_2", "T5ForConditionalGeneration"),
    ],
)
def test_classes_of_finetunes_are_read_as_what_they_extend(part, class_name, model):
    path = model / part / "config.json"
    key = "_class_name" if part == "transformer" else "architectures"
    value = class_name if part == "transformer" else [class_name]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    component = inspect(model).components[part]
    assert list_shapes(part, component.config) == shapes_of(component, component.config)


def test_a_whole_clip_is_read_as_its_text_half(model):
    path = model / "text_encoder" / "config.json"
    half = json.loads(path.read_text())
    path.write_text(
        json.dumps({"architectures": ["CLIPModel"], "text_config": half, "vision_config": {}})
    )
    component = inspect(model).components["text_encoder"]
    assert component.config["hidden_size"] == half["hidden_size"]
    check_components(inspect(model).components)
