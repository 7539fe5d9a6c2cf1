"""Products in int8 in plain torch: each row is rotated and rounded as it should, sums are exact,
and codes become their levels as in comfy-kitchen.
"""

from itertools import product

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.backends.eager.w4a8_int8 import _dequant_int4_grouped_to_int8
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from quant import codes as codes_module
from quant import int8_products, rotated
from quant.int8_products import Int8Rows, Int8Weight
from quant.linear import Multiplication, RotatedLinear, make_linear
from quant.spec import GROUP_SCALE, LEVELS, ROTATED, ROW_SCALE
from tests.support.card import Card
from tests.support.card_driver import installed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OTHER_LEVELS = tuple(float(x) for x in torch.linspace(-0.9, 1.0, 16))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, largest: int = 127, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8, generator=generator)


# --- rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "rotation"), [(512, 256), (640, 64), (48, 16), (20, 4)])
def test_rows_are_rotated_by_the_matrix_wherever_they_lie(columns, rotation, dtype):
    """Sums of small integers are exact in all dtypes, in whatever order they are made."""
    wide = integers(37, columns + 40, largest=3).to(dtype)
    matrix = _build_hadamard(rotation, dtype=torch.float64)
    for rows in (wide[:, :columns], wide[:, 40:].contiguous(), wide[:1, 40:], wide[:0, 40:]):
        groups = rows.double().reshape(len(rows), columns // rotation, rotation)
        divisor = int8_products.find_divisor(dtype, rotation)
        expected = (groups @ matrix).reshape(rows.shape) / divisor
        found = int8_products.rotate_rows(rows, rotation)
        assert found.dtype == dtype and found.is_contiguous()
        assert torch.equal(found, expected.to(dtype))
        assert torch.equal(int8_products.rotate_rows(rows, 0), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_quotient_is_rounded_to_the_nearest_integer_half_to_even(dtype):
    """A float32 sum has 13 bits behind its point: what is nearer to a half may go either way."""
    step = 1 / 64 if dtype != torch.bfloat16 else 1 / 2
    values = torch.arange(-127, 127 + step, step).to(dtype)
    rows = torch.stack([values, values.flip(0)])
    found = int8_products.quantize_rows(rows, 0)
    assert torch.equal(found.scale, torch.ones(2, 1))
    assert torch.equal(found.values[:2], rows.float().round().char())
    rows = noise(64, 4096).to(dtype)
    found = int8_products.quantize_rows(rows, 0)
    exact = rows.double() / found.scale.double()
    assert (found.values - exact).abs().max() <= 0.5 + 2**-13
    assert found.values.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", [0, 64])
def test_a_row_is_quantized_by_its_own_largest_value_after_it_was_rotated(
    rotation, dtype, monkeypatch
):
    rows = (noise(50, 128) * 2 ** noise(50, 1, seed=1)).to(dtype)
    rows[7] = 0
    given = rows.clone()
    found = int8_products.quantize_rows(rows, rotation)
    assert torch.equal(rows, given)
    turned = int8_products.rotate_rows(rows, rotation).float()
    turned *= int8_products.find_divisor(dtype, rotation)
    scale = turned.abs().amax(1, keepdim=True).div(127).clamp(min=1e-12)
    assert torch.equal(found.scale, scale)
    assert (found.values[:50] - turned / scale).abs().max() <= 0.5 + 2**-13
    assert not found.values[7].any() and found.values.shape == (64, 128)
    monkeypatch.setattr(int8_products, "CPU_ROWS", 32)
    in_parts = int8_products.quantize_rows(rows, rotation)
    assert torch.equal(in_parts.scale, found.scale)
    assert torch.equal(in_parts.values[:50], found.values[:50])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_quantized_as_by_comfy_kitchen_within_one_unit(dtype):
    rows = noise(70, 512, seed=2).to(dtype)
    matrix = _build_hadamard(256, dtype=dtype)
    values, scale = kitchen.quantize_and_rotate_rowwise(rows, matrix, 256)
    found = int8_products.quantize_rows(rows, 256)
    torch.testing.assert_close(found.scale, scale, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (found.values[:70].int() - values.int()).abs().max() <= 1


# --- products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 17, 32, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_sums_are_exact_and_rounded_once(count, has_bias, dtype, monkeypatch):
    """Whatever is multiplied at a time; with scales that are powers of 2 nothing else rounds."""
    values, levels = integers(96, 96, largest=8), integers(48, 96, largest=8, seed=1)
    rows = Int8Rows(values, 2.0 ** torch.arange(count)[:, None].fmod(5))
    weight = Int8Weight(levels, 2.0 ** -torch.arange(48).fmod(7))
    bias = integers(48, largest=9, seed=2).to(dtype) if has_bias else None
    exact = values[:count].double() @ levels.double().T * rows.scale * weight.scale
    if has_bias:
        exact += bias
    rows = Int8Rows(values[: -(-count // 32) * 32], rows.scale)
    for part_rows in (32, 64, 1024):
        monkeypatch.setattr(int8_products, "CPU_ROWS", part_rows)
        found = int8_products.multiply(rows, weight, bias=bias, dtype=dtype)
        assert found.dtype == dtype and torch.equal(found, exact.to(dtype))


def test_a_device_multiplies_as_much_at_a_time_as_its_limit_allows(monkeypatch):
    """Parts of one size, whose sums are within the limit but for what fills up 32 rows."""
    for count, width, parts in [(4608, 21504, 2), (4608, 3072, 1), (32, 64, 1), (0, 64, 1)]:
        values = torch.empty(count, 16, dtype=torch.int8, device="meta")
        part_rows = int8_products._choose_part(values, width=width)
        assert part_rows % 32 == 0 and -(-count // part_rows) <= parts
        assert part_rows * width * 4 <= int8_products.SUM_BYTES or part_rows == 32


# --- codes


def make_codes(bits: int, *, rows: int = 40, groups: int = 12, group: int = 16):
    """Random codes, and scales of any sign and size, each of which comes."""
    generator = torch.Generator().manual_seed(bits)
    size = (rows, groups * group * bits // 8)
    codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(torch.int8)
    scales = torch.arange(rows * groups).remainder(256).to(torch.uint8).view(rows, groups)
    scales[scales & 127 == 127] = 1  # no NaN
    return codes, scales.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("levels", [rotated.NORMAL_LEVELS, OTHER_LEVELS, ()], ids=str)
def test_codes_become_the_levels_of_comfy_kitchen_bit_for_bit(levels, group, monkeypatch):
    codes, scales = make_codes(4 if levels else 6, group=group)
    table = torch.tensor(levels) if levels else None
    expected = _dequant_int4_grouped_to_int8(codes, scales, table, group)
    stored = {"": codes, GROUP_SCALE: scales}
    if levels:
        stored[LEVELS] = table
    assert torch.equal(rotated.decode_levels(stored, "w4a8" if levels else "w6a8"), expected)
    for index_bytes in (4 << 20, 4 * 7 * codes.shape[1], 1):
        monkeypatch.setattr(codes_module, "CPU_INDEX_BYTES", index_bytes)
        assert torch.equal(codes_module.decode(codes, scales, levels), expected)


def test_every_code_of_six_bits_has_its_level_with_every_scale():
    codes = torch.arange(64, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)
    scales = scales.masked_fill(scales & 127 == 127, 0).view(torch.float8_e4m3fn)
    packed = rotated._pack(codes, "w6a8")
    found = codes_module.decode(packed, scales[:, None].expand(256, 4).contiguous(), ())
    expected = (torch.arange(-32.0, 32.0) * scales.float()[:, None]).round().clamp(-127, 127)
    assert torch.equal(found, expected.char())


# --- layers


def make_layer(scheme: str, shapes: list, *, rotation: int, levels: tuple = ()) -> RotatedLinear:
    parts = []
    for seed, shape in enumerate(shapes):
        stored = rotated.quantize(noise(*shape, seed=seed), scheme)
        if levels and LEVELS in stored:
            stored[LEVELS] = torch.tensor(levels[seed])
        parts.append(stored)
    bias = noise(sum(shape[0] for shape in shapes), seed=9)
    return make_linear(scheme, parts, shapes=shapes, bias=bias, arithmetic=True, rotation=rotation)


@pytest.mark.parametrize("arithmetic", [True, False], ids=["int8", "dequantized"])
@pytest.mark.parametrize("rotation", [64, 256])
def test_what_float16_holds_overflows_in_no_rotation(rotation, arithmetic):
    """A group's largest sum is its largest value times the root of its columns, 6e4 times 16."""
    layer = make_layer("int8", [(32, 512)], rotation=rotation)
    layer.arithmetic = arithmetic
    layer.weight_scale /= 1024  # the output itself is to fit
    x = (6e4 * noise(40, 512).sign()).half()
    x[0, :rotation] = 6e4 * _build_hadamard(rotation, dtype=torch.float32)[1].sign()
    x[1:3] *= 1e-5
    layer.bias = layer.bias.half()
    exact = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    assert exact.abs().max() < 6e4
    found = layer(x)
    assert found.dtype == torch.float16 and found.isfinite().all()
    wrong = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert wrong.max() < (0.02 if arithmetic else 0.002)


def test_parts_whose_codes_stand_for_different_levels_are_decoded_apart():
    shapes = [(48, 64), (16, 64), (32, 64), (16, 64)]
    normal = rotated.NORMAL_LEVELS
    layer = make_layer("w4a8", shapes, rotation=64, levels=(normal, OTHER_LEVELS, normal, normal))
    assert [run.rows for run in layer.runs] == [48, 16, 48]
    parts = []
    first = 0
    for shape, levels in zip(shapes, (normal, OTHER_LEVELS, normal, normal), strict=True):
        rows = slice(first, first + shape[0])
        first += shape[0]
        stored = {"": layer.weight[rows], GROUP_SCALE: layer.group_scale[rows]}
        stored[LEVELS] = torch.tensor(levels)
        parts.append(rotated.decode_levels(stored, "w4a8"))
    whole = torch.cat(parts)
    assert torch.equal(layer.decode_levels(), whole)
    for rows in (slice(0, 48), slice(40, 70), slice(50, 60), slice(112, 112)):
        if rows.start < rows.stop:
            assert torch.equal(layer.decode_levels(rows), whole[rows])
    single = make_layer("w4a8", shapes, rotation=64)
    assert [run.rows for run in single.runs] == [112]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ROTATED)
def test_a_layer_gives_what_comfy_kitchen_gives_and_errs_no_more(scheme, dtype):
    """There quotients become the dtype before integers, and products before the bias is added."""
    layer = make_layer(scheme, [(96, 512)], rotation=256)
    layer.bias = layer.bias.to(dtype)
    x = noise(3, 11, 512, seed=4).to(dtype)
    theirs = kitchen.int8_linear(
        x,
        layer.decode_levels(),
        layer.weight_scale[:, None],
        bias=layer.bias,
        out_dtype=dtype,
        convrot=True,
        convrot_groupsize=256,
    )
    found = layer(x)
    assert found.shape == theirs.shape and found.dtype == dtype
    exact = x.double() @ layer.dequantize(torch.float64).T + layer.bias
    error, their_error = ((each - exact).norm() / exact.norm() for each in (found, theirs))
    assert 0.006 < error < 0.01 and error < their_error * 1.001
    if dtype == torch.float32:
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ROTATED)
def test_without_int8_products_a_layer_rotates_its_input_and_dequantizes(scheme, monkeypatch):
    monkeypatch.setattr("quant.linear.PROBED", {(scheme, "cpu"): Multiplication("dequantize")})
    layer = make_layer(scheme, [(96, 128)], rotation=64)
    x = noise(5, 128, seed=4)
    stored = rotated.quantize(noise(96, 128), scheme)
    weight = rotated.dequantize(stored, scheme, rotation=64, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer.dequantize(torch.float32), weight)
    assert torch.equal(layer.dequantize_rows(slice(5, 90), torch.float32), weight[5:90])


@pytest.mark.parametrize(("scheme", "dtype"), product(ROTATED, DTYPES), ids=str)
def test_on_a_card_no_product_waits_and_the_bits_are_the_cpus(scheme, dtype, monkeypatch):
    """In parts, too: no row changes with what it is multiplied beside."""
    layer = make_layer(scheme, [(96, 256), (32, 256)], rotation=256)
    layer.bias = layer.bias.to(dtype)
    x = noise(70, 256, seed=4).to(dtype)
    expected = layer(x)
    monkeypatch.setattr(int8_products, "SUM_BYTES", 32 * 128 * 4)
    monkeypatch.setattr(codes_module, "INDEX_BYTES", 1)
    with installed(Card()) as card:
        there = layer.to("cuda:0")
        on_card = x.to("cuda:0")
        there(on_card)  # which makes the constants
        card.take_counts()
        found = there(on_card)
        counts = card.take_counts()
        assert not counts.waits and card.problems == []
        assert counts.launches["_int_mm"] == 3
        assert torch.equal(found.cpu(), expected)


def test_the_scales_of_rows_come_in_every_published_shape():
    weight = integers(32, 64)
    for scale in (torch.full((32, 1), 0.5), torch.full((32,), 0.5), torch.tensor(0.5)):
        layer = make_linear(
            "int8",
            [{"": weight, ROW_SCALE: scale}],
            shapes=[(32, 64)],
            bias=None,
            arithmetic=True,
            rotation=0,
        )
        assert torch.equal(layer.dequantize(torch.float32), weight * 0.5)
