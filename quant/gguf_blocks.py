"""GGUF's blocks of values: codes of 2 to 8 bits with scales, unpacked on the device that has them.

The layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`). The results are those of the gguf
package and of diffusers bit for bit, which compute in float32, too: a scale times a code is exact
there, so that only the difference to a minimum rounds, and then the cast to the dtype that is asked
for.

Launches are what a card waits for here, so that no kind takes more than ten for 64 MiB of a result
in 16 bit. Nothing is uploaded: the few constants of a kind are one table, which is filled in on the
device, so that the host never waits. Some ways of doing two things at once come back:

- Fields of 2 bits are shifted down together, (n, 4, bytes): what is above a field is masked, or
  left where a product that wraps at 8 bits drops it.
- `x | 252` of a field of 2 bits is the field minus 4, as int8; a field at the top of a byte whose
  highest bit is turned over is the field minus 2, as int8, when it is shifted down.
- `out=` of float32 converts what was computed in 8 bits.

Each kind has a function that takes its blocks (n, B) apart. A block's values are in groups of
neighbours with one scale; codes have one dimension or more for the groups, and a last one for what
is in them.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quant.tensor_info import GGUF_BITS, gguf_block_values

# Values that are unpacked at a time. On the CPU the parts stay in its caches. Elsewhere launches
# are to be few, and what is taken beside the result is to stay small: 1.9 bytes a value of the lean
# kinds at most, 3.1 of the others, 5.4 of IQ4_XS (`plan.costs` counts with 96 and 176 MiB).
CPU_PART = 1 << 20
DEVICE_PART = 32 << 20
LEAN_PART = 48 << 20
LEAN = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K")
# Kinds of devices of which some or all have no float64.
WITHOUT_DOUBLES = ("mps", "xpu")
# What the 16 codes of IQ4_NL and IQ4_XS stand for.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Unpacked(NamedTuple):
    """Blocks taken apart: a value is sign x scale x code + least. Scales and leasts are float32.

    Both have the codes' dimensions; those of what shares one are 1 long.
    """

    scales: Tensor
    codes: Tensor  # (n, ..., S), of 8 bits
    leasts: Tensor | None = None
    sign: int = 1


def unpack(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The values (N, K) in `dtype` of blocks of a kind, which are given as rows of bytes (N, B)."""
    block_values = gguf_block_values(kind)
    block_bytes = int(GGUF_BITS[kind] * block_values) // 8
    columns = rows.shape[1] // block_bytes * block_values
    values = torch.empty(rows.shape[0], columns, dtype=dtype, device=rows.device)
    part_values = LEAN_PART if kind in LEAN else DEVICE_PART
    if rows.device.type == "cpu":
        part_values = CPU_PART
    part_rows = max(1, part_values // columns)
    parts = zip(torch.split(rows, part_rows), torch.split(values, part_rows), strict=True)
    for part, target in parts:
        # Without a name: one part's memory is free before the next one's is taken.
        _multiply(UNPACKERS[kind](part.reshape(-1, block_bytes)), target)
    return values


def _multiply(unpacked: Unpacked, target: Tensor) -> None:
    """Write the values into the target, whose dtype they are rounded to."""
    scales, codes, leasts, sign = unpacked
    target = target.view(codes.shape)
    if leasts is None:
        torch.mul(scales, codes, out=target)
    elif target.device.type == "cpu":  # whose addcmul of several dtypes is slow
        torch.add(leasts, scales * codes, alpha=sign, out=target)
    else:
        torch.addcmul(leasts, scales, codes, value=sign, out=target)


def _view_halves(blocks: Tensor, index: int, count: int = 1) -> Tensor:
    """Float16 numbers (n, count) from a place in the blocks on, counted in pairs of bytes."""
    return blocks.view(torch.float16)[:, index : index + count]


def _negate_halves(blocks: Tensor, index: int) -> Tensor:
    """The two numbers (n, 2) from a place on as `_view_halves` has them, negated and in float32."""
    halves = _view_halves(blocks, index, 2)
    return torch.mul(halves, -1, out=_make_floats(halves))


def _make_table(blocks: Tensor, numbers: Sequence[int]) -> Tensor:
    """At most 16 numbers of 8 bits, as uint8, where the blocks are.

    They are the bits of one complex number: filling that in is one launch. It is three, of two
    integers, where there are no doubles.
    """
    bits = bytes(number & 255 for number in numbers).ljust(16, b"\0")
    if blocks.device.type in WITHOUT_DOUBLES:
        integers = struct.unpack("<2q", bits)
        table = torch.cat([blocks.new_full((1,), each, dtype=torch.int64) for each in integers])
    else:
        number = complex(*struct.unpack("<2d", bits))
        table = blocks.new_full((1,), number, dtype=torch.complex128)
    return table.view(torch.uint8)[: len(numbers)]


def _split_bytes(data: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The low halves of bytes (n, B), and the high ones: (n, 2, B) of 4 bits each."""
    halves = data.new_empty(data.shape[0], 2, data.shape[1], dtype=dtype)
    torch.bitwise_and(data, 15, out=halves[:, 0])
    torch.bitwise_right_shift(data, 4, out=halves[:, 1])
    return halves


def _shift_fields(data: Tensor, shifts: Tensor) -> Tensor:
    """Bytes (n, B) shifted down by each of the four shifts: (n, 4, B)."""
    return data[:, None] >> shifts[:, None]


# --- 32 values with one scale: 4-bit codes are the low halves of 16 bytes, then the high ones


def _take_five_bits(fifths: Tensor, data: Tensor) -> Tensor:
    """5-bit codes (n, 32): the highest bits in 4 bytes (n, 4), the others in 16 (n, 16)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = (fifths[:, :, None] >> shifts).bitwise_and_(1)
    return _split_bytes(data).flatten(1).add_(bits.flatten(1), alpha=16)


def _unpack_q8_0(blocks: Tensor) -> Unpacked:
    # A scale, 32 signed codes.
    return Unpacked(_view_halves(blocks, 0).float(), blocks[:, 2:].view(torch.int8))


def _unpack_q4_0(blocks: Tensor) -> Unpacked:
    # A scale, the codes.
    codes = _split_bytes(blocks[:, 2:]).flatten(1).sub_(8).view(torch.int8)
    return Unpacked(_view_halves(blocks, 0).float(), codes)


def _unpack_q4_1(blocks: Tensor) -> Unpacked:
    # A scale, a minimum, the codes.
    units = _view_halves(blocks, 0, 2).float()
    return Unpacked(units[:, :1], _split_bytes(blocks[:, 4:]).flatten(1), units[:, 1:])


def _unpack_q5_0(blocks: Tensor) -> Unpacked:
    # A scale, the fifth bits, the codes.
    codes = _take_five_bits(blocks[:, 2:6], blocks[:, 6:]).sub_(16).view(torch.int8)
    return Unpacked(_view_halves(blocks, 0).float(), codes)


def _unpack_q5_1(blocks: Tensor) -> Unpacked:
    # A scale, a minimum, the fifth bits, the codes.
    units = _view_halves(blocks, 0, 2).float()
    return Unpacked(units[:, :1], _take_five_bits(blocks[:, 4:8], blocks[:, 8:]), units[:, 1:])


def _unpack_iq4_nl(blocks: Tensor) -> Unpacked:
    # A scale, the codes. A byte is looked up as a whole: two levels, that of its low half first.
    levels = _make_table(blocks, IQ4_LEVELS)
    pairs = torch.stack((levels.expand(16, 16), levels[:, None].expand(16, 16)), dim=2)
    found = pairs.view(torch.int16).view(256).index_select(0, blocks[:, 2:].int().view(-1))
    codes = found.view(torch.int8).view(-1, 16, 2).transpose(1, 2)
    return Unpacked(_view_halves(blocks, 0).float()[:, None], codes)


# --- 256 values in groups, whose scales are multiples of the block's unit


def _unpack_q2_k(blocks: Tensor) -> Unpacked:
    # 16 bytes with a group's scale in the low half and its minimum in the high one; 64 bytes of
    # codes: each 32 have 128 values, the lowest fields first; the units of scales and minimums.
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    fields = _shift_fields(blocks[:, :80], shifts)
    fields[:, 0, :16].bitwise_and_(15)
    fields[:, :, 16:].bitwise_and_(3)
    factors = fields[:, ::2, :16] * _negate_halves(blocks, 40)[:, :, None]
    scales, leasts = factors.view(-1, 2, 2, 4, 2, 1).unbind(1)
    codes = fields[:, :, 16:].view(-1, 4, 2, 2, 16).transpose(1, 2)
    return Unpacked(scales, codes, leasts, sign=-1)


def _unpack_q3_k(blocks: Tensor) -> Unpacked:
    # 32 bytes of third bits, whose bit k is for the values from 32 * k; 64 bytes of codes as in
    # Q2_K; 16 scales of 6 bits: the low 4 in 8 bytes, the high 2 in 4 bytes; their unit.
    table = _make_table(blocks, (0, 2, 4, 6, 1, 2, 4, 2, 15, 15, 3))
    fields = _shift_fields(blocks[:, :108], table[:4])
    codes = fields[:, :, 32:96].bitwise_or_(252).view(torch.int8)
    codes = codes.view(-1, 2, 2, 2, 32).permute(0, 3, 1, 2, 4)
    # Of the third bits, two of a field: bits 0 and 1 are worth 4 and 2 times what they are here.
    bits = (fields[:, :, None, :32] & table[4:6, None]).view(torch.int8)
    codes.addcmul_(bits.view(codes.shape), table[6:8, None].view(torch.int8))
    parts = fields[:, :, 96:].view(-1, 4, 3, 4)
    parts.bitwise_and_(table[8:, None])
    low = fields[:, ::2, 96:104].view(-1, 2, 2, 4)
    high = fields[:, :, 104:].view(-1, 2, 2, 4)
    scales = torch.add(low, high, alpha=16, out=_make_floats(low))
    scales.sub_(32).mul_(_view_halves(blocks, 54)[:, :, None, None])
    return Unpacked(scales.view(-1, 2, 2, 2, 2, 1), codes.view(-1, 2, 2, 2, 2, 16))


def _make_floats(like: Tensor) -> Tensor:
    """Room for float32 numbers in this shape."""
    return like.new_empty(like.shape, dtype=torch.float32)


def _read_group_scales(blocks: Tensor, low: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the leasts (n, 2, 2, 2, 1) of Q4_K and Q5_K, negated.

    A unit of each, then 12 bytes: of the first four groups the 6 bits of the scales, then those of
    the minimums; of the others the `low` 4 bits of both (n, 2, 4), whose high 2 are above the first
    ones. `masks` are 63 and 192.
    """
    factors = blocks.new_empty(blocks.shape[0], 2, 2, 4, dtype=torch.float32)
    six_bits = blocks[:, 4:12].view(-1, 1, 2, 4)
    torch.bitwise_and(six_bits, masks.view(2, 1, 1), out=factors)
    torch.add(low, factors[:, 1], alpha=0.25, out=factors[:, 1])
    factors.mul_(_negate_halves(blocks, 0)[:, None, :, None])
    scales, leasts = factors.view(-1, 2, 2, 2, 2, 1).unbind(2)
    return scales, leasts


def _order_groups(halves: Tensor) -> Tensor:
    """Codes (n, 2, 2, 2, 32) by groups, from halves (n, 2, 128): each 32 bytes have two groups."""
    return halves.view(-1, 2, 2, 2, 32).permute(0, 2, 3, 1, 4)


def _unpack_q4_k(blocks: Tensor) -> Unpacked:
    # Scales; 128 bytes of codes: each 32 have two groups.
    table = _make_table(blocks, (63, 192))
    halves = _split_bytes(blocks[:, 12:])
    scales, leasts = _read_group_scales(blocks, halves[:, :, :4], table)
    return Unpacked(scales, _order_groups(halves[:, :, 4:]), leasts, sign=-1)


def _unpack_q5_k(blocks: Tensor) -> Unpacked:
    # Scales; 32 bytes of fifth bits, whose bit k is for group k; codes as in Q4_K.
    table = _make_table(blocks, (63, 192, 1, 2, 4, 8, 16, 8, 4, 2))
    halves = _split_bytes(blocks[:, 12:])
    scales, leasts = _read_group_scales(blocks, halves[:, :, :4], table[:2])
    codes = _order_groups(halves[:, :, 36:])
    # Of a half of a byte, bit k is worth 16 / 2^k times what it is there.
    bits = halves[:, :, None, 4:36] & table[2:6, None]
    codes.addcmul_(bits.view(codes.shape), table[6:].view(2, 2, 1))
    return Unpacked(scales, codes, leasts, sign=-1)


def _unpack_q6_k(blocks: Tensor) -> Unpacked:
    # 128 bytes with the low 4 bits: each 64 have 128 values; 64 bytes with the high 2, as in Q2_K;
    # 16 signed scales; their unit.
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = _shift_fields(blocks[:, 128:192], shifts).bitwise_and_(3)
    codes = _split_bytes(blocks[:, :128]).view(-1, 2, 2, 2, 32)
    codes.add_(high.view(codes.shape).transpose(2, 3), alpha=16).sub_(32)
    codes = codes.view(torch.int8).view(-1, 2, 2, 2, 2, 16).transpose(1, 2)
    scales = _view_halves(blocks, 104).float() * blocks[:, 192:208].view(torch.int8)
    return Unpacked(scales.view(-1, 2, 2, 2, 2, 1), codes)


def _unpack_iq4_xs(blocks: Tensor) -> Unpacked:
    # A unit; the high 2 bits of 8 groups' scales in 2 bytes, the low 4 in 4; 128 bytes of codes:
    # each 16 have one group.
    halves = _split_bytes(blocks[:, 4:], torch.int32)  # which can be looked up
    levels = _make_table(blocks, IQ4_LEVELS).view(torch.int8)
    codes = levels.index_select(0, halves.view(-1)).view(halves.shape)[:, :, 4:]
    # To the top of a byte, turned over, and down again: minus 2.
    table = _make_table(blocks, (64, 16, 4, 1, 128))
    high = torch.addcmul(table[4:], blocks[:, 2:4, None], table[:4])
    high = high.view(torch.int8).bitwise_right_shift_(6)
    low = halves[:, :, :4].transpose(1, 2)
    scales = torch.add(low, high.view(low.shape), alpha=16, out=_make_floats(low))
    scales.mul_(_view_halves(blocks, 0)[:, :, None])
    codes = codes.view(-1, 2, 8, 16).transpose(1, 2)
    return Unpacked(scales.view(-1, 8, 1, 1), codes)


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
