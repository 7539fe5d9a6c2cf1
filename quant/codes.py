"""Codes of 4 and 6 bits become the levels that are multiplied, by a table.

A level is what a code stands for times its group's scale, rounded, and at most 127. There are 256
scales in float8_e4m3fn, and two neighbours share one. So both are looked up at once: by the scale,
the upper 2 bits of both codes where they have 6, and the lower 4 bits of both. That moves 6 bytes
for a weight (12 in 6 bits) where the arithmetic itself moves 40. Nothing makes the host wait, but
for the first table on a device. Sizes are in bytes; a weight is (N, K).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.spec import LEVELS

# What 4-bit codes stand for; () in 6 bits, whose codes are numbers.
Codebook = tuple[float, ...]

# The largest level.
LARGEST_LEVEL = 127
# The largest code of w6a8; it is stored with 32 added.
SIX_BIT_LEVEL = 31
# Indexes that are in memory at a time: one takes 4 bytes, for two weights. On the CPU they stay in
# its caches.
INDEX_BYTES = 256 << 20
CPU_INDEX_BYTES = 4 << 20

# Tables of 2^16 entries, or of 2^20 in 6 bits, by device and codebook.
TABLES: dict[tuple[str, Codebook], Tensor] = {}


def read_codebook(stored: Mapping[str, Tensor]) -> Codebook:
    """The codebook of a weight's stored tensors, which have it in RAM."""
    return tuple(stored[LEVELS].tolist()) if LEVELS in stored else ()


def decode(codes: Tensor, group_scale: Tensor, codebook: Codebook) -> Tensor:
    """The levels (N, K) int8 of codes (N, K / 2 or 3 K / 4) int8.

    In 4 bits a byte has two neighbours, the first one in its lower half. In 6 bits these are
    followed by bytes that have the upper 2 bits of four neighbours. `group_scale` (N, groups) is
    float8_e4m3fn, or a wider float, as some converters have it: that takes no table.
    """
    if group_scale.dtype != torch.float8_e4m3fn:
        return _compute_levels(codes, group_scale.float(), codebook)
    rows, groups = group_scale.shape
    pairs = codes.shape[1] if codebook else codes.shape[1] * 2 // 3
    table = _find_table(codebook, str(codes.device))
    result = torch.empty(rows, pairs, dtype=torch.int16, device=codes.device)
    most_bytes = CPU_INDEX_BYTES if codes.device.type == "cpu" else INDEX_BYTES
    part_rows = max(1, most_bytes // (pairs * torch.int32.itemsize))
    parts = zip(
        torch.split(codes.view(torch.uint8), part_rows),
        torch.split(group_scale.view(torch.uint8), part_rows),
        torch.split(result, part_rows),
        strict=True,
    )
    for data, scale, target in parts:
        start = scale.int().mul_(len(table) // 256)  # of each group's part of the table
        low = data[:, :pairs].view(len(data), groups, -1)
        index = torch.add(start[:, :, None], low).view(len(data), pairs)
        if not codebook:
            high = data[:, pairs:]
            index[:, 0::2].add_(high & 15, alpha=256)
            index[:, 1::2].add_(high >> 4, alpha=256)
        torch.index_select(table, 0, index.view(-1), out=target.view(-1))
    return result.view(torch.int8)


def _compute_levels(codes: Tensor, group_scale: Tensor, codebook: Codebook) -> Tensor:
    """As `decode`, of float32 scales."""
    data = codes.view(torch.uint8)
    rows, width = data.shape
    pairs = width if codebook else width * 2 // 3
    low = data[:, :pairs]
    numbers = torch.stack((low & 15, low >> 4), dim=2).view(rows, -1)  # (N, K)
    if codebook:
        levels = torch.tensor(codebook, device=codes.device)
        values = levels.index_select(0, numbers.flatten().int())
    else:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
        high = data[:, pairs:, None] >> shifts & 3
        values = (numbers | high.view(rows, -1) << 4).float().sub_(SIX_BIT_LEVEL + 1)
    groups = values.view(rows, group_scale.shape[1], -1).mul_(group_scale[:, :, None])
    return groups.round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL).char().view(rows, -1)


def _find_table(codebook: Codebook, device: str) -> Tensor:
    key = (device, codebook)
    if key not in TABLES:
        TABLES[key] = _make_table(codebook).to(device)
    return TABLES[key]


def _make_table(codebook: Codebook) -> Tensor:
    """Two levels in each int16, by their index."""
    values = torch.tensor(codebook) if codebook else torch.arange(64.0) - (SIX_BIT_LEVEL + 1)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    # Readers refuse the two scales that are NaN.
    products = values * scales.nan_to_num()[:, None]
    levels = products.round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL).char()
    levels = levels.view(256, -1, 16)  # by scale, upper bits, lower bits
    upper = levels.shape[1]
    # By scale, the second code's upper bits, the first one's; likewise the lower bits.
    pairs = torch.empty(256, upper, upper, 16, 16, 2, dtype=torch.int8)
    pairs[..., 0] = levels[:, None, :, None, :]
    pairs[..., 1] = levels[:, :, None, :, None]
    return pairs.view(torch.int16).view(-1)
