"""Quantize weights to bitsandbytes' NF4, each block's scale either its absmax or searched.

64 weights share a scale ("absmax" in the format's names) and are stored as 4-bit codes, which are
indexes into 16 values. 256 scales share a second one and are stored as 8-bit indexes into 256
levels, after their mean was taken off. The search moves the scales to where the squared error is
least.

A weight's stored tensors are a dict by what follows the weight's name in a file: "" for the codes,
".absmax" for the scales and so on, as in `quant.spec.lay_out`. Knows nothing of files, layers or
models; computes on the device of the tensors it is given.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quant.spec import BLOCK, NESTED_BLOCK, STATE, STATE_BYTES

# The dtypes that weights can be dequantized to, by the names that the format stores.
READABLE = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# Scales to try, as fractions of a block's absmax. They were chosen greedily for the least error
# over normal, Laplace and Student-t(4) weights.
# fmt: off
FRACTIONS = (
    0.86, 0.89, 0.91, 0.92, 0.94, 0.95, 0.97, 0.99, 1.02, 1.05, 1.08, 1.11, 1.25, 1.32, 1.37, 1.44,
)
# fmt: on
# The search sees integers: weights in -STEPS..STEPS, and the 16 values in -UNITS..UNITS. As BLOCK *
# STEPS * UNITS < 2**24, its float32 sums are exact, and the scales are the same whatever the order
# of summation, the threads, the parts or the device.
STEPS = 1023
UNITS = 256
SMALLEST_ABSMAX = 1e-38
# Blocks that are quantized at a time: 16 Mi weights on a card, and on a CPU 512 Ki, which stay in
# its cache.
CARD_BLOCKS = 1 << 18
CPU_BLOCKS = 1 << 13


def quantize(weight: Tensor, *, search: bool) -> dict[str, Tensor]:
    """Return the stored tensors of `weight` (N, K), quantized.

    With `search`, scales of less squared error than their absmax are looked for. Without it the
    tensors equal what `bitsandbytes.functional.quantize_4bit` with nested statistics makes, on the
    CPU bit by bit. Raises ValueError unless the weights are finite.
    """
    flat = weight.detach().reshape(-1)
    missing = -weight.numel() % BLOCK  # of the last block
    if missing:
        flat = functional.pad(flat, (0, missing))
    blocks = flat.view(-1, BLOCK)
    part_blocks = CARD_BLOCKS if weight.is_cuda else CPU_BLOCKS
    parts = torch.split(blocks, part_blocks)
    scales = _choose_scales(parts, search=search)
    if missing:
        scales[-1].clamp_(min=SMALLEST_ABSMAX)
    stored_scales = _quantize_scales(scales, search=search)
    if search:
        scales = stored_scales.dequantize()  # codes are for the scales that readers will see

    values = _read_values(weight.device)
    midpoints = ((values[:-1] + values[1:]) / 2).tolist()
    reciprocals = 1 / scales.clamp(min=SMALLEST_ABSMAX)
    codes = []
    for part, factors in zip(parts, torch.split(reciprocals, part_blocks), strict=True):
        scaled = part.float() * factors[:, None]
        codes.append(_find_codes(scaled, midpoints))
    if missing and not search:
        # bitsandbytes divides the last block, and multiplies by the reciprocal elsewhere.
        scaled = blocks[-1:].float() / scales[-1]
        codes[-1][-1:] = _find_codes(scaled, midpoints)
    code_bytes = ceil(weight.numel() / 2)
    return {
        "": torch.cat(codes).view(-1, 1)[:code_bytes],
        ".quant_map": values,
        ".absmax": stored_scales.absmax,
        ".nested_absmax": stored_scales.nested_absmax,
        ".nested_quant_map": stored_scales.levels,
        STATE: _describe(weight, float(stored_scales.offset)),
    }


class _StoredScales(NamedTuple):
    """A weight's scales as the format has them, named as the parameters of `dequantize_scales`."""

    absmax: Tensor
    nested_absmax: Tensor
    levels: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The scales (blocks,) float32 that readers will see."""
        return dequantize_scales(self.absmax, self.nested_absmax, self.levels).add_(self.offset)


def _quantize_scales(scales: Tensor, *, search: bool) -> _StoredScales:
    """Quantize the scales (blocks,) float32; raises ValueError unless they are finite."""
    from bitsandbytes.functional import create_dynamic_map

    offset = scales.mean()
    if not offset.isfinite():
        raise ValueError("the weights are not all finite")
    levels = create_dynamic_map().to(scales.device)
    write = torch.ops.bitsandbytes.quantize_blockwise.default
    absmax, nested_absmax = write(scales - offset, levels, NESTED_BLOCK)
    stored = _StoredScales(absmax, nested_absmax, levels, offset=offset)
    if search:
        # A scale that rounding made negative gets the next higher level, in place.
        absmax += stored.dequantize() < 0
    return stored


def _read_values(device: torch.device) -> Tensor:
    """The format's 16 values, float32, ascending from -1 to 1."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type("nf4", device=device)
    return values


def _describe(weight: Tensor, offset: float) -> Tensor:
    """The state: a JSON text that tells readers the weight's shape and how it is stored.

    It is a tensor of bytes, on the CPU.
    """
    dtype = str(weight.dtype).removeprefix("torch.")
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype if dtype in READABLE else "float32",
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def _choose_scales(parts: Sequence[Tensor], *, search: bool) -> Tensor:
    """The scales (blocks,) float32 of all parts' blocks: their absmax, or the best ones found."""
    if not search:
        return torch.cat([part.float().abs().amax(1) for part in parts])
    table = _make_search_table(parts[0].device)
    return torch.cat([_search_scales(part.float(), table) for part in parts])


def _search_scales(part: Tensor, table: Tensor) -> Tensor:
    """The scales (b,) for blocks (b, 64) float32: of those that the fractions give, the best.

    Each fraction of the absmax gives codes c to the weights w. The best scale for these codes is
    <w,c> / <c,c>, and it lowers the squared error by <w,c>^2 / <c,c>; the fraction with the largest
    such gain wins. A row of the table has one weight's terms of both sums, for all fractions.
    """
    absmax = part.abs().amax(1)
    factors = STEPS / absmax.clamp(min=1e-35)
    steps = (part * factors[:, None]).round_().int()
    # The clamp is for NaN, which has no row; `quantize` refuses it afterwards.
    rows = steps.clamp_(-STEPS, STEPS).add_(STEPS)
    sums = functional.embedding_bag(rows, table, mode="sum")
    wc, cc = sums.chunk(2, dim=1)  # (b, fractions)
    cc = cc.clamp(min=1)  # 0 for a block of zeros
    gains = wc * wc / cc
    best = gains.argmax(1, keepdim=True)
    scales = (wc / cc).gather(1, best).view(-1)
    return scales * absmax * (UNITS / STEPS)


@cache
def _make_search_table(device: torch.device) -> Tensor:
    """The search's table (2 * STEPS + 1, 2 * fractions) float32.

    The row of a weight w has w * c, then c * c, where c is the value nearest to w by each fraction.
    """
    values = _read_values(device)
    midpoints = (values[:-1] + values[1:]) / 2 * STEPS
    w = torch.arange(-STEPS, STEPS + 1, dtype=torch.float32, device=device)[:, None]
    codes = [torch.bucketize(w, midpoints * fraction) for fraction in FRACTIONS]
    units = (values * UNITS).round()
    c = units[torch.cat(codes, dim=1)]
    return torch.cat([w * c, c * c], dim=1)


def _find_codes(scaled: Tensor, midpoints: list[float]) -> Tensor:
    """The codes (b, 32) uint8 of the values nearest to `scaled` (b, 64) float32 in -1..1.

    Two codes share a byte, the first of them in its high bits.
    """
    index = torch.zeros_like(scaled)
    above = torch.empty_like(scaled)
    for midpoint in midpoints:
        # Comparing into floats is five times as fast as into bools.
        index += torch.gt(scaled, midpoint, out=above)
    index = index.to(torch.uint8)
    return index[:, ::2] << 4 | index[:, 1::2]


def dequantize(stored: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) of this shape, in `dtype`, that stored tensors hold.

    Their scales may also be float32, without nested ones. Raises ValueError where the tensors are
    not of the shape's size, and for a dtype that is not READABLE.
    """
    blocks = ceil(prod(shape) / BLOCK)
    sizes = {"": ceil(prod(shape) / 2), ".absmax": blocks}
    has_nested_scales = ".nested_absmax" in stored
    if has_nested_scales:
        sizes[".nested_absmax"] = ceil(blocks / NESTED_BLOCK)
    # The kernels would read past the end of what is too short, and leave float64 unwritten.
    for suffix, size in sizes.items():
        if stored[suffix].numel() != size:
            what = suffix or "packed"
            raise ValueError(f"{what} has {stored[suffix].numel()} elements, not {size}")
    if dtype not in READABLE.values():
        raise ValueError(f"{dtype} is not one of {', '.join(READABLE)}")
    scales = stored[".absmax"]
    if has_nested_scales:
        nested_absmax = stored[".nested_absmax"]
        scales = dequantize_scales(scales, nested_absmax, stored[".nested_quant_map"])
        scales.add_(read_offset(stored))
    return dequantize_codes(stored[""], scales, shape=shape, dtype=dtype)


def read_offset(stored: Mapping[str, Tensor]) -> float:
    """The mean that was taken off the scales, from the state; readers add it to each of them."""
    state = json.loads(bytes(stored[STATE].tolist()))
    return float(state["nested_offset"])


def dequantize_scales(absmax: Tensor, nested_absmax: Tensor, levels: Tensor) -> Tensor:
    """Return the scales (blocks,) float32 without the mean that was taken off them.

    Each is `levels[absmax]` times the second scale of its 256. `absmax` (blocks,) uint8 are indexes
    into `levels` (256,) float32, and `nested_absmax` (blocks / 256, rounded up) float32 are the
    second scales. What every reader sees is this and the offset.
    """
    import bitsandbytes  # noqa: F401, for its operators

    read = torch.ops.bitsandbytes.dequantize_blockwise.default
    scales: Tensor = read(absmax, nested_absmax, levels, NESTED_BLOCK, torch.float32)
    return scales


def dequantize_codes(
    codes: Tensor, scales: Tensor, *, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return the weight (N, K) in a READABLE dtype.

    `codes` are (N * K / 2,) uint8 and `scales` (blocks,) float32.
    """
    # Where blocks cross rows, bitsandbytes' AVX-512 kernel takes wrong scales, and for odd rows it
    # compiles C++. As one long row it does neither.
    rows = list(shape) if shape[-1] % BLOCK == 0 else [1, 2 * codes.numel()]
    read = torch.ops.bitsandbytes.dequantize_4bit.default
    flat: Tensor = read(codes, scales, BLOCK, "nf4", rows, dtype).view(-1)
    return flat[: prod(shape)].view(*shape)
