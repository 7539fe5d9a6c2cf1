"""Single weight files: published headers are read whole, values are the dialect's library's."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import nn

from fluxcli.engine.loader import read_tensors
from fluxcli.engine.streaming import load_component
from fluxcli.models.shapes import read_known_shapes
from quant.checkpoint import COMPONENTS, Component, inspect
from quant.errors import CheckpointError
from quant.expected import count_matching
from quant.kinds import FILL_CHANNELS
from quant.linear import QuantizedLinear
from quant.single_file import assemble_checkpoint, inspect_file, inspect_transformer
from tests import published
from tests.support import exports, real_width
from tests.support.exports import DIALECTS
from tests.support.helpers import draw, engine_of, tiny
from tests.support.invariant import call
from tests.test_formats import named

KNOWN = {
    kind: read_known_shapes(f"black-forest-labs/FLUX.1-{kind}").components
    for kind in ("dev", "schnell")
}
NUMEL = {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}
NUMEL_OF_TRANSFORMER = {"dev": 11_901_408_320, "schnell": 11_891_178_560}
HF, BFL, RAW, OLD, NEW = (
    "Hugging Face",
    "BFL",
    "fp8 without scales",
    "ComfyUI scaled fp8, old layout",
    "ComfyUI scaled fp8",
)
NF4 = "bitsandbytes nf4 (Forge)"
ALONE = {  # published file: what it holds and in which dialect; the tensors that nobody reads
    "bfl_dev": ("transformer", BFL, {}),
    "bfl_schnell": ("transformer", BFL, {}),
    "ae": ("vae", BFL, {}),
    "kijai_fp8": ("transformer", RAW, {}),
    "clip_l": ("text_encoder", HF, {}),
    "comfy_scaled_old": ("transformer", OLD, {"scale_input": 314, "scaled_fp8": 1}),
    "comfy_scaled_new": ("transformer", NEW, {"input_scale": 266, "comfy_quant": 266}),
    "gguf_q4_k_s": ("transformer", "GGUF", {}),
    "gguf_q8_0": ("transformer", "GGUF", {}),
    "gguf_t5_q8_0": ("text_encoder_2", "GGUF", {}),
    "t5xxl_fp16": ("text_encoder_2", HF, {"embed_tokens.weight": 1}),
    "t5xxl_fp8_e4m3fn": ("text_encoder_2", RAW, {"embed_tokens.weight": 1}),
    "t5xxl_fp8_scaled": ("text_encoder_2", OLD, {"embed_tokens.weight": 1, "scaled_fp8": 1}),
}
WHOLE = {"comfy_all_in_one_fp8": (HF, RAW, RAW, BFL)} | dict.fromkeys(
    ("forge_nf4_v1", "forge_nf4_v2"), (HF, RAW, NF4, BFL)
)
FOREIGN = {"other_flux2": "FLUX.2", "other_sd3": "Stable Diffusion 3", "other_sdxl": "SDXL"}
FOREIGN |= {path.stem: "a LoRA" for path in published.HERE.glob("lora_*.json")}
LOSSLESS = ("bfl bf16", "bfl f32", "gguf BF16")
UNPACKED = (*LOSSLESS, "comfy fp8 e5m2", "gguf F16")  # in memory
IN_8_BIT = ("comfy fp8", "comfy scaled old", "comfy scaled")  # which multiply in fp8


# --- published headers, at full size


@pytest.fixture
def blank(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    def made(name: str, *changes: str) -> Path:
        return exports.blank(
            name, tmp_path / f"x.{'gguf' if name.startswith('gguf') else 'safetensors'}", *changes
        )

    yield made
    for path in tmp_path.glob("x.*"):
        path.unlink()


def bytes_read() -> int:
    """What this process has read of files, 0 where the system does not say."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else 0


def test_every_published_list_is_used():
    known = {*ALONE, *WHOLE, *FOREIGN, "other_fill", "other_kontext"}
    assert known == {path.stem for path in published.HERE.glob("*.json")}


@pytest.mark.parametrize("name", [*ALONE, *WHOLE])
def test_a_published_file_is_read_whole_by_its_header(name, blank):
    path, before, began = blank(name), bytes_read(), time.process_time()
    found = inspect_file(path)
    assert time.process_time() - began < 3 and bytes_read() - before < 10 << 20
    if name in ALONE:
        part, dialect, unused = ALONE[name]
        dialects = {part: dialect}
    else:
        dialects = {
            part: f"all-in-one, {each}" for part, each in zip(COMPONENTS, WHOLE[name], strict=True)
        }
        unused = {"logit_scale": 2, "text_projection.weight": 1}
    assert {part: component.dialect for part, component in found.items()} == dialects
    read = {
        piece.info.name
        for c in found.values()
        for weight in c.weights.values()
        for piece in weight.pieces.values()
    }
    left = [
        re.search(r"[^.]+(\.weight)?$", each)[0] for each in set(published.tensors(name)) - read
    ]
    assert Counter(left) == unused
    kind = "schnell" if "schnell" in name else "dev"
    for part, component in found.items():
        known = KNOWN[kind][part]
        config = component.config or known.config
        there, needed = count_matching(part, config=config, weights=component.weights)
        # One tensor under two names.
        assert there == needed == len(known.weights) + (part == "text_encoder_2")
        assert (
            component.numel
            == known.numel
            == (NUMEL | {"transformer": NUMEL_OF_TRANSFORMER[kind]})[part]
        )
        assert component.config | known.config == component.config or not component.config


@pytest.mark.parametrize("name", ["gguf_q4_k_s", "forge_nf4_v2", "t5xxl_fp8_scaled", "ae"])
def test_inspect_says_of_a_published_file_that_it_is_whole(name, blank, capsys):
    result = call(capsys, "inspect", str(blank(name)))
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    parts = found.get("components") or {found["kind"]: found}
    assert (
        list(parts) == (list(COMPONENTS) if name in WHOLE else [ALONE[name][0]])
        and found["problems"] == []
    )
    assert not [
        part["loads"] for part in parts.values() if len(set(part["loads"].split(" of "))) > 1
    ]
    assert set(COMPONENTS) - set(parts) == set(found["needs"][:-1]) and found["needs"][
        -1
    ].startswith("tokenizers")


@pytest.mark.parametrize("name", FOREIGN)
def test_another_models_published_file_is_named(name, blank):
    with pytest.raises(CheckpointError, match=f": {FOREIGN[name]}$"):
        inspect_file(blank(name))


def test_a_fill_model_has_its_channels_and_kontext_has_the_names_of_dev(blank):
    config = inspect_file(blank("bfl_dev", "other_fill"))["transformer"].config
    assert config["in_channels"] == 384 and config["out_channels"] == 64
    kontext = blank("bfl_dev", "other_kontext")
    assert inspect_file(kontext)["transformer"].dialect == BFL


def test_a_t5_names_its_vocabulary_once_even_if_it_is_stored_under_its_other_name(blank, tmp_path):
    names = published.tensors("t5xxl_fp16")
    path = tmp_path / "x.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            published,
            "tensors",
            lambda _: {n: info for n, info in names.items() if n != "shared.weight"},
        )
        exports.blank("t5xxl_fp16", path)
    part = replace(
        inspect_file(path)["text_encoder_2"], config=KNOWN["dev"]["text_encoder_2"].config
    )
    assert (
        count_matching(part.name, config=part.config, weights=part.weights) == (220, 220)
        and part.numel == NUMEL["text_encoder_2"]
    )


# --- values


def values_of(part: Component) -> dict[str, torch.Tensor]:
    return read_tensors(part, list(part.weights), dtype=torch.float32, device="cpu")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_weight_is_what_the_formats_library_reads(dialect, exported, tiny_folder):
    path, expected = exported(dialect)
    part = inspect_transformer(path)
    assert part.dialect == DIALECTS[dialect][2]
    assert same(values_of(part), expected)
    plain = values_of(inspect(tiny_folder).components["transformer"])
    assert same(plain, expected) == (dialect in LOSSLESS)
    module = load_component(part, dtype=torch.float32, device="cpu").module
    compared, packed = {name for name in expected if not name.endswith("weight")}, 0
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear | nn.Linear):
            names = [f"{each}.weight" for each in named(name)]
            weight = (
                layer.dequantize(torch.float32)
                if isinstance(layer, QuantizedLinear)
                else layer.weight
            )
            assert torch.equal(weight, torch.cat([expected[each] for each in names])), name
            biases = [expected[each.replace("weight", "bias")] for each in names]
            assert torch.equal(layer.bias, torch.cat(biases)), name
            compared |= set(names)
            packed += isinstance(layer, QuantizedLinear)
        elif name + ".weight" in expected:  # norms
            assert torch.equal(layer.weight, expected[name + ".weight"]), name
            compared.add(name + ".weight")
    assert compared == set(expected) and bool(packed) == (dialect not in UNPACKED)


def test_a_bfl_file_of_real_width_is_what_diffusers_converts(tmp_path):
    """One block of each kind, 0.6 B parameters.

    The other dialects are checked by hand: python -m tests.support.real_width.
    """
    found = {
        dialect: counted for dialect, *counted, _ in real_width.rows(["bfl bf16", "vae"], tmp_path)
    }
    assert found == {"bfl bf16": [66, 0.0], "vae": [244, 0.0]}


@pytest.mark.exhaustive
def test_a_fill_file_of_real_width_is_what_diffusers_converts(tmp_path):
    """As test_a_bfl_file_of_real_width_is_what_diffusers_converts, with Fill's 384 channels."""
    assert real_width.transformer("bfl bf16", tmp_path, FILL_CHANNELS) == (66, 0.0)


def test_the_tables_of_the_exporters_give_the_published_names(tiny_folder):
    t5 = {
        exports.to_llama(name): weight.shape
        for name, weight in KNOWN["dev"]["text_encoder_2"].weights.items()
    }
    assert t5 == {name: shape for name, (_, shape) in published.tensors("gguf_t5_q8_0").items()}
    vae = [
        exports.to_ldm(n, torch.empty(w.shape, device="meta"))
        for n, w in KNOWN["dev"]["vae"].weights.items()
    ]
    assert {name: tuple(t.shape) for name, t in vae} == {
        n: shape for n, (_, shape) in published.tensors("ae").items()
    }
    bfl = exports.bfl_tensors(tiny_folder, Path("bfl.safetensors"))
    assert same(exports.to_diffusers(bfl), exports.part_of(tiny_folder, "transformer"))


def test_an_all_in_one_file_holds_the_parts_of_the_folder(tiny_folder):
    bfl = exports.bfl_tensors(tiny_folder, Path("bfl.safetensors"))
    exports.all_in_one(tiny_folder, bfl, Path("all.safetensors"))
    found, expected = inspect_file(Path("all.safetensors")), inspect(tiny_folder).components
    assert list(found) == list(COMPONENTS)
    for name, part in found.items():
        assert same(values_of(part), values_of(expected[name])), name
    ldm = dict(exports.to_ldm(*item) for item in exports.part_of(tiny_folder, "vae").items())
    theirs = convert_ldm_vae_checkpoint(ldm, expected["vae"].config)
    assert same(values_of(found["vae"]), {name: tensor.float() for name, tensor in theirs.items()})


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
def test_a_t5_of_llama_cpp_has_the_values_that_gguf_reads(kind, tiny_folder):
    export = exports.in_gguf(kind, architecture="t5encoder", rename=exports.to_llama)
    expected = export(exports.part_of(tiny_folder, "text_encoder_2"), Path("t5.gguf"))
    part = replace(
        inspect_file(Path("t5.gguf"))["text_encoder_2"],
        config=inspect(tiny_folder).components["text_encoder_2"].config,
    )
    assert same(values_of(part), expected)
    module = load_component(part, dtype=torch.float32, device="cpu").module
    packed = {name for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    # Not `wo`, which transformers keeps in float32.
    assert len(packed) == (0 if kind == "F16" else 12)
    for name in packed:
        assert torch.equal(
            module.get_submodule(name).dequantize(torch.float32), expected[f"{name}.weight"]
        )
    assert torch.equal(module.shared.weight, expected["shared.weight"])


def test_the_int8_folder_of_bitsandbytes_has_the_values_that_it_reads(tiny_folder):
    folder, expected = exports.int8_folder(tiny_folder, Path("int8").absolute())
    checkpoint = inspect(folder)
    part = checkpoint.components["transformer"]
    assert (part.dialect, part.precision) == ("diffusers, int8 by bitsandbytes", "int8") and len(
        expected
    ) == 68
    assert {name for name, weight in part.weights.items() if weight.scheme == "int8"} == set(
        expected
    )
    found = read_tensors(part, list(expected), dtype=torch.float32, device="cpu")
    for name, values in expected.items():  # it multiplies by 1/127 last, we divide the scale first
        torch.testing.assert_close(found[name], values, rtol=3e-7, atol=0)
    assert (
        apart(
            draw(engine_of(checkpoint), tiny())[1], draw(engine_of(inspect(tiny_folder)), tiny())[1]
        )
        < 0.5
    )


# --- pictures


def apart(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


@pytest.fixture(scope="module")
def picture(tiny_folder: Path) -> np.ndarray:
    found = draw(engine_of(inspect(tiny_folder)), tiny())[1]
    other = tiny(prompt="a green square on a white background")
    assert apart(found, draw(engine_of(inspect(tiny_folder), other), other)[1]) > 20
    return found


@pytest.mark.parametrize(
    "dialect", ["bfl bf16", *IN_8_BIT, "gguf Q4_0", "gguf Q8_0", "gguf Q6_K", "nf4 v1", "nf4 v2"]
)
def test_a_file_draws_what_a_folder_with_its_values_draws(dialect, exported, tiny_folder, picture):
    path, values = exported(dialect)
    folder = Path(shutil.copytree(tiny_folder, "folder"))
    save_file(values, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    engine = engine_of(assemble_checkpoint(path, lambda lacking: tiny_folder))
    found, expected = draw(engine, tiny())[1], draw(engine_of(inspect(folder)), tiny())[1]
    assert (
        engine.plan.precision
        == {"bfl": "fp32", "com": "fp8", "ggu": "gguf", "nf4": "nf4"}[dialect[:3]]
    )
    if dialect in IN_8_BIT:
        assert 0 < apart(found, expected) < 0.06  # another seed: 0.07
    else:
        assert np.array_equal(found, expected)
    if dialect != "gguf Q6_K":  # whose blocks are random
        assert apart(found, picture) < 0.5
    assert (apart(found, picture) == 0) == (dialect in LOSSLESS)
