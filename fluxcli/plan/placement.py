"""Where weights are in each phase of a run: the fastest placement within a budget, its bytes and
seconds, and the next one down when memory runs out all the same.

Arithmetic on `costs`: opens no file and asks no device. Sizes are in bytes. Stdlib only.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from fluxcli.plan import costs
from fluxcli.plan.costs import Bus, ControlCost, Cost, Workload
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware, Speeds
from quant.checkpoint import Checkpoint
from quant.spec import ATTENTION, DEQUANTIZE, SCHEMES, ActivationLine, QuantSpec

GIB = 2**30
PHASES = ("encode", "condition", "denoise", "decode")  # of every picture
PREPARE = "prepare"  # after the first of these, where the VAE encodes pictures
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
TILEABLE = (PREPARE, "decode")  # phases in which the VAE computes
CONTROL_LEVELS = ("resident", "streamed", "sequential")
# What stays on the device between phases, by the names of `Placement.keep`.
KEEP_ALL = ("text_encoder", "text_encoder_2", "transformer", "vae", "modulation")
KEEP_LARGE = ("transformer", "vae")


@dataclass(frozen=True)
class Placement:
    """Where weights are in each phase.

    encode: T5 is "resident" on the device, or "sequential", block by block from its file.
    prepare: the VAE encodes pictures "whole", or "tiled", which gives other pixels.
    denoise: the transformer is "resident", "streamed" (the blocks in `streamed`, by index, come
    from pinned memory), or "sequential" (every block from its file in every step).
    controls: ControlNets, which stay beside it, are "resident", "streamed" (every block of each
    comes from pinned memory, through two slots of its own), or "sequential".
    decode: the VAE works "together" with the transformer, "alone" after it has left, or "tiled",
    alone and in tiles, which gives other pixels.
    """

    encode: str = "resident"
    denoise: str = "resident"
    decode: str = "together"
    streamed: tuple[int, ...] = ()
    keep: tuple[str, ...] = ()  # components, and "modulation", that may stay beside each other
    prepare: str = "whole"
    controls: str = "resident"

    def level(self, phase: str) -> str:
        """A phase's level in words, streamed blocks with their count; "" for condition."""
        if phase == "denoise" and self.denoise == "streamed":
            return f"streamed {len(self.streamed)}"
        levels = {"encode": self.encode, "denoise": self.denoise, "decode": self.decode}
        levels[PREPARE] = self.prepare
        return levels.get(phase, "")

    @property
    def tiles(self) -> tuple[str, ...]:
        """The phases in which the VAE works in tiles."""
        levels = {PREPARE: self.prepare, "decode": self.decode}
        return tuple(phase for phase, level in levels.items() if level == "tiled")

    def allows(self, name: str, other: str) -> bool:
        """Whether two components may be on the device at once.

        ControlNets compute in the transformer's steps, and may stay wherever it may.
        """
        one, two = ("transformer" if costs.is_control(each) else each for each in (name, other))
        return one == two or (one in self.keep and two in self.keep)


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

    def find_spec(self, component: str) -> QuantSpec | None:
        """What is quantized of a component while it is loaded."""
        if costs.is_control(component):
            return costs.find_control_spec(self.precision)
        return self.spec

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
        control_spec=costs.find_control_spec(precision),
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
    tiles: Collection[str] = TILEABLE,
) -> Fit:
    """The fastest placement within a budget on the device and so much RAM for streamed blocks.

    `offload` is the request's wish: "auto", or "none", "stream" or "sequential", which leave one
    level. `tiles` are the phases that may work in tiles, which changes pixels; others have the VAE
    take the whole picture in less memory than cuDNN would take, rather than not at all. Each phase
    takes the first level that fits, from most memory to least.
    """
    hardware = candidate.hardware
    placement = Placement(keep=_choose_keep(candidate, offload, budget_bytes))
    fitted = ["encode", "denoise", "decode"]
    if candidate.cost.workload.input_pixels:
        fitted.append(PREPARE)
    for phase in fitted:
        chosen = None
        why = f"{phase} cannot be so: packing again in every step is never worth it"
        for level in _list_levels(
            candidate, phase, placement, offload=offload, may_tile=phase in tiles
        ):
            peak_bytes = estimate_peaks(candidate, level)[phase]
            if phase not in tiles:
                peak_bytes -= _count_spared_bytes(candidate, phase, level)
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


def _count_spared_bytes(candidate: Candidate, phase: str, level: Placement) -> int:
    """The workspace that the VAE goes without, where it would have to work in tiles else."""
    if phase == "decode" and level.decode == "alone":
        return candidate.cost.workspace_bytes
    if phase == PREPARE and not level.keep:
        return candidate.cost.prepare_workspace_bytes
    return 0


def _choose_keep(candidate: Candidate, offload: str, budget_bytes: int) -> tuple[str, ...]:
    """What stays on the device between phases: everything, where the model is small."""
    whole_bytes = candidate.cost.total_bytes + candidate.cost.modulation_bytes
    is_small = whole_bytes < budget_bytes * RESIDENT_SHARE
    if not is_small or offload not in ("auto", "none"):
        return KEEP_LARGE
    if candidate.cost.image_encoders_bytes:
        return (*KEEP_ALL, *costs.IMAGE_ENCODERS)
    return KEEP_ALL


def _list_levels(
    candidate: Candidate, phase: str, now: Placement, *, offload: str, may_tile: bool
) -> Iterator[Placement]:
    """What a phase may have after the phases before it, from most memory to least."""
    if phase == "encode":
        return _list_encode_levels(candidate, now, offload)
    if phase == "denoise":
        return _list_denoise_levels(candidate, now, offload)
    if phase == PREPARE:
        return _list_prepare_levels(now, may_tile=may_tile)
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
        # The bytes that come in a step are the same, whichever blocks stay. A ControlNet's are
        # double ones, and go last.
        for controls in ("resident", "streamed"):
            if controls == "resident" and offload == "stream" and candidate.cost.controls:
                continue
            if controls == "streamed" and not candidate.cost.controls:
                continue
            for count in counts:
                yield replace(_stream(candidate, now, count), controls=controls)
    # What is quantized while loading would be quantized again in every step: never worth it.
    if offload != "stream" and candidate.spec is None:
        yield replace(now, denoise="sequential", controls=_find_least_of_controls(candidate))


def _find_least_of_controls(candidate: Candidate) -> str:
    """The level of ControlNets that takes the least memory of the device.

    What would be quantized again in every step comes from RAM.
    """
    if not candidate.cost.controls:
        return "resident"
    is_quantized = any(control.quantized_numel for control in candidate.cost.controls)
    return "streamed" if is_quantized else "sequential"


def _list_decode_levels(now: Placement, *, may_tile: bool) -> Iterator[Placement]:
    yield now
    yield replace(now, keep=(), decode="alone")
    if may_tile:
        yield replace(now, keep=(), decode="tiled")


def _list_prepare_levels(now: Placement, *, may_tile: bool) -> Iterator[Placement]:
    yield now
    alone = _leave_nothing(now)
    yield alone
    if may_tile:
        yield replace(alone, prepare="tiled")


def _leave_nothing(now: Placement) -> Placement:
    """The placement with nothing that stays beside what computes."""
    decode = "alone" if now.decode == "together" else now.decode
    return replace(now, keep=(), decode=decode)


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
    """Bytes of RAM that the streamed blocks take, those of ControlNets, too."""
    streamed_bytes = sum(candidate.cost.blocks[i].nbytes for i in placement.streamed)
    if placement.controls == "streamed":
        streamed_bytes += sum(control.blocks_bytes for control in candidate.cost.controls)
    return streamed_bytes


def count_copied_bytes(candidate: Candidate, placement: Placement) -> int:
    """Bytes that come to the device in every step, from RAM or from files."""
    cost = candidate.cost
    copied_bytes = sum(cost.blocks[i].nbytes for i in placement.streamed)
    if placement.denoise == "sequential":
        copied_bytes = cost.blocks_bytes
    if placement.controls != "resident":
        copied_bytes += sum(control.blocks_bytes for control in cost.controls)
    return copied_bytes


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
        if phase not in TILEABLE:
            peaks[phase] += int(size * share)
    # The workspaces are those that others have measured, as reserved bytes: with their fragments.
    is_tiled = placement.decode == "tiled"
    peaks["decode"] += cost.workspace_tiled_bytes if is_tiled else cost.workspace_bytes
    if PREPARE in peaks:
        peaks[PREPARE] += cost.prepare_workspace_bytes
        if placement.prepare == "tiled":
            peaks[PREPARE] += cost.prepare_workspace_tiled_bytes - cost.prepare_workspace_bytes
    return peaks


def estimate_live(candidate: Candidate, placement: Placement) -> dict[str, int]:
    """Bytes of tensors on the device at the peak of each phase."""
    cost = candidate.cost
    held = _hold_for_steps(cost, placement)
    always_bytes = 0
    if "modulation" in placement.keep:
        always_bytes += cost.modulation_bytes
    encoders_bytes = 0  # that stay through all phases
    if "text_encoder_2" in placement.keep:
        encoders_bytes = cost.encoders_bytes
    beside_bytes = cost.vae_bytes if "transformer" in placement.keep else 0

    if encoders_bytes:
        encode_bytes = encoders_bytes + held.computing_bytes + beside_bytes + cost.encode_bytes
    else:
        encode_bytes = _estimate_encoders(candidate, placement)

    condition_bytes = encoders_bytes + _estimate_condition(candidate)
    if cost.workload.input_pixels:
        condition_bytes += beside_bytes

    denoise_bytes = encoders_bytes + held.computing_bytes + beside_bytes
    denoise_bytes += cost.tables_bytes + cost.denoise_bytes

    beside = _list_activations(candidate, placement)
    decode_bytes = encoders_bytes + cost.vae_bytes + beside["decode"]
    if placement.decode == "together":
        decode_bytes += held.left_bytes
    found = {
        "encode": always_bytes + encode_bytes,
        "condition": always_bytes + condition_bytes,
        "denoise": always_bytes + denoise_bytes,
        "decode": always_bytes + decode_bytes,
    }
    if PREPARE in beside:
        prepare_bytes = encoders_bytes + cost.vae_bytes + beside[PREPARE]
        if "transformer" in placement.keep:  # of the picture before
            prepare_bytes += held.left_bytes
        found[PREPARE] = always_bytes + prepare_bytes
    return {phase: found[phase] for phase in list_phases(cost.workload)}


def list_phases(workload: Workload) -> tuple[str, ...]:
    """The phases of a workload's pictures, in their order."""
    if not workload.input_pixels:
        return PHASES
    return (PHASES[0], PREPARE, *PHASES[1:])


class _Held(NamedTuple):
    """Bytes of the transformer and the ControlNets on the device."""

    computing_bytes: int  # at the peak of a step
    left_bytes: int  # after the last one


def _hold_for_steps(cost: Cost, placement: Placement) -> _Held:
    """What is on the device of all that a step computes."""
    controls_bytes = _count_controls(cost, placement)
    if placement.denoise == "sequential":
        left_bytes = cost.rest_bytes + controls_bytes
        # Each block leaves before the next one comes, a ControlNet's or the transformer's.
        passing = [block.nbytes for block in cost.blocks]
        if placement.controls == "sequential":
            passing += [block.nbytes for block in cost.control_blocks]
        return _Held(left_bytes + max(passing), left_bytes)
    slot_bytes = max((cost.blocks[i].nbytes for i in placement.streamed), default=0)
    left_bytes = cost.transformer_bytes + 2 * slot_bytes + controls_bytes
    left_bytes -= sum(cost.blocks[i].nbytes for i in placement.streamed)
    return _Held(left_bytes, left_bytes)


def _estimate_encoders(candidate: Candidate, placement: Placement) -> int:
    """Bytes at the peak of encode, where each encoder is there alone."""
    cost = candidate.cost
    t5_bytes = cost.t5_bytes
    if placement.encode == "sequential":
        # A block that is quantized while loading is there twice.
        copies = 2 if candidate.spec else 1
        t5_bytes = cost.t5_rest_bytes + cost.t5_block_bytes * copies
    of_images_bytes = 0
    if cost.image_encoders_bytes:
        of_images_bytes = cost.image_encoders_bytes + costs.IMAGE_ENCODER_BYTES
    return max(t5_bytes + cost.encode_bytes, cost.clip_bytes, of_images_bytes)


def _count_controls(cost: Cost, placement: Placement) -> int:
    """Bytes of ControlNets on the device between their blocks."""
    if placement.controls == "resident":
        return cost.controls_bytes
    held_bytes = sum(control.rest_bytes for control in cost.controls)
    if placement.controls == "streamed":
        held_bytes += sum(2 * control.slot_bytes for control in cost.controls)
    return held_bytes


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
    found = {
        "condition": _estimate_condition(candidate),
        "denoise": cost.denoise_bytes,
        "decode": decode_bytes,
    }
    if cost.workload.input_pixels:
        is_tiled = placement.prepare == "tiled"
        found[PREPARE] = cost.prepare_tiled_bytes if is_tiled else cost.prepare_bytes
    return found


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
    quantize_bytes = QUANTIZE_BYTES
    if candidate.hardware.kind == "cpu":
        quantize_bytes *= CPU_QUANTIZE_SHARE
    quantized_numel = sum(control.quantized_numel for control in cost.controls)
    if candidate.spec:
        quantized_numel += sum(sum(block.numel_by_form.values()) for block in cost.blocks)
        if candidate.spec.text_encoder != "keep":
            quantized_numel += cost.t5_numel
    load_s += quantized_numel * 2 / quantize_bytes

    workload = cost.workload
    # Each pass of a step has a prompt of its own.
    encode_s = 2 * cost.t5_numel * workload.text_tokens * workload.passes / speeds.wide
    if placement.encode == "sequential":
        encode_s += cost.t5_bytes * workload.passes / speeds.pageable_bytes

    compute_s = costs.block_seconds(cost, candidate.hardware, speeds)
    bus = find_bus(candidate.hardware)
    pass_s = costs.step_seconds(cost, compute_s, placement.streamed, bus=bus)
    if placement.denoise == "sequential":
        pass_s += cost.blocks_bytes / speeds.pageable_bytes
    denoise_s = pass_s * workload.passes * workload.steps
    for control in cost.controls:
        denoise_s += control.calls * _estimate_call(candidate, control, placement, speeds)

    prepare_s = sum(workload.input_pixels) * costs.INPUT_FLOP / speeds.wide
    if placement.prepare == "tiled":
        prepare_s *= costs.TILED_WORK
    decode_s = cost.workload.pixels * costs.VAE_FLOP / speeds.wide
    if placement.decode == "tiled":
        decode_s *= costs.TILED_WORK
    found = {
        "load": load_s,
        "encode": encode_s,
        PREPARE: prepare_s,
        "condition": modulation_stored_bytes / speeds.disk_bytes,
        "denoise": denoise_s,
        "decode": decode_s,
    }
    return {name: round(found[name], 3) for name in ("load", *list_phases(workload))}


def _estimate_call(
    candidate: Candidate, control: ControlCost, placement: Placement, speeds: Speeds
) -> float:
    """Seconds by which a ControlNet makes a step longer that it computes in.

    Streamed blocks come while others compute, the transformer's among them.
    """
    cost = candidate.cost
    own_s = costs.control_seconds(cost, control, candidate.hardware, speeds)
    if placement.controls == "sequential":
        return sum(own_s) + control.blocks_bytes / speeds.pageable_bytes
    if placement.controls == "resident":
        return sum(own_s)
    compute_s = costs.block_seconds(cost, candidate.hardware, speeds)
    bus = find_bus(candidate.hardware)
    without_s = costs.step_seconds(cost, compute_s, placement.streamed, bus=bus)
    count = len(own_s)
    streamed = (*range(count), *(count + index for index in placement.streamed))
    both = costs.put_before(cost, control)
    return costs.step_seconds(both, [*own_s, *compute_s], streamed, bus=bus) - without_s


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
    for phase, does in (("decode", "decodes"), (PREPARE, "encodes")):
        if peak_bytes.get(phase, 0) > budget_bytes:
            peak_bytes[phase] = budget_bytes
            reasons += (f"the VAE {does} in less memory than cuDNN would take, more slowly",)
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
    reasons += _explain_inputs(candidate, placement)
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


def _explain_inputs(candidate: Candidate, placement: Placement) -> list[str]:
    """What pictures and true guidance add, a sentence for each."""
    cost = candidate.cost
    workload = cost.workload
    reasons = []
    if workload.passes > 1:
        reasons.append(f"true guidance: {workload.passes} passes of the transformer in each step")
    if workload.reference_tokens:
        tokens = f"{workload.reference_tokens} tokens of references"
        reasons.append(f"{tokens} are in each step beside {workload.image_tokens} of the picture")
    if workload.extra_text_tokens:
        size = f"{cost.image_encoders_bytes / GIB:.1f} GiB"
        tokens = f"{workload.extra_text_tokens} tokens"
        reasons.append(f"SigLIP and Redux' embedder ({size}) add {tokens} to the prompt's")
    for control in cost.controls:
        size = f"{control.nbytes / GIB:.1f} GiB in {len(control.blocks)} blocks"
        how = {
            "resident": "stays beside the transformer",
            "streamed": "is streamed from RAM",
            "sequential": "is read from its files in every step",
        }[placement.controls]
        called = f"{control.calls} of {workload.steps} steps"
        if control.pictures > 1:
            called = f"{control.calls} calls for {control.pictures} pictures"
        reasons.append(f"{control.name} {how}: {size}, for {called}")
    if placement.prepare == "tiled":
        reasons.append("the VAE encodes pictures in tiles")
    return reasons


# --- less memory than planned


def weaker(first: Placement, second: Placement) -> Placement:
    """The placement that takes no more memory than either: of each phase the lower level."""

    def rank_denoise(placement: Placement) -> tuple[bool, int]:
        return placement.denoise == "sequential", len(placement.streamed)

    denoise = max(first, second, key=rank_denoise)
    prepare_levels = ("whole", "tiled")
    encode_levels = ("resident", "sequential")
    decode_levels = ("together", "alone", "tiled")
    return Placement(
        encode=max(first.encode, second.encode, key=encode_levels.index),
        denoise=denoise.denoise,
        decode=max(first.decode, second.decode, key=decode_levels.index),
        streamed=denoise.streamed,
        keep=tuple(name for name in first.keep if name in second.keep),
        prepare=max(first.prepare, second.prepare, key=prepare_levels.index),
        controls=max(first.controls, second.controls, key=CONTROL_LEVELS.index),
    )


def step_down(plan: MemoryPlan, phase: str, candidate: Candidate) -> StepDown | None:
    """The plan to go on with after a phase ran out of memory; None where nothing is left.

    First nothing else stays on the device; then the phase itself takes less: T5 passes block by
    block, the VAE encodes in tiles, or decodes alone and then in tiles, more blocks are streamed
    (an eighth of them at a time, as far as the RAM goes), then those of ControlNets, and last every
    block is read from its file.
    """
    now = plan.placement
    following: Placement | None = None
    change = ""
    if now.keep:
        following = _leave_nothing(now)
        change = "nothing else stays"
    elif phase == "encode" and now.encode == "resident":
        following = replace(now, encode="sequential")
        change = "T5 passes block by block"
    elif phase == "decode" and now.decode != "tiled":
        following = replace(now, decode="tiled")
        change = "the VAE decodes in tiles (the pixels differ a little)"
    elif phase == PREPARE and now.prepare != "tiled":
        following = replace(now, prepare="tiled")
        change = "the VAE encodes in tiles (the pixels differ a little)"
    elif phase in ("condition", "denoise") and now.denoise != "sequential":
        following, change = _step_down_denoise(candidate, now)
    if following is None:
        return None
    made = _make_plan(candidate, following, plan.budget_bytes)
    return StepDown(replace(made, device=plan.device, margin_bytes=plan.margin_bytes), change)


def _step_down_denoise(candidate: Candidate, now: Placement) -> tuple[Placement | None, str]:
    """The next placement whose steps take less memory, None where there is none, and the change."""
    following = _stream_more(candidate, now)
    if following:
        blocks = len(candidate.cost.blocks)
        return following, f"{len(following.streamed)} of {blocks} blocks streamed"
    if candidate.cost.controls and now.controls == "resident" and now.denoise == "streamed":
        following = replace(now, controls="streamed")
        if _streamed_bytes(candidate, following) <= host_limit_now(candidate.hardware):
            return following, "the ControlNets streamed, too"
    if candidate.spec is not None:
        return None, ""
    controls = _find_least_of_controls(candidate)
    following = replace(now, denoise="sequential", streamed=(), controls=controls)
    return following, "every block from its file"


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
