"""Quantized layers: the product of their values, in the arithmetic that they say."""

import copy
import functools
from pathlib import Path

import pytest
import torch

from quant import codecs, linear, rotated
from quant.linear import (
    ALIGNED,
    FP8Linear,
    NF4Linear,
    QuantizedLinear,
    RotatedLinear,
    ask_multiply,
    find_multiply,
    fits_together,
    make_linear,
)
from quant.spec import BAKEABLE, ROTATED, SCHEMES, find_rotation
from quant.tensor_info import TensorInfo
from quant.weights import Piece

K = 64
QKV = [(96, K), (32, K), (160, K)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"nf4": NF4Linear, "fp8": FP8Linear, **dict.fromkeys(ROTATED, RotatedLinear)}
OPERATORS = {"fp8": "_scaled_mm", **dict.fromkeys(ROTATED, "_int_mm")}
SCALED_MM = torch._scaled_mm
WHERE = Piece(Path("w.safetensors"), TensorInfo("w", "F32", (1, 1)))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def pack(scheme: str, shape: tuple[int, int], seed: int = 1) -> dict[str, torch.Tensor]:
    spread = 2 ** noise(shape[0], 1, seed=seed + 100)  # rows of very different size
    return codecs.quantize(noise(*shape, seed=seed) * spread, scheme, name="w", where=WHERE).stored


def make(scheme: str, shapes=QKV, *, bias: bool = True, arithmetic: bool = True) -> QuantizedLinear:
    parts = [pack(scheme, shape, seed) for seed, shape in enumerate(shapes)]
    rows = sum(shape[0] for shape in shapes)
    return make_linear(
        scheme,
        parts,
        shapes=shapes,
        bias=noise(rows, seed=9) if bias else None,
        arithmetic=arithmetic,
        rotation=find_rotation(shapes[0][1]),
    )


def decode(stored: dict[str, torch.Tensor], scheme: str, shape: tuple[int, int]) -> torch.Tensor:
    rotation = find_rotation(shape[1])
    return codecs.dequantize(stored, scheme, shape, torch.float32, rotation=rotation)


def values(scheme: str, shapes=QKV) -> torch.Tensor:
    """The weight (N, K) float64 that the stored of `make` hold."""
    parts = [decode(pack(scheme, s, seed), scheme, s) for seed, s in enumerate(shapes)]
    return torch.cat(parts).double()


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """(operator, dtypes of both factors) of every 8-bit product."""
    found: list[tuple] = []

    def spy(name, original):
        def call(a, b, *args, **kwargs):
            found.append((name, a.dtype, b.dtype))
            return original(a, b, *args, **kwargs)

        monkeypatch.setattr(torch, name, call)

    for name in set(OPERATORS.values()):
        spy(name, getattr(torch, name))
    return found


@pytest.mark.parametrize("scheme", BAKEABLE)
def test_a_fused_layer_is_its_parts_one_below_the_other(scheme):
    fused = make(scheme, bias=False)
    assert type(fused) is KINDS[scheme] and (fused.in_features, fused.out_features) == (K, 288)
    parts = [
        make_linear(
            scheme, [pack(scheme, s, i)], shapes=[s], bias=None, arithmetic=True, rotation=64
        )
        for i, s in enumerate(QKV)
    ]
    for dtype in DTYPES:
        assert torch.equal(
            fused.dequantize(dtype), torch.cat([part.dequantize(dtype) for part in parts])
        )
    x = noise(5, K)
    torch.testing.assert_close(
        fused(x), torch.cat([part(x) for part in parts], -1), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", BAKEABLE)
def test_dequantized_products_are_those_of_the_decoded_weights(scheme, dtype, calls):
    layer, x = make(scheme, arithmetic=False), noise(7, K).to(dtype)
    layer.bias = layer.bias.to(dtype)
    exact = x.double() @ values(scheme).T + layer.bias.double()
    # of all that is summed
    size = x.double().abs() @ values(scheme).T.abs() + layer.bias.double().abs()
    assert (
        (layer(x).double() - exact).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-5 * size
    ).all()
    assert layer(x).dtype == dtype and calls == []
    torch.testing.assert_close(
        layer.dequantize(torch.float32).double(), values(scheme), rtol=0, atol=0
    )


@pytest.mark.parametrize("shapes", [QKV[:1], QKV], ids=["one part", "qkv"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", OPERATORS)
def test_8_bit_products_run_and_err_by_the_rounding_of_activations(scheme, dtype, shapes, calls):
    layer, w = make(scheme, shapes), values(scheme, shapes)
    # rows of very different size: each has its own scale
    x = (noise(33, K) * 2 ** noise(33, 1, seed=3)).to(dtype)
    layer.bias = layer.bias.to(dtype)
    calls.clear()  # of the probe
    y, exact = layer(x).double(), x.double() @ w.T + layer.bias.double()
    kind = torch.float8_e4m3fn if scheme == "fp8" else torch.int8
    assert calls == [(OPERATORS[scheme], kind, kind)]
    x = x.double()
    if scheme != "fp8":  # the rounding is of what was rotated
        x, w = rotate(x), rotate(w)
    largest = x.abs().amax(1, keepdim=True)
    step = torch.maximum(x.abs() / 16, largest / 448 * 2**-10)
    if scheme != "fp8":
        step = largest / 254 + x.abs() * torch.finfo(dtype).eps
    rounding = step.expand_as(x) @ w.T.abs()  # the worst that rounding every activation can do
    assert (
        (y - exact).abs()
        <= rounding + 3 * torch.finfo(dtype).eps * (x.abs() @ w.T.abs() + layer.bias.abs())
    ).all()
    relative = (y - exact).norm() / exact.norm()
    assert 1e-3 < relative < (0.035 if scheme == "fp8" else 0.012)


def rotate(values: torch.Tensor) -> torch.Tensor:
    return rotated.rotate(values, K)


@pytest.mark.parametrize("scheme", OPERATORS)
def test_8_bit_products_are_exact_but_for_the_activations(scheme):
    """The same rounding of activations, written another way, times the decoded weight."""
    layer, x = make(scheme, bias=False), noise(40, K) * 5
    weight = values(scheme)
    turned = x if scheme == "fp8" else rotate(x)
    scale = turned.abs().amax(1, keepdim=True) / SCHEMES[scheme].largest
    rounded = (
        (turned / scale).to(torch.float8_e4m3fn) if scheme == "fp8" else (turned / scale).round()
    )
    exact = (rounded.double() * scale) @ (weight if scheme == "fp8" else rotate(weight)).T
    assert (layer(x) - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        (scheme, shape)
        for scheme in BAKEABLE
        for shape in [(48, 72), (40, 64), (3, 50), (1, 64)]
        if shape[1] % SCHEMES[scheme].columns == 0
    ],
)
def test_odd_widths_are_dequantized(scheme, shape, calls):
    layer, x = make(scheme, [shape]), noise(4, shape[1])
    calls.clear()
    exact = x.double() @ values(scheme, [shape]).T + layer.bias
    assert (layer(x) - exact).norm() / exact.norm() < 1e-6
    assert calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", BAKEABLE)
def test_every_shape_of_input(scheme, dtype):
    layer = make(scheme)
    layer.bias = layer.bias.to(dtype)
    x = noise(2, 3, 20, K).to(dtype)
    whole = layer(x)
    assert whole.shape == (2, 3, 20, 288) and whole.dtype == dtype
    options = {
        "rtol": 0,
        "atol": (1e-6 if dtype == torch.float32 else 0.02) * float(whole.abs().max()),
    }
    torch.testing.assert_close(layer(x[1, 2]), whole[1, 2], **options)
    torch.testing.assert_close(layer(x[1, 2, :1]), whole[1, 2, :1], **options)  # one row
    torch.testing.assert_close(layer(x[1, 2, 0]), whole[1, 2, 0], **options)  # no row dimension
    # not contiguous
    torch.testing.assert_close(layer(x.transpose(1, 2)), whole.transpose(1, 2), **options)
    assert layer(x[:, :, :0]).shape == (2, 3, 0, 288)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", BAKEABLE)
def test_rows_of_zeros_are_no_nan(scheme, dtype):
    weight = noise(32, K)
    weight[3] = 0
    stored = codecs.quantize(weight, scheme, name="w", where=WHERE).stored
    layer = make_linear(
        scheme,
        [stored],
        shapes=[(32, K)],
        bias=noise(32, seed=2).to(dtype),
        arithmetic=True,
        rotation=K,
    )
    x = noise(6, K).to(dtype)
    x[2] = 0
    y = layer(x)
    assert y.isfinite().all()
    assert torch.equal(y[2], layer.bias)
    assert torch.equal(y[:, 3], layer.bias[3].expand(6))
    assert torch.equal(layer(torch.zeros(2, K, dtype=dtype)), layer.bias.expand(2, 32))


@pytest.mark.parametrize("scheme", BAKEABLE)
def test_all_of_its_state_moves_copies_and_loads_as_plain_tensors(scheme):
    layer, x = make(scheme), noise(5, K)
    expected = layer(x)
    state = layer.state_dict()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert set(state) == {name for name, _ in layer.named_buffers()} and not list(
        layer.parameters()
    )
    assert not [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    assert not {t.data_ptr() for t in twin.buffers()} & {t.data_ptr() for t in layer.buffers()}
    other = make_linear(
        scheme,
        [pack(scheme, s, 50) for s in QKV],
        shapes=QKV,
        bias=torch.zeros(288),
        arithmetic=True,
        rotation=K,
    )
    assert not torch.equal(other(x), expected)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    moved = twin.to("meta")
    assert {tensor.device.type for tensor in moved.buffers()} == {"meta"}
    assert moved(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize(
    ("scheme", "most"),
    [("nf4", 0.54), ("fp8", 1.07), ("int8", 1.07), ("w6a8", 0.88), ("w4a8", 0.65)],
)
def test_it_takes_the_bytes_of_its_scheme(scheme, most):
    layer = make(scheme, [(256, K), (512, K)], bias=False)
    tables = 1024 if scheme == "nf4" else 0  # one for all parts
    assert sum(t.nbytes for t in layer.buffers()) - tables <= most * 768 * K


@pytest.mark.parametrize("scheme", BAKEABLE)
def test_it_compiles_without_a_break(scheme, monkeypatch):
    monkeypatch.setattr(linear, "PROBED", {})
    layer, x = make(scheme), noise(5, K)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    try:
        assert torch.equal(compiled(x), layer(x))
    finally:
        torch.compiler.reset()


def test_the_path_is_named():
    assert {scheme: find_multiply(scheme, "cpu") for scheme in (*BAKEABLE, "bfloat16")} == {
        "nf4": "dequantize",
        "fp8": "scaled_mm",
        **dict.fromkeys(ROTATED, "int_mm"),
        "bfloat16": "dequantize",
    }
    assert find_multiply("fp8", "meta") == find_multiply("int8", "mps") == "dequantize"


def refused(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("not implemented for this device")


@pytest.mark.parametrize("operator", [refused, lambda a, b, **_: torch.zeros(len(a), b.shape[1])])
@pytest.mark.parametrize("scheme", OPERATORS)
def test_where_the_operator_is_missing_or_wrong_it_dequantizes(scheme, operator, monkeypatch):
    monkeypatch.setattr(linear, "PROBED", {})
    monkeypatch.setattr(torch, OPERATORS[scheme], operator)
    assert find_multiply(scheme, "cpu") == "dequantize"
    why = "not implemented for this device" if operator is refused else "its product is wrong"
    assert ask_multiply(scheme, "cpu").why == why
    x = noise(5, K)
    assert torch.equal(make(scheme)(x), make(scheme, arithmetic=False)(x))


def only_per_tensor(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    """As every torch for Windows: with a scale for each row it raises torch's own words."""
    if options["scale_a"].numel() > 1:
        raise RuntimeError("Rowwise scaling is not currently supported on your device.\nmore words")
    return SCALED_MM(a, b, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_row_wise_kernel_fp8_multiplies_per_tensor_and_says_so(dtype, monkeypatch):
    x = noise(5, K).to(dtype)
    by_rows = make("fp8")(x)
    monkeypatch.setattr(linear, "PROBED", {})
    monkeypatch.setattr(torch, "_scaled_mm", only_per_tensor)
    why = "Rowwise scaling is not currently supported on your device"
    assert ask_multiply("fp8", "cpu") == ("scaled_mm per tensor", why)
    # The same sums, rounded three times more where the product is in 16 bit.
    most = 1e-6 if dtype == torch.float32 else 2**-7
    assert (make("fp8")(x) - by_rows).abs().max() <= most * by_rows.abs().max()


def test_the_largest_sums_per_tensor_overflow_in_no_dtype():
    largest = torch.full((ALIGNED, 15360), 448.0)
    stored = {"": largest.to(torch.float8_e4m3fn), "_scale": torch.full((ALIGNED,), 1e-6)}
    shapes = [tuple(largest.shape)]
    layer = make_linear("fp8", [stored], shapes=shapes, bias=None, arithmetic=False)
    for dtype in DTYPES:
        scale = torch.full((ALIGNED, 1), 1e-3)
        product = layer.multiply_per_tensor(stored[""], scale, dtype)
        expected = torch.full((ALIGNED, ALIGNED), 448.0 * 448.0 * 15360 * 1e-9, dtype=dtype)
        torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("scheme", OPERATORS)
def test_memory_that_ends_in_the_probe_says_nothing_of_the_arithmetic(scheme, monkeypatch):
    def full(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")

    monkeypatch.setattr(linear, "PROBED", {})
    with monkeypatch.context() as patch:
        patch.setattr(torch, OPERATORS[scheme], full)
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            ask_multiply(scheme, "cpu")
    assert ask_multiply(scheme, "cpu") == (OPERATORS[scheme].removeprefix("_"), "")


def test_only_nf4_minds_where_a_part_ends():
    crossing = [(3, 50), (5, 50)]
    assert all(fits_together(scheme, QKV) for scheme in BAKEABLE)
    assert [scheme for scheme in BAKEABLE if not fits_together(scheme, crossing)] == ["nf4"]
    layer = make("fp8", crossing)
    torch.testing.assert_close(
        layer.dequantize(torch.float32).double(), values("fp8", crossing), rtol=0, atol=0
    )


# --- fp8's rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_largest_value_of_a_row_is_beyond_fp8(dtype):
    """Every 16-bit number, and as many of 32 bits: a row's largest becomes 448 without a clamp."""
    bits = torch.arange(1 << 15, dtype=torch.int16)
    if dtype == torch.float32:
        bits = bits.int() << 16 | 0x5A5A
    every = bits.view(dtype)
    every = every[every.isfinite()]
    rows = torch.stack([-every, every / 3], dim=1)
    layer = make("fp8", [(16, 2)])
    scale = (every.float() / 448).clamp(min=1e-12)[:, None]
    found = layer.quantize_rows(rows, scale)
    expected = (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    largest = found[:, 0].float()
    assert largest.isfinite().all() and largest.min() == -448
    assert (largest[every.float() > 1e-9] == -448).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_scale_is_its_largest_absolute_value(dtype, monkeypatch):
    """That of int8's rows is in test_int8_products.py."""
    layer = make("fp8")
    x = noise(2, 20, K).to(dtype)
    x[0, 3] = 0
    seen = []
    monkeypatch.setattr(
        layer,
        "multiply",
        lambda values, scale, _: seen.append(scale) or values.float() @ noise(K, 288),
    )
    layer(x)
    rows = x.view(-1, K).abs().amax(1, keepdim=True).float()
    assert torch.equal(seen[0], (rows / 448).clamp(min=1e-12))


@pytest.mark.parametrize("way", ["scaled_mm", linear.PER_TENSOR, "int_mm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_give_nan_and_rows_of_zeros_the_bias(way, dtype, monkeypatch):
    """What is not finite must reach the picture, where it is found; other rows are as alone."""
    scheme = "int8" if way == "int_mm" else "fp8"
    monkeypatch.setattr(linear, "PROBED", {(scheme, "cpu"): linear.Multiplication(way)})
    layer = make(scheme)
    layer.bias = layer.bias.to(dtype)
    x = noise(6, K).to(dtype)
    usual = layer(x)
    x[0, 3] = torch.nan
    x[1, 5] = torch.inf
    x[2] = 0
    x[3] = torch.finfo(dtype).smallest_normal
    found = layer(x)
    assert found[:2].isnan().all()
    assert torch.equal(found[2], layer.bias) and torch.equal(found[4:], usual[4:])
    torch.testing.assert_close(found[3], layer.bias, atol=1e-2, rtol=0)


def test_in_bfloat16_the_product_adds_the_bias_before_it_rounds():
    layer, bare = make("fp8"), make("fp8", bias=False)
    bias = noise(288, seed=9).bfloat16()
    layer.bias = bias
    x = noise(33, K).bfloat16()
    scale = (x.abs().amax(1, keepdim=True).float() / 448).clamp(min=1e-12)
    exact = bare.multiply(bare.quantize_rows(x, scale), scale, torch.float32) + bias.float()
    assert torch.equal(layer(x), exact.bfloat16())


def test_scales_of_several_nf4_weights_are_dequantized_together_where_they_may():
    """As one after the other, also where a second scale would be for two of them."""
    for shapes, run_length in (([(512, K), (256, K), (1280, K)], 256), ([(512, K), (257, K)], 0)):
        layer = make("nf4", shapes)
        assert layer.run_length == run_length
        apart = [
            decode(pack("nf4", shape, seed), "nf4", shape) for seed, shape in enumerate(shapes)
        ]
        assert torch.equal(layer.dequantize(torch.float32), torch.cat(apart))
