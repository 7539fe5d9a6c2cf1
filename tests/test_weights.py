"""Quantized weights in files: whole ones are read, those not whole or not honest are refused."""

import functools
import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quant import codecs
from quant.codecs import Reader, take_rows
from quant.errors import CheckpointError
from quant.header import read_header
from quant.spec import BAKEABLE, MARKER, STATE, name_stored
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight, group_weights

SHAPE = (32, 128)
NAME = "block.weight"


@functools.cache
def _pieces(scheme: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    where = Piece(Path("source"), TensorInfo(NAME, "BF16", SHAPE))
    return codecs.quantize(
        torch.randn(SHAPE, dtype=torch.bfloat16), scheme, name=NAME, where=where
    ).stored


def pack(scheme: str) -> dict[str, torch.Tensor]:
    return {name_stored(NAME, suffix): t.clone() for suffix, t in _pieces(scheme).items()}


def read(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Weight]:
    save_file(tensors, path)
    return group_weights({name: Piece(path, info) for name, info in read_header(path).items()})


def refusal(tensors: dict[str, torch.Tensor], path: Path) -> str:
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read(tensors, path)
    text = str(caught.value)
    assert time.perf_counter() - started < 1
    assert (
        str(path) in text
        and "block" in text
        and "\n" not in text
        and len(text) < 400 + len(str(path))
    )
    return text


@pytest.mark.parametrize("scheme", BAKEABLE)
def test_a_whole_pack_is_one_weight_with_the_values_that_were_packed(scheme, tmp_path):
    tensors = pack(scheme)
    weights = read(tensors | {"block.bias": torch.ones(32)}, tmp_path / "x.safetensors")
    assert set(weights) == {NAME, "block.bias"}
    weight = weights[NAME]
    assert (weight.scheme, weight.shape, weight.numel, weight.info.dtype) == (
        scheme,
        SHAPE,
        32 * 128,
        "BF16",
    )
    tensors.pop(f"block{MARKER}", None)  # is read with the header
    assert weight.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (weights["block.bias"].scheme, weights["block.bias"].info.dtype) == ("", "F32")
    reader = Reader()
    stored = reader.read(weight)
    assert {NAME + suffix for suffix in stored} == set(tensors)
    assert all(
        torch.equal(
            tensor.view(-1).view(torch.uint8), tensors[NAME + suffix].view(-1).view(torch.uint8)
        )
        for suffix, tensor in stored.items()
    )


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda t: t.pop(f"{NAME}.absmax"), "has no absmax"),
        (lambda t: t.pop(f"{NAME}.nested_absmax"), "has no nested_absmax"),
        (lambda t: t.pop(f"{NAME}.quant_map"), "has no quant_map"),
        (lambda t: t.pop(NAME + STATE), "has no quant_state"),
        (lambda t: t.pop(NAME), "has only its scales"),
        (lambda t: t.update({f"{NAME}_scale": torch.ones(32)}), "also has scale"),
        (
            lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__fp4": t.pop(NAME + STATE)}),
            "quant_state",
        ),
        (lambda t: [t.pop(name) for name in list(t) if name != NAME], "no scale beside it"),
        (lambda t: t.update({NAME: t[NAME][:-1]}), f"{NAME} is U8 [2047, 1]"),
        (lambda t: t.update({NAME: t[NAME].float()}), f"{NAME} is F32"),
        (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}), "absmax is U8 [63]"),
        (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"].float()}), "absmax is F32"),
        (lambda t: t.update({f"{NAME}.nested_absmax": torch.ones(2)}), "nested_absmax is F32 [2]"),
        (
            lambda t: t.update({f"{NAME}.nested_quant_map": torch.ones(255)}),
            "nested_quant_map is F32 [255]",
        ),
        (lambda t: t.update({f"{NAME}.quant_map": torch.ones(16).half()}), "quant_map is F16"),
    ],
)
def test_an_nf4_pack_that_is_not_whole_is_refused(change, word, tmp_path):
    tensors = pack("nf4")
    change(tensors)
    assert word in refusal(tensors, tmp_path / "x.safetensors")


STATES = {
    "quant_type": ["fp4", None, "nf4 "],
    "blocksize": [32, 128, -64, "64", None, 10**30],
    "nested_blocksize": [64, 0],
    "nested_dtype": ["float64", "bfloat16", None],
    "dtype": ["int8", "float64", "__import__", ["bfloat16"], {}, None, 3],
    "shape": [
        [32],
        [32, 128, 1],
        [-32, -128],
        [0, 128],
        [2**40, 2**40],
        [32.0, 128.0],
        [True, 4096],
        "ab",
        None,
        32,
        [128, 64],
        [31, 128],
        [32, 130],
        [2**23, 2**23],
    ],
    "nested_offset": [float("nan"), float("inf"), 1e300, "0.1", None, True, [0.1], 10**400],
}


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in STATES.items() for value in values]
)
def test_a_hostile_value_in_the_quant_state_is_refused(key, value, tmp_path):
    tensors = pack("nf4")
    state = json.loads(bytes(tensors[NAME + STATE].tolist()))
    assert read(tensors, tmp_path / "good.safetensors")[NAME].shape == tuple(state["shape"])
    for changed in (state | {key: value}, {k: v for k, v in state.items() if k != key}):
        tensors[NAME + STATE] = torch.tensor(list(json.dumps(changed).encode()), dtype=torch.uint8)
        refusal(tensors, tmp_path / "x.safetensors")


BLOBS = [
    b"",
    b"\xff" * 64,
    b"{nope",
    b"[]",
    b"3",
    b'"text"',
    b"null",
    b"[" * 4000,
    b"{}",
    b" " * 5000,
    b'{"a":' * 800,
]


@pytest.mark.parametrize("blob", BLOBS, ids=[blob[:8].decode("latin-1") for blob in BLOBS])
def test_a_quant_state_that_is_no_state_is_refused(blob, tmp_path):
    tensors = pack("nf4") | {NAME + STATE: torch.tensor(list(blob), dtype=torch.uint8)}
    assert "quant state" in refusal(tensors, tmp_path / "x.safetensors")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_of_the_quant_state_is_a_crash(data, tmp_path):
    tensors = pack("nf4")
    changes = st.lists(st.tuples(st.integers(0, 180), st.integers(0, 255)), min_size=1, max_size=3)
    for place, value in data.draw(changes):
        tensors[NAME + STATE][place] = value
    try:
        weights = read(tensors, tmp_path / "x.safetensors")
    except CheckpointError as error:
        assert "quant state" in str(error) or "4-bit" in str(error)
    else:
        assert weights[NAME].shape == SHAPE


@pytest.mark.parametrize("scheme, dtype", [("fp8", "F8_E4M3"), ("int8", "I8")])
@pytest.mark.parametrize(
    "scale, word",
    [
        (None, "has no scale beside it"),
        (torch.ones(31), "impossible scales"),
        (torch.ones(33), "impossible scales"),
        (torch.ones(0), "impossible scales"),
        (torch.ones(32, 128), "impossible scales"),
        (torch.ones(32, dtype=torch.uint8), "impossible scales"),
        (torch.ones(32, dtype=torch.int64), "impossible scales"),
    ],
)
def test_rows_without_their_scales_are_refused(scheme, dtype, scale, word, tmp_path):
    tensors = {NAME: pack(scheme)[NAME]} | ({} if scale is None else {f"{NAME}_scale": scale})
    text = refusal(tensors, tmp_path / "x.safetensors")
    assert word in text and (scale is not None or dtype in text)


@pytest.mark.parametrize(
    "names",
    [
        ["block.scale_weight"],
        ["scaled_fp8", "block.scale_weight"],
        ["block.scale"],
        ["block.weight_scale_inv"],
        [],
    ],
)
def test_fp8_scaled_in_another_way_is_never_read_as_unscaled(names, tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensors = {NAME: torch.ones(SHAPE).to(dtype)} | {name: torch.ones(1) for name in names}
        assert "quantized weights without scales" in refusal(tensors, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "scheme, scale",
    [
        ("fp8", torch.tensor(0.5)),
        ("fp8", torch.ones(1)),
        ("int8", torch.ones(32, 1)),
        ("fp8", torch.ones(32).half()),
    ],
)
def test_one_scale_for_all_rows_and_scales_in_a_column_are_read(scheme, scale, tmp_path):
    tensors = {NAME: pack(scheme)[NAME], f"{NAME}_scale": scale}
    weight = read(tensors, tmp_path / "x.safetensors")[NAME]
    assert (weight.scheme, weight.shape) == (scheme, SHAPE)
    reader = Reader()
    decoded = codecs.dequantize(reader.read(weight), scheme, SHAPE, torch.float32)
    assert torch.equal(decoded, tensors[NAME].float() * scale.float().view(-1, 1))


@pytest.mark.parametrize("kind, scheme", [("qfloat8", "fp8"), ("qint8", "int8")])
def test_what_optimum_quanto_saves_is_read(kind, scheme, tmp_path):
    from optimum import quanto

    model = torch.nn.ModuleDict({"block": torch.nn.Linear(128, 32), "norm": torch.nn.LayerNorm(32)})
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    weights = read(dict(model.state_dict()), tmp_path / "x.safetensors")
    assert set(weights) == {NAME, "block.bias", "norm.weight", "norm.bias"}
    assert (weights[NAME].scheme, weights[NAME].shape) == (scheme, SHAPE)
    reader = Reader()
    decoded = codecs.dequantize(reader.read(weights[NAME]), scheme, SHAPE, torch.float32)
    assert torch.allclose(decoded, model["block"].weight.dequantize(), atol=1e-7)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted).map(tuple),
        min_size=1,
        max_size=3,
    )
)
def test_ranges_of_rows_are_read_in_their_order(tmp_path, ranges):
    values = torch.arange(36).view(12, 3)
    save_file({"a": values}, tmp_path / "x.safetensors")
    piece = Piece(
        tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors")["a"], tuple(ranges)
    )
    expected = torch.cat([values[start:stop] for start, stop in ranges])
    reader = Reader()
    assert torch.equal(take_rows(values, piece), expected)
    found = reader.read(Weight("a", (len(expected), 3), "", pieces={"": piece}))[""]
    assert torch.equal(found, expected)
    assert piece.shape == expected.shape and piece.nbytes == expected.nbytes
