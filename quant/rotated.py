"""Weights whose columns were rotated before they were quantized: int8, w6a8 and w4a8.

A Hadamard matrix spreads what is large in few columns over all columns of their group, so that the
scale of a row fits them all. An activation is rotated in the same way before its product, which
leaves the product as it is, for the matrix is its own inverse. The forms are ComfyUI's
(`int8_tensorwise` with ConvRot, `asym_w4a8_int8`), byte for byte.

A weight's stored tensors are a dict by suffix, as in `quant.spec.lay_out`. Its levels are the
integers of -127 to 127 that are multiplied: the codes of int8, or what the codes of 4 and 6 bits
become by the scales of their groups. Knows nothing of files, layers or models; computes on the
device of the tensors that it is given.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quant.codes import LARGEST_LEVEL, decode, read_codebook
from quant.scales import (
    NORMAL_LEVELS,
    choose_group_scales,
    choose_row_scales,
    find_largest_scales,
)
from quant.spec import (
    CHANNEL_SCALE,
    GROUP_SCALE,
    LEVELS,
    MARKER,
    ROW_SCALE,
    find_rotation,
    make_marker,
)

# Values that are quantized at a time: on a CPU as many as stay in its cache.
CPU_CHUNK = 1 << 19
CARD_CHUNK = 1 << 22
HADAMARD_4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def make_hadamard(size: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The matrix (size, size) that rotates a group of so many columns, a power of 4.

    It is symmetric and its own inverse; all its values are 1 or -1 divided by the root of the size.
    """
    four = torch.tensor(HADAMARD_4, dtype=dtype, device=device) / 2
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix


def rotate(values: Tensor, rotation: int) -> Tensor:
    """Rotate the last dimension in groups of `rotation` columns; 0 leaves it as it is."""
    if not rotation:
        return values
    matrix = make_hadamard(rotation, dtype=values.dtype, device=values.device)
    # Two shapes of a product may differ in a bit: it has the shape of comfy-kitchen's.
    groups = values.reshape(*values.shape[:-1], values.shape[-1] // rotation, rotation)
    return (groups @ matrix.T).reshape(values.shape)


class Rounded(NamedTuple):
    """A quantized weight: its stored tensors, and squared norms of the weight and of its error."""

    stored: dict[str, Tensor]
    squared_norm: float
    squared_error: float


def quantize(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """Return the stored tensors of a (N, K) weight, quantized in a scheme of `quant.spec.ROTATED`.

    The group that is rotated is the largest that divides K. All values have to be finite.
    """
    return round_weight(weight, scheme).stored


def round_weight(weight: Tensor, scheme: str) -> Rounded:
    """Quantize as `quantize` does, and measure the error of what is stored.

    Rows are independent of each other, and are done in parts of whole rows, so that little memory
    is taken beside the result. What is stored depends neither on these parts nor on threads.
    """
    rotation = find_rotation(weight.shape[1])
    chunk = CARD_CHUNK if weight.is_cuda else CPU_CHUNK
    stored: dict[str, Tensor] = {}
    squared_norm = 0.0
    squared_error = 0.0
    start = 0
    for rows in torch.split(weight, max(1, chunk // weight.shape[1])):
        steps, scale, part = _round_rows(rotate_in_two(rows, rotation), scheme)
        for suffix, tensor in part.items():
            if suffix not in stored:
                stored[suffix] = tensor.new_empty(len(weight), *tensor.shape[1:])
            stored[suffix][start : start + len(rows)] = tensor
        start += len(rows)
        # A rotation keeps lengths: the error is the same before it and after it.
        squared_norm += _sum_squares(steps, scale)
        levels = decode_levels(part | _list_levels(scheme), scheme)
        squared_error += _sum_squares(steps.sub_(levels.float()), scale)
    stored |= _list_levels(scheme)
    stored[MARKER] = torch.tensor(list(make_marker(scheme, weight.shape[1])), dtype=torch.uint8)
    return Rounded(stored, squared_norm, squared_error)


def _round_rows(values: Tensor, scheme: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Quantize rotated rows (N, K), which are overwritten.

    Returns them in steps of the int8 grid, these steps (N, 1), and the tensors that rows have.
    """
    if scheme == "int8":
        scale = choose_row_scales(values)
        steps = values.div_(scale)
        codes = steps.round().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL).char()
        return steps, scale, {"": codes, ROW_SCALE: scale}
    scale = find_largest_scales(values)
    steps = values.div_(scale)
    found = choose_group_scales(steps, scheme)
    packed = _pack(found.codes, scheme)
    return steps, scale, {"": packed, GROUP_SCALE: found.scales, CHANNEL_SCALE: scale.view(-1)}


def rotate_in_two(values: Tensor, rotation: int) -> Tensor:
    """Rotate rows (N, K) of any float dtype, to float32, by two products with at most 16 columns.

    It is `rotate` but for rounding, and takes a fifth of its time on a CPU. There the 16 products
    are added up in their order, while the order of 256 depends on the number of rows.
    """
    inner = min(rotation, 16)
    matrix = make_hadamard(inner, dtype=torch.float32, device=values.device)
    turned = values.float().reshape(-1, inner) @ matrix
    if rotation > inner:
        outer = rotation // inner
        matrix = make_hadamard(outer, dtype=torch.float32, device=values.device)
        turned = matrix @ turned.view(-1, outer, inner)
    return turned.view(values.shape)


def _sum_squares(steps: Tensor, scale: Tensor) -> float:
    """The sum of the squares of values (N, K) in steps, which are as large as `scale` (N, 1)."""
    lengths = torch.linalg.vector_norm(steps, dim=1, keepdim=True)
    return float(lengths.double().mul_(scale).square_().sum())


def _list_levels(scheme: str) -> dict[str, Tensor]:
    """What the codes of w4a8 stand for, as a stored tensor in RAM; the others have none."""
    if scheme != "w4a8":
        return {}
    return {LEVELS: torch.tensor(NORMAL_LEVELS)}


def _pack(codes: Tensor, scheme: str) -> Tensor:
    """The bytes (N, B) int8 of codes (N, K) uint8.

    The lower 4 bits of two columns are a byte, the even column's lower; in 6 bits the upper 2 bits
    of four columns follow in bytes behind those of the row.
    """
    low = (codes[:, 0::2] & 15) | ((codes[:, 1::2] & 15) << 4)
    if scheme == "w4a8":
        return low.view(torch.int8)
    high = codes >> 4
    upper = high[:, 0::4]
    for n in range(1, 4):
        upper = upper | (high[:, n::4] << 2 * n)
    return torch.cat((low, upper), 1).view(torch.int8)


def decode_levels(stored: Mapping[str, Tensor], scheme: str) -> Tensor:
    """The levels (N, K) int8 of a weight's stored tensors."""
    if scheme == "int8":
        return stored[""]
    return decode(stored[""], stored[GROUP_SCALE], read_codebook(stored))


def dequantize(
    stored: Mapping[str, Tensor], scheme: str, *, rotation: int, dtype: torch.dtype
) -> Tensor:
    """The values (N, K) in `dtype` of a weight's stored tensors.

    With scales for groups they are rotated back in `dtype`, else in float32, as ComfyUI does it.
    """
    levels = decode_levels(stored, scheme).float()
    if scheme == "int8":
        scale = stored[ROW_SCALE].float().reshape(-1, 1)
        return rotate(levels.mul_(scale), rotation).to(dtype)
    return rotate(levels.mul_(stored[CHANNEL_SCALE][:, None]).to(dtype), rotation)
