"""T5 in int8: which of its layers multiply, in which dtype, and that outliers do no harm."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.engine.streaming import load_component
from fluxcli.engine.text import PromptEncoder, Text
from fluxcli.models.shapes import read_known_shapes
from fluxcli.plan.costs import component_bytes
from fluxcli.plan.placement import GIB
from quant.checkpoint import FORMER_FILES, inspect
from quant.linear import QuantizedLinear
from quant.rotated import rotate
from quant.spec import MARKER, SCHEMES, QuantSpec
from tests.support.helpers import BAKED, machine, order, plan_for

T5 = "text_encoder_2"
LAYERS = 14  # of two blocks: q, k, v, o, wi_0, wi_1 and wo
OUTLIERS = [5, 77]
CLOSE = 0.07  # this T5 makes 0.01 of a layer five times as much
IDS = torch.arange(2, 34)[None]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A folder's T5."""
    return load_component(inspect(folder).components[T5], dtype=dtype, device="cpu").module


def quantized_layers(module: torch.nn.Module) -> dict[str, QuantizedLinear]:
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)
    }


@torch.inference_mode()
def encode(module: torch.nn.Module) -> torch.Tensor:
    return module(IDS)[0][0]


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.float() - reference).norm() / reference.norm())


def test_at_full_size_it_takes_what_the_documents_say():
    parts = read_known_shapes("black-forest-labs/FLUX.1-dev").components
    sizes = {
        to: component_bytes(parts[T5], dtype="bfloat16", spec=QuantSpec("w4a8", to)) / GIB
        for to in ("keep", "int8")
    }
    assert sizes == {"keep": pytest.approx(8.87, abs=0.005), "int8": pytest.approx(4.56, abs=0.005)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_layer_multiplies_in_int8_and_gets_the_models_dtype(baked, tiny_folder, dtype):
    module = load(baked("int8", **BAKED["int8"]), dtype=dtype)
    seen = set()
    layers = quantized_layers(module)
    for layer in layers.values():
        layer.register_forward_hook(lambda _, x, y: seen.update((x[0].dtype, y.dtype)))
    found = encode(module)
    assert len(layers) == LAYERS and sum(name.endswith(".wo") for name in layers) == 2
    assert all(layer.arithmetic for layer in layers.values())
    assert {layer.weight.dtype for layer in layers.values()} == {torch.int8}
    assert seen == {dtype} == {found.dtype}
    assert relative(found, encode(load(tiny_folder))) < CLOSE


def write_unrotated(folder: Path) -> None:
    """Rotate a folder's int8 T5 back, as flux wrote int8 before, its levels rounded once more."""
    path = folder / T5 / SCHEMES["int8"].file_name
    state = load_file(path)
    for marker in [name for name in state if name.endswith(MARKER)]:
        weight = marker.removesuffix(MARKER) + ".weight"
        scale = state[f"{weight}_scale"].view(-1, 1)
        columns = state[weight].shape[1]
        values = rotate(state[weight] * scale, 64 if columns == 128 else 256)
        scale = values.abs().amax(1, keepdim=True) / 127
        state[weight] = (values / scale).round().char()
        state[f"{weight}_scale"] = scale.flatten()
        del state[marker]
    save_file(state, path.with_name(FORMER_FILES[0]))
    path.unlink()


def test_what_is_not_rotated_dequantizes(baked, tmp_path, tiny_folder):
    folder = shutil.copytree(baked("int8", **BAKED["int8"]), tmp_path / "copy")
    write_unrotated(folder)
    module = load(folder)
    layers = quantized_layers(module)
    assert len(layers) == LAYERS and not any(layer.arithmetic for layer in layers.values())
    assert relative(encode(module), encode(load(tiny_folder))) < CLOSE


def with_outliers(module: torch.nn.Module) -> torch.nn.Module:
    """The module with two channels of the stream that are hundreds of times the others."""
    module.shared.weight[:, OUTLIERS] += 300 * module.shared.weight.std()
    return module


def test_with_outliers_int8_errs_less_than_fp8_in_the_other_channels_too(baked, tiny_folder):
    """The decision that `MULTIPLIED_IN_TEXT_ENCODER` stands for; at full size: benchmarks."""
    reference = encode(with_outliers(load(tiny_folder)))
    others = [channel for channel in range(reference.shape[1]) if channel not in OUTLIERS]
    errors = {}
    for to in ("int8", "fp8"):
        found = encode(with_outliers(load(baked(to, **BAKED[to]))))
        errors[to] = (relative(found, reference), relative(found[:, others], reference[:, others]))
    assert errors["int8"][0] < errors["fp8"][0]
    assert errors["int8"][1] < errors["fp8"][1]


def test_embeddings_of_an_int8_t5_are_entries_of_their_own(
    baked: Callable[..., Path], tiny_folder, monkeypatch
):
    def key_of(folder: Path, precision: str) -> str:
        wanted = order("a red circle", precision=precision)
        here = machine(8, "cpu")
        checkpoint, plan = plan_for(wanted, [inspect(folder)], here)
        encoder = PromptEncoder(checkpoint, plan, here, on_disk=False)
        return encoder.key_of(Text("a red circle", wanted.request.text_tokens))

    folder = baked("int8", **BAKED["int8"])
    keys = [key_of(folder, "int8"), key_of(tiny_folder, "int8"), key_of(tiny_folder, "fp32")]
    assert len(set(keys)) == 3 and key_of(folder, "int8") == keys[0]
    # The same weights dequantized give other last bits.
    monkeypatch.setattr("fluxcli.engine.text.find_multiply", lambda *_: "dequantize")
    assert key_of(folder, "int8") != keys[0] and key_of(tiny_folder, "fp32") == keys[2]
