"""Encode and decode weights in bitsandbytes' NF4 format, each block's scale either its absmax or searched.

64 weights share a scale ("absmax" in the format's names) and are stored as 4-bit indexes into 16 values; 256 scales
share a second one and are stored as 8-bit indexes into 256 levels, after their mean was taken off. The search moves
the scales to where the squared error is least. Knows nothing of files, layers or models; works on the tensor's device.
"""

import json
from collections.abc import Sequence
from functools import cache
from math import ceil, prod

from quant.lazy import Tensor, Tensors, torch
from quant.spec import BLOCK, NESTED_BLOCK, STATE, STATE_BYTES

READABLE = ("bfloat16", "float16", "float32")  # dtypes that readers decode to
# Scales to try, as fractions of the block's absmax: chosen greedily for normal, Laplace and Student-t(4) weights.
FRACTIONS = (
    0.86,
    0.89,
    0.91,
    0.92,
    0.94,
    0.95,
    0.97,
    0.99,
    1.02,
    1.05,
    1.08,
    1.11,
    1.25,
    1.32,
    1.37,
    1.44,
)
# The search sees integers: weights in -STEPS..STEPS, values in -UNITS..UNITS. As BLOCK * STEPS * UNITS < 2**24, its
# float32 sums are exact: the same scales whatever the order of summation, the threads, the chunks or the device.
STEPS, UNITS = 1023, 256


def quantize(weight: Tensor, *, search: bool) -> Tensors:
    """Return the tensors that store `weight` (N, K), by what follows its name; raises ValueError unless it is finite.

    Without `search` they equal `bitsandbytes.functional.quantize_4bit` with nested statistics, on the CPU bit by bit.
    """
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type
    from torch.nn.functional import pad

    flat, missing = weight.detach().reshape(-1), -weight.numel() % BLOCK
    blocks = (pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)
    parts = blocks.split(
        1 << (18 if weight.is_cuda else 13)
    )  # of 16 Mi weights, or of 512 Ki: they stay in the cache
    table = _search_table(weight.device) if search else None
    scales = torch.cat([_scales(part.float(), table) for part in parts])  # (blocks,) float32
    if missing:
        scales[-1].clamp_(min=1e-38)
    offset, levels = scales.mean(), create_dynamic_map().to(scales.device)
    if not offset.isfinite():
        raise ValueError("the weights are not all finite")
    absmax, nested = torch.ops.bitsandbytes.quantize_blockwise.default(
        scales - offset, levels, NESTED_BLOCK
    )
    if search:  # for what readers will see; a level more where rounding made it negative
        absmax += dequantize_scales(absmax, nested, levels, offset) < 0
        scales = dequantize_scales(absmax, nested, levels, offset)
    reciprocals = (1 / scales.clamp(min=1e-38))[:, None].split(len(parts[0]))
    values = get_4bit_type("nf4", device=weight.device)  # 16, ascending, from -1 to 1
    midpoints = ((values[:-1] + values[1:]) / 2).tolist()
    packed = [
        _packed(part.float() * scale, midpoints)
        for part, scale in zip(parts, reciprocals, strict=True)
    ]
    if (
        missing and not search
    ):  # bitsandbytes divides here, where it multiplies by the reciprocal elsewhere
        packed[-1][-1:] = _packed(blocks[-1:].float() / scales[-1], midpoints)
    dtype = str(weight.dtype).removeprefix("torch.")
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype if dtype in READABLE else "float32",
    }
    state |= {
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
    }
    blob = list(json.dumps(state | {"nested_offset": float(offset)}).encode().ljust(STATE_BYTES))
    codes = torch.cat(packed).view(-1, 1)[: ceil(weight.numel() / 2)]
    stored = {
        "": codes,
        ".quant_map": values,
        ".absmax": absmax,
        ".nested_absmax": nested,
        ".nested_quant_map": levels,
    }
    return stored | {STATE: torch.tensor(blob, dtype=torch.uint8, device="cpu")}


def dequantize(stored: Tensors, shape: Sequence[int], dtype: "torch.dtype") -> Tensor:
    """Return the weight (N, K) that `stored` store. Raises ValueError for stored not of this size, or another dtype."""
    blocks, nested = (
        ceil(prod(shape) / BLOCK),
        stored.get(".nested_absmax"),
    )  # None: scales in float32
    sizes = [("", ceil(prod(shape) / 2)), (".absmax", blocks)]
    sizes += [] if nested is None else [(".nested_absmax", ceil(blocks / NESTED_BLOCK))]
    for (
        suffix,
        size,
    ) in sizes:  # kernels read past the end of what is too short, and leave float64 unwritten
        if stored[suffix].numel() != size:
            raise ValueError(
                f"{suffix or 'packed'} has {stored[suffix].numel()} elements, not {size}"
            )
    if str(dtype).removeprefix("torch.") not in READABLE:
        raise ValueError(f"{dtype} is not one of {', '.join(READABLE)}")
    absmax = stored[".absmax"]
    if nested is not None:
        absmax = dequantize_scales(
            absmax, nested, stored[".nested_quant_map"], nested.new_tensor(read_offset(stored))
        )
    return dequantize_codes(stored[""], absmax, shape, dtype)


def read_offset(stored: Tensors) -> float:
    """What the scales' mean was: it is added to each that is read."""
    return float(json.loads(bytes(stored[STATE].tolist()))["nested_offset"])


def dequantize_scales(
    absmax_u8: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, offset: Tensor
) -> Tensor:
    """Return the scales (blocks,) float32 that every reader sees; `offset` is () float32."""
    import bitsandbytes  # noqa: F401, for its operators
    import torch  # itself: torch.compile does not look through a lazy one

    read = torch.ops.bitsandbytes.dequantize_blockwise.default
    return read(absmax_u8, nested_absmax, nested_quant_map, NESTED_BLOCK, torch.float32) + offset


def dequantize_codes(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: "torch.dtype"
) -> Tensor:
    """Return the weight (N, K) in one of the READABLE dtypes, from (N * K / 2,) uint8 and scales (blocks,) float32."""
    import torch

    # Blocks that cross rows: bitsandbytes' AVX-512 kernel takes wrong scales, and for odd rows it compiles C++.
    rows = list(shape) if shape[-1] % BLOCK == 0 else [1, 2 * packed.numel()]
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, BLOCK, "nf4", rows, dtype
    ).view(-1)
    return flat[: prod(shape)].view(*shape)


def _scales(part: Tensor, table: "torch.Tensor | None") -> Tensor:
    """(b, 64) float32 -> (b,): the absmax, or with a table the scale of least squared error that the fractions lead to.

    Each fraction of the absmax gives codes c to the weights w; the best scale for these is <w,c> / <c,c>, and lowers
    the error by <w,c>^2 / <c,c>. One table row per weight has its terms of both sums, for all fractions.
    """
    from torch.nn.functional import embedding_bag

    absmax = part.abs().amax(1)
    if table is None:
        return absmax
    steps = (part * (STEPS / absmax.clamp(min=1e-35))[:, None]).round_().int()
    rows = steps.clamp_(-STEPS, STEPS).add_(STEPS)  # NaN, which `quantize` refuses, has no row
    wc, cc = embedding_bag(rows, table, mode="sum").chunk(2, dim=1)  # (b, fractions)
    cc = cc.clamp(min=1)  # 0 for a block of zeros
    best = (wc * wc / cc).argmax(1, keepdim=True)
    return (wc / cc).gather(1, best).view(-1) * absmax * (UNITS / STEPS)


@cache
def _search_table(device: "torch.device") -> Tensor:
    """(2 * STEPS + 1, 2 * fractions) float32: row w has w * c, then c * c, for the code c by each fraction."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type("nf4", device=device)
    w = torch.arange(-STEPS, STEPS + 1, dtype=torch.float32, device=device)[:, None]
    midpoints = (values[:-1] + values[1:]) / 2 * STEPS
    c = (values * UNITS).round()[
        torch.cat([torch.bucketize(w, midpoints * part) for part in FRACTIONS], dim=1)
    ]
    return torch.cat([w * c, c * c], dim=1)


def _packed(scaled: Tensor, midpoints: list[float]) -> Tensor:
    """(b, 64) float32 in -1..1 -> (b, 32) uint8: indexes of the nearest values, the first of two in the high bits."""
    index, above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for midpoint in midpoints:
        index += torch.gt(
            scaled, midpoint, out=above
        )  # into floats: five times as fast as into bools
    index = index.to(torch.uint8)
    return index[:, ::2] << 4 | index[:, 1::2]
