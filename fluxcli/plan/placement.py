"""Where weights are in each phase: the fastest placement within a budget, its bytes and seconds, and what is left of it
when memory runs out all the same. Arithmetic on `costs`. Stdlib only. Sizes are in bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from fluxcli.plan import costs
from fluxcli.plan.costs import Cost
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware, Speeds
from fluxcli.request.fields import Order
from quant.checkpoint import Checkpoint
from quant.spec import SCHEMES, QuantSpec

RAM_SHARE, FREE_RAM_SHARE = 0.6, 0.8  # of all RAM, and of what is free now, that streamed blocks may take
RESIDENT_SHARE = 0.25  # everything stays when together it takes less than this share of memory
PACK_BYTES = 1.5e9  # a second, of packing while loading
GIB = 2**30
PHASES = ("encode", "condition", "denoise", "decode")


@dataclass(frozen=True)
class Residency:
    """Where weights are in each phase: the `levels` of a plan, from most memory to least.

    encode: T5 "resident" or "sequential"; denoise: "resident", "streamed" (the blocks in `streamed`, by index) or
    "sequential"; decode: "together" with the transformer, "alone", or "tiled" (other pixels).
    """

    encode: str = "resident"
    denoise: str = "resident"
    decode: str = "together"
    streamed: tuple[int, ...] = ()
    keep: tuple[str, ...] = ()  # components, and "modulation", that may stay beside each other

    def level(self, phase: str) -> str:
        """The phase's level by name; streamed ones with their count."""
        level = getattr(self, phase, "")
        return f"streamed {len(self.streamed)}" if level == "streamed" else level


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will do: precision, placement, and the bytes and seconds of each phase.

    `precision` is that of the transformer's blocks; `spec` says what is packed while loading.
    """

    device: str
    precision: str
    dtypes: dict[str, str]
    spec: QuantSpec | None
    residency: Residency
    peak_bytes: dict[str, int]
    seconds: dict[str, float]
    speeds: str  # where the seconds' speeds are from
    budget_bytes: int
    host_bytes: int  # RAM that is held, mapped files not counted
    reasons: tuple[str, ...]

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Offer:
    """One precision of one folder for one machine, not judged yet: what it is, why, and what it costs."""

    checkpoint: Checkpoint
    hardware: Hardware
    precision: str
    scheme: str  # of the packed layers, "" where none is packed
    spec: QuantSpec | None
    dtypes: dict[str, str]
    why: str
    cost: Cost


def weaker(first: Residency, second: Residency) -> Residency:
    """What takes no more memory than either: of each phase the lower level, and what both keep."""

    def lower(phase: str, *levels: str) -> str:
        return max((getattr(first, phase), getattr(second, phase)), key=levels.index)

    denoise = max(first, second, key=lambda it: (it.denoise == "sequential", len(it.streamed)))
    return Residency(
        lower("encode", "resident", "sequential"), denoise.denoise, lower("decode", "together", "alone", "tiled"),
        denoise.streamed, tuple(name for name in first.keep if name in second.keep),
    )  # fmt: skip


def make_offer(  # noqa: PLR0917
    order: Order, checkpoint: Checkpoint, hardware: Hardware, precision: str, spec: QuantSpec | None,
    dtypes: dict[str, str], why: str = "",
) -> Offer:  # fmt: skip
    """One precision of one folder with its costs."""
    scheme = precision if precision in SCHEMES else ""
    unpacks = scheme in ("fp8", "int8") and scheme not in hardware.speeds.eight_bit and hardware.kind != "cpu"
    cost = costs.cost_of(order, checkpoint, dtypes, spec, "unpacked" if unpacks else scheme)
    return Offer(checkpoint, hardware, precision, scheme, spec, dtypes, why, cost)


def fit(offer: Offer, *, budget: int, host: int, tiled: bool = True) -> tuple[MemoryPlan | None, str]:
    """(the fastest residency within `budget` bytes of the device and `host` bytes of RAM, or why there is none).

    `tiled` allows the decode that changes pixels.
    """
    cost, hardware, speeds, over = offer.cost, offer.hardware, offer.hardware.speeds, ""
    if hardware.kind == "cpu" and offer.dtypes["transformer"] == "bfloat16" and not hardware.bf16:
        speeds = replace(speeds, wide=speeds.wide * costs.SLOW_BF16)
    small = cost.total + cost.modulation < budget * RESIDENT_SHARE
    every = ("text_encoder", "text_encoder_2", "transformer", "vae", "modulation")
    now = Residency(keep=every if small and cost.order.resources.offload in ("auto", "none") else ("transformer", "vae"))
    for phase in ("encode", "denoise", "decode"):
        for level in _levels(phase, now, offer, speeds, tiled=tiled):
            peak = _peaks(offer, level)[phase]
            if peak <= budget and _held(offer, level) <= host:
                now, over = level, ""
                break
            over = f"{phase} needs {peak / GIB:.1f} GiB, {hardware.device} has {budget / GIB:.1f} GiB"
        else:
            return None, over or f"{phase} cannot be so: packing again in every step is never worth it"
    kept = replace(now, keep=(*now.keep, "modulation"))
    if "modulation" not in now.keep and hardware.kind != "cpu" and max(_peaks(offer, kept).values()) <= budget:
        now = kept
    return _planned(offer, now, budget, speeds), ""


def _levels(phase: str, now: Residency, offer: Offer, speeds: Speeds, *, tiled: bool) -> Iterator[Residency]:
    """What the phase may have, from most memory to least; an --offload leaves one."""
    offload, alone = offer.cost.order.resources.offload, replace(now, keep=())
    if phase == "decode":
        yield now
        yield replace(alone, decode="alone")
        if tiled:
            yield replace(alone, decode="tiled")
        return
    if offload in ("auto", "none") or (offload, phase) == ("stream", "encode"):
        yield now
    if offer.hardware.kind == "cpu" or offload == "none":
        return
    if phase == "encode":
        yield replace(now, encode="sequential")
        return
    counts = _counts(len(offer.cost.blocks))
    for count in {"auto": counts, "stream": counts[-1:]}.get(offload, ()):
        yield _streaming(offer, now, count, speeds)
    if offload != "stream" and not offer.spec:  # packing again in every step is never worth it
        yield replace(now, denoise="sequential")


def _counts(blocks: int) -> range:
    """How many of the blocks may be streamed: even numbers, since two slots take turns."""
    return range(4, blocks + 1, 4 if blocks > 16 else 2)


def _streaming(offer: Offer, now: Residency, count: int, speeds: Speeds) -> Residency:
    compute = costs.block_seconds(offer.cost, speeds, offer.scheme)
    return replace(now, denoise="streamed", streamed=costs.spread(offer.cost, compute, count, speeds.bus_bytes))


def host_limit(hardware: Hardware, *, ever: bool = False) -> int:
    """Bytes of RAM that streamed blocks may take: by all of it, and unless `ever` by what is free now."""
    by_all = int(hardware.ram_bytes * RAM_SHARE)
    return by_all if ever else min(by_all, int(hardware.ram_free_bytes * FREE_RAM_SHARE))


def _held(offer: Offer, residency: Residency) -> int:
    """Bytes of RAM of the streamed blocks."""
    return sum(offer.cost.blocks[i].nbytes for i in residency.streamed)


def _peaks(offer: Offer, residency: Residency) -> dict[str, int]:
    """Bytes on the device at the peak of each phase."""
    cost, keep = offer.cost, residency.keep
    stay = (0 if offer.hardware.kind == "cpu" else CONTEXT_BYTES) + cost.modulation * ("modulation" in keep)
    encoders = cost.clip + cost.t5 if "text_encoder_2" in keep else 0
    largest = max((cost.blocks[i].nbytes for i in residency.streamed), default=0)
    transformer = left = cost.transformer - _held(offer, residency) + 2 * largest
    if residency.denoise == "sequential":
        transformer, left = cost.rest + max(block.nbytes for block in cost.blocks), cost.rest
    beside = cost.vae if "transformer" in keep else 0
    t5 = cost.t5 if residency.encode == "resident" else cost.t5_rest + cost.t5_block * (2 if offer.spec else 1)
    alone = max(t5 + cost.encode, cost.clip)
    copies = 2 if offer.dtypes["transformer"] == "bfloat16" else 3  # stored, computed with, and the one before
    decode = cost.decode_tiled if residency.decode == "tiled" else cost.decode
    return {
        "encode": stay + (encoders + transformer + beside + cost.encode if encoders else alone),
        "condition": stay + encoders + cost.tables // 2 + copies * cost.largest_modulation + cost.unblocking,
        "denoise": stay + encoders + transformer + beside + cost.tables + cost.denoise,
        "decode": stay + encoders + cost.vae + decode + left * (residency.decode == "together"),
    }


def _planned(offer: Offer, residency: Residency, budget: int, speeds: Speeds) -> MemoryPlan:
    cost, hardware, blocks = offer.cost, offer.hardware, len(offer.cost.blocks)
    because = [f"{hardware.device}: {hardware.reason}", f"seconds by {speeds.source} speeds"]
    if residency.encode == "sequential":
        because.append(f"T5 passes block by block: {cost.t5 / GIB:.1f} GiB are too much for it at once")
    if residency.denoise != "resident":
        whole = f"{blocks} blocks, with all on the device {cost.transformer / GIB:.1f} GiB"
        how = "streamed from pinned memory" if residency.streamed else "read from their files in every step"
        because.append(f"{len(residency.streamed) or blocks} of {whole}, are {how}")
    if residency.decode != "together":
        because.append("the transformer leaves before the VAE decodes" + ", in tiles" * (residency.decode == "tiled"))
    if "text_encoder_2" in residency.keep:
        because.append("all components stay loaded: together they are small")
    peaks, converted = _peaks(offer, residency), hardware.kind == "cpu" and offer.dtypes["transformer"] == "float32"
    host = _held(offer, residency) + (max(peaks.values()) if converted else 0)
    return MemoryPlan(
        hardware.device, offer.precision, offer.dtypes, offer.spec, residency, peaks,
        _seconds(offer, residency, speeds), speeds.source, budget, host, tuple(because),
    )  # fmt: skip


def _seconds(offer: Offer, residency: Residency, speeds: Speeds) -> dict[str, float]:
    """Seconds of each phase of one picture from cold; overlaps of reading and computing are not counted."""
    cost, request, slow_bus = offer.cost, offer.cost.order.request, speeds.bus_bytes / 2  # not pinned, not beside
    packed = sum(block.image_numel + block.text_numel for block in cost.blocks) if offer.spec else 0
    modulation = cost.modulation_numel * 2
    compute = costs.block_seconds(cost, speeds, offer.scheme)
    step = costs.step_seconds(cost, compute, residency.streamed, speeds.bus_bytes)
    step += sum(block.nbytes for block in cost.blocks) / slow_bus * (residency.denoise == "sequential")
    encode = 2 * cost.t5_numel * request.text_tokens / speeds.wide
    encode += cost.t5 / slow_bus * (residency.encode == "sequential")
    tiles = costs.TILED_WORK if residency.decode == "tiled" else 1
    pack = PACK_BYTES * (0.1 if offer.hardware.kind == "cpu" else 1.0)
    found = {
        "load": (cost.stored - modulation) / speeds.disk_bytes + packed * 2 / pack,
        "encode": encode,
        "condition": modulation / speeds.disk_bytes,
        "denoise": step * request.steps,
        "decode": math.prod(request.size) * costs.VAE_FLOP * tiles / speeds.wide,
    }
    return {name: round(value, 3) for name, value in found.items()}


def relaxed(plan: MemoryPlan, phase: str, offer: Offer) -> tuple[MemoryPlan, str] | None:
    """The plan one rung further down in a phase, and the rung in words; None where none is left."""
    now, blocks, hardware = plan.residency, len(offer.cost.blocks), offer.hardware
    counts = [count for count in _counts(blocks) if count >= len(now.streamed) + max(1, blocks // 8)]
    wider = [_streaming(offer, now, count, hardware.speeds) for count in counts[:1] if hardware.kind != "cpu"]
    more = [each for each in wider if _held(offer, each) <= host_limit(hardware)]
    if now.keep:
        following, words = replace(now, keep=(), decode=now.decode.replace("together", "alone")), "nothing else stays"
    elif phase == "encode" and now.encode == "resident":
        following, words = replace(now, encode="sequential"), "T5 passes block by block"
    elif phase == "decode" and now.decode != "tiled":
        following, words = replace(now, decode="tiled"), "the VAE decodes in tiles (the pixels differ a little)"
    elif phase not in ("condition", "denoise") or now.denoise == "sequential":
        return None
    elif more:
        following, words = more[0], f"{len(more[0].streamed)} of {blocks} blocks streamed"
    elif not offer.spec:
        following, words = replace(now, denoise="sequential", streamed=()), "every block from its file"
    else:
        return None
    return replace(_planned(offer, following, plan.budget_bytes, hardware.speeds), device=plan.device), words
