"""Weights whose blocks of 16 or 32 neighbours share a scale in 8 bit: nvfp4 and mxfp8.

nvfp4 has values in float4 (E2M1), two in a byte, a scale in float8_e4m3fn for each 16, and one in
float32 for all. ComfyUI has the first value of a pair in the high half of its byte, and rounds what
it computes to the dtype that it computes in; BFL's own files (diffusers' `BFLQuantizationConfig`)
have the first in the low half, and are computed in float32. mxfp8 has values in float8_e4m3fn and a
power of two for each 32 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
The results are theirs bit for bit.

ComfyUI stores the scales as NVIDIA's matrix units want them: in tiles of 128 rows and 4 columns
(https://docs.nvidia.com/cuda/cublas/index.html#block-scaling-factors-layout). Knows no files, and
nothing of layers. Shapes: weight (N, K), scales (N, K / 16) or (N, K / 32).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quant.spec import FLOAT4, MXFP8, OVERALL_SCALE, ROW_SCALE, SCALE_TILE, find_tiles

# Values that are decoded at a time: on the CPU they stay in its caches; elsewhere launches are few,
# and 64 MiB are taken beside the result.
CPU_PART = 1 << 20
DEVICE_PART = 16 << 20
# A value in E2M1, its exponent and mantissa moved to where float16 has them, is the float16 of
# 2^-14 times the value: float16's exponent has a bias larger by 14.
BIAS = 14
# Where float32 has its exponent, which the scales of mxfp8 are.
EXPONENT_BIT = 23


def order_scales(tiles: Tensor, ranges: Sequence[tuple[int, int]], columns: int) -> Tensor:
    """The scales (N, columns) of these ranges of rows, row after row, from those in tiles.

    `tiles` has what `find_tiles` says of the ranges, one after the other.
    """
    height, width = SCALE_TILE
    # A tile has row r and column c at byte r % 32 * 16 + r // 32 * 4 + c.
    split = tiles.view(torch.uint8).reshape(-1, -(-columns // width), 32, height // 32, width)
    rows = split.permute(0, 3, 2, 1, 4).reshape(-1, split.shape[1] * width)
    parts = []
    at = 0
    for (start, stop), (first, last) in zip(ranges, find_tiles(ranges), strict=True):
        begin = at + start - first
        parts.append(rows[begin : begin + stop - start, :columns])
        at += last - first
    return torch.cat(parts).view(tiles.dtype)


def dequantize(stored: Mapping[str, Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """The values (N, K) in `dtype` of a weight's stored tensors, its scales row after row.

    `scheme` is a form of `quant.spec.SCALED_BLOCKS`. nvfp4's scale of all values may also be one
    for each row, (N, 1).
    """
    codes = stored[""]
    scales = _compute_scales(stored, scheme, dtype)
    rows, groups = scales.shape
    columns = codes.shape[1]
    decode = _make_decoder(scheme, codes.device)
    if scheme != MXFP8:
        columns *= 2
        scales = scales * 2**BIAS
    values = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    part_values = CPU_PART if codes.device.type == "cpu" else DEVICE_PART
    part_rows = max(1, part_values // columns)
    parts = zip(
        torch.split(codes, part_rows),
        torch.split(scales, part_rows),
        torch.split(values, part_rows),
        strict=True,
    )
    for part, part_scales, target in parts:
        shape = (len(part), groups, columns // groups)
        torch.mul(decode(part).view(shape), part_scales[:, :, None], out=target.view(shape))
    return values


def _compute_scales(stored: Mapping[str, Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """The factors (N, groups) of the blocks in float32."""
    scales = stored[ROW_SCALE]
    if scheme == MXFP8:
        # Exponents with float32's own bias; 0 stands for 0.
        return (scales.view(torch.uint8).int() << EXPONENT_BIT).view(torch.float32)
    overall = stored[OVERALL_SCALE].float().reshape(-1, 1)
    scales = scales.float()
    # ComfyUI's float16 is not followed: small scales are subnormal there.
    if scheme == FLOAT4 and dtype == torch.bfloat16:
        return (scales.bfloat16() * overall.bfloat16()).float()
    return scales * overall


def _make_decoder(scheme: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that makes values in float16 of codes; those of nvfp4 are times 2^-14.

    A device looks both values of a byte up at once, as the bits of one int32: that moves a third of
    the bytes. The CPU is faster without.
    """

    def decode(codes: Tensor) -> Tensor:
        if scheme == MXFP8:
            return codes.half()
        return _decode_float4(codes, has_high_first=scheme == FLOAT4)

    if scheme == MXFP8 or device.type == "cpu":
        return decode
    pairs = decode(torch.arange(256, dtype=torch.uint8, device=device)).view(torch.int32)

    def look_up(codes: Tensor) -> Tensor:
        return pairs.index_select(0, codes.flatten().int()).view(torch.float16)

    return look_up


def _decode_float4(codes: Tensor, *, has_high_first: bool) -> Tensor:
    """The values of bytes, two of each one after the other, times 2^-14, in float16."""
    halves = [codes & 15, codes >> 4]
    if has_high_first:
        halves.reverse()
    bits = torch.stack(halves, dim=-1).short()
    sign = (bits & 8) << 12
    magnitude = (bits & 7) << 9
    return (sign | magnitude).view(torch.float16).view(-1)
