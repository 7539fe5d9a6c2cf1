"""Where weights are in each phase: the fastest placement within a budget, its bytes and seconds, and what is left of it
when memory runs out all the same. Arithmetic on `costs`. Stdlib only. Sizes are in bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from fluxcli import costs
from fluxcli.costs import CONTEXT_BYTES, DTYPE_BYTES, Hardware, Sizes, Speeds, Work
from fluxcli.request import GenerationRequest
from quant.checkpoint import Checkpoint
from quant.spec import SCHEMES, QuantSpec

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
    """One precision of one folder, not judged yet: what it is, why, and what it costs."""

    checkpoint: Checkpoint
    precision: str
    spec: QuantSpec | None
    dtypes: dict[str, str]
    why: str
    sizes: Sizes
    work: Work

    @property
    def scheme(self) -> str:
        return self.precision if self.precision in SCHEMES else ""


def fit(
    request: GenerationRequest, offer: Offer, hardware: Hardware, *, budget: int, host: int, speeds: Speeds,
    learned: Mapping[str, int] = {}, tiled: bool = True,
) -> tuple[MemoryPlan | None, str]:  # fmt: skip
    """(the fastest residency within `budget` bytes of the device and `host` bytes of RAM, or why there is none).

    `learned` has peaks measured before, by "phase level"; `tiled` allows the decode that changes pixels.
    """
    sizes, cpu = offer.sizes, hardware.kind == "cpu"
    if cpu and offer.dtypes["transformer"] == "bfloat16" and not hardware.bf16:
        speeds = replace(speeds, wide=speeds.wide * costs.SLOW_BF16)
    small = sizes.total + sizes.modulation < hardware.total_bytes * RESIDENT_SHARE
    every = ("text_encoder", "text_encoder_2", "transformer", "vae", "modulation")
    now, over = Residency(keep=every if small and request.offload in ("auto", "none") else ("transformer", "vae")), ""
    for phase in ("encode", "denoise", "decode"):
        for level in _levels(phase, now, request, offer, hardware, speeds, tiled=tiled):
            peak = _peaks(offer, level, cpu=cpu)[phase]
            peak = learned.get(f"{phase} {level.level(phase)}", peak)
            held = sum(sizes.blocks[i].nbytes for i in level.streamed)
            if peak <= budget and held <= host:
                now = level
                break
            over = over or f"{phase} needs {peak / GIB:.1f} GiB, {hardware.device} has {budget / GIB:.1f} GiB"
        else:
            return None, over
        over = ""
    if "modulation" not in now.keep:
        kept = replace(now, keep=(*now.keep, "modulation"))
        if not cpu and max(_peaks(offer, kept, cpu=cpu).values()) <= budget:
            now = kept
    return _planned(offer, now, hardware, budget, speeds), ""


def _levels(  # noqa: PLR0917
    phase: str, now: Residency, request: GenerationRequest, offer: Offer, hardware: Hardware, speeds: Speeds,
    *, tiled: bool,
) -> Iterator[Residency]:  # fmt: skip
    """What the phase may have, from most memory to least; an --offload leaves one."""
    offload, alone = request.offload, replace(now, keep=())
    if phase == "decode":
        yield now
        yield replace(alone, decode="alone")
        if tiled:
            yield replace(alone, decode="tiled")
        return
    if offload in ("auto", "none", "stream"[: 6 * (phase == "encode")]):
        yield now
    if hardware.kind == "cpu":
        return
    if phase == "encode":
        if offload != "none":
            yield replace(now, encode="sequential")
        return
    compute = costs.block_seconds(offer.sizes, offer.work, speeds, offer.scheme)
    counts = {"auto": _counts(len(compute)), "stream": _counts(len(compute))[-1:]}.get(offload, ())
    for count in counts:
        yield replace(now, denoise="streamed", streamed=costs.spread(offer.sizes, compute, count, speeds.bus_bytes))
    if offload in ("auto", "sequential") and not offer.spec:  # packing again in every step is never worth it
        yield replace(now, denoise="sequential")


def _counts(blocks: int) -> range:
    """How many of the blocks may be streamed: even numbers, since two slots take turns."""
    step = 4 if blocks > 16 else 2
    return range(4, blocks + 1, step)


def _peaks(offer: Offer, residency: Residency, *, cpu: bool) -> dict[str, int]:
    """Bytes on the device at the peak of each phase."""
    sizes, work, keep = offer.sizes, offer.work, residency.keep
    stay = (0 if cpu else CONTEXT_BYTES) + sizes.modulation * ("modulation" in keep)
    encoders = sizes.clip + sizes.t5 if "text_encoder_2" in keep else 0
    passing = [sizes.blocks[i].nbytes for i in residency.streamed]
    transformer = sizes.transformer - sum(passing) + 2 * max(passing, default=0)
    if residency.denoise == "sequential":
        transformer = sizes.rest + max(block.nbytes for block in sizes.blocks)
    left = sizes.rest if residency.denoise == "sequential" else transformer
    beside = sizes.vae if "transformer" in keep else 0
    t5 = sizes.t5 if residency.encode == "resident" else sizes.t5_rest + sizes.t5_block * (2 if offer.spec else 1)
    alone = max(t5 + work.encode, sizes.clip)
    together = encoders + transformer + beside + work.encode if encoders else alone
    copies = 2 if offer.dtypes["transformer"] == "bfloat16" else 3  # stored, computed with, and the one before
    decode = work.decode_tiled if residency.decode == "tiled" else work.decode
    return {
        "encode": stay + together,
        "condition": stay + encoders + 2 * work.tables + copies * sizes.largest_modulation,
        "denoise": stay + encoders + transformer + beside + work.tables + work.denoise,
        "decode": stay + encoders + sizes.vae + decode + left * (residency.decode == "together"),
    }


def _planned(
    offer: Offer, residency: Residency, hardware: Hardware, budget: int, speeds: Speeds
) -> MemoryPlan:  # fmt: skip
    sizes, cpu = offer.sizes, hardware.kind == "cpu"
    held = sum(sizes.blocks[i].nbytes for i in residency.streamed)
    peaks = _peaks(offer, residency, cpu=cpu)
    because = [f"{hardware.device}: {hardware.reason}", f"seconds by {speeds.source} speeds"]
    if residency.encode == "sequential":
        because.append(f"T5 passes block by block: {sizes.t5 / GIB:.1f} GiB are too much for it at once")
    if residency.denoise != "resident":
        passing = len(residency.streamed) or len(sizes.blocks)
        whole = f"{len(sizes.blocks)} blocks, with all on the device {sizes.transformer / GIB:.1f} GiB"
        how = "streamed from pinned memory" if residency.streamed else "read from their files in every step"
        because.append(f"{passing} of {whole}, are {how}")
    if residency.decode != "together":
        because.append("the transformer leaves before the VAE decodes" + ", in tiles" * (residency.decode == "tiled"))
    if "text_encoder_2" in residency.keep:
        because.append("all components stay loaded: together they are small")
    seconds = _seconds(offer, residency, speeds, cpu=cpu)
    host = (sizes.total if cpu and DTYPE_BYTES[offer.dtypes["transformer"]] == 4 else 0) + held
    return MemoryPlan(
        hardware.device, offer.precision, offer.dtypes, offer.spec, residency, peaks, seconds, speeds.source, budget,
        host, tuple(because),
    )  # fmt: skip


def _seconds(offer: Offer, residency: Residency, speeds: Speeds, *, cpu: bool) -> dict[str, float]:
    """Seconds of each phase of one picture from cold; overlaps of reading and computing are not counted."""
    sizes, work = offer.sizes, offer.work
    packed = sum(b.image_numel + b.text_numel for b in sizes.blocks) if offer.spec else 0
    modulation = sizes.modulation_numel * 2
    compute = costs.block_seconds(sizes, work, speeds, offer.scheme)
    step = costs.step_seconds(sizes, compute, residency.streamed, speeds.bus_bytes)
    if residency.denoise == "sequential":
        step += sum(block.nbytes for block in sizes.blocks) / (speeds.bus_bytes / 2)  # not pinned, not beside
    decode = work.pixels * costs.VAE_FLOP * (costs.TILED_WORK if residency.decode == "tiled" else 1) / speeds.wide
    encode = 2 * sizes.t5_numel * work.text_tokens / speeds.wide
    encode += sizes.t5 / (speeds.bus_bytes / 2) * (residency.encode == "sequential")
    load = (sizes.stored - modulation) / speeds.disk_bytes + packed * 2 / (PACK_BYTES * (0.1 if cpu else 1.0))
    found = {"load": load, "encode": encode, "condition": modulation / speeds.disk_bytes}
    return {name: round(value, 3) for name, value in (found | {"denoise": step * work.steps, "decode": decode}).items()}


def make_offer(  # noqa: PLR0917
    request: GenerationRequest, checkpoint: Checkpoint, hardware: Hardware, precision: str, spec: QuantSpec | None,
    dtypes: dict[str, str], why: str = "",
) -> Offer:  # fmt: skip
    """One precision of one folder with its costs."""
    scheme = precision if precision in SCHEMES else ""
    unpacks = scheme in ("fp8", "int8") and scheme not in hardware.table.eight_bit and hardware.kind != "cpu"
    packed_t5 = bool(checkpoint.components["text_encoder_2"].precision or (spec and spec.text_encoder != "keep"))
    work = costs.work_of(request, checkpoint, dtypes, "unpacked" if unpacks else scheme, packed_t5=packed_t5)
    return Offer(checkpoint, precision, spec, dtypes, why, costs.sizes_of(checkpoint, dtypes, spec), work)


def relaxed(plan: MemoryPlan, phase: str, offer: Offer, hardware: Hardware) -> tuple[MemoryPlan, str] | None:
    """The plan one rung further down in a phase, and the rung in words; None where none is left."""
    now = plan.residency
    following, words = None, ""
    if now.keep:
        following, words = replace(now, keep=(), decode=now.decode.replace("together", "alone")), "nothing else stays"
    elif phase == "encode" and now.encode == "resident":
        following, words = replace(now, encode="sequential"), "T5 passes block by block"
    elif phase == "decode" and now.decode != "tiled":
        following, words = replace(now, decode="tiled"), "the VAE decodes in tiles (the pixels differ a little)"
    elif phase in ("condition", "denoise") and now.denoise != "sequential":
        count = len(offer.sizes.blocks)
        more = [n for n in _counts(count) if n >= len(now.streamed) + max(1, count // 8) and hardware.kind != "cpu"]
        if more:
            compute = costs.block_seconds(offer.sizes, offer.work, hardware.speeds, offer.scheme)
            chosen = costs.spread(offer.sizes, compute, more[0], hardware.speeds.bus_bytes)
            following, words = (
                replace(now, denoise="streamed", streamed=chosen),
                f"{more[0]} of {count} blocks streamed",
            )
        elif not offer.spec:
            following, words = replace(now, denoise="sequential", streamed=()), "every block from its file"
    if following is None:
        return None
    return replace(_planned(offer, following, hardware, plan.budget_bytes, hardware.speeds), device=plan.device), words
