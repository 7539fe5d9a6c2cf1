"""int8, w6a8 and w4a8: errors, beside those of comfy-kitchen's quantizer; it decodes as we do."""

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen_int8
from comfy_kitchen.backends.eager import w4a8_int8 as kitchen_groups
from comfy_kitchen.tensor.int8_utils import _build_hadamard
from comfy_kitchen.tensor.w4a8_packed import default_w4a8_codebook

from quant import rotated, scales
from quant.spec import (
    CHANNEL_SCALE,
    GROUP,
    GROUP_SCALE,
    LEVELS,
    ROTATED,
    ROW_SCALE,
    SCHEMES,
    find_rotation,
)
from tests.support.weights import (
    ACTIVATIONS,
    WEIGHTS,
    make_activation,
    make_weight,
    relative_error,
)

# Of a weight, and of a layer's output with its activations in int8.
LIMITS = {"int8": (0.0090, 0.0130), "w6a8": (0.0210, 0.0230), "w4a8": (0.0735, 0.0780)}
# comfy-kitchen's numbers of dtypes.
KITCHEN_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDTHS = (16, 32, 64, 128, 512, 640, 3072)


def decode(stored: dict[str, torch.Tensor], scheme: str, columns: int) -> torch.Tensor:
    rotation = find_rotation(columns)
    return rotated.dequantize(stored, scheme, rotation=rotation, dtype=torch.float32)


def decode_by_kitchen(
    stored: dict[str, torch.Tensor], scheme: str, *, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    rotation = find_rotation(columns)
    if scheme == "int8":
        return kitchen_int8.dequantize_int8_convrot_weight_dtype(
            stored[""], stored[ROW_SCALE], rotation, KITCHEN_DTYPES[dtype]
        )
    return kitchen_groups.dequantize_w4a8_int8_weight(
        stored[""],
        stored[GROUP_SCALE],
        stored[CHANNEL_SCALE],
        stored.get(LEVELS),
        group_size=GROUP,
        convrot_groupsize=rotation,
        output_dtype=dtype,
    )


def quantize_by_kitchen(weight: torch.Tensor, scheme: str) -> dict[str, torch.Tensor]:
    rotation = find_rotation(weight.shape[1])
    if scheme == "int8":
        codes, scale = kitchen_int8.quantize_int8_convrot_weight(weight, rotation)
        return {"": codes, ROW_SCALE: scale}
    bits = SCHEMES[scheme].bits
    codes, group, channel, _, levels = kitchen_groups.quantize_w4a8_int8_weight(
        weight, bits=bits, convrot_groupsize=rotation
    )
    stored = {"": codes, GROUP_SCALE: group, CHANNEL_SCALE: channel}
    return stored if levels is None else stored | {LEVELS: levels}


def check_errors(weight: torch.Tensor, scheme: str) -> None:
    """Our error is within the limit, and less than comfy-kitchen's."""
    columns = weight.shape[1]
    found = rotated.round_weight(weight, scheme)
    ours = relative_error(decode(found.stored, scheme, columns), weight)
    assert ours <= LIMITS[scheme][0]
    assert ours == pytest.approx((found.squared_error / found.squared_norm) ** 0.5, rel=1e-5)
    theirs = decode(quantize_by_kitchen(weight, scheme), scheme, columns)
    assert ours < relative_error(theirs, weight)


@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_errors_are_within_the_limits_and_below_comfy_kitchens(kind, scheme):
    check_errors(make_weight(kind, 32, 3072, seed=1), scheme)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("seed", [1, 3])
def test_errors_of_weights_of_full_size(kind, scheme, seed):
    check_errors(make_weight(kind, 1024, 3072, seed=seed), scheme)


def check_output(scheme: str, kind: str, *, rows: int, tokens: int, columns: int) -> None:
    """A layer's output with both sides in int8 is within the limit."""
    weight = make_weight("student-t6", rows, columns, seed=4)
    activation = make_activation(kind, tokens, columns, seed=5)
    stored = rotated.quantize(weight, scheme)
    turned = rotated.rotate(activation, find_rotation(columns))
    codes, scale = kitchen_int8.quantize_int8_rowwise(turned)
    levels = rotated.decode_levels(stored, scheme)
    sums = torch._int_mm(codes, levels.t()).float()
    row_scale = stored[ROW_SCALE if scheme == "int8" else CHANNEL_SCALE].view(1, -1)
    assert relative_error(sums * scale * row_scale, activation @ weight.t()) <= LIMITS[scheme][1]


@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_outputs_of_a_layer_are_within_the_limits(kind, scheme):
    check_output(scheme, kind, rows=160, tokens=160, columns=3072)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_outputs_of_a_layer_of_full_size(kind, scheme):
    check_output(scheme, kind, rows=512, tokens=512, columns=3072)


@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("dtype", KITCHEN_DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_comfy_kitchen_decodes_bit_for_bit_as_we_do(columns, dtype, scheme):
    if columns % SCHEMES[scheme].columns:
        return
    for rows in (1, 40):
        weight = make_weight("student-t4", rows, columns, seed=6)
        stored = rotated.quantize(weight, scheme)
        rotation = find_rotation(columns)
        ours = rotated.dequantize(stored, scheme, rotation=rotation, dtype=dtype)
        theirs = decode_by_kitchen(stored, scheme, columns=columns, dtype=dtype)
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", ROTATED)
def test_what_comfy_kitchen_wrote_is_decoded_as_it_decodes_it(scheme):
    weight = make_weight("laplace", 40, 640, seed=7)
    stored = quantize_by_kitchen(weight, scheme)
    theirs = decode_by_kitchen(stored, scheme, columns=640, dtype=torch.float32)
    assert torch.equal(decode(stored, scheme, 640), theirs)


def test_the_levels_of_w4a8_are_those_that_comfy_kitchens_kernels_decode():
    stored = rotated.quantize(make_weight("student-t4", 4, 64, seed=8), "w4a8")
    assert torch.equal(stored[LEVELS], default_w4a8_codebook())


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_matrix_is_comfy_kitchens_and_two_products_rotate_as_it_does(size):
    matrix = rotated.make_hadamard(size, dtype=torch.float32, device="cpu")
    assert torch.equal(matrix, _build_hadamard(size))
    values = torch.randn(7, 2 * size, generator=torch.Generator().manual_seed(9))
    in_two = rotated.rotate_in_two(values, size)
    assert torch.allclose(in_two, rotated.rotate(values, size), atol=2e-6)
    assert torch.allclose(rotated.rotate_in_two(in_two, size), values, atol=2e-6)


@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("columns", [256, 320, 3072])
def test_neither_parts_nor_threads_change_a_bit(columns, scheme, monkeypatch):
    weight = make_weight("student-t4", 33, columns, seed=10).bfloat16()
    whole = rotated.quantize(weight, scheme)
    assert all(
        torch.equal(rotated.quantize(row[None], scheme)[""], whole[""][n][None])
        for n, row in enumerate(weight[:3])
    )
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((1, 1), (5 * columns, 2), (1 << 22, 2)):
            monkeypatch.setattr(rotated, "CPU_CHUNK", chunk)
            torch.set_num_threads(count)
            stored = rotated.quantize(weight, scheme)
            for suffix, tensor in whole.items():
                assert torch.equal(stored[suffix].view(torch.uint8), tensor.view(torch.uint8))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scheme", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e15])
def test_the_size_of_values_does_not_matter_and_rows_of_zeros_stay_zero(factor, dtype, scheme):
    weight = (make_weight("gauss", 6, 320, seed=11) * factor).to(dtype)
    weight[2] = 0
    weight[3, :256] = 0
    weight[4] = factor
    found = rotated.round_weight(weight, scheme)
    decoded = decode(found.stored, scheme, 320)
    assert not decoded[2].any()
    assert (found.squared_error / found.squared_norm) ** 0.5 < LIMITS[scheme][0]
    # A row of one value stays one: it is what a rotation leaves as it is.
    assert relative_error(decoded[4] / factor, torch.ones(320)) < LIMITS[scheme][0]
    for suffix in (ROW_SCALE, CHANNEL_SCALE):
        if suffix in found.stored:
            assert (found.stored[suffix] > 0).all()


@pytest.mark.parametrize("scheme", ["w6a8", "w4a8"])
def test_codes_are_the_nearest_and_scales_the_best_of_all(scheme):
    values = make_weight("gauss", 6, 64, seed=12) * 35
    values[1] *= 0.01  # some groups are much smaller than their row's largest
    found = scales.choose_group_scales(values, scheme)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    multiples = default_w4a8_codebook() if scheme == "w4a8" else torch.arange(-31.0, 32)
    grid = (every[:, None] * multiples).round().clamp(-127, 127)  # (126, levels)
    groups = values.view(-1, GROUP)
    errors = (groups[None, :, :, None] - grid[:, None, None]).square().amin(3).sum(2)
    chosen = found.scales.view(torch.uint8).view(-1).long() - 1
    multiples_of = dict(enumerate(multiples.tolist(), start=0 if scheme == "w4a8" else 1))
    own_multiples = torch.tensor([multiples_of[code] for code in found.codes.view(-1).tolist()])
    own_levels = (own_multiples.view(-1, GROUP) * every[chosen][:, None]).round().clamp(-127, 127)
    own = (groups - own_levels).square().sum(1)
    nearest = errors[chosen, torch.arange(len(groups))]
    assert torch.allclose(own, nearest, rtol=1e-5, atol=1e-5)
    assert float(own.sum()) <= 1.005 * float(errors.amin(0).sum())
