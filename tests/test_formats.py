"""Other programs open what is baked here and compute what we do; we read optimum-quanto's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from diffusers import BFLQuantizationConfig, BitsAndBytesConfig, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from fluxcli.engine.loader import read_tensors
from fluxcli.engine.streaming import load_component
from quant import checkpoint
from quant.bake import bake
from quant.checkpoint import KEEP_FILE, Component, inspect
from quant.header import read_header
from quant.linear import FP8Linear, NF4Linear, QuantizedLinear, RotatedLinear
from quant.recipe import make_file_recipe, make_recipe
from quant.single_file import inspect_transformer as inspect_file
from quant.spec import ROTATED, STATE, QuantSpec
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight
from tests.support.helpers import BAKED
from tests.test_equals_diffusers import write_random

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
QKV = [f"attn.to_{x}" for x in "qkv"]
PARTS = {
    "attn.to_qkv": QKV,
    "attn.to_added_qkv": [f"attn.add_{x}_proj" for x in "qkv"],
    "proj_in": [*QKV, "proj_mlp"],
}
KEPT: dict[str, Callable[[int, int, bool], int]] = {  # pattern of --keep: how many layers it spares
    "": lambda double, single, modulation: 0,
    "*.ff.net.2": lambda double, single, modulation: double,
    "single_transformer_blocks.0.*": lambda double, single, modulation: 5 + modulation,
    "transformer_blocks.1.attn.to_q": lambda double, single, modulation: 1,
    # Without the top-level one, whose original lies beside the quantized one.
    "*proj_out": lambda double, single, modulation: single,
    "*norm*": lambda double, single, modulation: modulation * (2 * double + single),
}
FULL = {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
}
FULL |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768}


def inputs(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """What a forward takes: 16 picture tokens, 8 of text."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": noise(1, 16, 64),
        "encoder_hidden_states": noise(1, 8, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.7], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": torch.stack(
            [torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1
        ).to(dtype),
        "txt_ids": torch.zeros(8, 3, dtype=dtype),
        "return_dict": False,
    }


@torch.no_grad()
def velocity(model: nn.Module) -> torch.Tensor:
    return model(**inputs(model.config))[0]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def dequantizing(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, FP8Linear | RotatedLinear):
            layer.arithmetic = False
    return model


def load(component: Component, **options: object) -> nn.Module:
    return load_component(component, dtype=torch.float32, device="cpu", **options).module


def packed_in(file: Path) -> set[str]:
    """Layers that a file holds packed in 4 bits."""
    return {
        name.removesuffix(f".weight{STATE}") for name in load_file(file) if name.endswith(STATE)
    }


def named(layer: str) -> list[str]:
    """The names in the file of what a layer of ours holds, first row first."""
    block, number, leaf = (*layer.split(".", 2), "", "")[:3]
    return [f"{block}.{number}.{part}" for part in PARTS[leaf]] if leaf in PARTS else [layer]


def replaced_by_diffusers(config: dict, quantization: dict) -> set[str]:
    """Layers that diffusers makes 4-bit ones before it loads a file with this config."""
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    wanted = BitsAndBytesConfig.from_dict(quantization)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
        model = replace_with_bnb_linear(
            model, modules_to_not_convert=wanted.llm_int8_skip_modules, quantization_config=wanted
        )
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }


# --- NF4: bitsandbytes, diffusers, transformers


@pytest.mark.parametrize("modulation", ["keep", "nf4"])
def test_bitsandbytes_unpacks_exactly_the_weights_that_we_multiply_with(baked, modulation):
    folder = baked("nf4", **BAKED["nf4"], modulation=modulation) / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    model = load(inspect(folder.parent).components["transformer"])
    compared, fused = set(), 0
    for name, layer in model.named_modules():
        if not isinstance(layer, NF4Linear):
            continue
        theirs = []
        for part in named(name):
            packed = {
                key: tensor for key, tensor in state.items() if key.startswith(f"{part}.weight.")
            }
            quant_state = bitsandbytes.functional.QuantState.from_dict(
                packed, device=torch.device("cpu")
            )
            values = bitsandbytes.functional.dequantize_4bit(state[f"{part}.weight"], quant_state)
            assert values.dtype == torch.bfloat16 and values.std() > 1e-3
            theirs.append(values)
            compared.add(part)
        assert torch.equal(layer.dequantize(torch.bfloat16), torch.cat(theirs)), name
        fused += len(theirs) > 1
    assert fused == 2 * model.config.num_layers + model.config.num_single_layers
    last = {"proj_out"}  # packed for bitsandbytes, and read from its original by us
    packed = packed_in(folder / "diffusion_pytorch_model.safetensors")
    assert compared == packed - last
    config = json.loads((folder / "config.json").read_text())
    assert replaced_by_diffusers(config, config.pop("quantization_config")) == packed
    original = load_file(folder / KEEP_FILE)
    assert list(original) == ["proj_out.weight"]
    assert torch.equal(model.proj_out.weight, original["proj_out.weight"].float())


@pytest.fixture(scope="module")
def full_size(tiny_folder) -> checkpoint.Checkpoint:
    """The bundled folder with a transformer of FLUX.1 [dev]'s size: only names and shapes of it."""
    source = inspect(tiny_folder)
    tiny = source.components["transformer"]
    config = tiny.config | FULL | {"axes_dims_rope": [16, 56, 56]}
    with torch.device("meta"):
        state = FluxTransformer2DModel.from_config(config).state_dict()
    pieces = {
        name: Piece(Path("none"), TensorInfo(name, "BF16", tuple(t.shape)))
        for name, t in state.items()
    }
    weights = {name: Weight(name, piece.shape, "", {"": piece}) for name, piece in pieces.items()}
    assert sum(weight.numel for weight in weights.values()) == 11_901_408_320
    return replace(
        source,
        components=source.components
        | {"transformer": replace(tiny, config=config, weights=weights)},
    )


@pytest.mark.parametrize(
    ("size", "pattern"),
    [*(("bundled", pattern) for pattern in KEPT), ("full", ""), ("full", "*proj_out")],
)
@pytest.mark.parametrize("modulation", ["keep", "nf4"])
def test_diffusers_replaces_exactly_the_packed_layers(
    tiny_folder, full_size, size, modulation, pattern
):
    source = full_size if size == "full" else inspect(tiny_folder)
    keep = (pattern,) if pattern else ()
    recipe = make_recipe(source, QuantSpec("nf4", modulation=modulation, keep=keep))
    outputs = [info.name for tensor in recipe.tensors for info in tensor.stored]
    packed = {name.removesuffix(f".weight{STATE}") for name in outputs if name.endswith(STATE)}
    config = json.loads(recipe.texts["transformer/config.json"])
    assert replaced_by_diffusers(config, config.pop("quantization_config")) == packed
    double, single = config["num_layers"], config["num_single_layers"]
    whole = 12 * double + 5 * single + (2 * double + single) * (modulation == "nf4") + 1
    assert len(packed) == whole - KEPT[pattern](double, single, modulation == "nf4")


@pytest.mark.parametrize("keep", [(), ("encoder.block.1.*", "*.SelfAttention.o")], ids=str)
def test_transformers_opens_the_nf4_t5(baked, tiny_folder, keep):
    from transformers import T5EncoderModel

    folder = baked("nf4", **BAKED["nf4"], keep=keep) / "text_encoder_2"
    theirs = T5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16)
    four_bit = {
        name
        for name, layer in theirs.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }
    assert four_bit == packed_in(folder / "model.safetensors")
    assert len(four_bit) == (12 if not keep else 5) and not [
        name for name in four_bit if name.endswith("wo")
    ]
    component = inspect(folder.parent).components["text_encoder_2"]
    ours = load_component(component, dtype=torch.bfloat16, device="cpu").module
    assert {
        name for name, layer in ours.named_modules() if isinstance(layer, NF4Linear)
    } == four_bit
    for name in four_bit:
        weight = theirs.get_submodule(name).weight
        values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(values, ours.get_submodule(name).dequantize(torch.bfloat16)), name
    ids = torch.randint(0, 512, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(ids)[0], theirs(ids)[0]
        # 0 where bitsandbytes multiplies as we do, 0.019 where its CPU kernel for AVX512-BF16
        # rounds in other places.
        assert apart(found.float(), expected.float()) < 0.03
        plain = T5EncoderModel.from_pretrained(tiny_folder / folder.name, dtype=torch.bfloat16)(
            ids
        )[0]
    assert apart(found.float(), plain.float()) > 0.05  # it is packed indeed


# --- fp8r: diffusers


def open_fp8r(file: Path, folder: Path) -> nn.Module:
    quantization = BFLQuantizationConfig(compute_dtype=torch.float32)
    return FluxTransformer2DModel.from_single_file(
        file, quantization_config=quantization, config=str(folder), subfolder="transformer"
    )


def count_fp8(model: nn.Module) -> int:
    return sum(type(layer).__name__ == "BFLFP8RLinear" for layer in model.modules())


@pytest.mark.parametrize("modulation", ["keep", "fp8"])
def test_diffusers_opens_the_fp8_file_and_draws_what_we_draw(baked, modulation):
    folder = baked("fp8", **BAKED["fp8"], modulation=modulation)
    theirs = open_fp8r(folder / "transformer" / "flux-fp8r.safetensors", folder)
    assert count_fp8(theirs) == 2 * 12 + 5 * 5 + (9 if modulation == "fp8" else 0)
    expected = velocity(theirs)
    model = load(inspect(folder).components["transformer"])
    in_8_bit = velocity(model)
    assert apart(velocity(dequantizing(model)), expected) < 1e-5
    assert 1e-3 < apart(in_8_bit, expected) < 0.06


@pytest.mark.slow
@pytest.mark.exhaustive  # the bundled width is enough for CI, with a read at real width beside it
def test_diffusers_opens_bfls_layout_at_real_width(tmp_path):
    """One double and one single block of width 3072, 0.6 B parameters."""
    (tmp_path / "transformer").mkdir()
    config = FULL | {"num_layers": 1, "num_single_layers": 1, "in_channels": 64, "patch_size": 1}
    config |= {
        "_class_name": "FluxTransformer2DModel",
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    write_random(tmp_path / "transformer", "transformer")
    file = tmp_path / "flux1-dev-fp8r.safetensors"
    source = checkpoint.inspect_component("transformer", tmp_path / "transformer")
    assert list(
        bake(make_file_recipe(source, QuantSpec("fp8"), kind="bfl"), file, origin={}, verify=False)
    )
    assert {"double_blocks.0.img_attn.qkv.weight_scale", "final_layer.linear.weight"} <= set(
        read_header(file)
    )
    component = inspect_file(file)
    assert component.config | config == component.config
    found = velocity(dequantizing(load(component)))
    theirs = open_fp8r(file, tmp_path)
    assert count_fp8(theirs) == 12 + 5
    assert apart(found, velocity(theirs)) < 1e-5


def test_under_its_own_name_the_fp8_file_fails_loudly_under_the_usual_one_it_draws_noise(
    baked, tmp_path
):
    folder = baked("fp8", **BAKED["fp8"])
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    for to in ROTATED:
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            FluxTransformer2DModel.from_pretrained(baked(to), subfolder="transformer")
    copy = shutil.copytree(folder / "transformer", tmp_path / "transformer")
    (copy / "flux-fp8r.safetensors").rename(copy / "diffusion_pytorch_model.safetensors")
    unscaled = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    expected = velocity(dequantizing(load(inspect(folder).components["transformer"])))
    assert apart(velocity(unscaled), expected) > 0.5


# --- optimum-quanto


@pytest.mark.parametrize(("weights", "scheme"), [("float8", "fp8"), ("int8", "int8")])
def test_optimum_quantos_checkpoints_are_read(tiny_folder, tmp_path, weights, scheme):
    from diffusers import QuantoConfig
    from optimum.quanto import QLinear

    wanted = QuantoConfig(weights_dtype=weights, modules_to_not_convert=["proj_mlp"])
    theirs = FluxTransformer2DModel.from_pretrained(
        tiny_folder, subfolder="transformer", torch_dtype=torch.float32, quantization_config=wanted
    )
    folder = shutil.copytree(
        tiny_folder, tmp_path / "quanto", ignore=shutil.ignore_patterns("transformer")
    )
    theirs.save_pretrained(folder / "transformer")
    component = inspect(folder).components["transformer"]
    layers = {name: layer for name, layer in theirs.named_modules() if isinstance(layer, QLinear)}
    assert len(layers) > 60 and not [name for name in layers if name.endswith("proj_mlp")]
    assert {f"{n}.weight" for n in layers} == {
        n for n, w in component.weights.items() if w.scheme == scheme
    }
    names = [f"{name}.weight" for name in layers]
    for name, found in read_tensors(component, names, dtype=torch.float32, device="cpu").items():
        assert torch.equal(found, layers[name.removesuffix(".weight")].weight.dequantize()), name
    ours = load(component)
    assert {type(layer.proj_out) for layer in ours.single_transformer_blocks} == {
        type(ours.x_embedder)
    }
    assert isinstance(ours.x_embedder, QuantizedLinear) and isinstance(
        ours.proj_out, QuantizedLinear
    )
    assert apart(velocity(dequantizing(ours)), velocity(theirs)) < 1e-5


# --- our own layers against diffusers' separate ones


@pytest.fixture(scope="module")
def plain(tiny_folder) -> Callable[[Component], nn.Module]:
    """diffusers' model with the values of a component."""

    def make(component: Component) -> nn.Module:
        model = FluxTransformer2DModel.from_config(component.config)
        options = {"dtype": torch.float32, "device": "cpu"}
        model.load_state_dict(dict(read_tensors(component, list(component.weights), **options)))
        return model.eval()

    return make


@pytest.mark.parametrize(
    ("to", "keep", "fused"),
    [
        ("", "", 9),
        ("nf4", "", 9),
        ("fp8", "", 9),
        ("int8", "", 9),
        ("nf4", "transformer_blocks.1.attn.to_q", 7),
        ("fp8", "transformer_blocks.0.attn.add_k_proj", 7),
        ("int8", "single_transformer_blocks.3.attn.to_v", 8),
        ("nf4", "single_transformer_blocks.*.proj_mlp", 4),
    ],
)
def test_fused_layers_draw_what_separate_ones_draw(tiny_folder, baked, plain, to, keep, fused):
    folder = baked(to, **BAKED[to], keep=(keep,) if keep else ()) if to else tiny_folder
    component = inspect(folder).components["transformer"]
    ours = dequantizing(load(component))
    layers = layers_fused(ours)
    assert len(layers) == fused and isinstance(
        ours.get_submodule(layers[0]), QuantizedLinear
    ) == bool(to)
    assert not {name for name, _ in ours.named_modules()} & {
        part for layer in layers for part in named(layer)
    }
    assert apart(velocity(ours), velocity(plain(component))) < 1e-5


def layers_fused(model: nn.Module) -> list[str]:
    """Layers that hold what are several in the file."""
    return [
        name
        for name, layer in model.named_modules()
        if hasattr(layer, "in_features") and len(named(name)) > 1
    ]


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("nf4", BAKED["nf4"] | {"modulation": "nf4"}),
        (
            "nf4",
            {
                "scales": "search",
                "keep": ("transformer_blocks.*", "single_transformer_blocks.[1-4].*"),
            },
        ),
        ("fp8", BAKED["fp8"] | {"modulation": "fp8"}),
        ("int8", {}),
        ("int8", {"keep": ("transformer_blocks.1.attn.to_q",)}),
    ],
)
def test_packing_while_loading_is_what_a_bake_holds(tiny_folder, baked, to, options):
    source, folder = inspect(tiny_folder), inspect(baked(to, **options))
    for name in ("transformer", "text_encoder_2"):
        state = load(source.components[name], spec=QuantSpec(to, **options)).state_dict()
        stored = load(folder.components[name]).state_dict()
        assert list(state) == list(stored)
        for key, tensor in state.items():
            assert tensor.dtype == stored[key].dtype and tensor.shape == stored[key].shape, key
            assert torch.equal(tensor.view(torch.uint8), stored[key].view(torch.uint8)), key
        packed = [key for key, tensor in state.items() if tensor.element_size() == 1]
        assert packed or (name == "text_encoder_2" and "text_encoder" not in options)
