"""What quantizing does to values: bounded, repeatable, finite or refused; the source stays."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import codecs
from quant.errors import CheckpointError
from quant.spec import BAKEABLE, SCHEMES, find_rotation
from quant.tensor_info import TensorInfo
from quant.weights import Piece

WHERE = Piece(Path("source.safetensors"), TensorInfo("a.weight", "BF16", (1, 1)))
LARGEST_ERROR = {
    "nf4": 0.093,
    "fp8": 0.037,
    "int8": 0.012,
    "w6a8": 0.024,
    "w4a8": 0.075,
}  # of normal weights
KINDS = st.sampled_from(["normal", "outlier", "zeros", "zero rows", "tiny", "huge", "constant"])


def weight_of(
    kind: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    torch.manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns)
    if kind == "outlier":
        weight[0, 0] = 1000
    if kind in ("zeros", "zero rows"):
        weight[:: 1 if kind == "zeros" else 2] = 0
    if kind == "constant":
        weight[:] = 0.25
    return (weight * {"tiny": 1e-4, "huge": 1e3}.get(kind, 1)).to(dtype)


def encode(weight: torch.Tensor, scheme: str, **options: bool) -> codecs.Quantized:
    return codecs.quantize(weight, scheme, name="a.weight", where=WHERE, **options)


def decode(stored: dict[str, torch.Tensor], scheme: str, shape: tuple[int, int]) -> torch.Tensor:
    rotation = find_rotation(shape[1])
    return codecs.dequantize(stored, scheme, shape, torch.float32, rotation=rotation)


@settings(max_examples=80)
@given(
    st.sampled_from(BAKEABLE),
    KINDS,
    st.integers(1, 70),
    st.integers(1, 200),
    st.booleans(),
    st.booleans(),
)
def test_the_error_is_the_one_that_readers_see_and_within_the_bound(
    scheme, kind, rows, columns, search, scalar
):
    columns *= SCHEMES[scheme].columns
    weight = weight_of(kind, rows, columns)
    encoded = encode(weight, scheme, search=search, scalar=scalar and scheme == "fp8")
    decoded = decode(encoded.stored, scheme, (rows, columns))
    norm = float(weight.float().norm()) or 1.0
    error = float((decoded - weight.float()).norm()) / norm
    assert error == pytest.approx(encoded.relative_error, rel=1e-3, abs=1e-9)
    assert decoded.isfinite().all() and not (kind == "zeros" and decoded.any())
    codecs.check_values("a.weight", encoded.stored, WHERE)


@pytest.mark.parametrize("scheme", BAKEABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_source_dtype_is_packed_and_left_as_it_was(scheme, dtype):
    weight = weight_of("normal", 96, 256, dtype)
    before = weight.clone()
    encoded = encode(weight, scheme)
    assert torch.equal(weight, before)
    assert encoded.relative_error < LARGEST_ERROR[scheme]
    decoded = decode(encoded.stored, scheme, (96, 256))
    assert float((decoded - before.float()).norm() / before.float().norm()) < LARGEST_ERROR[scheme]


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 129])
def test_rows_are_optimum_quantos_whatever_the_chunk(rows, monkeypatch):
    from optimum import quanto

    weight = weight_of("outlier", rows, 160)
    kind = quanto.qfloat8_e4m3fn
    expected = quanto.quantize_weight(
        weight.float(), kind, 0, quanto.AbsmaxOptimizer()(weight.float(), kind, axis=0)
    )
    for chunk in (1, 500, 1 << 18):
        monkeypatch.setattr(codecs, "CHUNK", chunk)
        stored = encode(weight, "fp8").stored
        assert torch.equal(stored[""].view(torch.int8), expected._data.view(torch.int8))
        assert torch.equal(stored["_scale"], expected._scale.flatten())


def test_one_scale_for_all_rows_is_that_of_the_largest_value():
    weight = weight_of("outlier", 64, 128)
    stored = encode(weight, "fp8", scalar=True).stored
    assert stored["_scale"].shape == () and float(stored["_scale"]) == pytest.approx(1000 / 448)
    assert float(stored[""].float().abs().max()) == 448


@pytest.mark.parametrize("scheme", BAKEABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (299, 63)])
def test_values_that_are_not_finite_are_refused_by_the_tensors_name(scheme, value, place):
    weight = weight_of("normal", 300, 64)
    weight[place] = value
    with pytest.raises(
        CheckpointError, match=r"not finite \(source.safetensors\): NaN or Inf in a.weight"
    ):
        encode(weight, scheme)


@pytest.mark.parametrize("scheme", BAKEABLE)
def test_a_pack_beyond_the_schemes_bound_is_refused_with_the_way_out(scheme, monkeypatch):
    monkeypatch.setattr(codecs.nf4, "dequantize", lambda _, shape, __: torch.full(shape, 1e6))
    monkeypatch.setattr(codecs, "_widen", lambda packed: torch.full(packed.shape, 1e6))
    monkeypatch.setattr(codecs.rotated, "decode_levels", lambda *_: torch.full((64, 64), 1e6))
    with pytest.raises(
        CheckpointError, match=f"weights that {scheme} cannot hold.*a.weight"
    ) as caught:
        encode(weight_of("normal", 64, 64), scheme)
    assert caught.value.hint == "--keep a.weight"


@pytest.mark.parametrize(
    "suffix, place, value, word",
    [
        ("_scale", 5, 0.0, "0 or negative"),
        ("_scale", 0, -1.0, "0 or negative"),
        ("_scale", 7, float("nan"), "NaN or Inf"),
        ("_scale", 7, float("inf"), "NaN or Inf"),
        ("", (3, 3), float("nan"), "NaN in a.weight"),
    ],
)
def test_impossible_rows_are_found_when_they_are_read(suffix, place, value, word):
    stored = encode(weight_of("normal", 8, 64), "fp8").stored
    stored[suffix][place] = value
    with pytest.raises(CheckpointError, match=word):
        codecs.check_values("a.weight", stored, WHERE)


@pytest.mark.parametrize("suffix", [".nested_absmax", ".nested_quant_map", ".quant_map"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_impossible_nf4_scales_are_found_when_they_are_read(suffix, value):
    stored = encode(weight_of("normal", 8, 64), "nf4").stored
    stored[suffix][0] = value
    with pytest.raises(CheckpointError, match=f"NaN or Inf in a.weight{suffix}"):
        codecs.check_values("a.weight", stored, WHERE)


@pytest.mark.parametrize(
    "values", [[1.0, float("nan")], [-float("inf"), 1.0], [float("inf"), -float("inf")]]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_tensors_are_checked_and_large_sums_are_no_fault(values, dtype):
    with pytest.raises(CheckpointError, match=r"NaN or Inf in a\.bias"):
        codecs.check_values("a.bias", {"": torch.tensor(values, dtype=dtype)}, WHERE)
    codecs.check_values("a.bias", {"": torch.full((8,), 3e38, dtype=dtype)}, WHERE)
    codecs.check_values("ids", {"": torch.arange(5)}, WHERE)


def test_a_missing_optimum_quanto_is_explained(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(codecs.MissingLibrary, match="optimum-quanto is missing"):
        encode(weight_of("normal", 4, 4), "fp8")


@pytest.mark.parametrize("scheme", BAKEABLE)
def test_values_beyond_float32_are_refused_not_packed_as_infinity(scheme):
    weight = weight_of("normal", 8, 64, torch.float64)
    weight[3, 3] = 1e300
    with pytest.raises(CheckpointError, match="not finite"):
        encode(weight, scheme)
    with pytest.raises(CheckpointError, match="cannot hold"):
        encode(weight_of("normal", 8, 64, torch.float32) * 1e30, scheme)  # the norm overflows
