"""The rotated schemes in one file as ComfyUI has them: what the file says of itself, and how
comfy-kitchen's own tensor classes read it; and the folders of int8 that flux wrote before.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_kitchen.tensor import AsymW4A8Int8Layout, QuantizedTensor, TensorWiseINT8Layout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from quant import codecs, rotated
from quant.checkpoint import FORMER_FILES, inspect
from quant.linear import RotatedLinear, make_linear
from quant.placing import describe_path
from quant.single_file import inspect_transformer
from quant.spec import MARKER, ROTATED, QuantSpec, find_rotation
from tests.support.bakes import bake_all, recipe_of
from tests.support.helpers import draw, engine_of, tiny

# One of each width, and those whose rows are several layers of ours.
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
)


@pytest.fixture(scope="module")
def comfy(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled transformer in one file, by scheme."""
    folder = tmp_path_factory.mktemp("comfy")

    @functools.cache
    def bake(to: str) -> Path:
        target = folder / f"{to}.safetensors"
        recipe = recipe_of(tiny_folder, "comfy", QuantSpec(to))
        bake_all(recipe, target)
        assert recipe.sizes == {"": target.stat().st_size}
        return target

    return bake


@pytest.mark.parametrize("to", ROTATED)
def test_each_layer_has_a_marker_and_the_metadata_says_the_same(to, comfy):
    path = comfy(to)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["_quantization_metadata"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    markers = {
        name.removesuffix(MARKER): json.loads(bytes(tensor.tolist()))
        for name, tensor in tensors.items()
        if name.endswith(MARKER)
    }
    assert metadata == {"format_version": "1.0", "layers": markers}
    packed = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dtype == torch.int8
    }
    assert set(markers) == packed and set(LAYERS) < packed
    assert not any("_mod" in name or "modulation" in name for name in packed)
    form = {"format": "int8_tensorwise"}
    if to != "int8":
        form = {"format": "asym_w4a8_int8", "group_size": 16}
    assert markers["double_blocks.0.img_attn.qkv"] == form | {
        "convrot": True,
        "convrot_groupsize": 64,
    }
    assert markers["double_blocks.0.img_mlp.2"]["convrot_groupsize"] == 256
    manifest = json.loads(describe_path(path).read_text())
    assert (manifest["layout"], manifest["recipe"]["to"]) == ("comfy", to)


def stored_of(tensors: dict, layer: str) -> dict[str, torch.Tensor]:
    """The stored tensors of a layer's weight by suffix, without the marker."""
    name = f"{layer}.weight"
    return {
        key.removeprefix(name): tensor for key, tensor in tensors.items() if key.startswith(name)
    }


def open_in_kitchen(tensors: dict, layer: str, dtype: torch.dtype) -> QuantizedTensor:
    """A layer's weight as ComfyUI makes it of its tensors."""
    said = json.loads(bytes(tensors[layer + MARKER].tolist()))
    codes = tensors[f"{layer}.weight"]
    if said["format"] == "int8_tensorwise":
        params = TensorWiseINT8Layout.Params(
            scale=tensors[f"{layer}.weight_scale"],
            orig_dtype=dtype,
            orig_shape=tuple(codes.shape),
            convrot=said["convrot"],
            convrot_groupsize=said["convrot_groupsize"],
        )
        return QuantizedTensor(codes, "TensorWiseINT8Layout", params)
    scale = tensors[f"{layer}.weight_s_rel"]
    params = AsymW4A8Int8Layout.Params(
        scale=scale,
        s_channel=tensors[f"{layer}.weight_s_channel"],
        codebook=tensors.get(f"{layer}.weight_codebook"),
        orig_dtype=dtype,
        orig_shape=(len(codes), scale.shape[1] * said["group_size"]),
        group_size=said["group_size"],
        convrot_groupsize=said["convrot_groupsize"],
    )
    return QuantizedTensor(codes, "AsymW4A8Int8Layout", params)


@pytest.mark.parametrize("to", ROTATED)
def test_comfy_kitchens_classes_dequantize_and_multiply_as_we_do(to, comfy):
    tensors = load_file(comfy(to))
    made = torch.Generator().manual_seed(1)
    for layer in LAYERS:
        stored = stored_of(tensors, layer)
        theirs = open_in_kitchen(tensors, layer, torch.float32)
        shape = tuple(theirs.shape)
        rotation = find_rotation(shape[1])
        for dtype in (torch.float32, torch.bfloat16):
            found = open_in_kitchen(tensors, layer, dtype).dequantize()
            ours = codecs.dequantize(stored, to, shape, dtype, rotation=rotation)
            assert torch.equal(found, ours), (layer, dtype)
        x = torch.randn(40, shape[1], generator=made)
        x[:, 3] *= 30
        bias = tensors[f"{layer}.bias"].float()
        layer_of_ours = make_linear(
            to, [stored], shapes=[shape], bias=bias, arithmetic=True, rotation=rotation
        )
        assert isinstance(layer_of_ours, RotatedLinear)
        difference = (functional.linear(x, theirs, bias) - layer_of_ours(x)).abs()
        # What one unit of int8 in one activation makes.
        largest = rotated.rotate(x, rotation).abs().amax(1, keepdim=True)
        unit = largest * layer_of_ours.weight_scale  # / 127 by the step, x 127 by the largest level
        assert (difference <= unit * 1.001).all(), layer


@pytest.mark.parametrize("to", ROTATED)
def test_the_file_has_the_values_of_the_folder(to, comfy, baked):
    """Rows are independent: q, k and v below each other are what they are apart."""
    reader = codecs.Reader()
    folder = inspect(baked(to)).components["transformer"].weights
    for name, weight in inspect_transformer(comfy(to)).weights.items():
        other = folder[name]
        assert (weight.scheme, weight.rotation) == (other.scheme, other.rotation)
        ours, theirs = reader.read(weight), reader.read(other)
        assert ours.keys() == theirs.keys()
        for suffix, tensor in ours.items():
            assert torch.equal(tensor, theirs[suffix].view(tensor.shape)), name


# --- what flux wrote before weights were rotated


@pytest.fixture(scope="module")
def former(baked: Callable, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as flux baked it to int8 before: rows without rotation or marker."""
    folder = Path(shutil.copytree(baked("int8"), tmp_path_factory.mktemp("former") / "int8"))
    (file,) = (folder / "transformer").glob("*.safetensors")
    (source,) = (tiny_folder / "transformer").glob("*.safetensors")
    packed = {name for name, tensor in load_file(file).items() if tensor.dtype == torch.int8}
    file.unlink()
    tensors = load_file(source)
    for name in packed:
        values = tensors[name].float()
        scale = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
        tensors[name] = (values / scale).round().char()
        tensors[f"{name}_scale"] = scale.flatten()
    save_file(tensors, folder / "transformer" / FORMER_FILES[0])
    return folder


def test_int8_without_rotation_is_read_and_drawn_as_it_was(former, monkeypatch):
    checkpoint = inspect(former)
    weights = checkpoint.components["transformer"].weights.values()
    packed = [weight for weight in weights if weight.scheme]
    assert {(weight.scheme, weight.rotation) for weight in packed} == {("int8", 0)}
    request = tiny(precision="int8")
    _, pixels = draw(engine_of(checkpoint, request), request)

    def multiply(layer: RotatedLinear, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, layer.in_features).double()
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
        product = (rows / scale).round() @ layer.weight.double().T
        product = product * scale * layer.weight_scale.double() + layer.bias.double()
        return product.to(x.dtype).view(*x.shape[:-1], -1)

    monkeypatch.setattr(RotatedLinear, "forward", multiply)
    _, expected = draw(engine_of(checkpoint, request), request)
    assert np.abs(pixels.astype(int) - expected).max() <= 1
