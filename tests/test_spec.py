"""Which tensors are quantized, and that what `layout` predicts is what the codecs store."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import _TYPES as DTYPES

from quant import codecs
from quant.checkpoint import inspect
from quant.errors import SpecError
from quant.spec import (
    BAKEABLE,
    GGUF_ERRORS,
    NF4_ONCE,
    SCALED_BLOCKS,
    SCHEMES,
    QuantSpec,
    find_error,
    is_modulation,
    lay_out,
    name_stored,
    scheme_in_memory,
)
from quant.tensor_info import GGUF_BITS, TensorInfo
from quant.weights import Piece

BLOCK = {
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.18.attn.add_v_proj",
    "transformer_blocks.3.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.9.ff_context.net.2",
    "transformer_blocks.1.attn.to_add_out",
    "single_transformer_blocks.37.proj_mlp",
    "single_transformer_blocks.0.proj_out",
    "single_transformer_blocks.0.attn.to_k",
}
MODULATION = {
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.norm1_context.linear",
    "single_transformer_blocks.12.norm.linear",
}
ALWAYS_16_BIT = {
    "x_embedder",
    "context_embedder",
    "time_text_embed.text_embedder.linear_1",
    "norm_out.linear",
    "proj_out",
    "time_text_embed.guidance_embedder.linear_2",
}
T5 = {"encoder.block.0.layer.0.SelfAttention.q", "encoder.block.23.layer.1.DenseReluDense.wi_1"}
T5_WO = {f"encoder.block.{block}.layer.1.DenseReluDense.wo" for block in (0, 23)}
T5_16_BIT = {
    "shared",
    "encoder.embed_tokens",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
}


def schemes(
    spec: QuantSpec, component: str, layers: set[str], leaf: str = "weight", shape=(128, 128)
) -> set[str]:
    return {spec.choose_scheme(component, f"{layer}.{leaf}", shape) for layer in layers}


@pytest.mark.parametrize("to", BAKEABLE)
@pytest.mark.parametrize("text_encoder", ["keep", "nf4", "fp8", "int8"])
def test_blocks_and_t5_are_quantized_and_nothing_else(to, text_encoder):
    spec = QuantSpec(to, text_encoder)
    assert schemes(spec, "transformer", BLOCK) == {to}
    assert schemes(spec, "text_encoder_2", T5) == {"" if text_encoder == "keep" else text_encoder}
    assert schemes(spec, "transformer", MODULATION | ALWAYS_16_BIT) == {""}
    assert schemes(spec, "text_encoder_2", T5_WO) == {"int8" if text_encoder == "int8" else ""}
    assert schemes(spec, "text_encoder_2", T5_16_BIT) == {""}
    for component in ("text_encoder", "vae"):
        assert schemes(spec, component, BLOCK | T5) == {""}
    assert schemes(spec, "transformer", BLOCK, "bias", (128,)) == {""}
    assert schemes(spec, "transformer", BLOCK, shape=(128,)) == {""}


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4", "Q8_0"])
def test_a_stored_wo_stays_quantized_in_int8_alone(form):
    for layer in T5_WO:
        in_memory = scheme_in_memory("text_encoder_2", f"{layer}.weight", form)
        assert in_memory == ("int8" if form == "int8" else "")
    assert scheme_in_memory("text_encoder_2", "shared.weight", form) == ""


@pytest.mark.parametrize("to", ["nf4", "fp8"])
def test_modulation_is_quantized_when_asked_for_and_alone_changes(to):
    spec = QuantSpec(to, modulation=to)
    assert schemes(spec, "transformer", MODULATION | BLOCK) == {to}
    assert schemes(spec, "transformer", ALWAYS_16_BIT) == {""}
    assert all(
        is_modulation(f"{layer}.{leaf}") for layer in MODULATION for leaf in ("weight", "bias")
    )
    assert not any(is_modulation(f"{layer}.weight") for layer in BLOCK)


@pytest.mark.parametrize(
    "pattern, kept",
    [
        ("transformer_blocks.0.attn.to_q", {"transformer_blocks.0.attn.to_q"}),
        ("transformer_blocks.0.attn.to_q.weight", {"transformer_blocks.0.attn.to_q"}),
        ("single_*", {layer for layer in BLOCK if layer.startswith("single_")}),
        ("*.proj_out", {"single_transformer_blocks.0.proj_out"}),
        ("*.0.attn.*", {layer for layer in BLOCK if ".0.attn." in layer}),
        ("*", BLOCK),
    ],
)
def test_a_pattern_keeps_what_it_names(pattern, kept):
    spec = QuantSpec("fp8", keep=(pattern,))
    assert {
        layer for layer in BLOCK if not spec.choose_scheme("transformer", f"{layer}.weight", (8, 8))
    } == kept
    spec.check_keep(f"{layer}.weight" for layer in BLOCK)


@pytest.mark.parametrize(
    "pattern", ["", "to_q", "TRANSFORMER_BLOCKS.*", "*.lora", "transformer_blocks.0"]
)
def test_a_pattern_without_a_match_is_refused(pattern):
    with pytest.raises(SpecError, match="--keep matches nothing"):
        QuantSpec("fp8", keep=("*.to_q", pattern)).check_keep(f"{layer}.weight" for layer in BLOCK)


@pytest.mark.parametrize(
    "wish, word",
    [
        ({"to": "nf5"}, "--to nf5"),
        ({"to": ""}, "nf4 or fp8 or int8 or w6a8 or w4a8"),
        ({"to": "keep"}, "--to"),
        ({"to": "nf4", "modulation": "fp8"}, "keep or nf4"),
        ({"to": "fp8", "modulation": "nf4"}, "keep or fp8"),
        ({"to": "int8", "modulation": "int8"}, "--modulation int8"),
        ({"to": "int8", "modulation": "nf4"}, "--modulation"),
        ({"to": "nf4", "text_encoder": "w4a8"}, "--text-encoder w4a8"),
        ({"to": "nf4", "scales": "best"}, "--scales best"),
    ],
)
def test_impossible_choices_are_refused_by_name(wish, word):
    with pytest.raises(SpecError) as caught:
        QuantSpec(**wish)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_t5_goes_with_the_transformer_and_the_policy_has_a_version():
    assert {to: SCHEMES[to].text_encoder for to in BAKEABLE} == {
        "nf4": "nf4",
        "fp8": "keep",
        "int8": "int8",
        "w6a8": "int8",
        "w4a8": "int8",
    }
    assert QuantSpec("nf4").to_json()["policy"] == 1


@settings(max_examples=60)
@given(
    st.sampled_from(BAKEABLE),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.integers(1, 80),
    st.integers(1, 300),
)
def test_layout_is_what_the_codec_stores(scheme, dtype, rows, columns):
    import torch

    columns *= SCHEMES[scheme].columns
    info = TensorInfo("a.weight", dtype, (rows, columns))
    weight = torch.randn(rows, columns).to(DTYPES[dtype])
    stored = codecs.quantize(weight, scheme, name=info.name, where=Piece(Path(), info)).stored
    predicted = {
        part.name: (DTYPES[part.dtype], part.shape, part.nbytes) for part in lay_out(scheme, info)
    }
    assert predicted == {
        name_stored("a.weight", suffix): (t.dtype, tuple(t.shape), t.nbytes)
        for suffix, t in stored.items()
    }


def test_the_bundled_model_in_each_scheme_keeps_the_same_layers(tiny_folder):
    weights = inspect(tiny_folder).components["transformer"].weights.values()
    specs = {to: QuantSpec(to) for to in BAKEABLE}
    kept = {
        to: {w.name for w in weights if not spec.choose_scheme("transformer", w.name, w.shape)}
        for to, spec in specs.items()
    }
    assert kept["nf4"] == kept["fp8"] == kept["int8"]
    wide = {
        name.removesuffix(".weight")
        for name in kept["nf4"]
        if name.endswith("weight") and "attn." not in name
    }
    assert (
        all("norm" in layer or "embed" in layer or layer == "proj_out" for layer in wide)
        and len(wide) == 19
    )


def test_the_errors_of_gguf_are_what_its_package_gives():
    """Of the kinds that the gguf package can quantize to, on the weights that the table is of."""
    from gguf import GGMLQuantizationType, quants

    weights = np.random.default_rng(1).standard_t(6, size=(256, 3072)).astype(np.float32)
    for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
        form = GGMLQuantizationType[kind]
        decoded = quants.dequantize(quants.quantize(weights, form), form)
        error = np.linalg.norm(decoded - weights) / np.linalg.norm(weights)
        assert find_error(kind) == pytest.approx(float(error), rel=0.05), kind
    assert set(GGUF_ERRORS) == set(GGUF_BITS) and find_error("") == 0


def test_a_schemes_row_agrees_with_itself():
    forms = [form for row in SCHEMES.values() for form in row.forms]
    only_read = {NF4_ONCE, *GGUF_BITS, *SCALED_BLOCKS}
    assert len(forms) == len(set(forms)) and set(forms) == {*BAKEABLE} | only_read
    assert len({row.error for row in SCHEMES.values()}) == len(SCHEMES)
    for name, row in SCHEMES.items():
        assert row.name == name and row.words and row.library
        assert bool(row.multiply) == (row.capability is not None) == bool(row.largest)
        assert row.can_bake or not (row.can_bake_modulation or row.can_bake_text_encoder)
        stored = lay_out(row.forms[0], TensorInfo("a.weight", "BF16", (256, 256)))
        assert not row.can_bake or stored[0].nbytes == 256 * 256 * row.bits // 8
