"""comfy-kitchen's Triton back end against plain torch, under Triton's interpreter.

    make test-triton

It needs triton beside torch, which changes what torch does: no other test runs there, and none of
these in the usual environment, so that this file is not called test_*. The interpreter lacks the
rounding function of CUDA's library, and an autotuner needs a card to time on: both are replaced.
A unit is one level of int8 of a row of activations.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends import triton as backend
from comfy_kitchen.backends.triton import quantization, w4a8_int8

from fluxcli.engine import blocks
from quant import kernels, linear, rotated
from quant.spec import find_rotation

WIDTHS = (64, 3072, 12288, 15360, 4096, 10240)  # of FLUX.1's and T5's layers, and the bundled one's
SCHEMES = ("int8", "w6a8", "w4a8")
DTYPES = (torch.bfloat16, torch.float16)
TILE = {"block_m": 16, "block_n": 16, "block_k": 1024, "group_size_m": 8}
ROWS = 19  # not a multiple of a tile's
EPS = 1e-6


def round_to_even(values: Any) -> Any:
    """float32 below 2^22, rounded: what is added leaves no digits behind the point."""
    return (values + 12582912.0) - 12582912.0


class Untuned:
    """A kernel with tiles that nobody timed."""

    def __init__(self, tuned: Any) -> None:
        self._kernel = tuned.fn

    def __getitem__(self, grid: Any) -> Any:
        launch = self._kernel[grid]
        return lambda **named: launch(**named, **TILE)


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """The back end as a card would have it."""
    assert backend._TRITON_AVAILABLE, backend._TRITON_ERROR
    library = SimpleNamespace(rint=round_to_even)
    with pytest.MonkeyPatch.context() as patch:
        for module in (quantization, w4a8_int8):
            patch.setattr(module, "libdevice", library)
        for name in ("_int8_matmul_dequant_kernel", "_int8_matmul_dequant_per_row_kernel"):
            patch.setattr(quantization, name, Untuned(getattr(quantization, name)))
        registry = comfy_kitchen.registry
        registry.register("triton", backend, backend._build_constraints())
        yield
        for name in list(registry._capabilities.pop("triton")):
            registry._constraints.pop(("triton", name))
        registry._backends.pop("triton")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    scheme: str, columns: int, *, bias: bool = True, parts: int = 1
) -> linear.RotatedLinear:
    shapes = [(24 + 16 * part, columns) for part in range(parts)]
    stored = [rotated.quantize(noise(*shape, seed=shape[0]), scheme) for shape in shapes]
    rows = sum(shape[0] for shape in shapes)
    made = linear.make_linear(
        scheme,
        stored,
        shapes=shapes,
        bias=noise(rows, seed=9) if bias else None,
        arithmetic=False,
        rotation=find_rotation(columns),
    )
    assert isinstance(made, linear.RotatedLinear)
    return made


def make_rows(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Activations with a column of outliers, and rows of very different size."""
    x = noise(rows, columns, seed=rows) * 2 ** noise(rows, 1, seed=3)
    x[:, :1] *= 40
    return x.to(dtype)


def count_units(layer: linear.RotatedLinear, x: torch.Tensor, found: torch.Tensor) -> float:
    """How many units outputs differ from those of plain torch in float32: the worst row's root
    mean square. The rounding of the output to 16 bit does not count (the interpreter cuts off).
    """
    rows = x.float().reshape(-1, layer.in_features)
    expected = layer.multiply(layer.quantize_rows(rows), torch.float32)
    unit = rotated.rotate(rows, layer.rotation).abs().amax(1, keepdim=True) / 127
    unit = unit * layer.weight_scale * layer.decode_levels().float().norm(dim=1)
    wrong = (found.float().view(expected.shape) - expected).abs() - expected.abs() / 128
    return (wrong.clamp(min=0) / unit).square().mean(1).sqrt().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_rows_are_rotated_and_quantized_to_the_same_levels(columns, rows, dtype):
    x = make_rows(rows, columns, dtype)
    rotation = find_rotation(columns)
    matrix = rotated.make_hadamard(rotation, dtype=torch.float32, device="cpu")
    levels, scale = backend.quantize_and_rotate_rowwise(x, matrix, rotation)
    exact = rotated.rotate(x.float(), rotation)
    expected_scale = exact.abs().amax(1, keepdim=True) / 127
    assert ((exact / expected_scale).round() - levels).abs().max() <= 1
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_products_are_those_of_torch_within_a_unit(scheme, columns, bias):
    layer = make_layer(scheme, columns, bias=bias)
    for rows in (1, ROWS):
        x = make_rows(rows, columns, torch.bfloat16)
        found = layer.run_kernel(x, "triton")
        assert found.shape == (rows, layer.out_features) and found.dtype == x.dtype
        assert count_units(layer, x, found) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_other_dtypes(scheme, dtype):
    layer = make_layer(scheme, 512)
    x = make_rows(33, 512, dtype).view(3, 11, 512)
    found = layer.run_kernel(x, "triton")
    assert found.shape == (3, 11, 24) and found.dtype == dtype
    assert count_units(layer, x, found) <= (0.5 if dtype == torch.float16 else 0.05)


@pytest.mark.parametrize("rotation", [0, 64])
def test_rows_that_are_not_one_behind_the_other(rotation):
    """As a single block's last layer gets them: a part of a wider tensor's columns."""
    layer = make_layer("int8", 64)
    layer.rotation = rotation
    wide = make_rows(9, 200, torch.bfloat16)
    for x in (wide[:, 72:136], wide.view(3, 3, 200)[:, :, 72:136]):
        assert count_units(layer, x, layer.run_kernel(x, "triton")) <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_rows_and_rows_of_zeros(scheme):
    layer = make_layer(scheme, 256)
    empty = layer.run_kernel(torch.zeros(0, 256, dtype=torch.bfloat16), "triton")
    assert empty.shape == (0, 24) and empty.dtype == torch.bfloat16
    zeros = layer.run_kernel(torch.zeros(2, 256, dtype=torch.bfloat16), "triton")
    torch.testing.assert_close(zeros.float(), layer.bias.expand(2, 24), rtol=1 / 128, atol=0)


def test_parts_of_one_table_are_one_product_and_others_one_for_each():
    layer = make_layer("w4a8", 256, parts=3)
    x = make_rows(5, 256, torch.bfloat16)
    assert len(layer.runs) == 1
    assert count_units(layer, x, layer.run_kernel(x, "triton")) <= 1
    (run,) = layer.runs
    halves = tuple(value / 2 for value in run.codebook)
    layer.runs = [
        linear.Run(24, run.codebook),
        linear.Run(40, halves),
        linear.Run(56, run.codebook),
    ]
    assert count_units(layer, x, layer.run_kernel(x, "triton")) <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_probe_passes(scheme):
    assert linear._check_kernel(scheme, "cpu", "triton") == ""


# --- what is between products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 128), (7, 128), (5, 32)])
def test_norm_and_rotation_are_those_of_torch(tokens, channels, dtype):
    query, key = (noise(2, tokens, 3, channels, seed=seed).to(dtype) for seed in (1, 2))
    angles = noise(tokens, channels // 2, seed=3) * 9
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
    rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    turns = rows.unflatten(-1, (2, 2))[None, :, None]
    weights = [(1 + 0.2 * noise(channels, seed=seed)).to(dtype) for seed in (4, 5)]
    found = kernels.norm_and_turn(
        query,
        key,
        turns,
        query_weight=weights[0],
        key_weight=weights[1],
        epsilon=EPS,
        backend="triton",
    )
    for x, weight, made in zip((query, key), weights, found, strict=True):
        normed = torch.nn.functional.rms_norm(x.float(), (channels,), weight.float(), EPS)
        exact = blocks.rotate(normed, rotation)
        assert made.dtype == dtype and made.shape == x.shape
        step = 3 * torch.finfo(dtype).eps
        assert (made.float() - exact).norm() <= step * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 37, 3072), (2, 5, 128), (1, 1, 64)])
def test_norm_and_modulation_are_those_of_torch(batch, tokens, width, dtype):
    x = (noise(batch, tokens, width) * 7 + 1).to(dtype)
    scale, shift = (noise(batch, 1, width, seed=seed).to(dtype) for seed in (1, 2))
    found = kernels.norm_and_modulate(x, scale, shift, epsilon=EPS, backend="triton")
    normed = torch.nn.functional.layer_norm(x.float(), (width,), eps=EPS)
    exact = normed * (1 + scale.float()) + shift.float()
    assert found.dtype == dtype and found.shape == x.shape
    torch.testing.assert_close(found.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
