"""Choose the scales of rotated weights, and the codes of w6a8 and w4a8 with them.

int8 has a scale for each row. w6a8 and w4a8 store integers of -127..127, too, in less room: `GROUP`
values share a second scale, in float8_e4m3, and a code says which of 63 or 16 values that scale is
multiplied by; a reader rounds the product to an integer, the level.

Which scale is best for a group is not estimated but looked up: a table has the squared error of
every value, in parts of a step, for each of some scales, with all that a reader's rounding adds to
it. It holds integers, whose sums are below 2**24, and exact in float32 in whatever order. A step is
one of the int8 grid. Knows nothing of rotations, files or layers.
"""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quant.codes import LARGEST_LEVEL, SIX_BIT_LEVEL
from quant.spec import GROUP

# The scale of a row of zeros.
SMALLEST_SCALE = 1e-37
# What the codes of w4a8 stand for: the 16 values of least squared error (Lloyd, Max) for normal
# ones that were divided by the largest of their group. comfy-kitchen 0.2.40 has this table frozen
# (tensor/w4a8_packed.py), its CUDA kernels decode no other.
# fmt: off
NORMAL_LEVELS = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)
# fmt: on

# Scales that are tried for a row, as fractions of the one by which its largest value becomes 127. A
# row of 3072 normal values errs by 0.5 % less than with that one, a row of 12288 by 2.6 %.
ROW_FRACTIONS = tuple(1 - n / 50 for n in range(8))
# Parts of a step that the table of errors tells apart: coarser ones change them by 0.1 % or less.
GROUP_PARTS = 8
GROUP_ROWS = 2 * (LARGEST_LEVEL + 1) * GROUP_PARTS
# Codes are looked up by halves of a step, which is exact: the middle of two levels is one.
HALVES = 2 * (LARGEST_LEVEL + 1) * 2
SHIFT = 2  # GROUP_PARTS / 2 parts are a half: shifting by so many bits divides by them
# The float8_e4m3 numbers from 0 to the largest, by their bits.
FLOAT8_COUNT = 127
# Scales that are tried for a group, and how many of them are below that of its largest value. All
# 126 find nothing better: 0.01 % of the error.
WINDOW = 8
BELOW = 2


def find_largest_scales(values: Tensor) -> Tensor:
    """The scales (N, 1) float32 by which the largest value of each row (N, K) becomes 127."""
    largest = values.abs().amax(1, keepdim=True)
    return largest.div_(LARGEST_LEVEL).clamp_(min=SMALLEST_SCALE)


def choose_row_scales(values: Tensor) -> Tensor:
    """The scales (N, 1) float32 of least error for int8, of values (N, K).

    A smaller scale rounds all values to smaller steps, whose squared error is a twelfth of the
    step's square, and cuts off what is above 127 of them. That can be only few values: it is looked
    at the largest of each 16, 8 or 4, which lie far from each other.
    """
    rows, columns = values.shape
    largest = values.abs().view(rows, gcd(columns, 16), -1).amax(1)
    scales = find_largest_scales(largest)
    fractions = torch.tensor(ROW_FRACTIONS, device=values.device)
    ends = (fractions * LARGEST_LEVEL)[:, None]
    cut = (largest / scales)[:, None].sub(ends).clamp_(min=0)  # (N, fractions, K / 16)
    errors = cut.square_().sum(2) + fractions.square() * (columns / 12)
    return scales * fractions[errors.argmin(1, keepdim=True)]


class Grouped(NamedTuple):
    """Values (N, K) as codes, and the scales of their groups."""

    codes: Tensor  # (N, K) uint8, not packed
    scales: Tensor  # (N, K / GROUP) float8_e4m3fn


def choose_group_scales(values: Tensor, scheme: str) -> Grouped:
    """Choose the scales of least error and the codes of w6a8 or w4a8 for values (N, K) in steps."""
    table, nearest_codes = _make_group_tables(scheme, values.device)
    groups = values.reshape(-1, GROUP)
    largest = groups.abs().amax(1).div_(_list_multiples(scheme)[-1])
    nearest = largest.to(torch.float8_e4m3fn).view(torch.uint8).int()
    first = nearest.sub_(BELOW).clamp_(1, FLOAT8_COUNT - WINDOW)[:, None]
    # Integers are clamped, not values: what is not a number has no row.
    parts = groups.mul(GROUP_PARTS).add_(GROUP_ROWS // 2).int().clamp_(0, GROUP_ROWS - 1)
    errors = functional.embedding_bag(parts + first * GROUP_ROWS, table, mode="sum")
    chosen = first + errors.argmin(1, keepdim=True)  # (groups, 1)
    halves = parts.bitwise_right_shift_(SHIFT).add_(chosen * HALVES)
    codes = nearest_codes.index_select(0, halves.view(-1)).view(values.shape)
    scales = chosen.to(torch.uint8).view(torch.float8_e4m3fn).view(len(values), -1)
    return Grouped(codes, scales)


def drop_tables() -> None:
    """Free what `choose_group_scales` has looked up so far: 8 MB a scheme and device."""
    _make_group_tables.cache_clear()


def _list_multiples(scheme: str) -> Tensor:
    """What a scale is multiplied by, by the codes from the first that is used on."""
    if scheme == "w4a8":
        return torch.tensor(NORMAL_LEVELS)
    return torch.arange(-SIX_BIT_LEVEL, SIX_BIT_LEVEL + 1).float()


@cache
def _make_group_tables(scheme: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `choose_group_scales` looks up.

    The first table (scales * GROUP_ROWS, WINDOW) float32 has, for the first scale of a window and a
    value by its part of a step, the squared errors without the value's own square. The second
    (scales * HALVES) uint8 has the code of the nearest level, by the half of a step.
    """
    scales = torch.arange(FLOAT8_COUNT, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    multiples = _list_multiples(scheme)
    grid = (multiples * scales[:, None]).round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL)
    borders = (grid[:, 1:] + grid[:, :-1]) / 2
    middles = (torch.arange(HALVES) + 0.5) / 2 - LARGEST_LEVEL - 1
    codes = torch.searchsorted(borders, middles.repeat(FLOAT8_COUNT, 1))
    levels = grid.gather(1, codes)  # (scales, HALVES)
    first_code = 0 if scheme == "w4a8" else 1
    nearest_codes = codes.add(first_code).to(torch.uint8)

    # Times GROUP_PARTS, l * l - 2 * l * v is an integer for the middle v of a part.
    levels = levels.repeat_interleave(GROUP_PARTS // 2, 1)  # (scales, GROUP_ROWS)
    doubled = torch.arange(GROUP_ROWS) * 2.0 + 1 - GROUP_ROWS
    errors = (levels * GROUP_PARTS - doubled).mul_(levels)
    windows = errors.unfold(0, WINDOW, 1).contiguous().view(-1, WINDOW)
    return windows.to(device), nearest_codes.view(-1).to(device)
