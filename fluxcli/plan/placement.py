"""Where weights are in each phase of a run: the fastest placement within a budget, its bytes and
seconds, and the next one down when memory runs out all the same.

Arithmetic on `costs`: opens no file and asks no device. Sizes are in bytes. Stdlib only.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from fluxcli.plan import costs
from fluxcli.plan.costs import Bus, Cost, Workload
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware, Speeds
from quant.checkpoint import Checkpoint
from quant.spec import ATTENTION, DEQUANTIZE, SCHEMES, ActivationLine, QuantSpec

GIB = 2**30
PHASES = ("encode", "condition", "denoise", "decode")
READING = ("load", "condition")  # whose seconds are those of reading files
RAM_SHARE = 0.6  # of all RAM, that streamed blocks may take
FREE_RAM_SHARE = 0.8  # of the RAM that is free now, that they may take
RESIDENT_SHARE = 0.25  # of the budget: a model that takes less stays loaded as a whole
# On a CUDA card, what the allocator reserves on top of what is live: pages that are not full and,
# where segments cannot grow, gaps between blocks that nothing fits into (docs/memory.md, Reserved).
FRAGMENTS_BYTES = 300 << 20
FRAGMENTS_SHARE = 0.08  # of what is live, on top of these
EXPANDABLE_SHARE = 0.02  # the same, where segments can grow
QUANTIZE_BYTES = 1.5e9  # a second, of 16-bit weights that are quantized while loading
CPU_QUANTIZE_SHARE = 0.1  # of that speed, on a CPU
# Of a step in 16 bit: beside attention, a fused weight while it is loaded.
SIXTEEN_BIT_LINES = (ATTENTION, ActivationLine(0.0, 7.2))
# What stays on the device between phases, by the names of `Placement.keep`.
KEEP_ALL = ("text_encoder", "text_encoder_2", "transformer", "vae", "modulation")
KEEP_LARGE = ("transformer", "vae")


@dataclass(frozen=True)
class Placement:
    """Where weights are in each phase.

    encode: T5 is "resident" on the device, or "sequential", block by block from its file.
    denoise: the transformer is "resident", "streamed" (the blocks in `streamed`, by index, come
    from pinned memory), or "sequential" (every block from its file in every step).
    decode: the VAE works "together" with the transformer, "alone" after it has left, or "tiled",
    alone and in tiles, which gives other pixels.
    """

    encode: str = "resident"
    denoise: str = "resident"
    decode: str = "together"
    streamed: tuple[int, ...] = ()
    keep: tuple[str, ...] = ()  # components, and "modulation", that may stay beside each other

    def level(self, phase: str) -> str:
        """A phase's level in words, streamed blocks with their count; "" for condition."""
        if phase == "denoise" and self.denoise == "streamed":
            return f"streamed {len(self.streamed)}"
        levels = {"encode": self.encode, "denoise": self.denoise, "decode": self.decode}
        return levels.get(phase, "")


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will do: precision, placement, and the bytes and seconds of each phase.

    `precision` is that of the transformer's blocks; `spec` says what is quantized while loading.
    `live_bytes` are those of tensors; `peak_bytes` count what the driver counts, too: its context,
    workspaces, and what the allocator holds without being able to use it.
    """

    device: str
    precision: str
    dtypes: dict[str, str]  # by component: what it computes in
    spec: QuantSpec | None
    placement: Placement
    peak_bytes: dict[str, int]  # on the device, by phase
    seconds: dict[str, float]  # by phase, and "load"
    speeds: str  # where the seconds' speeds are from
    budget_bytes: int
    host_bytes: int  # RAM that is held
    reasons: tuple[str, ...]
    margin_bytes: int = 0  # that are free beyond the budget, and left alone as long as it goes
    compiled: bool = False  # the transformer's blocks
    live_bytes: dict[str, int] = field(default_factory=dict)  # on the device, by phase
    activation_bytes: dict[str, int] = field(default_factory=dict)  # the part that is no weights

    @property
    def total_s(self) -> float:
        """From a cold start to one picture."""
        return sum(self.seconds.values())

    @property
    def picture_s(self) -> float:
        """Of one picture whose model is loaded: what a worker and a batch pay for each."""
        return sum(taken_s for name, taken_s in self.seconds.items() if name not in READING)

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types; the placement has the key "residency" that it always had."""
        found = asdict(self)
        found["residency"] = found.pop("placement")
        return found


@dataclass(frozen=True)
class Candidate:
    """One precision of one checkpoint for one device: what it costs, and what became of it.

    `verdict` is "" until `planner.survey` has judged it: then "chosen", "fits" (a better one does,
    too), "too slow", "does not fit", or "not now" (it does not fit into what is free).
    """

    checkpoint: Checkpoint
    hardware: Hardware
    precision: str
    scheme: str  # of the quantized layers, "" where there is none
    spec: QuantSpec | None
    dtypes: dict[str, str]
    basis: str  # why it would be computed so
    cost: Cost
    error: float = 0.0  # relative, of a layer's output: what 16 bit gives is the measure
    verdict: str = ""
    why: str = ""  # this verdict
    plan: MemoryPlan | None = None  # for what is free now

    @property
    def multiply(self) -> str:
        """How the blocks multiply: the precision itself where it is of 16 or 32 bit."""
        if self.scheme:
            return self.hardware.find_multiply(self.scheme)
        return self.precision

    @property
    def multiplied(self) -> str:
        """The scheme that its products are in; "" where they are in 16 or 32 bit."""
        return self.scheme if self.is_native else ""

    @property
    def is_native(self) -> bool:
        """Whether the device multiplies in the precision itself, without dequantizing."""
        return self.multiply != DEQUANTIZE


class Fit(NamedTuple):
    """The best plan of a candidate within a budget; or the phase that has none, and why."""

    plan: MemoryPlan | None
    phase: str = ""
    why: str = ""


class StepDown(NamedTuple):
    """A plan that takes less memory than another, and what changed, in words for the user."""

    plan: MemoryPlan
    change: str


def make_candidate(
    workload: Workload,
    checkpoint: Checkpoint,
    hardware: Hardware,
    *,
    precision: str,
    spec: QuantSpec | None,
    dtypes: dict[str, str],
    basis: str = "",
) -> Candidate:
    """One precision of one checkpoint with its costs, not judged yet."""
    lines = SIXTEEN_BIT_LINES
    scheme = SCHEMES.get(precision)
    if scheme:
        is_unpacked = hardware.find_multiply(scheme.name) == DEQUANTIZE
        lines = scheme.dequantized_lines if is_unpacked else scheme.activation_lines
    cost = costs.estimate_cost(
        workload,
        checkpoint,
        dtypes=dtypes,
        spec=spec,
        lines=lines,
        has_workspaces=hardware.kind == "cuda",
    )
    return Candidate(
        checkpoint=checkpoint,
        hardware=hardware,
        precision=precision,
        scheme=scheme.name if scheme else "",
        spec=spec,
        dtypes=dtypes,
        basis=basis,
        cost=cost,
        error=costs.estimate_error(checkpoint.components["transformer"], spec),
    )


# --- the fastest placement within a budget


def fit(
    candidate: Candidate,
    *,
    offload: str,
    budget_bytes: int,
    host_bytes: int,
    may_tile: bool = True,
) -> Fit:
    """The fastest placement within a budget on the device and so much RAM for streamed blocks.

    `offload` is the request's wish: "auto", or "none", "stream" or "sequential", which leave one
    level. `may_tile` allows the decode that changes pixels; without it the whole picture is decoded
    in less memory than cuDNN would take, rather than not at all. Each phase takes the first level
    that fits, from most memory to least.
    """
    hardware = candidate.hardware
    placement = Placement(keep=_choose_keep(candidate, offload, budget_bytes))
    for phase in ("encode", "denoise", "decode"):
        chosen = None
        why = f"{phase} cannot be so: packing again in every step is never worth it"
        for level in _list_levels(candidate, phase, placement, offload=offload, may_tile=may_tile):
            peak_bytes = estimate_peaks(candidate, level)[phase]
            if phase == "decode" and level.decode == "alone" and not may_tile:
                peak_bytes -= candidate.cost.workspace_bytes
            streamed_bytes = _streamed_bytes(candidate, level)
            if peak_bytes <= budget_bytes and streamed_bytes <= host_bytes:
                chosen = level
                break
            why = f"{phase} needs {peak_bytes / GIB:.1f} GiB"
            why += f", {hardware.device} has {budget_bytes / GIB:.1f} GiB"
            if peak_bytes <= budget_bytes:
                why = f"{phase} streams {streamed_bytes / GIB:.1f} GiB"
                why += f", for which RAM has {host_bytes / GIB:.1f} GiB"
        if chosen is None:
            return Fit(None, phase, why)
        placement = chosen
    if "modulation" not in placement.keep and hardware.kind != "cpu":
        with_modulation = replace(placement, keep=(*placement.keep, "modulation"))
        if max(estimate_peaks(candidate, with_modulation).values()) <= budget_bytes:
            placement = with_modulation
    return Fit(_make_plan(candidate, placement, budget_bytes))


def _choose_keep(candidate: Candidate, offload: str, budget_bytes: int) -> tuple[str, ...]:
    """What stays on the device between phases: everything, where the model is small."""
    whole_bytes = candidate.cost.total_bytes + candidate.cost.modulation_bytes
    is_small = whole_bytes < budget_bytes * RESIDENT_SHARE
    if is_small and offload in ("auto", "none"):
        return KEEP_ALL
    return KEEP_LARGE


def _list_levels(
    candidate: Candidate, phase: str, now: Placement, *, offload: str, may_tile: bool
) -> Iterator[Placement]:
    """What a phase may have after the phases before it, from most memory to least."""
    if phase == "encode":
        return _list_encode_levels(candidate, now, offload)
    if phase == "denoise":
        return _list_denoise_levels(candidate, now, offload)
    return _list_decode_levels(now, may_tile=may_tile)


def _list_encode_levels(candidate: Candidate, now: Placement, offload: str) -> Iterator[Placement]:
    if offload != "sequential":
        yield now
    if offload != "none" and candidate.hardware.kind != "cpu":
        yield replace(now, encode="sequential")


def _list_denoise_levels(candidate: Candidate, now: Placement, offload: str) -> Iterator[Placement]:
    if offload in ("auto", "none"):
        yield now
    if offload == "none" or candidate.hardware.kind == "cpu":
        return
    if offload in ("auto", "stream"):
        counts = _list_counts(candidate)
        if offload == "stream":
            counts = counts[-1:]
        for count in counts:
            yield _stream(candidate, now, count)
    # What is quantized while loading would be quantized again in every step: never worth it.
    if offload != "stream" and candidate.spec is None:
        yield replace(now, denoise="sequential")


def _list_decode_levels(now: Placement, *, may_tile: bool) -> Iterator[Placement]:
    yield now
    yield replace(now, keep=(), decode="alone")
    if may_tile:
        yield replace(now, keep=(), decode="tiled")


def _list_counts(candidate: Candidate) -> range:
    """How many blocks may be streamed: even numbers, since two slots take turns."""
    blocks = len(candidate.cost.blocks)
    return range(4, blocks + 1, 4 if blocks > 16 else 2)


def _stream(candidate: Candidate, now: Placement, count: int) -> Placement:
    """The placement with `count` blocks streamed: those that make a step the fastest."""
    compute_s = costs.block_seconds(candidate.cost, candidate.hardware, _speeds_of(candidate))
    bus = find_bus(candidate.hardware)
    streamed = costs.choose_streamed(candidate.cost, compute_s, count, bus=bus)
    return replace(now, denoise="streamed", streamed=streamed)


def find_bus(hardware: Hardware) -> Bus:
    """How fast streamed blocks come, those that are pinned and those beyond the driver's limit."""
    speeds = hardware.speeds
    return Bus(
        bus_bytes=speeds.bus_bytes,
        fed_bytes=min(speeds.bus_bytes, speeds.host_copy_bytes),
        pin_limit_bytes=inf if hardware.pin_bytes is None else hardware.pin_bytes,
    )


def host_limit(hardware: Hardware) -> int:
    """Bytes of RAM that streamed blocks may take on this machine, whatever else it holds."""
    return int(hardware.ram_bytes * RAM_SHARE)


def host_limit_now(hardware: Hardware) -> int:
    """Bytes of RAM that streamed blocks may take now, by what is free."""
    return min(host_limit(hardware), int(hardware.ram_free_bytes * FREE_RAM_SHARE))


# --- bytes and seconds of a placement


def _streamed_bytes(candidate: Candidate, placement: Placement) -> int:
    """Bytes of RAM that the streamed blocks take."""
    return sum(candidate.cost.blocks[i].nbytes for i in placement.streamed)


def count_copied_bytes(candidate: Candidate, placement: Placement) -> int:
    """Bytes that come to the device in every step, from RAM or from files."""
    if placement.denoise == "sequential":
        return candidate.cost.blocks_bytes
    return _streamed_bytes(candidate, placement)


def estimate_peaks(candidate: Candidate, placement: Placement) -> dict[str, int]:
    """Bytes that the driver counts at the peak of each phase.

    That are those of tensors, the context, cuDNN's workspaces, and a margin for what the allocator
    holds beside.
    """
    cost = candidate.cost
    hardware = candidate.hardware
    live_bytes = estimate_live(candidate, placement)
    if hardware.kind == "cpu":
        return live_bytes
    peaks = {phase: CONTEXT_BYTES + size for phase, size in live_bytes.items()}
    if hardware.kind != "cuda":
        return peaks
    share = EXPANDABLE_SHARE if hardware.expandable else FRAGMENTS_SHARE
    for phase, size in live_bytes.items():
        peaks[phase] += FRAGMENTS_BYTES
        if phase != "decode":
            peaks[phase] += int(size * share)
    # The workspaces are those that others have measured, as reserved bytes: with their fragments.
    is_tiled = placement.decode == "tiled"
    peaks["decode"] += cost.workspace_tiled_bytes if is_tiled else cost.workspace_bytes
    return peaks


def estimate_live(candidate: Candidate, placement: Placement) -> dict[str, int]:
    """Bytes of tensors on the device at the peak of each phase."""
    cost = candidate.cost
    always_bytes = 0
    if "modulation" in placement.keep:
        always_bytes += cost.modulation_bytes
    encoders_bytes = 0  # that stay through all phases
    if "text_encoder_2" in placement.keep:
        encoders_bytes = cost.clip_bytes + cost.t5_bytes
    beside_bytes = cost.vae_bytes if "transformer" in placement.keep else 0

    if placement.denoise == "sequential":
        left_bytes = cost.rest_bytes  # of the transformer after the last step
        transformer_bytes = left_bytes + max(block.nbytes for block in cost.blocks)
    else:
        slot_bytes = max((cost.blocks[i].nbytes for i in placement.streamed), default=0)
        left_bytes = cost.transformer_bytes + 2 * slot_bytes
        left_bytes -= _streamed_bytes(candidate, placement)
        transformer_bytes = left_bytes

    if encoders_bytes:
        encode_bytes = encoders_bytes + transformer_bytes + beside_bytes + cost.encode_bytes
    else:
        t5_bytes = cost.t5_bytes
        if placement.encode == "sequential":
            # A block that is quantized while loading is there twice.
            copies = 2 if candidate.spec else 1
            t5_bytes = cost.t5_rest_bytes + cost.t5_block_bytes * copies
        encode_bytes = max(t5_bytes + cost.encode_bytes, cost.clip_bytes)

    condition_bytes = encoders_bytes + _estimate_condition(candidate)

    denoise_bytes = encoders_bytes + transformer_bytes + beside_bytes
    denoise_bytes += cost.tables_bytes + cost.denoise_bytes

    decode_bytes = encoders_bytes + cost.vae_bytes
    if placement.decode == "tiled":
        decode_bytes += cost.decode_tiled_bytes
    else:
        decode_bytes += cost.decode_bytes
    if placement.decode == "together":
        decode_bytes += left_bytes
    return {
        "encode": always_bytes + encode_bytes,
        "condition": always_bytes + condition_bytes,
        "denoise": always_bytes + denoise_bytes,
        "decode": always_bytes + decode_bytes,
    }


def _estimate_condition(candidate: Candidate) -> int:
    """Bytes of the tables, and of the weights that pass while they are made."""
    cost = candidate.cost
    # A modulation weight as stored and the one before it; once more where it is converted.
    copies = 2 if candidate.dtypes["transformer"] == "bfloat16" else 3
    # The other half of the tables is in RAM already when the largest weight is there.
    tables_bytes = cost.tables_bytes // 2 + cost.dequantizing_bytes
    return tables_bytes + copies * cost.largest_modulation_bytes


def _list_activations(candidate: Candidate, placement: Placement) -> dict[str, int]:
    """Bytes beside the weights that are there before a phase computes."""
    cost = candidate.cost
    is_tiled = placement.decode == "tiled"
    decode_bytes = cost.decode_tiled_bytes if is_tiled else cost.decode_bytes
    return {
        "condition": _estimate_condition(candidate),
        "denoise": cost.denoise_bytes,
        "decode": decode_bytes,
    }


def _speeds_of(candidate: Candidate) -> Speeds:
    """The device's speeds in this candidate's dtype."""
    hardware = candidate.hardware
    is_bf16 = candidate.dtypes["transformer"] == "bfloat16"
    if hardware.kind == "cpu" and is_bf16 and not hardware.bf16:
        speeds = hardware.speeds
        return replace(
            speeds,
            wide=speeds.wide * costs.SLOW_BF16,
            attention=speeds.attention * costs.SLOW_BF16,
        )
    return hardware.speeds


def estimate_seconds(
    candidate: Candidate, placement: Placement, speeds: Speeds | None = None
) -> dict[str, float]:
    """Seconds of each phase of one picture from a cold start, with the device's speeds or others.

    Reading and computing are added up: that they overlap is not counted.
    """
    cost = candidate.cost
    speeds = speeds or _speeds_of(candidate)

    modulation_stored_bytes = cost.modulation_numel * 2
    load_s = (cost.stored_bytes - modulation_stored_bytes) / speeds.disk_bytes
    if candidate.spec:
        quantize_bytes = QUANTIZE_BYTES
        if candidate.hardware.kind == "cpu":
            quantize_bytes *= CPU_QUANTIZE_SHARE
        quantized_numel = sum(sum(block.numel_by_form.values()) for block in cost.blocks)
        if candidate.spec.text_encoder != "keep":
            quantized_numel += cost.t5_numel
        load_s += quantized_numel * 2 / quantize_bytes

    encode_s = 2 * cost.t5_numel * cost.workload.text_tokens / speeds.wide
    if placement.encode == "sequential":
        encode_s += cost.t5_bytes / speeds.pageable_bytes

    compute_s = costs.block_seconds(cost, candidate.hardware, speeds)
    bus = find_bus(candidate.hardware)
    step_s = costs.step_seconds(cost, compute_s, placement.streamed, bus=bus)
    if placement.denoise == "sequential":
        step_s += cost.blocks_bytes / speeds.pageable_bytes

    decode_s = cost.workload.pixels * costs.VAE_FLOP / speeds.wide
    if placement.decode == "tiled":
        decode_s *= costs.TILED_WORK
    return {
        "load": round(load_s, 3),
        "encode": round(encode_s, 3),
        "condition": round(modulation_stored_bytes / speeds.disk_bytes, 3),
        "denoise": round(step_s * cost.workload.steps, 3),
        "decode": round(decode_s, 3),
    }


def estimate_sure_s(candidate: Candidate, plan: MemoryPlan) -> float:
    """Seconds of a picture of a plan, with products in 8 bit at 16 bit's speed where none is known.

    Its model is loaded, as for `MemoryPlan.picture_s`.
    """
    speeds = _speeds_of(candidate).without_guesses()
    seconds = estimate_seconds(candidate, plan.placement, speeds)
    return replace(plan, seconds=seconds).picture_s


def _make_plan(candidate: Candidate, placement: Placement, budget_bytes: int) -> MemoryPlan:
    """Return the plan of a placement: its bytes and seconds by phase, and its reasons."""
    hardware = candidate.hardware
    peak_bytes = estimate_peaks(candidate, placement)
    host_bytes = _streamed_bytes(candidate, placement)
    if hardware.kind == "cpu":
        host_bytes += max(peak_bytes.values())  # RAM is the device's memory there
    reasons = _explain(candidate, placement)
    if peak_bytes["decode"] > budget_bytes:
        peak_bytes["decode"] = budget_bytes
        reasons += ("the VAE decodes in less memory than cuDNN would take, more slowly",)
    return MemoryPlan(
        device=hardware.device,
        precision=candidate.precision,
        dtypes=candidate.dtypes,
        spec=candidate.spec,
        placement=placement,
        peak_bytes=peak_bytes,
        live_bytes=estimate_live(candidate, placement),
        activation_bytes=_list_activations(candidate, placement),
        seconds=estimate_seconds(candidate, placement),
        speeds=hardware.speeds.name_source(candidate.multiplied),
        budget_bytes=budget_bytes,
        host_bytes=host_bytes,
        reasons=reasons,
    )


def _explain(candidate: Candidate, placement: Placement) -> tuple[str, ...]:
    """Why the placement is what it is, a sentence for each decision."""
    cost = candidate.cost
    hardware = candidate.hardware
    reasons = [
        f"{hardware.device}: {hardware.reason}",
        f"seconds by {hardware.speeds.name_source(candidate.multiplied)}",
    ]
    how = hardware.explain_multiply(candidate.scheme)
    if how:
        reasons.append(f"{candidate.scheme}: {how}")
    if hardware.ram_limit:
        reasons.append(f"RAM is {hardware.ram_bytes / GIB:.1f} GiB by {hardware.ram_limit}")
    if hardware.kind == "cuda" and hardware.expandable:
        reasons.append("memory is planned with segments that can grow (expandable_segments)")
    elif hardware.kind == "cuda":
        why = hardware.fixed_segments or "segments of memory cannot grow"
        reasons.append(f"{FRAGMENTS_SHARE:.0%} of memory are left for gaps: {why}")
    if placement.encode == "sequential":
        size = f"{cost.t5_bytes / GIB:.1f} GiB"
        reasons.append(f"T5 passes block by block: {size} are too much for it at once")
    if placement.denoise != "resident":
        blocks = len(cost.blocks)
        passing = len(placement.streamed) or blocks
        whole = f"{blocks} blocks, with all on the device {cost.transformer_bytes / GIB:.1f} GiB"
        how = "read from their files in every step"
        if placement.streamed:
            how = "streamed from RAM"
        reasons.append(f"{passing} of {whole}, are {how}")
    streamed_bytes = _streamed_bytes(candidate, placement)
    if hardware.pin_bytes is not None and streamed_bytes > hardware.pin_bytes:
        limit = f"{hardware.pin_bytes / GIB:.1f} of {streamed_bytes / GIB:.1f} GiB"
        reasons.append(f"the driver pins {limit}: the rest passes through a buffer")
    if placement.decode == "alone":
        reasons.append("the transformer leaves before the VAE decodes")
    if placement.decode == "tiled":
        reasons.append("the transformer leaves before the VAE decodes, in tiles")
    if "text_encoder_2" in placement.keep:
        reasons.append("all components stay loaded: together they are small")
    return tuple(reasons)


# --- less memory than planned


def weaker(first: Placement, second: Placement) -> Placement:
    """The placement that takes no more memory than either: of each phase the lower level."""

    def rank_denoise(placement: Placement) -> tuple[bool, int]:
        return placement.denoise == "sequential", len(placement.streamed)

    denoise = max(first, second, key=rank_denoise)
    encode_levels = ("resident", "sequential")
    decode_levels = ("together", "alone", "tiled")
    return Placement(
        encode=max(first.encode, second.encode, key=encode_levels.index),
        denoise=denoise.denoise,
        decode=max(first.decode, second.decode, key=decode_levels.index),
        streamed=denoise.streamed,
        keep=tuple(name for name in first.keep if name in second.keep),
    )


def step_down(plan: MemoryPlan, phase: str, candidate: Candidate) -> StepDown | None:
    """The plan to go on with after a phase ran out of memory; None where nothing is left.

    First nothing else stays on the device; then the phase itself takes less: T5 passes block by
    block, the VAE decodes alone and then in tiles, more blocks are streamed (an eighth of them at
    a time, as far as the RAM goes), and last every block is read from its file.
    """
    now = plan.placement
    following: Placement | None = None
    change = ""
    if now.keep:
        following = replace(now, keep=())
        if now.decode == "together":
            following = replace(following, decode="alone")
        change = "nothing else stays"
    elif phase == "encode" and now.encode == "resident":
        following = replace(now, encode="sequential")
        change = "T5 passes block by block"
    elif phase == "decode" and now.decode != "tiled":
        following = replace(now, decode="tiled")
        change = "the VAE decodes in tiles (the pixels differ a little)"
    elif phase in ("condition", "denoise") and now.denoise != "sequential":
        following = _stream_more(candidate, now)
        if following:
            blocks = len(candidate.cost.blocks)
            change = f"{len(following.streamed)} of {blocks} blocks streamed"
        elif candidate.spec is None:
            following = replace(now, denoise="sequential", streamed=())
            change = "every block from its file"
    if following is None:
        return None
    made = _make_plan(candidate, following, plan.budget_bytes)
    return StepDown(replace(made, device=plan.device, margin_bytes=plan.margin_bytes), change)


def _stream_more(candidate: Candidate, now: Placement) -> Placement | None:
    """The placement with an eighth more of the blocks streamed; None beyond what the RAM holds."""
    hardware = candidate.hardware
    if hardware.kind == "cpu":
        return None
    least = len(now.streamed) + max(1, len(candidate.cost.blocks) // 8)
    for count in _list_counts(candidate):
        if count >= least:
            following = _stream(candidate, now, count)
            fits = _streamed_bytes(candidate, following) <= host_limit_now(hardware)
            return following if fits else None
    return None
