"""How much of an adapter arrives in a quantized checkpoint: by the figures, the sums behind them,
and what is said.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.models import loras
from fluxcli.request.settings import LoraRef
from quant import codecs
from quant.bake import _Quantizer
from quant.checkpoint import MANIFEST, inspect
from quant.codecs import Reader
from quant.recipe import Recipe, make_file_recipe, make_recipe
from quant.spec import BAKEABLE, QuantSpec
from tests.support.bakes import ATTENTION, bake_all
from tests.support.invariant import call
from tests.support.loras import peft_tensors

TO_Q = f"{ATTENTION}.to_q"
WIDTH = 128
LARGE = 1.0  # of the weights' norm
TINY = 0.005


@pytest.fixture(scope="module")
def write_adapter(micro: Path) -> Callable[..., Path]:
    """Writes a LoRA whose products have `size` times the norm of the weights."""
    weights = inspect(micro).components["transformer"].weights

    def write(path: Path, *, size: float, layers: tuple[str, ...] = (TO_Q,), seed: int = 0) -> Path:
        made = torch.Generator().manual_seed(seed)
        pairs = {}
        for layer in layers:
            weight = Reader().read(weights[f"{layer}.weight"])[""].float()
            down = torch.randn(4, WIDTH, generator=made)
            up = torch.randn(WIDTH, 4, generator=made)
            pairs[layer] = down, up * size * weight.norm() / (up @ down).norm()
        save_file(peft_tensors("transformer", pairs), path)
        return path

    return write


def recipe_with(folder: Path, spec: QuantSpec, *paths: Path, kind: str = "diffusers") -> Recipe:
    source = inspect(folder)
    refs = [LoraRef(str(path), 1.0) for path in paths]
    adapters = tuple(loras.resolve_loras(refs, source.components))
    if kind == "diffusers":
        return make_recipe(source, spec, adapters=adapters)
    transformer = source.components["transformer"]
    return make_file_recipe(transformer, spec, kind=kind, adapters=adapters)


def bake_with(folder: Path, spec: QuantSpec, *paths: Path, target: Path) -> list[dict]:
    """What the manifest says of the adapters."""
    bake_all(recipe_with(folder, spec, *paths), target)
    return json.loads((target / MANIFEST).read_text())["lora"]


def read_values(folder: Path, name: str) -> torch.Tensor:
    weight = inspect(folder).components["transformer"].weights[name]
    stored = Reader().read(weight)
    return codecs.dequantize(
        stored, weight.scheme, weight.shape, torch.float32, rotation=weight.rotation
    )


@pytest.mark.parametrize("to", BAKEABLE)
def test_the_figures_are_those_of_the_files_with_and_without_it(to, micro, write_adapter, tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors", size=0.3)
    (about,) = bake_with(micro, QuantSpec(to), adapter, target=tmp_path / "with")
    bake_all(make_recipe(inspect(micro), QuantSpec(to)), tmp_path / "without")
    pair = load_file(adapter)
    down, up = (pair[f"transformer.{TO_Q}.lora_{x}.weight"] for x in "AB")
    change = (up @ down).flatten()
    name = f"{TO_Q}.weight"
    arrived = read_values(tmp_path / "with", name) - read_values(tmp_path / "without", name)
    arrived = arrived.flatten()
    noise = float((arrived - change).norm() / change.norm())
    projection = float(arrived @ change / (change @ change))
    assert about["noise"] == pytest.approx(noise, rel=0.01)
    assert about["projection"] == pytest.approx(projection, rel=0.01)
    assert about["worst_layers"] == {TO_Q: about["noise"]} and about["layers"] == 1


@pytest.mark.parametrize("to", BAKEABLE)
def test_a_large_change_arrives_in_every_scheme(to, micro, write_adapter, tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors", size=LARGE)
    (about,) = bake_with(micro, QuantSpec(to), adapter, target=tmp_path / "x")
    assert about["noise"] < 0.2 and abs(about["projection"] - 1) < 0.03
    assert about["drowned_layers"] == 0


def test_a_tiny_change_drowns_in_nf4_and_the_warning_names_its_layers(
    micro, write_adapter, tmp_path, capsys
):
    layers = tuple(f"{ATTENTION}.to_{x}" for x in "qkv")
    adapter = write_adapter(tmp_path / "faint.safetensors", size=TINY, layers=layers)
    arguments = ("quantize", str(micro), "x", "--to", "nf4", "--scales", "absmax", "--json")
    result = call(capsys, *arguments, "--lora", str(adapter))
    assert result.returncode == 0
    (about,) = json.loads(result.stdout)["lora"]
    assert about == json.loads(Path("x", MANIFEST).read_text())["lora"][0]
    assert about["noise"] > 1 and about["drowned_layers"] == about["layers"] == 3
    (warning,) = [line for line in result.stderr.splitlines() if "drowns" in line]
    assert all(layer in warning for layer in layers) and "more" not in warning
    assert f"flux generate --lora {adapter}" in warning
    assert "are quantized once more" in result.stderr


@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_a_change_of_which_nothing_arrives_is_warned_of(to, micro, write_adapter, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "lost.safetensors", size=1e-7)
    result = call(capsys, "quantize", str(micro), "x", "--to", to, "--json", "--lora", str(adapter))
    (about,) = json.loads(result.stdout)["lora"]
    assert (about["projection"], about["noise"], about["drowned_layers"]) == (0, 1, 1)
    assert "0.0% of its change arrived" in result.stderr and "-0.0%" not in result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if "drowns" in line]
    assert TO_Q in warning


def test_what_stays_in_16_bit_is_only_rounded_to_it(micro, write_adapter, tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors", size=LARGE)
    spec = QuantSpec("nf4", keep=("*",), scales="absmax")
    (about,) = bake_with(micro, spec, adapter, target=tmp_path / "x")
    assert 0 < about["noise"] < 2**-7 and about["projection"] == pytest.approx(1, abs=1e-3)


def test_each_of_several_adapters_is_compared_with_what_was_there_before_it(
    micro, write_adapter, tmp_path
):
    large = write_adapter(tmp_path / "a.safetensors", size=LARGE)
    faint = write_adapter(tmp_path / "b.safetensors", size=TINY, seed=1)
    first, second = bake_with(micro, QuantSpec("int8"), large, faint, target=tmp_path / "x")
    (alone,) = bake_with(micro, QuantSpec("int8"), large, target=tmp_path / "y")
    assert first == alone and first["noise"] < 0.1 < 1 < second["noise"]


def test_an_adapter_that_changes_nothing_has_no_figures(micro, write_adapter, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "a.safetensors", size=0)
    arguments = ("quantize", str(micro), "x", "--to", "fp8", "--json")
    result = call(capsys, *arguments, "--lora", str(adapter))
    (about,) = json.loads(result.stdout)["lora"]
    assert about["noise"] is about["projection"] is None and about["worst_layers"] == {}
    assert "it changes nothing" in result.stderr and "warning" not in result.stderr


def test_rows_of_several_layers_and_swapped_halves_are_compared_in_the_files_order(
    tiny_folder, tmp_path
):
    layers = (TO_Q, "norm_out.linear")
    made = torch.Generator().manual_seed(0)
    shapes = {TO_Q: (WIDTH, WIDTH), "norm_out.linear": (2 * WIDTH, WIDTH)}
    pairs = {}
    for layer in layers:
        rows, columns = shapes[layer]
        down = torch.randn(4, columns, generator=made) / columns**0.5
        pairs[layer] = down, torch.randn(rows, 4, generator=made)
    save_file(peft_tensors("transformer", pairs), tmp_path / "a.safetensors")
    paths = (tmp_path / "a.safetensors",)
    recipe = recipe_with(tiny_folder, QuantSpec("fp8"), *paths, kind="comfy")
    quantizer = _Quantizer(recipe, "cpu")
    reader = Reader()
    for output in recipe.tensors:
        values = torch.cat([reader.read(source)[""] for source in output.sources])
        quantizer.quantize(output, values)
    (about,) = [arrival.describe() for arrival in quantizer.arrivals]
    assert set(about["worst_layers"]) == {
        "double_blocks.0.img_attn.qkv",
        "final_layer.adaLN_modulation.1",
    }
    assert about["noise"] < 0.1 and abs(about["projection"] - 1) < 0.01
