"""Files as ComfyUI, BFL and converters write them: values are the packing library's, bit for bit.

What the markers do not say, or say in a way that is not known, is refused, and never read as
something else.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.engine.loader import read_tensors
from fluxcli.engine.streaming import load_component
from quant import codecs
from quant.checkpoint import COMPONENTS, KEEP_FILE, PACKED_FILES, Component, inspect
from quant.codecs import Reader
from quant.errors import CheckpointError
from quant.header import read_whole_header
from quant.header_json import MARKERS as METADATA
from quant.linear import QuantizedLinear
from quant.markers import Marker, read_layers, read_marker
from quant.single_file import assemble_checkpoint, inspect_file, inspect_transformer
from quant.weights import Piece, Weight, group_weights
from tests.support import comfy, exports
from tests.support.comfy import GROUPED, INT8, bfl, marker, metadata, pack
from tests.support.helpers import draw, engine_of, tiny
from tests.support.invariant import call
from tests.test_formats import named

Tensors = dict[str, torch.Tensor]
LAYER = "layer"
PREFIX = "model.diffusion_model."
FILE = Path("x.safetensors")
FLOATS = (torch.float32, torch.bfloat16)
TABLES = torch.linspace(-1, 1, 16), torch.linspace(-0.9, 1, 16).flip(0)


def usually(names: Iterable[str], *chosen: str) -> list:
    """All of these, but in CI only the chosen ones."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.exhaustive) for name in names
    ]


def matrix(rows: int = 96, columns: int = 512, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[:, ::37] *= 12
    return weight * 0.02


def weight_of(parts: Tensors, said: object = None, *, layers: dict | None = None) -> Weight:
    """The weight of a file with one layer, whose stored tensors are by suffix."""
    tensors = {f"{LAYER}.weight{suffix}": part.contiguous() for suffix, part in parts.items()}
    if said is not None:
        tensors[f"{LAYER}.comfy_quant"] = said if torch.is_tensor(said) else marker(said)
    save_file(tensors, FILE, None if layers is None else metadata(layers))
    header = read_whole_header(FILE)
    pieces = {name: Piece(FILE, info) for name, info in header.tensors.items()}
    known = read_layers(header.metadata) if METADATA in header.metadata else None
    (weight,) = group_weights(pieces, markers=known).values()
    return weight


def values_of(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    stored = Reader().read_checked(weight)
    return codecs.dequantize(
        stored, weight.scheme, shape=weight.shape, dtype=dtype, rotation=weight.rotation
    )


def read_all(part: Component) -> Tensors:
    return read_tensors(part, list(part.weights), dtype=torch.float32, device="cpu")


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


# --- one weight


def test_every_pack_of_comfy_kitchen_is_read_as_it_reads_it():
    for kind in ("int8 tensor", "int8 rows", "int8 convrot", "w4a8", "w6a8", "nvfp4", "mxfp8"):
        packed = pack(matrix(), kind)
        weight = weight_of(packed.stored, packed.described)
        assert weight.shape == (96, 512)
        for dtype in FLOATS:
            assert torch.equal(values_of(weight, dtype), packed.read(dtype)), (kind, dtype)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_every_group_of_rotated_columns_is_read(group):
    for kind in ("int8 convrot", "w4a8", "w6a8"):
        packed = pack(matrix(16), kind, convrot_groupsize=group)
        weight = weight_of(packed.stored, packed.described)
        assert weight.rotation == group
        if group == 4:  # of so small products the last bits depend on how many rows there are
            torch.testing.assert_close(values_of(weight), packed.read(), rtol=0, atol=1e-7)
        else:
            assert torch.equal(values_of(weight), packed.read()), kind


@pytest.mark.parametrize("group", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e4m3fn])
def test_every_group_of_values_with_a_scale_is_read(group, scale_dtype):
    options = {"group_size": group, "scale_dtype": scale_dtype}
    packs = [pack(matrix(16), "w4a8", codebook=False, **options)]
    packs += [pack(matrix(16), "w4a8", codebook_tensor=TABLES[0], **options)]
    if group >= 16:
        packs.append(pack(matrix(16), "w6a8", **options))
    for packed in packs:
        weight = weight_of(packed.stored, packed.described)
        for dtype in FLOATS:
            assert torch.equal(values_of(weight, dtype), packed.read(dtype))


def test_a_table_may_have_any_order():
    packed = pack(matrix(16), "w4a8")
    packed.params = replace(packed.params, codebook=TABLES[1])
    weight = weight_of(packed.stored, packed.described)
    assert torch.equal(values_of(weight), packed.read())


def as_bytes(*suffixes: str) -> Callable[[Tensors], Tensors]:
    return lambda parts: {suffix: parts[suffix].view(torch.uint8) for suffix in suffixes}


OTHERWISE = {  # how else converters store the same
    "scales (N,)": ("int8 convrot", lambda parts: {"_scale": parts["_scale"].flatten()}),
    "a scale (1,)": ("int8 tensor", lambda parts: {"_scale": parts["_scale"].view(1)}),
    "a scale (1, 1)": ("int8 tensor", lambda parts: {"_scale": parts["_scale"].view(1, 1)}),
    "scales of groups as bytes": ("w4a8", as_bytes("_s_rel")),
    "channels (N, 1)": ("w6a8", lambda parts: {"_s_channel": parts["_s_channel"][:, None]}),
    "nvfp4's scales as bytes": ("nvfp4", as_bytes("_scale")),
    "nvfp4's scales flat": ("nvfp4", lambda parts: {"_scale": parts["_scale"].flatten()}),
    "one scale in a row": ("nvfp4", lambda parts: {"_scale_2": parts["_scale_2"].view(1)}),
    "mxfp8's scales as bytes": ("mxfp8", as_bytes("_scale")),
}


@pytest.mark.parametrize(("kind", "change"), OTHERWISE.values(), ids=OTHERWISE)
def test_the_same_stored_in_another_way_is_the_same(kind, change):
    packed = pack(matrix(), kind)
    weight = weight_of(packed.stored | change(packed.stored), packed.described)
    assert torch.equal(values_of(weight), packed.read())


def test_a_marker_may_be_in_the_metadata_alone_or_in_both():
    packed = pack(matrix(16), "int8 convrot")
    said = packed.described
    for options in ({"layers": {LAYER: said}}, {"said": said, "layers": {LAYER: said}}):
        assert torch.equal(values_of(weight_of(packed.stored, **options)), packed.read())


def test_defaults_are_those_of_comfyui():
    def read(**said: object) -> Marker:
        return read_marker(LAYER, said, file=FILE)

    assert read(format=INT8) == read(format=INT8, convrot=False) == Marker(INT8)
    assert read(format=INT8, convrot_groupsize=64) == Marker(INT8)  # without convrot
    assert read(format=INT8, convrot=True) == Marker(INT8, 256)
    assert read(format=INT8, convrot=True, convrot_groupsize=16) == Marker(INT8, 16)
    assert read(format=GROUPED) == read(format=GROUPED, convrot=True) == Marker(GROUPED, 256, 16)
    nested = {"convrot": True, "convrot_groupsize": 64}
    assert read(format=INT8, params=nested) == Marker(INT8, 64)
    assert read(format=INT8, params=nested, convrot_groupsize=16) == Marker(INT8, 16)
    assert read_marker(LAYER, "nvfp4", file=FILE) == Marker("nvfp4")
    # What convert_to_quant and ComfyUI say beside it.
    described = {"orig_dtype": "torch.bfloat16", "orig_shape": [4, 4], "per_row": True}
    described |= {"full_precision_matrix_mult": True, "made_by": "x", "future": False}
    assert read(format=INT8, **described) == Marker(INT8)


ROWS = ((50, 130), (300, 400))


@pytest.mark.parametrize("kind", ["int8 tensor", "int8 convrot", "w4a8", "w6a8", "nvfp4", "mxfp8"])
def test_rows_are_cut_anywhere(kind):
    packed = pack(matrix(416, 64), kind)
    weight = weight_of(packed.stored, packed.described)
    expected = packed.read()
    # In a product of few rows the last bits may be others.
    atol = 1e-7 if weight.rotation else 0
    for rows in (ROWS, ((1, 2),), ((0, 128),), ((128, 416), (0, 128))):
        cut = weight.take_rows("cut", rows)
        wanted = torch.cat([expected[start:stop] for start, stop in rows])
        torch.testing.assert_close(values_of(cut), wanted, rtol=0, atol=atol)


def test_a_weight_of_bfl_is_read_as_diffusers_reads_it():
    codes, scale, overall = bfl.quantize_nvfp4(matrix())
    weight = weight_of({"": codes, "_scale": scale, "_scale_2": overall})
    expected = bfl.dequantize_nvfp4(codes, scale, overall)
    for dtype in FLOATS:
        assert torch.equal(values_of(weight, dtype), expected.to(dtype))
    assert torch.equal(values_of(weight.take_rows("cut", ((3, 20),))), expected[3:20])


# --- what is refused

KNOWN = "int8_tensorwise"
REFUSED = {  # the marker, and what is said of it
    "svdquant": ({"format": "svdquant_w4a4"}, "svdquant_w4a4"),
    "w4a4": ({"format": "convrot_w4a4", "convrot_groupsize": 256}, "convrot_w4a4"),
    "awq": ({"format": "awq_w4a16", "group_size": 64}, "awq_w4a16"),
    "a future name": ({"format": "int5_tensorwise"}, "int5_tensorwise"),
    "float8_e5m2": ({"format": "float8_e5m2"}, "float8_e5m2"),
    "another format": ({"format": "float8_e4m3fn"}, "marked float8_e4m3fn"),
    "no format": ({"convrot": True}, "float8_e4m3fn with convrot"),
    "a number for a format": ({"format": 8}, "is 8"),
    "None for a format": ({"format": None}, "is None"),
    "a list": ([{"format": KNOWN}], "for a marker"),
    "a number": (8, "has 8 for a marker"),
    "null": (None, "for a marker"),
    "convrot is a text": ({"format": KNOWN, "convrot": "yes"}, "convrot is 'yes'"),
    "convrot is 1": ({"format": KNOWN, "convrot": 1}, "convrot is 1"),
    **{
        f"groups of {size}": (
            {"format": KNOWN, "convrot": True, "convrot_groupsize": size},
            "convrot_groupsize is",
        )
        for size in (0, -4, 1, 2, 8, 1_000_000_000, 4.0, math.nan, "256", None, True, [4])
    },
    "groups that do not fill": (
        {"format": KNOWN, "convrot": True, "convrot_groupsize": 1024},
        "512 columns and is marked as rotated by 1024",
    ),
    "huge groups": (
        {"format": KNOWN, "convrot": True, "convrot_groupsize": 4**30},
        "convrot_groupsize is 1152921504606846976",
    ),
    "QuIP": ({"format": KNOWN, "hadamard_quip": True}, "hadamard_quip True"),
    "another rotation": ({"format": KNOWN, "hadamard_size": 128}, "hadamard_size 128"),
    "nested": ({"format": KNOWN, "params": {"smooth": True}}, "smooth True"),
    "experts": ({"format": KNOWN, "num_experts": 8}, "num_experts 8"),
    "an object": ({"format": KNOWN, "rotation": {"size": 64}}, "rotation {'size': 64}"),
    "pairs": ({"format": KNOWN, "params": [["convrot", True]]}, "[['convrot', True]] for params"),
}


@pytest.mark.parametrize(("said", "words"), REFUSED.values(), ids=REFUSED)
def test_a_marker_that_is_not_known_is_refused_by_its_name(said, words):
    packed = pack(matrix(16), "int8 rows")
    with pytest.raises(CheckpointError, match="weights packed in a way") as caught:
        weight_of(packed.stored, said if said is not None else torch.tensor(list(b"null")).byte())
    assert words in str(caught.value) and LAYER in caught.value.why


TWICE = b'{"format":"int8_tensorwise","convrot":true,"convrot":false}'


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe{}", b'{"format":"x"' * 9000, b"[" * 4000, TWICE]
)
def test_a_marker_that_is_no_json_is_refused(data):
    packed = pack(matrix(16), "int8 rows")
    with pytest.raises(CheckpointError, match="the marker of layer is no JSON"):
        weight_of(packed.stored, torch.tensor(list(data)).byte())


def test_markers_that_contradict_each_other_are_refused():
    packed = pack(matrix(16), "int8 convrot")
    with pytest.raises(CheckpointError, match=r"rotated by 256, and int8_tensorwise$"):
        weight_of(packed.stored, packed.described, layers={LAYER: {"format": INT8}})


def test_integers_without_a_marker_are_refused_where_others_have_one():
    packed = pack(matrix(16), "int8 convrot")
    for layers in ({"other": packed.described}, {}):
        with pytest.raises(CheckpointError, match="has no marker, as others have"):
            weight_of(packed.stored, layers=layers)
    assert weight_of(packed.stored).rotation == 0  # as flux wrote it before
    save_file(packed.stored | {"x": torch.ones(1)}, FILE, {METADATA: "x" * (1 << 21)})
    assert read_whole_header(FILE).metadata == {METADATA: ""}


def put(**parts: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda _: parts


def without(suffix: str) -> Callable[[Tensors], Tensors]:
    return lambda parts: {suffix: None}


GROUPS = {"format": GROUPED, "convrot_groupsize": 64}
MISFITS = {  # what is stored, what is changed, what it is marked as, and what is said of it
    "a correction": (
        "w4a8", put(_correction=torch.ones(32, 16)), None, "also has weight_correction"
    ),
    "levels of 6 bits": ("w6a8", put(_codebook=TABLES[0]), None, "also has weight_codebook"),
    "no scales of groups": ("w4a8", without("_s_rel"), None, "has no weight_s_rel"),
    "no channels": ("w4a8", without("_s_channel"), None, "has no weight_s_channel"),
    "15 levels": ("w4a8", put(_codebook=torch.ones(15)), None, "impossible scales"),
    "whole levels": ("w4a8", put(_codebook=torch.ones(16).int()), None, "impossible scales"),
    "another group": ("w4a8", put(), GROUPS | {"group_size": 32}, "in groups of 32"),
    "a huge group": ("w4a8", put(), GROUPS | {"group_size": 10**9}, "group_size is 1000000000"),
    **{
        f"groups of {size}": ("w4a8", put(), GROUPS | {"group_size": size}, "group_size is")
        for size in (0, -16, 16.0, math.nan, "16", None, True)
    },
    "groups of 2": (
        "w4a8", lambda parts: {"_s_rel": parts["_s_rel"].repeat(1, 8)}, GROUPS | {"group_size": 2},
        "in groups of 2",
    ),
    "6 bits in groups of 8": (
        "w6a8", lambda parts: {"_s_rel": parts["_s_rel"].repeat(1, 2)}, GROUPS | {"group_size": 8},
        "in groups of 8",
    ),
    "not rotated": ("w4a8", put(), GROUPS | {"convrot": False}, "without convrot"),
    "int8 marked as w4a8": ("int8 convrot", put(), GROUPS, "has no weight_s_channel"),
    "w4a8 marked as int8": ("w4a8", put(), {"format": INT8}, "also has weight_codebook"),
    "nvfp4 marked as int8": ("nvfp4", put(), {"format": INT8}, "weight_scale_2"),
    "int8 marked as mxfp8": ("int8 rows", put(), {"format": "mxfp8"}, "is I8 [16, 512]"),
    "int8 marked as nvfp4": ("int8 rows", put(), {"format": "nvfp4"}, "has no weight_scale_2"),
    "mxfp8 marked as fp8": ("mxfp8", put(), {"format": "float8_e4m3fn"}, "impossible scales"),
    "nvfp4 without its scale": ("nvfp4", without("_scale_2"), None, "has no weight_scale_2"),
    "nvfp4 with plain scales": (
        "nvfp4", put(_scale=torch.ones(16, 32).byte()), None, "impossible scales"
    ),
    "nvfp4 in I8": ("nvfp4", lambda parts: {"": parts[""].view(torch.int8)}, None, "is I8 [16"),
    "mxfp8 of E5M2": (
        "mxfp8", lambda parts: {"": parts[""].view(torch.float8_e5m2)}, None, "is F8_E5M2 [32"
    ),
    "nvfp4 with convrot": ("nvfp4", put(), {"format": "nvfp4", "convrot": True}, "with convrot"),
    "int8 without scales": ("int8 rows", without("_scale"), None, "has no scale beside it"),
    "int8 in bfloat16": (
        "int8 rows", lambda parts: {"": parts[""].bfloat16(), "_scale": None}, None, "is BF16 [16"
    ),
    "7 scales": ("int8 convrot", put(_scale=torch.ones(7)), None, "impossible scales"),
    "scales in a row": ("int8 rows", put(_scale=torch.ones(1, 16)), None, "impossible scales"),
    "channels in a row": ("w6a8", put(_s_channel=torch.ones(1, 16)), None, "impossible scales"),
    "codes without levels": ("w4a8", without("_s_channel"), None, "weight_s_channel"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "said", "words"), MISFITS.values(), ids=MISFITS)
def test_tensors_that_do_not_fit_their_marker_are_refused(kind, change, said, words):
    packed = pack(matrix(16), kind)
    parts = packed.stored | change(packed.stored)
    with pytest.raises(CheckpointError) as caught:
        weight_of({k: v for k, v in parts.items() if v is not None}, said or packed.described)
    assert words in str(caught.value) and LAYER in caught.value.why


def test_a_pack_without_a_marker_is_refused_and_so_are_smoothed_activations():
    packed = pack(matrix(16), "w4a8")
    with pytest.raises(CheckpointError, match="weight_s_rel and no marker"):
        weight_of(packed.stored)
    tensors = {"layer.weight": torch.ones(4, 4), "layer.pre_quant_scale": torch.ones(4)}
    save_file(tensors, FILE)
    pieces = {name: Piece(FILE, info) for name, info in read_whole_header(FILE).tensors.items()}
    with pytest.raises(CheckpointError, match="pre_quant_scale"):
        group_weights(pieces)
    save_file({"layer.comfy_quant": marker({"format": INT8})}, FILE)
    pieces = {name: Piece(FILE, info) for name, info in read_whole_header(FILE).tensors.items()}
    with pytest.raises(CheckpointError, match=r"layer\.weight has only its marker"):
        group_weights(pieces)


def damage(suffix: str, value: float) -> Callable[[Tensors], Tensors]:
    """Change the last value of a stored tensor; of 8-bit ones all bits but the sign are set."""

    def change(parts: Tensors) -> Tensors:
        part = parts[suffix].clone()
        if part.element_size() == 1:
            part.view(torch.uint8)[-1:] = 255
        else:
            part.view(-1)[-1] = value
        return {suffix: part}

    return change


DAMAGED = {
    **{
        f"{value} in {kind}{suffix}": (kind, damage(suffix, value), words)
        for kind, suffix in (
            ("int8 rows", "_scale"),
            ("w4a8", "_s_channel"),
            ("w6a8", "_s_channel"),
            ("nvfp4", "_scale_2"),
        )
        for value, words in (
            (math.nan, "NaN or Inf"),
            (math.inf, "NaN or Inf"),
            (0.0, "0 or negative"),
            (-1.0, "0 or negative"),
        )
    },
    "NaN in s_rel": ("w4a8", damage("_s_rel", math.nan), "NaN in layer"),
    "NaN in the levels": ("w4a8", damage("_codebook", math.nan), "NaN or Inf in layer.*codebook"),
    "Inf in the levels": ("w4a8", damage("_codebook", math.inf), "NaN or Inf in layer.*codebook"),
    "NaN in nvfp4's scales": (
        "nvfp4", lambda parts: {"_scale": torch.full((128, 32), 255).byte()}, "NaN in layer"
    ),
    "NaN in mxfp8's scales": (
        "mxfp8", lambda parts: {"_scale": torch.full((128, 16), 255).byte()}, "NaN in layer"
    ),
    "NaN in mxfp8's codes": ("mxfp8", damage("", math.nan), "NaN in layer"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "words"), DAMAGED.values(), ids=DAMAGED)
def test_values_that_cannot_be_are_refused_when_they_are_read(kind, change, words):
    packed = pack(matrix(16), kind)
    weight = weight_of(packed.stored | change(packed.stored), packed.described)
    with pytest.raises(CheckpointError, match=words):
        values_of(weight)


# --- whole files

DRAWN = {  # dialect: the precision that is planned
    "comfy int8 rows": "int8",
    "comfy int8 convrot": "int8",
    "comfy w4a8": "w4a8",
    "comfy w6a8": "w6a8",
    "comfy nvfp4": "nvfp4",
    "comfy mxfp8": "mxfp8",
    "bfl nvfp4": "nvfp4",
}


def apart(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


@pytest.fixture(scope="module")
def picture(tiny_folder: Path) -> np.ndarray:
    return draw(engine_of(inspect(tiny_folder)), tiny())[1]


@pytest.mark.parametrize(
    "dialect", usually(DRAWN, "comfy int8 convrot", "comfy w4a8", "comfy nvfp4")
)
def test_a_file_draws_nearly_what_the_model_draws(dialect, exported, tiny_folder, picture):
    engine = engine_of(assemble_checkpoint(exported(dialect)[0], lambda lacking: tiny_folder))
    found = draw(engine, tiny())[1]
    assert engine.plan.precision == DRAWN[dialect]
    # Another prompt's picture is more than 20 apart.
    assert 0 < apart(found, picture) < (1.5 if "4" in DRAWN[dialect] else 0.5)


@pytest.fixture(scope="module")
def diffusers_tensors(exported) -> Tensors:
    return exported("bfl bf16")[1]


def check_layers(part: Component, expected: Tensors) -> int:
    """How many quantized layers the loaded part has; all have the values that are expected."""
    module = load_component(part, dtype=torch.float32, device="cpu").module
    layers = dict(module.named_modules())
    packed = {name: each for name, each in layers.items() if isinstance(each, QuantizedLinear)}
    for name, layer in packed.items():
        rows = torch.cat([expected[f"{each}.weight"] for each in named(name)])
        assert torch.equal(layer.dequantize(torch.float32), rows), name
        some = slice(len(rows) // 2 - 1, len(rows) - 1)
        assert torch.equal(layer.dequantize_rows(some, torch.float32), rows[some]), name
    return len(packed)


# The packed layers of the bundled transformer, where q, k and v are one.
FUSED = 2 * 10 + 5 * 3 + 10


def other_tables(name: str, parts: Tensors, said: dict) -> None:
    """Every q has other levels than its k, which are in another order."""
    if "to_q" in name:
        parts["_codebook"] = parts["_codebook"].flip(0)
        parts[""] = ~parts[""]  # code 15 - k stands for what k stood for


def test_parts_of_a_layer_may_have_other_levels(diffusers_tensors):
    write = comfy.comfy("w4a8", change=other_tables)
    expected = write(diffusers_tensors, FILE)
    part = inspect_transformer(FILE)
    assert same(read_all(part), expected)
    assert check_layers(part, expected) == FUSED


OTHER_QUERIES = {
    "rotation": ("int8 convrot", {"convrot_groupsize": 16}),
    "group": ("w4a8", {"group_size": 32}),
    "dtype of scales": ("w4a8", {"scale_dtype": torch.float32}),
}


@pytest.mark.parametrize("other", usually(OTHER_QUERIES, "rotation"))
def test_parts_that_are_packed_in_another_way_stay_layers_of_their_own(other, diffusers_tensors):
    kind, options = OTHER_QUERIES[other]
    write = comfy.comfy(kind, choose=lambda name: options if "to_q" in name else {})
    expected = write(diffusers_tensors, FILE)
    part = inspect_transformer(FILE)
    assert same(read_all(part), expected)
    # Of 2 double blocks q, k and v of the picture, of 5 single ones q, k, v and the MLP.
    assert check_layers(part, expected) == FUSED + 2 * (2 + 2) + 5 * 3


@pytest.mark.parametrize(
    "dialect",
    usually(["comfy int8 convrot", "comfy w6a8", "comfy nvfp4"], "comfy int8 convrot"),
)
def test_a_prefix_may_be_in_the_names_or_not(dialect, exported, tiny_folder):
    """In the file's names, in those of the metadata, in both, or in none."""
    path, expected = exported(dialect)
    tensors, said = load_file(path), read_layers(read_whole_header(path).metadata)
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    bare = {name: tensor for name, tensor in bare.items() if not name.endswith("comfy_quant")}
    layers = {name.removeprefix(PREFIX): each for name, each in said.items()}
    for start in ("", PREFIX, "diffusion_model."):
        for other in ("", PREFIX):
            save_file(
                {start + name: tensor for name, tensor in bare.items()},
                FILE,
                metadata({other + name: each for name, each in layers.items()}),
            )
            part = inspect_transformer(FILE)
            assert part.dialect == exports.DIALECTS[dialect][2]
            weights = ["transformer_blocks.0.attn.to_k.weight", "proj_out.weight"]
            found = read_tensors(part, weights, dtype=torch.float32, device="cpu")
            assert same(found, {name: expected[name] for name in weights})


T5_QUERY = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"


def change_prefixes(tensors: Tensors, *, of_weights: str, of_markers: str) -> Tensors:
    changed = {}
    for name, tensor in tensors.items():
        prefix = of_markers if name.endswith("comfy_quant") else of_weights
        changed[prefix + name.removeprefix(PREFIX)] = tensor
    return changed


def test_markers_apart_from_their_weights_are_never_passed_over(exported):
    tensors = load_file(exported("comfy int8 convrot")[0])
    for prefixes in (("", PREFIX), (PREFIX, ""), ("", "vae.")):
        save_file(change_prefixes(tensors, of_weights=prefixes[0], of_markers=prefixes[1]), FILE)
        with pytest.raises(CheckpointError, match="comfy_quant has no weight with that prefix"):
            inspect_file(FILE)
    packed = pack(matrix(16), "int8 convrot")
    unmarked = {name: tensor for name, tensor in tensors.items() if "comfy_quant" not in name}
    query = {f"{T5_QUERY}.weight{suffix}": part for suffix, part in packed.stored.items()}
    save_file(unmarked | query | {f"{T5_QUERY}.comfy_quant": marker(packed.described)}, FILE)
    with pytest.raises(CheckpointError, match="has no marker, as others have"):
        inspect_file(FILE)


def test_what_stands_under_two_names_is_refused(exported):
    tensors = load_file(exported("comfy int8 convrot")[0])
    layer = f"{PREFIX}double_blocks.0.img_attn.proj"
    doubled = {
        f"{layer.removeprefix('model.')}.comfy_quant": marker({"format": INT8}),
        f"{layer.removeprefix('model.')}.weight": torch.ones(128, 128),
        f"{layer}.scale_weight": torch.ones(128, 1),
    }
    for name, tensor in doubled.items():
        save_file(tensors | {name: tensor}, FILE)
        with pytest.raises(CheckpointError, match="a tensor under two names"):
            inspect_file(FILE)
    bare = {name: tensor for name, tensor in tensors.items() if "comfy_quant" not in name}
    said = {layer: {"format": INT8}, layer.removeprefix(PREFIX): {"format": INT8, "convrot": True}}
    save_file(bare, FILE, metadata(said))
    with pytest.raises(CheckpointError, match="is described twice, not alike"):
        inspect_file(FILE)


T5_KINDS = {
    "int8 rows": ("ComfyUI int8", "int8"),
    "int8 convrot": ("ComfyUI int8 ConvRot", "int8"),
    "nvfp4": ("nvfp4 (ComfyUI)", "nvfp4"),
}


@pytest.mark.parametrize("kind", usually(T5_KINDS, "int8 convrot"))
def test_a_t5_is_read_alone_and_beside_the_others(kind, tiny_folder, picture):
    """Its embedding is packed, too, as some converters do."""
    tensors = exports.part_of(tiny_folder, "text_encoder_2")

    def is_packed(name: str, tensor: torch.Tensor) -> bool:
        return comfy.is_packed(name, tensor) and "relative" not in name

    expected = comfy.comfy(kind, packs=is_packed)(tensors, Path("t5.safetensors"))
    part = inspect_file(Path("t5.safetensors"))["text_encoder_2"]
    assert (part.dialect, part.precision) == T5_KINDS[kind] and same(read_all(part), expected)
    made = assemble_checkpoint(
        tiny_folder, lambda _: tiny_folder, text_encoders=[Path("t5.safetensors")]
    )
    found = draw(engine_of(made), tiny())[1]
    assert 0 < apart(found, picture) < 2
    whole = Path("whole.safetensors")
    exports.all_in_one(
        tiny_folder, exports.bfl_tensors(tiny_folder, Path("bfl.safetensors")), whole
    )
    kept = {name: t for name, t in load_file(whole).items() if "t5xxl.transformer." not in name}
    stored = load_file("t5.safetensors")
    kept |= {f"text_encoders.t5xxl.transformer.{name}": t for name, t in stored.items()}
    save_file(kept, whole)
    found = inspect_file(whole)
    assert list(found) == list(COMPONENTS) and same(read_all(found["text_encoder_2"]), expected)
    assert found["text_encoder_2"].dialect == f"all-in-one, {T5_KINDS[kind][0]}"
    assert found["transformer"].precision == ""


@pytest.mark.parametrize("dialect", ["comfy w4a8", "comfy mxfp8", "bfl nvfp4"])
def test_inspect_says_the_format(dialect, exported, capsys):
    result = call(capsys, "inspect", str(exported(dialect)[0]))
    found = json.loads(result.stdout)
    assert (result.returncode, found["problems"]) == (0, [])
    assert found["dialect"] == exports.DIALECTS[dialect][2]
    assert (found["precision"], found["loads"]) == (DRAWN[dialect], "154 of 154")


def test_a_folder_of_diffusers_names_is_read_by_its_markers(diffusers_tensors, tiny_folder):
    import shutil

    folder = Path(shutil.copytree(tiny_folder, "folder"))
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for marks in (("tensors",), ("metadata",)):
        expected = comfy.comfy("int8 convrot", marks=marks)(diffusers_tensors, path)
        part = inspect(folder).components["transformer"]
        assert part.precision == "int8" and same(read_all(part), expected)
    # Under its own name it is rotated, whatever it says.
    own = path.with_name(PACKED_FILES["int8"])
    unmarked = {name: each for name, each in load_file(path).items() if "comfy_quant" not in name}
    save_file(unmarked, own)
    path.rename("marked.safetensors")
    with pytest.raises(CheckpointError, match="has no marker, as others have"):
        inspect(folder)
    with pytest.raises(CheckpointError, match="has no marker, as others have"):
        inspect_file(own)
    own.unlink()
    Path("marked.safetensors").rename(path)
    # Originals may be marked, too.
    path.rename(path.with_name(KEEP_FILE))
    shutil.copy(tiny_folder / "transformer" / path.name, path)
    assert same(read_all(inspect(folder).components["transformer"]), expected)
