"""BFL's key names: against BFL's own modules, there and back; every other model is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.engine import classes, loader
from quant import codecs
from quant.checkpoint import Component
from quant.codecs import Reader
from quant.errors import CheckpointError, SpecError
from quant.header import read_header
from quant.recipe import Recipe, make_file_recipe
from quant.single_file import inspect_transformer as inspect_file
from quant.spec import QuantSpec
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight
from tests.support.bakes import bake_all

REAL = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
SMALL = REAL | {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "_class_name": "FluxTransformer2DModel",
}
SWAPPED = "final_layer.adaLN_modulation.1"


def published(config: dict, *, guidance: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes that flux/model.py and flux/modules/layers.py make.

    The two are files of github.com/black-forest-labs/flux.
    """
    head, width = (
        config["attention_head_dim"],
        config["attention_head_dim"] * config["num_attention_heads"],
    )
    linears: dict[str, tuple[int, int]] = {"img_in": (config["in_channels"], width)}
    linears["txt_in"] = (config["joint_attention_dim"], width)
    inputs = {"time_in": 256, "vector_in": config["pooled_projection_dim"]} | (
        {"guidance_in": 256} if guidance else {}
    )
    for name, size in inputs.items():
        linears |= {f"{name}.in_layer": (size, width), f"{name}.out_layer": (width, width)}
    scales = []
    for i in range(config["num_layers"]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linears |= {
                f"{block}_mod.lin": (width, 6 * width),
                f"{block}_attn.qkv": (width, 3 * width),
            }
            linears |= {f"{block}_attn.proj": (width, width)}
            linears |= {f"{block}_mlp.0": (width, 4 * width), f"{block}_mlp.2": (4 * width, width)}
            scales += [f"{block}_attn.norm.query_norm", f"{block}_attn.norm.key_norm"]
    for i in range(config["num_single_layers"]):
        block = f"single_blocks.{i}"
        linears |= {f"{block}.linear1": (width, 7 * width), f"{block}.linear2": (5 * width, width)}
        linears |= {f"{block}.modulation.lin": (width, 3 * width)}
        scales += [f"{block}.norm.query_norm", f"{block}.norm.key_norm"]
    linears |= {"final_layer.linear": (width, config["in_channels"]), SWAPPED: (width, 2 * width)}
    found = {f"{name}.scale": (head,) for name in scales}
    return found | {
        f"{name}.{leaf}": shape
        for name, (k, n) in linears.items()
        for leaf, shape in (("weight", (n, k)), ("bias", (n,)))
    }


def unread(config: dict) -> Component:
    """A transformer of which nothing but names and shapes is there."""
    module = loader.build(Component("transformer", Path("x"), config, {}))
    infos = [
        TensorInfo(name, "BF16", tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
    ]
    weights = {
        info.name: Weight(info.name, info.shape, "", {"": Piece(Path("x"), info)}) for info in infos
    }
    return Component("transformer", Path("x"), config, weights)


@pytest.mark.parametrize("guidance, count", [(True, 780), (False, 776)], ids=["dev", "schnell"])
def test_a_full_size_file_has_the_published_names_and_shapes(guidance, count):
    recipe = make_file_recipe(
        unread(REAL | {"guidance_embeds": guidance}), QuantSpec("fp8", keep=("*",)), kind="bfl"
    )
    written = {tensor.name: tensor.info.shape for tensor in recipe.tensors}
    assert (
        written == published(REAL, guidance=guidance)
        and len(recipe.tensors) == len(written) == count
    )
    packed = make_file_recipe(
        unread(REAL | {"guidance_embeds": guidance}), QuantSpec("fp8"), kind="bfl"
    )
    assert sum(bool(tensor.scheme) for tensor in packed.tensors) == 19 * 8 + 38 * 2


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Component:
    """A transformer of heads 128 wide with random values, in diffusers' layout."""
    torch.manual_seed(7)
    config = {key: value for key, value in SMALL.items() if key != "_class_name"}
    module = classes.transformer()(**config).to(torch.bfloat16)
    values = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    path = tmp_path_factory.mktemp("small") / "diffusion_pytorch_model.safetensors"
    save_file(values, path)
    infos = read_header(path)
    weights = {
        name: Weight(name, info.shape, "", {"": Piece(path, info)}) for name, info in infos.items()
    }
    return Component("transformer", path.parent, SMALL, weights)


def values_of(component: Component) -> dict[str, torch.Tensor]:
    reader = Reader()
    return {
        name: codecs.dequantize(reader.read(weight), weight.scheme, weight.shape, torch.float32)
        for name, weight in component.weights.items()
    }


def written(small: Component, spec: QuantSpec, kind: str, path: Path) -> Recipe:
    recipe = make_file_recipe(small, spec, kind=kind)
    bake_all(recipe, path)
    return recipe


def test_a_file_holds_what_bfls_modules_read(small, tmp_path):
    path = tmp_path / "x.safetensors"
    written(small, QuantSpec("fp8", keep=("*",)), "bfl", path)
    file, ours = load_file(path), load_file(next(iter(small.weights.values())).pieces[""].file)
    assert {name: tuple(t.shape) for name, t in file.items()} == published(SMALL, guidance=True)
    for leaf in ("weight", "bias"):
        block, single = "transformer_blocks.0", "single_transformer_blocks.0"
        qkv = [ours[f"{block}.attn.to_{part}.{leaf}"] for part in "qkv"]
        assert torch.equal(file[f"double_blocks.0.img_attn.qkv.{leaf}"], torch.cat(qkv))
        added = [ours[f"{block}.attn.add_{part}_proj.{leaf}"] for part in "qkv"]
        assert torch.equal(file[f"double_blocks.0.txt_attn.qkv.{leaf}"], torch.cat(added))
        fused = [
            ours[f"{single}.{part}.{leaf}"]
            for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ]
        assert torch.equal(file[f"single_blocks.0.linear1.{leaf}"], torch.cat(fused))
        # diffusers chunks scale first, BFL's LastLayer shift.
        scale, shift = ours[f"norm_out.linear.{leaf}"].chunk(2)
        assert torch.equal(file[f"{SWAPPED}.{leaf}"], torch.cat([shift, scale]))
    block = "double_blocks.0"
    pairs = {
        "img_in.weight": "x_embedder.weight",
        "final_layer.linear.weight": "proj_out.weight",
        "time_in.out_layer.bias": "time_text_embed.timestep_embedder.linear_2.bias",
        "vector_in.in_layer.weight": "time_text_embed.text_embedder.linear_1.weight",
        f"{block}.txt_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_added_k.weight",
        "double_blocks.0.txt_mod.lin.weight": "transformer_blocks.0.norm1_context.linear.weight",
        "double_blocks.0.img_mlp.2.weight": "transformer_blocks.0.ff.net.2.weight",
        "double_blocks.0.txt_attn.proj.bias": "transformer_blocks.0.attn.to_add_out.bias",
        "single_blocks.0.linear2.weight": "single_transformer_blocks.0.proj_out.weight",
        "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
    }
    assert all(torch.equal(file[bfl], ours[name]) for bfl, name in pairs.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "kind, keep", [("bfl", ("*",)), ("bfl", ()), ("bfl", ("*.to_q",)), ("comfy", ())]
)
def test_a_file_reads_back_as_the_model_that_was_written(kind, keep, prefix, small, tmp_path):
    path = tmp_path / "x.safetensors"
    written(small, QuantSpec("fp8", modulation="fp8", keep=keep), kind, path)
    if prefix:
        save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    found = inspect_file(path)
    assert {key: found.config[key] for key in SMALL} == SMALL
    ours, read = values_of(small), values_of(found)
    assert {name: t.shape for name, t in read.items()} == {
        name: t.shape for name, t in ours.items()
    }
    for name, weight in found.weights.items():
        if not weight.scheme:
            assert torch.equal(read[name], ours[name]), name
        # Each row has its own scale: nothing changes where rows lie in one tensor.
        elif kind == "bfl":
            stored = codecs.quantize(ours[name], "fp8", name=name, where=weight.pieces[""]).stored
            assert torch.equal(
                read[name], codecs.dequantize(stored, "fp8", weight.shape, torch.float32)
            ), name
        else:
            assert float((read[name] - ours[name]).norm() / ours[name].norm()) < 0.037, name
    packed = {name for name, weight in found.weights.items() if weight.scheme}
    # q, k and v lie in one tensor.
    assert len(packed) == {("*",): 0, ("*.to_q",): 20 - 3 - 4}.get(keep, 20)
    assert found.precision == ("fp8" if packed else "")


@pytest.mark.parametrize("spec", [QuantSpec("nf4"), QuantSpec("int8")])
def test_these_layouts_are_fp8(spec, small):
    with pytest.raises(SpecError, match="--layout bfl --to"):
        make_file_recipe(small, spec, kind="bfl")


def test_a_transformer_with_other_tensors_has_no_place_there(small):
    weights = small.weights | {"controlnet.weight": next(iter(small.weights.values()))}
    with pytest.raises(CheckpointError, match=r"of which .* have a place"):
        make_file_recipe(
            Component("transformer", Path("x"), SMALL, weights), QuantSpec("fp8"), kind="bfl"
        )


def test_comfy_finds_its_scaled_layers_in_the_metadata(small, tmp_path):
    import json

    from safetensors import safe_open

    written(small, QuantSpec("fp8"), "comfy", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        scaled = {
            name.removesuffix(".weight_scale")
            for name in load_file(tmp_path / "x.safetensors")
            if name.endswith(".weight_scale")
        }
        assert set(layers) == scaled and len(scaled) == 10
        assert all(file.get_tensor(f"{name}.weight_scale").shape == () for name in scaled)


QKV, NORM = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.norm.query_norm.scale"
DEFECTS = {
    "no img_in": (lambda t: t.pop("img_in.weight"), "img_in.weight is missing"),
    "no vector_in": (
        lambda t: t.pop("vector_in.in_layer.weight"),
        "vector_in.in_layer.weight is missing",
    ),
    "no first block": (lambda t: t.pop(NORM), "query_norm.scale is missing"),
    "other heads": (lambda t: t.update({NORM: torch.ones(24)}), "24 wide"),
    "too few rows": (lambda t: t.update({QKV: t[QKV][:-1].clone()}), "has 383 rows"),
    "too many rows": (lambda t: t.update({QKV: torch.ones(512, 128)}), "has 512 rows"),
    "flat": (lambda t: t.update({QKV: torch.ones(384)}), "has 384 rows"),
    "a bias alone": (lambda t: t.pop(QKV), "has 384 rows"),
    "an extra tensor": (lambda t: t.update({"x.weight": torch.ones(2)}), "it has x.weight"),
    "a block's extra": (
        lambda t: t.update({"double_blocks.0.x.weight": torch.ones(2)}),
        "it has double_blocks.0.x",
    ),
    "another leaf": (lambda t: t.update({"img_in.gamma": torch.ones(2)}), "it has img_in.gamma"),
    "a weight twice": (
        lambda t: t.update({"img_in.scale": t["img_in.weight"].clone()}),
        "it has img_in.scale",
    ),
    "block 7 alone": (
        lambda t: t.update({"double_blocks.7.img_mod.lin.bias": torch.ones(2)}),
        "double_blocks.7",
    ),
    "other channels": (lambda t: t.update({"img_in.weight": torch.ones(128, 96)}), "96 channels"),
}


@pytest.mark.parametrize("change, word", DEFECTS.values(), ids=DEFECTS)
def test_a_file_that_is_not_whole_is_refused(change, word, small, tmp_path):
    path = tmp_path / "x.safetensors"
    written(small, QuantSpec("fp8", keep=("*",)), "bfl", path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=word) as caught:
        inspect_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


OTHER_MODELS = {
    "FLUX.2": [
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "img_in.weight",
    ],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "SDXL": [
        "conditioner.embedders.0.transformer.text_model.encoder.x",
        "model.diffusion_model.input_blocks.0.0.bias",
    ],
    "Stable Diffusion": [
        "cond_stage_model.transformer.x",
        "model.diffusion_model.middle_block.0.x",
    ],
    "a LoRA": ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"],
    "LoRA": [
        "double_blocks.0.img_attn.proj.lora_A.weight",
        "double_blocks.0.img_attn.proj.lora_B.weight",
    ],
    "it has text_encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "it has text_encoder_2": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "a VAE": ["decoder.up.0.block.0.conv1.weight"],
    "its first key is something": ["something.else"],
}


@pytest.mark.parametrize("kind, names", OTHER_MODELS.items(), ids=OTHER_MODELS)
def test_another_models_file_is_named(kind, names, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(4, 4) for name in names}, path)
    with pytest.raises(CheckpointError, match=kind):
        inspect_file(path)
