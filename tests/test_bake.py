"""Bakes have exactly the predicted bytes, are verified, and refuse what cannot be baked."""

import hashlib
import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import codecs
from quant.checkpoint import KEEP_FILE, MANIFEST, Checkpoint, inspect
from quant.codecs import Reader
from quant.errors import CheckpointError, WriteError
from quant.recipe import MARGIN_BYTES, make_recipe
from quant.spec import BAKEABLE, SCHEMES, QuantSpec
from quant.writer import SafetensorsWriter
from tests.support.bakes import ORIGIN, Hook, bake_all, change, content, recipe_of
from tests.support.invariant import files

TEXT_ENCODERS = ["keep", *(to for to in BAKEABLE if SCHEMES[to].can_bake_text_encoder)]
SPECS = [
    QuantSpec(to, text_encoder, modulation, "absmax" if "nf4" in (to, text_encoder) else "search")
    for to in BAKEABLE
    for text_encoder in TEXT_ENCODERS
    for modulation in (("keep", to) if SCHEMES[to].can_bake_modulation else ("keep",))
]
# T5 beside each scheme as it is unless asked otherwise; all others are more of the same.
CHOICES = [
    pytest.param(
        spec,
        marks=[] if spec.text_encoder == SCHEMES[spec.to].text_encoder else pytest.mark.exhaustive,
        id=f"{spec.to}-{spec.text_encoder}-{spec.modulation}",
    )
    for spec in SPECS
]
# Relative to the norm.
LARGEST_ERROR = {"": 0, "nf4": 0.1, "fp8": 0.037, "int8": 0.012, "w6a8": 0.024, "w4a8": 0.075}
MAIN = {
    "w6a8": "flux-w6a8.safetensors",
    "w4a8": "flux-w4a8.safetensors",
    "nf4": "diffusion_pytorch_model.safetensors",
    "fp8": "flux-fp8r.safetensors",
    "int8": "flux-int8-convrot.safetensors",
}


@pytest.mark.parametrize("spec", CHOICES)
def test_every_choice_has_exactly_the_predicted_bytes_and_is_a_model(spec, tiny_folder, tmp_path):
    source, target = inspect(tiny_folder), tmp_path / "deep" / "er" / "model"
    recipe = make_recipe(source, spec)
    progress = bake_all(recipe, target)
    written = {name for name in files(target) if name.endswith(".safetensors")} - set(recipe.copies)
    assert recipe.sizes == {name: (target / name).stat().st_size for name in written}
    assert f"transformer/{MAIN[spec.to]}" in written
    assert (f"transformer/{KEEP_FILE}" in written) == (spec.to == "nf4")
    assert {stat.S_IMODE((target / name).stat().st_mode) for name in written} == {0o666 & ~_umask()}
    done = [each.done_bytes for each in progress]
    assert done == sorted(done) and done[-1] <= progress[-1].total_bytes
    _assert_same_model(source, inspect(target), spec)
    assert not list(target.parent.glob("*.tmp-*"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _assert_same_model(source: Checkpoint, found: Checkpoint, spec: QuantSpec) -> None:
    assert found.scheduler == source.scheduler
    for name, part in source.components.items():
        weights = found.components[name].weights
        assert part.config == found.components[name].config and set(weights) == set(part.weights)
        reader = Reader()
        for weight in part.weights.values():
            stored = weights[weight.name]
            scheme = ""
            if weight.name != "proj_out.weight":
                scheme = spec.choose_scheme(name, weight.name, weight.shape)
            assert (stored.scheme, stored.shape) == (scheme, weight.shape)
            ours = reader.read(weight)[""].float()
            read = codecs.dequantize(
                reader.read(stored),
                scheme,
                stored.shape,
                torch.float32,
                rotation=stored.rotation,
            )
            error = float((read - ours).norm())
            assert error <= LARGEST_ERROR[scheme] * float(ours.norm())


@pytest.mark.parametrize("kind", ["bfl", "comfy"])
def test_a_file_has_exactly_the_predicted_bytes_and_its_manifest_beside_it(kind, micro, tmp_path):
    recipe, target = recipe_of(micro, kind), tmp_path / "out" / "x.safetensors"
    bake_all(recipe, target)
    assert recipe.sizes == {"": target.stat().st_size} and set(load_file(target))
    assert set(files(target.parent)) == {"x.safetensors", "x.safetensors.json"}
    manifest = json.loads((tmp_path / "out" / "x.safetensors.json").read_text())
    assert (manifest["layout"], manifest["bytes"]) == (kind, recipe.sizes)


def test_the_manifest_says_what_was_made_of_what(micro, tmp_path):
    spec = QuantSpec("nf4", "nf4", keep=("x_embedder",))
    bake_all(recipe_of(micro, spec=spec), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert {key: manifest[key] for key in ORIGIN} == ORIGIN and manifest["verified"] is True
    assert manifest["recipe"] == json.loads(json.dumps(spec.to_json())) and manifest["seconds"] >= 0
    sources = [
        path
        for part in ("transformer", "text_encoder_2")
        for path in (micro / part).glob("*.safetensors")
    ]
    sums = {hashlib.sha256(path.read_bytes()).hexdigest(): path.stat().st_size for path in sources}
    assert {found["sha256"]: found["bytes"] for found in manifest["source"].values()} == sums
    errors = manifest["relative_errors"]
    assert set(errors) == {
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.to_k.weight",
        "transformer_blocks.0.attn.to_v.weight",
        "proj_out.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    }
    assert all(0 < error < 0.1 for error in errors.values())


def test_two_sources_of_the_same_file_name_both_stand_in_the_manifest(copy, tmp_path):
    transformer = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.rename(copy / "transformer" / "model.safetensors")
    bake_all(recipe_of(copy), tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]) == 2


@pytest.mark.parametrize("kind", ["diffusers", "bfl", "comfy"])
def test_the_same_source_gives_the_same_bytes(kind, micro, tmp_path):
    for name in ("a", "b"):
        bake_all(recipe_of(micro, kind), tmp_path / name / "x")
    assert content(tmp_path / "a" / "x") == content(tmp_path / "b" / "x") != {}


@pytest.mark.parametrize("to", BAKEABLE)
def test_shards_and_wide_dtypes_give_the_same_model(to, copy, tmp_path):
    spec = QuantSpec(to)
    bake_all(recipe_of(copy, spec=spec), tmp_path / "whole")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    path.unlink()
    shards = {name: f"s-{k % 3}.safetensors" for k, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file(
            {name: tensors[name] for name in tensors if shards[name] == shard}, path.parent / shard
        )
    (path.parent / f"{path.name}.index.json").write_text(json.dumps({"weight_map": shards}))
    bake_all(recipe_of(copy, spec=spec), tmp_path / "shards")
    file = f"transformer/{MAIN[to]}"
    whole, sharded = load_file(tmp_path / "whole" / file), load_file(tmp_path / "shards" / file)
    assert set(whole) == set(sharded)
    for name, tensor in whole.items():
        if "quant_state" not in name:  # it names the dtype
            assert torch.equal(tensor.float(), sharded[name].float()), name


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.to_q.bias",
        "proj_out.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_source_that_is_not_finite_is_refused_by_the_tensors_name(name, value, copy, tmp_path):
    values = next(t[name] for t in map(load_file, copy.rglob("*.safetensors")) if name in t)
    values[-1] = value
    change(copy, name, values)
    with pytest.raises(CheckpointError, match=f"not finite.*NaN or Inf in {name}"):
        bake_all(recipe_of(copy), tmp_path / "out" / "x")
    assert files(tmp_path / "out") == {}


@pytest.mark.parametrize("to", BAKEABLE)
def test_what_is_quantized_already_is_refused(to, micro, tmp_path):
    bake_all(recipe_of(micro, spec=QuantSpec(to)), tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"quantized already.*is {to}") as caught:
        recipe_of(tmp_path / "x", spec=QuantSpec("fp8"))
    assert "16-bit" in caught.value.hint


def test_a_quantized_text_encoder_is_refused_unless_it_is_kept(micro, tmp_path):
    bake_all(recipe_of(micro, spec=QuantSpec("fp8", "fp8")), tmp_path / "x")
    for file in (tmp_path / "x" / "transformer").glob("*"):
        file.unlink()
    shutil.copytree(micro / "transformer", tmp_path / "x" / "transformer", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="quantized already"):
        recipe_of(tmp_path / "x", spec=QuantSpec("fp8", "fp8"))
    bake_all(recipe_of(tmp_path / "x", spec=QuantSpec("int8")), tmp_path / "y")
    assert inspect(tmp_path / "y").components["text_encoder_2"].precision == "fp8"


def test_the_top_proj_out_is_never_a_pattern_that_spares_every_single_block(micro):
    for keep in ((), ("proj_out",), ("*proj_out*",)):
        texts = recipe_of(micro, spec=QuantSpec("nf4", keep=keep)).texts
        config = json.loads(texts["transformer/config.json"])
        assert "proj_out" not in config["quantization_config"]["llm_int8_skip_modules"]


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(micro, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    recipe = recipe_of(micro)
    need = sum(recipe.sizes.values()) + recipe.copied_bytes + MARGIN_BYTES
    hook = Hook(0, lambda _: None).install(monkeypatch.setattr)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(need, 0, need - 1))
    with pytest.raises(WriteError, match=r"disk is too small.*needs 0\.07 GB, 0\.07 GB are free"):
        bake_all(recipe, tmp_path / "new" / "x")
    assert set(hook.names) <= {"unlink"} and not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(need, 0, need))
    assert bake_all(recipe, tmp_path / "new" / "x")


@pytest.mark.parametrize("kind", ["diffusers", "bfl"])
def test_a_byte_that_changes_on_the_disk_is_found_before_the_rename(
    kind, micro, tmp_path, monkeypatch
):
    def finish(writer: SafetensorsWriter) -> None:
        real(writer)
        data = bytearray(writer.path.read_bytes())
        data[-1] ^= 1
        writer.path.write_bytes(data)

    real, target = SafetensorsWriter.finish, tmp_path / "out" / "x"
    monkeypatch.setattr(SafetensorsWriter, "finish", finish)
    with pytest.raises(WriteError, match=r"the file is damaged.*does not read back"):
        bake_all(recipe_of(micro, kind), target)
    assert list(target.parent.iterdir()) == []
    bake_all(recipe_of(micro, kind), target, verify=False)
    described = target / MANIFEST if kind == "diffusers" else Path(f"{target}.json")
    assert json.loads(described.read_text())["verified"] is False
