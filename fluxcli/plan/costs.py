"""What a run costs in bytes and in seconds: arithmetic on headers, the request and speeds. Stdlib only.

Sizes are in bytes, speeds in bytes or FLOP a second. Activations are a line fitted to counted values of the full-size
model (docs/memory.md has both); FLOP are 2 per weight and row, and 4 x tokens^2 x width for each block's attention.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fluxcli.models.loras import resolve_loras
from fluxcli.plan.machine import Speeds
from fluxcli.request.fields import Order
from quant.checkpoint import Checkpoint, Component
from quant.spec import QuantSpec, is_modulation, layout, scheme_in_memory
from quant.weights import Weight

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes at the peak of a step, counted: the larger of two lines (a, b), a x tokens x width + b x width^2 in the compute
# dtype. The first is attention in every precision; the second what else can be largest: unpacked weights, wide sums.
ACTIVATIONS = {
    "": ((20.25, 0.45), (0.0, 7.2)), "nf4": ((20.25, 0.45), (10.6, 7.2)), "fp8": ((20.25, 0.45), (7.0, 3.6)),
    "int8": ((20.25, 0.45), (13.0, 5.0)), "gguf": ((20.25, 0.45), (10.6, 7.2)),
    "unpacked": ((20.25, 0.45), (6.0, 21.3)),
}  # fmt: skip
ENCODER_SCORES, ENCODER_WIDE = 1.63, 4.0  # live (heads, tokens, tokens) and (tokens, d_ff) tensors of T5
UNBLOCKING_BYTES = 80 << 20  # temporary ones, of unpacking a part of a GGUF weight
PIXEL_ACTIVATIONS = 6  # live (first VAE width, height, width) tensors at the peak of decode
DECODE_BYTES = 12 << 20  # beside these
TILE_PX = 512  # of a tiled decode
VAE_FLOP = 1.0e7  # a pixel
TILED_WORK = 1.35  # overlaps are computed twice
SLOW_BF16 = 0.25  # of float32's speed, on a CPU without units for it
T5_BLOCKS = "encoder.block."


@dataclass(frozen=True)
class Block:
    """One block of the transformer: bytes on the device, and weights that image and text tokens are multiplied by."""

    nbytes: int
    image_numel: int
    text_numel: int


@dataclass(frozen=True)
class Cost:
    """What a request makes of a checkpoint in one precision, in bytes; `blocks` in the order of the forward."""

    order: Order
    clip: int
    t5: int
    t5_numel: int
    t5_block: int
    t5_rest: int
    blocks: tuple[Block, ...]
    rest: int  # of the transformer: neither in a block nor modulation
    modulation: int
    largest_modulation: int
    modulation_numel: int
    unblocking: int  # beside a modulation weight that is unpacked
    vae: int
    stored: int  # of all files
    width: int  # of the transformer, in channels
    encode: int  # beside the weights, in the phase of that name
    tables: int
    denoise: int
    decode: int
    decode_tiled: int

    @property
    def transformer(self) -> int:
        return self.rest + sum(block.nbytes for block in self.blocks)

    @property
    def total(self) -> int:
        return self.clip + self.t5 + self.transformer + self.vae


def block_names(transformer: Component) -> list[str]:
    """The blocks in the order of the forward."""
    config = transformer.config
    kinds = ("transformer_blocks", config["num_layers"]), ("single_transformer_blocks", config["num_single_layers"])
    return [f"{kind}.{i}" for kind, count in kinds for i in range(count)]


def t5_block_names(t5: Component) -> list[str]:
    """The encoder's blocks in the order of the forward."""
    found = {name.removeprefix(T5_BLOCKS).split(".")[0] for name in t5.weights if name.startswith(T5_BLOCKS)}
    return [f"{T5_BLOCKS}{i}" for i in sorted(filter(str.isdecimal, found), key=int)]


def weight_bytes(weight: Weight, component: str, dtype: str, spec: QuantSpec | None) -> int:
    """Bytes of a weight in memory: packed as stored (or as `spec` will), else in `dtype`."""
    stored = scheme_in_memory(component, weight.name, weight.scheme)
    scheme = stored or (spec.scheme(component, weight.name, weight.shape) if spec and not weight.scheme else "")
    return sum(i.nbytes for i in layout(scheme, weight.info)) if scheme else weight.numel * DTYPE_BYTES[dtype]


def part_bytes(part: Component, dtype: str, spec: QuantSpec | None, start: str = "") -> int:
    """Bytes of a component's weights in memory, of those whose names begin so."""
    return sum(weight_bytes(w, part.name, dtype, spec) for name, w in part.weights.items() if name.startswith(start))


def cost_of(
    order: Order, checkpoint: Checkpoint, dtypes: dict[str, str], spec: QuantSpec | None, scheme: str = ""
) -> Cost:  # fmt: skip
    """Bytes of every part that is placed by itself, and beside them; `scheme` is one of `ACTIVATIONS`."""
    parts, (width, height), tokens = checkpoint.components, order.request.size, order.request.text_tokens
    t5, transformer, wide = parts["text_encoder_2"], parts["transformer"], DTYPE_BYTES[dtypes["transformer"]]
    of = {name: part_bytes(part, dtypes[name], spec) for name, part in parts.items() if name != "transformer"}
    adapters = resolve_loras(order.request.lora, parts)
    held = {name: sum(each.numel(name) for each in adapters) * DTYPE_BYTES[dtypes[name]] for name in parts}
    of = {name: size + held[name] for name, size in of.items()}
    t5_blocks = [part_bytes(t5, dtypes[t5.name], spec, f"{block}.") for block in t5_block_names(t5)]
    modulation = {name: weight for name, weight in transformer.weights.items() if is_modulation(name)}
    numels = [weight.numel for weight in modulation.values()]
    outputs = sum(weight.shape[0] for name, weight in modulation.items() if name.endswith(".linear.weight"))
    blocks, rest = _blocks(transformer, dtypes["transformer"], spec)
    inner = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    lines = ((a * (width * height // 256 + tokens) + b * inner) * inner * wide for a, b in ACTIVATIONS[scheme])
    known = {"num_heads": 64, "d_ff": 10240, "d_model": 4096} | t5.config
    scores = ENCODER_SCORES * known["num_heads"] * tokens**2 + ENCODER_WIDE * known["d_ff"] * tokens
    unpacked = known["d_ff"] * known["d_model"] * bool(t5.precision or (spec and spec.text_encoder != "keep"))
    pixel = PIXEL_ACTIVATIONS * parts["vae"].config["block_out_channels"][0] * DTYPE_BYTES[dtypes["vae"]]
    joined = 2 * 3 * DTYPE_BYTES[dtypes["vae"]] * width * height  # the tiles that are done, and the whole picture
    return Cost(
        order, of["text_encoder"], of[t5.name], t5.numel, max(t5_blocks, default=0), of[t5.name] - sum(t5_blocks),
        blocks, rest + held["transformer"], sum(numels) * wide, max(numels, default=0) * wide, sum(numels),
        UNBLOCKING_BYTES * (transformer.precision == "gguf"), of["vae"],
        checkpoint.nbytes, inner,
        encode=int((scores + unpacked) * DTYPE_BYTES[dtypes[t5.name]]) + UNBLOCKING_BYTES * (t5.precision == "gguf"),
        tables=order.request.steps * outputs * wide,
        denoise=int(max(lines)), decode=pixel * width * height + DECODE_BYTES,
        decode_tiled=pixel * min(width, TILE_PX) * min(height, TILE_PX) + joined + DECODE_BYTES,
    )  # fmt: skip


def _blocks(transformer: Component, dtype: str, spec: QuantSpec | None) -> tuple[tuple[Block, ...], int]:
    """(the blocks without their modulation, the bytes of what is in none)."""
    blocks, rest = {name: [0, 0, 0] for name in block_names(transformer)}, 0
    for name, weight in transformer.weights.items():
        size = weight_bytes(weight, transformer.name, dtype, spec)
        found = blocks.get(".".join(name.split(".")[:2]))
        if found and not is_modulation(name):
            text = "add_" in name or "_context" in name
            found[0] += size
            found[1] += weight.numel * (not text)
            found[2] += weight.numel * (text or name.startswith("single"))
        elif not is_modulation(name):
            rest += size
    return tuple(Block(*found) for found in blocks.values()), rest


def block_seconds(cost: Cost, speeds: Speeds, scheme: str) -> list[float]:
    """Seconds that each block computes in one step."""
    image, text = math.prod(cost.order.request.size) // 256, cost.order.request.text_tokens
    attention = 4 * (image + text) ** 2 * cost.width / speeds.wide
    flop = [2 * (block.image_numel * image + block.text_numel * text) for block in cost.blocks]
    return [each / speeds.of(scheme) + attention for each in flop]


def spread(cost: Cost, compute: Sequence[float], count: int, bus_bytes: float) -> tuple[int, ...]:
    """Which `count` blocks are streamed: evenly spread over the seconds of a step, so that the bus neither idles nor
    blocks. Of all blocks, or of the second kind first (half the bytes for the same seconds), whichever is faster.
    """
    every = range(len(compute))
    second = [i for i in every if cost.blocks[i].nbytes == cost.blocks[-1].nbytes]
    first = _even([i for i in every if i not in second], compute, max(0, count - len(second)))
    found = [_even(every, compute, count), tuple(sorted((*first, *_even(second, compute, min(count, len(second))))))]
    return min(found, key=lambda chosen: (
        round(step_seconds(cost, compute, chosen, bus_bytes), 4), sum(cost.blocks[i].nbytes for i in chosen)
    ))  # fmt: skip


def _even(among: Sequence[int], compute: Sequence[float], count: int) -> tuple[int, ...]:
    total, at, chosen = sum(compute[i] for i in among), 0.0, []
    for left, i in zip(range(len(among), 0, -1), among, strict=True):
        at += compute[i]
        wanted = count - len(chosen)
        if wanted and (at >= total * (len(chosen) + 0.5) / count or left == wanted):
            chosen.append(i)
    return tuple(chosen)


def step_seconds(cost: Cost, compute: Sequence[float], streamed: Sequence[int], bus_bytes: float) -> float:
    """Seconds of a step when `streamed` blocks come through two slots: a slot is filled once its block has computed."""
    now, bus, order = 0.0, 0.0, {block: k for k, block in enumerate(streamed)}
    ready: dict[int, float] = {}

    def copy(k: int, since: float) -> None:
        nonlocal bus
        bus = ready[k] = max(bus, since) + cost.blocks[streamed[k]].nbytes / bus_bytes

    for k in range(min(2, len(streamed))):
        copy(k, 0.0)
    started = 0.0
    for _ in range(3):  # the first step also fills the slots; the third is like all others
        started = now
        for block, seconds in enumerate(compute):
            k = order.get(block)
            now = max(now, ready[k] if k is not None else 0.0) + seconds
            if k is not None and len(streamed) > 2:
                copy(k + 2 if k + 2 < len(streamed) else k % 2, now)
    return now - started
