"""Products of activations with int8 weights, in plain torch: rotate, quantize, multiply, scale.

Each row of an activation is rotated as the weight's columns were, and becomes int8 with a scale of
its own. The sums are int32; scales and bias are applied in float32, and the result is rounded once.
What is computed on the CPU and on a card is the same but for the order of sums in the rotation.

Nothing here makes the host wait: the few constants are made when a device is first seen. What is
not finite in a row makes its whole product NaN. Shapes: rows (M, K), weight (N, K), product (M, N).
Sizes are in bytes.
"""

from math import ceil, isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from quant import rotated
from quant.codes import LARGEST_LEVEL

# The sums of a product that are in memory at a time: as many as keep a step's peak where that of 16
# bit is. A product at 1024x1024 is cut in two then, where its output is 21504 wide.
SUM_BYTES = 192 << 20
# On the CPU parts are so small that they stay in its caches.
CPU_ROWS = 1024
# CUDA's _int_mm wants more than 16 rows, and some cards a multiple of 8, or of 32.
ROW_MULTIPLE = 32
# The scale of a row of zeros.
SMALLEST_SCALE = 1e-12
# float16 numbers from 1024 to 2048 are integers, and the lower byte of 1536 + n is that of n: the
# sum of a quotient and this rounds it, half to even, and is its int8 in that byte.
ROUNDER = 1536.0

# What is made once for a device: the matrices that rotate, by dtype and size, and `ROUNDER`.
CONSTANTS: dict[tuple[str, torch.dtype, int], Tensor] = {}


class Int8Rows(NamedTuple):
    """Quantized rows; those of `values` beyond M fill up a multiple of 32, and mean nothing."""

    values: Tensor  # (M or more, K) int8
    scale: Tensor  # (M, 1) float32


class Int8Weight(NamedTuple):
    """A weight as it is multiplied."""

    levels: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32


def rotate_rows(rows: Tensor, rotation: int) -> Tensor:
    """The rows (M, K), rotated in groups of so many columns; 0 returns them as they are.

    They are divided by `find_divisor`. It is one product with the whole matrix. As two with its
    factors of 16 x 16 it would be an eighth of the operations, but another pass over memory, which
    is what a card waits for; on a CPU it is slower in 16 bit, and as fast in 32 (docs/LOG.md).
    """
    if not rotation:
        return rows
    matrix = _find_constant(rows, rotation)
    groups = rows.shape[1] // rotation
    shape = (len(rows), groups, rotation)
    result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    # A product for each group of columns: in this way rows may lie apart from each other.
    torch.bmm(
        rows.view(shape).transpose(0, 1),
        matrix.expand(groups, -1, -1),
        out=result.view(shape).transpose(0, 1),
    )
    return result


def find_divisor(dtype: torch.dtype, rotation: int) -> int:
    """What rotated rows are divided by: where a sum may be too large for float16, a power of 2.

    The largest sum of a group is its largest value times the root of its columns.
    """
    return isqrt(rotation) if rotation and dtype == torch.float16 else 1


def quantize_rows(rows: Tensor, rotation: int) -> Int8Rows:
    """The rows (M, K) of a floating dtype, rotated in groups of `rotation` and then quantized."""
    count, columns = rows.shape
    padded = ceil(count / ROW_MULTIPLE) * ROW_MULTIPLE
    values = torch.empty(padded, columns, dtype=torch.int8, device=rows.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    part_rows = CPU_ROWS if rows.device.type == "cpu" else max(1, count)
    divisor = find_divisor(rows.dtype, rotation)
    parts = zip(
        torch.split(rows, part_rows),
        torch.split(values[:count], part_rows),
        torch.split(scale, part_rows),
        strict=True,
    )
    for part, part_values, part_scale in parts:
        turned = rotate_rows(part, rotation)
        _find_scale(turned, part_scale, divisor=divisor)
        quotients = _make_halves(turned, may_overwrite=turned is not part)
        rounder = _find_constant(rows, 0)
        torch.addcdiv(rounder, turned, part_scale, value=divisor, out=quotients)
        part_values.copy_(quotients.view(torch.int8)[:, ::2])
    return Int8Rows(values, scale)


def _find_scale(rows: Tensor, scale: Tensor, *, divisor: int) -> None:
    """Write the scales (M, 1) of rows (M, K) times `divisor`: their largest values become 127."""
    if rows.device.type == "cpu":  # whose vector_norm is slow
        scale.copy_(rows.abs().amax(1, keepdim=True))
    else:
        torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True, dtype=torch.float32, out=scale)
    scale.div_(LARGEST_LEVEL / divisor).clamp_(min=SMALLEST_SCALE)


def _make_halves(rows: Tensor, *, may_overwrite: bool) -> Tensor:
    """A float16 tensor of the shape of rows, in their memory where that fits."""
    if may_overwrite and rows.dtype.itemsize == torch.float16.itemsize:
        return rows.view(torch.float16)
    return torch.empty(rows.shape, dtype=torch.float16, device=rows.device)


def multiply(
    rows: Int8Rows, weight: Int8Weight, *, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product (M, N) in `dtype` of quantized rows with a weight, plus the bias (N,)."""
    count = len(rows.scale)
    product = torch.empty(count, len(weight.levels), dtype=dtype, device=rows.values.device)
    part_rows = _choose_part(rows.values, width=len(weight.levels))
    parts = zip(
        torch.split(rows.values, part_rows),
        torch.split(rows.scale, part_rows),
        torch.split(product, part_rows),
        strict=True,
    )
    for values, scale, target in parts:
        _multiply_part(Int8Rows(values, scale), weight, bias=bias, target=target)
    return product


def _multiply_part(
    rows: Int8Rows, weight: Int8Weight, *, bias: Tensor | None, target: Tensor
) -> None:
    """Write a product into its target (M, N); the sums are gone before those of the next part."""
    sums = torch._int_mm(rows.values, weight.levels.T)[: len(target)]
    # Scaled, they stay where they are.
    scaled = torch.mul(sums, rows.scale, out=sums.view(torch.float32))
    if bias is None:
        torch.mul(scaled, weight.scale, out=target)
    else:
        torch.addcmul(bias, scaled, weight.scale, out=target)


def _choose_part(values: Tensor, *, width: int) -> int:
    """How many of the rows to multiply at a time: parts of one size, a multiple of 32."""
    if values.device.type == "cpu":
        return CPU_ROWS
    count = len(values)
    parts = max(1, ceil(count * width * torch.int32.itemsize / SUM_BYTES))
    return max(1, ceil(count / parts / ROW_MULTIPLE)) * ROW_MULTIPLE


def _find_constant(like: Tensor, rotation: int) -> Tensor:
    """The matrix (G, G) in a tensor's dtype that rotates groups of so many columns, on its device.

    It is divided by `find_divisor`. For 0 it is `ROUNDER` (1,) in float32.
    """
    dtype = like.dtype if rotation else torch.float32
    key = (str(like.device), dtype, rotation)
    if key not in CONSTANTS:
        if rotation:
            matrix = rotated.make_hadamard(rotation, dtype=dtype, device=like.device)
            CONSTANTS[key] = matrix / find_divisor(dtype, rotation)
        else:
            CONSTANTS[key] = like.new_full((1,), ROUNDER, dtype=dtype)
    return CONSTANTS[key]
