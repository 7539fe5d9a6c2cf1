"""GGUF's blocks of values: codes of 2 to 8 bits with scales, unpacked on the device that has them.

The layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`). The results are those of the gguf
package and of diffusers bit for bit, which compute in float32, too: a scale times a code is exact
there, so that only the sum with a minimum rounds, and then the cast to the dtype that is asked for.

Nothing is uploaded: the few constants are made on the device, so that the host never waits. Each
kind has a function that takes its blocks (n, B) apart. A block's values are in groups (n, G, S) of
neighbours with one scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quant.tensor_info import GGUF_BITS, gguf_block_values

# Values that are unpacked at a time. On the CPU the parts stay in its caches. Elsewhere launches
# are to be few, and what is taken beside the result is to stay below 80 MiB: the codes and what
# they are put together from, 2 bytes a value, and 6 where they are looked up in a table.
CPU_PART = 1 << 20
DEVICE_PART = 32 << 20
TABLE_PART = 8 << 20
# What the 16 codes of IQ4_NL and IQ4_XS stand for.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Unpacked(NamedTuple):
    """Blocks taken apart: a value is scale x code + least. Scales and leasts are float32."""

    scales: Tensor  # (n, G, 1)
    codes: Tensor  # (n, G, S), of 8 bits
    leasts: Tensor | None = None  # (n, G, 1)


def unpack(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The values (N, K) in `dtype` of blocks of a kind, which are given as rows of bytes (N, B)."""
    block_values = gguf_block_values(kind)
    block_bytes = int(GGUF_BITS[kind] * block_values) // 8
    columns = rows.shape[1] // block_bytes * block_values
    values = torch.empty(rows.shape[0], columns, dtype=dtype, device=rows.device)
    part_values = TABLE_PART if kind.startswith("IQ4") else DEVICE_PART
    if rows.device.type == "cpu":
        part_values = CPU_PART
    part_rows = max(1, part_values // columns)
    parts = zip(torch.split(rows, part_rows), torch.split(values, part_rows), strict=True)
    for part, target in parts:
        unpacked = UNPACKERS[kind](part.reshape(-1, block_bytes))
        _multiply(unpacked, target.view(unpacked.codes.shape))
    return values


def _multiply(unpacked: Unpacked, target: Tensor) -> None:
    """Write the values (n, G, S) into the target, whose dtype they are rounded to."""
    scales, codes, leasts = unpacked
    if leasts is None:
        torch.mul(scales, codes, out=target)
    elif target.device.type == "cpu":  # whose addcmul of several dtypes is slow
        torch.add(scales * codes, leasts, out=target)
    else:
        torch.addcmul(leasts, scales, codes, out=target)


def _read_halves(blocks: Tensor, index: int) -> Tensor:
    """The float16 number (n, 1) at a place of the blocks that is counted in pairs of bytes."""
    return blocks.view(torch.float16)[:, index : index + 1].float()


def _take_codes(data: Tensor, bits: int, *, at: int = 0) -> Tensor:
    """The codes of so many bits in bytes (n, R, C), the lowest first: (n, R, 8 / bits, C).

    Each is in a byte of its own, whose bits below `at` are 0.
    """
    count = 8 // bits
    mask = ((1 << bits) - 1) << at
    codes = data.new_empty(data.shape[0], data.shape[1], count, data.shape[2])
    for index in range(count):
        target = codes[:, :, index]
        shift = bits * index - at
        if shift == 0:
            torch.bitwise_and(data, mask, out=target)
            continue
        if shift > 0:
            torch.bitwise_right_shift(data, shift, out=target)
        else:
            torch.bitwise_left_shift(data, -shift, out=target)
        is_alone = index == count - 1 and at == 0
        if not is_alone:
            target.bitwise_and_(mask)
    return codes


def _spread_bits(data: Tensor, dim: int, *, at: int) -> Tensor:
    """The 8 bits of bytes in a new dimension, the lowest first; each becomes bit `at` of a byte."""
    shape = [1] * (data.ndim + 1)
    shape[dim] = 8
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device).view(shape)
    bits = data.unsqueeze(dim) >> shifts
    return bits.bitwise_and_(1).bitwise_left_shift_(at)


def _center(codes: Tensor, middle: int) -> Tensor:
    """Unsigned codes minus the one that stands for 0, as int8; the codes' memory is used."""
    return codes.sub_(middle).view(torch.int8)


# --- 32 values with one scale: 4-bit codes are the low halves of 16 bytes, then the high ones


def _take_halves(data: Tensor) -> Tensor:
    """4-bit codes (n, 1, 32) of 16 bytes (n, 16)."""
    return _take_codes(data[:, None], 4).flatten(1)[:, None]


def _take_five_bits(fifths: Tensor, data: Tensor) -> Tensor:
    """5-bit codes (n, 1, 32): the highest bits in 4 bytes (n, 4), the others in 16 (n, 16)."""
    high = _spread_bits(fifths, 2, at=4).flatten(1)[:, None]
    return high.bitwise_or_(_take_halves(data))


def _unpack_q8_0(blocks: Tensor) -> Unpacked:
    # A scale, 32 signed codes.
    codes = blocks[:, None, 2:].view(torch.int8)
    return Unpacked(_read_halves(blocks, 0)[:, None], codes)


def _unpack_q4_0(blocks: Tensor) -> Unpacked:
    # A scale, the codes.
    codes = _center(_take_halves(blocks[:, 2:]), 8)
    return Unpacked(_read_halves(blocks, 0)[:, None], codes)


def _unpack_q4_1(blocks: Tensor) -> Unpacked:
    # A scale, a minimum, the codes.
    leasts = _read_halves(blocks, 1)[:, None]
    return Unpacked(_read_halves(blocks, 0)[:, None], _take_halves(blocks[:, 4:]), leasts)


def _unpack_q5_0(blocks: Tensor) -> Unpacked:
    # A scale, the fifth bits, the codes.
    codes = _center(_take_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16)
    return Unpacked(_read_halves(blocks, 0)[:, None], codes)


def _unpack_q5_1(blocks: Tensor) -> Unpacked:
    # A scale, a minimum, the fifth bits, the codes.
    codes = _take_five_bits(blocks[:, 4:8], blocks[:, 8:])
    leasts = _read_halves(blocks, 1)[:, None]
    return Unpacked(_read_halves(blocks, 0)[:, None], codes, leasts)


def _unpack_iq4_nl(blocks: Tensor) -> Unpacked:
    # A scale, the codes.
    levels = _look_up(_take_halves(blocks[:, 2:]))
    return Unpacked(_read_halves(blocks, 0)[:, None], levels)


# --- 256 values in groups, whose scales are multiples of the block's unit


def _unpack_q2_k(blocks: Tensor) -> Unpacked:
    # 16 bytes with a group's scale in the low half and its minimum in the high one; 64 bytes of
    # codes: each 32 have 128 values; the units of scales and minimums.
    factors = _take_codes(blocks[:, None, :16], 4)[:, 0]
    scales = _read_halves(blocks, 40) * factors[:, 0]
    leasts = -_read_halves(blocks, 41) * factors[:, 1]
    codes = _take_codes(blocks[:, 16:80].view(-1, 2, 32), 2)
    return Unpacked(scales[:, :, None], codes.view(-1, 16, 16), leasts[:, :, None])


def _unpack_q3_k(blocks: Tensor) -> Unpacked:
    # 32 bytes of third bits, whose bit k is for the values from 32 * k; 64 bytes of codes as in
    # Q2_K; 16 scales of 6 bits: the low 4 in 8 bytes, the high 2 in 4 bytes; their unit.
    low = _take_codes(blocks[:, None, 96:104], 4).flatten(1)
    high = _take_codes(blocks[:, None, 104:108], 2, at=4).flatten(1)
    scales = _read_halves(blocks, 54) * _center(low.bitwise_or_(high), 32)
    codes = _spread_bits(blocks[:, :32], 1, at=2).view(-1, 16, 16)
    codes.bitwise_or_(_take_codes(blocks[:, 32:96].view(-1, 2, 32), 2).view(-1, 16, 16))
    return Unpacked(scales[:, :, None], _center(codes, 4))


def _read_group_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the leasts (n, 8, 1) of Q4_K and Q5_K.

    A unit of each, then 12 bytes: of the first four groups the 6 bits of the scales, then those of
    the minimums; of the others the low 4 bits of both, whose high 2 are above the first ones.
    """
    packed = blocks[:, 4:12]
    first = packed & 63
    high = (packed >> 2) & 48
    low = _take_codes(blocks[:, None, 12:16], 4)[:, 0]
    scales = torch.cat((first[:, :4], high[:, :4] | low[:, 0]), dim=1)
    leasts = torch.cat((first[:, 4:], high[:, 4:] | low[:, 1]), dim=1)
    scales = _read_halves(blocks, 0) * scales
    leasts = -_read_halves(blocks, 1) * leasts
    return scales[:, :, None], leasts[:, :, None]


def _unpack_q4_k(blocks: Tensor) -> Unpacked:
    # Scales; 128 bytes of codes: each 32 have two groups.
    scales, leasts = _read_group_scales(blocks)
    codes = _take_codes(blocks[:, 16:].view(-1, 4, 32), 4)
    return Unpacked(scales, codes.view(-1, 8, 32), leasts)


def _unpack_q5_k(blocks: Tensor) -> Unpacked:
    # Scales; 32 bytes of fifth bits, whose bit k is for group k; codes as in Q4_K.
    scales, leasts = _read_group_scales(blocks)
    codes = _spread_bits(blocks[:, 16:48], 1, at=4)
    codes.bitwise_or_(_take_codes(blocks[:, 48:].view(-1, 4, 32), 4).view(-1, 8, 32))
    return Unpacked(scales, codes, leasts)


def _unpack_q6_k(blocks: Tensor) -> Unpacked:
    # 128 bytes with the low 4 bits: each 64 have 128 values; 64 bytes with the high 2, as in Q2_K;
    # 16 signed scales; their unit.
    scales = _read_halves(blocks, 104) * blocks[:, 192:208].view(torch.int8)
    codes = _take_codes(blocks[:, 128:192].view(-1, 2, 32), 2, at=4).view(-1, 16, 16)
    codes.bitwise_or_(_take_codes(blocks[:, :128].view(-1, 2, 64), 4).view(-1, 16, 16))
    return Unpacked(scales[:, :, None], _center(codes, 32))


def _unpack_iq4_xs(blocks: Tensor) -> Unpacked:
    # A unit; the high 2 bits of 8 groups' scales in 2 bytes, the low 4 in 4; 128 bytes of codes:
    # each 16 have one group.
    low = _take_codes(blocks[:, 4:8, None], 4).flatten(1)
    high = _take_codes(blocks[:, 2:4, None], 2, at=4).flatten(1)
    scales = _read_halves(blocks, 0) * _center(low.bitwise_or_(high), 32)
    levels = _look_up(_take_codes(blocks[:, 8:].view(-1, 8, 16), 4).view(-1, 8, 32))
    return Unpacked(scales[:, :, None], levels)


def _look_up(codes: Tensor) -> Tensor:
    """What the codes of IQ4_NL and IQ4_XS stand for, as int8."""
    # Filled one by one, for an upload would make the host wait.
    levels = [codes.new_full((1,), level, dtype=torch.int8) for level in IQ4_LEVELS]
    return torch.cat(levels).index_select(0, codes.flatten().int()).view(codes.shape)


UNPACKERS: dict[str, Callable[[Tensor], Unpacked]] = {
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q5_0": _unpack_q5_0,
    "Q5_1": _unpack_q5_1,
    "Q8_0": _unpack_q8_0,
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "IQ4_NL": _unpack_iq4_nl,
    "IQ4_XS": _unpack_iq4_xs,
}
