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

import torch
from torch import Tensor

from quant.codes import LARGEST_LEVEL, SIX_BIT_LEVEL, decode, read_codebook
from quant.spec import (
    CHANNEL_SCALE,
    GROUP,
    GROUP_SCALE,
    LEVELS,
    MARKER,
    ROW_SCALE,
    find_rotation,
    make_marker,
)

# The scale of a row of zeros.
SMALLEST_SCALE = 1e-12
# Values that are quantized at a time.
CHUNK = 1 << 20
# What the codes of w4a8 stand for: the 16 levels of least squared error for normal values that were
# divided by the largest of their group. It is the table of comfy-kitchen's kernels.
# fmt: off
NORMAL_LEVELS = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)
# fmt: on
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
    return (values.reshape(-1, rotation) @ matrix).view(values.shape)


def quantize(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """Return the stored tensors of a (N, K) weight, quantized in a scheme of `quant.spec.ROTATED`.

    The group that is rotated is the largest that divides K. All values have to be finite.
    """
    columns = weight.shape[1]
    parts = []
    for part in torch.split(weight, max(1, CHUNK // columns)):
        rotated = rotate(part.float(), find_rotation(columns))
        parts.append(
            _quantize_rows(rotated) if scheme == "int8" else _quantize_groups(rotated, scheme)
        )
    stored = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
    if scheme == "w4a8":
        stored[LEVELS] = torch.tensor(NORMAL_LEVELS)
    stored[MARKER] = torch.tensor(list(make_marker(scheme, columns)), dtype=torch.uint8)
    return stored


def _quantize_rows(rotated: Tensor) -> dict[str, Tensor]:
    """int8 with a scale for each row (N, 1), of rotated float32 values (N, K)."""
    scale = rotated.abs().amax(1, keepdim=True).div_(LARGEST_LEVEL).clamp_(min=SMALLEST_SCALE)
    codes = (rotated / scale).round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL).char()
    return {"": codes, ROW_SCALE: scale}


def _quantize_groups(rotated: Tensor, scheme: str) -> dict[str, Tensor]:
    """4 or 6 bits with a scale for each group of 16, of rotated float32 values (N, K)."""
    rows, columns = rotated.shape
    groups = rotated.view(rows, columns // GROUP, GROUP)
    largest = groups.abs().amax(2, keepdim=True).clamp_(min=SMALLEST_SCALE)
    if scheme == "w6a8":
        steps = torch.arange(-SIX_BIT_LEVEL, SIX_BIT_LEVEL + 1, device=rotated.device).float()
        scale = largest / SIX_BIT_LEVEL
    else:
        steps = torch.tensor(NORMAL_LEVELS, device=rotated.device)
        scale = largest
    middles = (steps[1:] + steps[:-1]) / 2
    for _ in range(2):
        values = steps[torch.bucketize(groups / scale, middles)]
        squared = values.square().sum(2, keepdim=True).clamp_(min=SMALLEST_SCALE)
        scale = (groups * values).sum(2, keepdim=True).div_(squared).clamp_(min=SMALLEST_SCALE)
    values = steps[torch.bucketize(groups / scale, middles)] * scale
    channel = values.abs().amax((1, 2)).div_(LARGEST_LEVEL).clamp_(min=SMALLEST_SCALE)
    relative = (scale[:, :, 0] / channel[:, None]).to(torch.float8_e4m3fn)
    grid = (steps * relative.float()[:, :, None]).round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL)
    middles = (grid[:, :, 1:] + grid[:, :, :-1]) / 2
    codes = torch.searchsorted(middles, groups / channel[:, None, None]).view(rows, columns)
    if scheme == "w6a8":
        codes += 1
    return {"": _pack(codes, scheme), GROUP_SCALE: relative, CHANNEL_SCALE: channel}


def _pack(codes: Tensor, scheme: str) -> Tensor:
    """The bytes (N, B) int8 of unsigned codes (N, K).

    The lower 4 bits of two columns are a byte, the even column's lower; in 6 bits the upper 2 bits
    of four columns follow in bytes behind those of the row.
    """
    codes = codes.to(torch.uint8)
    low = (codes[:, 0::2] & 15) | ((codes[:, 1::2] & 15) << 4)
    if scheme == "w4a8":
        return low.view(torch.int8)
    high = codes >> 4
    upper = high[:, 0::4] | (high[:, 1::4] << 2) | (high[:, 2::4] << 4) | (high[:, 3::4] << 6)
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
