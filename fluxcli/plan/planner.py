"""Which precision a request gets, and why: every one that a model's checkpoints offer is judged.

By the device's TOTAL memory the precision of least error is taken that is not predicted slower than
1.25 times the fastest that fits. One whose blocks all stay on the device goes before one that is
streamed, since nobody has measured how well copies hide, and what must be dequantized for each
product comes last. The FREE memory decides only where weights are (`placement`), so that the same
request on the same device gives the same pixels in a busy moment, too. Loading does not count,
which a worker pays once; and products in 8 bit count as fast as in 16 where nobody has timed them,
so that no better precision is "too slow" on a guess. Arithmetic on headers; docs/memory.md explains
it. Opens no file. Sizes are in bytes. Stdlib only.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fluxcli.errors import DoesNotFit, UsageError
from fluxcli.plan import costs
from fluxcli.plan.costs import Measured, Window, Workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import (
    GIB,
    SIXTEEN_BIT_LINES,
    Candidate,
    Fit,
    MemoryPlan,
    count_copied_bytes,
    estimate_sure_s,
    fit,
    host_limit,
    host_limit_now,
    make_candidate,
)
from fluxcli.request.fields import GenerationRequest, Resources
from fluxcli.request.settings import flag
from quant.checkpoint import Checkpoint
from quant.lora import Adapter
from quant.spec import BAKEABLE, SCHEMES, QuantSpec, find_error

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LONG = {short: long for long, short in SHORT.items()}
USABLE_SHARE = 0.92  # of the total: the rest is the desktop's and the driver's
CPU_SHARE = 0.8  # of the RAM, that weights in float32 may take
COMPILED = "compiled: bytes and seconds are planned as without; the first step takes longer"
SLOWER = 1.25  # times the fastest that fits: what a better precision may take


class Planned(NamedTuple):
    """What is to be done: the checkpoint to load, and how."""

    checkpoint: Checkpoint
    plan: MemoryPlan


def make_plan(
    workload: Workload,
    resources: Resources,
    checkpoints: Sequence[Checkpoint],
    hardware: Hardware,
    *,
    margin_bytes: int = 0,
    model: str = "",
) -> Planned:
    """The checkpoint to take and how to place it.

    `checkpoints` are what there is of one model, which messages call `model`; see `survey` for
    `margin_bytes`. Raises `DoesNotFit` with the numbers (`suggest_options` says what would fit),
    and `UsageError` for a precision that the checkpoints cannot give.
    """
    found = survey(
        workload, resources, checkpoints, hardware=hardware, margin_bytes=margin_bytes, model=model
    )
    chosen = find_chosen(found)
    if chosen and chosen.plan:
        return Planned(chosen.checkpoint, chosen.plan)
    worst = next((each for each in found if each.verdict == "not now"), found[0])
    why = f"{worst.precision}: {worst.why}"
    hint = "another device, or -p tiny"
    raise DoesNotFit("the model does not fit", which=model, why=why, hint=hint)


def find_chosen(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate to take, None if nothing fits now."""
    return next((each for each in candidates if each.verdict == "chosen"), None)


def choose_bake(
    workload: Workload, resources: Resources, checkpoint: Checkpoint, *, hardware: Hardware
) -> Candidate:
    """What a 16-bit checkpoint is best baked to for a device: what the device's plan would choose.

    Its precision is one of `SCHEMES`, or of 16 or 32 bit, where nothing has to be baked; `why` and
    the plan's reasons say why. Raises `DoesNotFit` where no precision fits.
    """
    found = survey(workload, resources, [checkpoint], hardware=hardware)
    for candidate in found:
        if candidate.verdict in ("chosen", "not now"):  # a busy moment decides no bake
            return candidate
    why = f"{found[-1].precision}: {found[-1].why}"
    hint = "--to " + found[-1].precision
    raise DoesNotFit("no precision fits", which=hardware.name, why=why, hint=hint)


def survey(
    workload: Workload,
    resources: Resources,
    checkpoints: Sequence[Checkpoint],
    hardware: Hardware,
    *,
    margin_bytes: int = 0,
    model: str = "",
) -> list[Candidate]:
    """Every candidate with its verdict, that of least error first.

    `margin_bytes` of what is free are left alone where that is possible: memory ran out on this
    card before. They move placements and never the precision. Raises `UsageError` for an
    --offload on a CPU, and for a precision that the checkpoints cannot give.
    """
    if hardware.kind == "cpu" and resources.offload != "auto":
        why = "on the CPU weights are in RAM already"
        what = f"--offload {resources.offload} without effect"
        raise UsageError(what, which="cpu", why=why, hint="leave it out")
    total_bytes = int(hardware.total_bytes * USABLE_SHARE)
    if resources.vram_limit:
        total_bytes = min(resources.vram_limit, hardware.total_bytes, total_bytes)
    free_bytes = total_bytes
    if hardware.kind != "cpu":
        free_bytes = min(total_bytes, hardware.usable_bytes)

    candidates = _list_candidates(workload, resources, checkpoints, hardware=hardware, model=model)
    candidates.sort(key=lambda candidate: candidate.error)
    always = hardware.without_circumstances()
    anytime = [replace(candidate, hardware=always) for candidate in candidates]
    by_total = [
        fit(
            candidate,
            offload=resources.offload,
            budget_bytes=total_bytes,
            host_bytes=host_limit(hardware),
        )
        for candidate in anytime
    ]
    sure_s = [
        estimate_sure_s(candidate, ever.plan)
        for candidate, ever in zip(anytime, by_total, strict=True)
        if ever.plan
    ]
    fastest_s = min(sure_s, default=0.0)
    taken = _find_taken(anytime, by_total, fastest_s=fastest_s)
    judged: list[Candidate] = []
    for candidate, ever in zip(candidates, by_total, strict=True):
        now = ever
        if ever.plan:
            now = _fit_now(
                candidate,
                resources,
                free_bytes=free_bytes,
                margin_bytes=margin_bytes,
                # Other pixels: decided by the total memory, never by a busy moment.
                tiles=ever.plan.placement.tiles,
            )
        judged.append(judge(candidate, ever, now, fastest_s=fastest_s, taken=taken))
    return _explain_choice(judged, compiled=resources.compile)


class Taken(NamedTuple):
    """The candidate whose precision a request gets on a device, by its total memory."""

    precision: str
    error: float
    is_whole: bool  # all blocks stay on the device
    is_native: bool  # as `Candidate.is_native`


def _find_taken(
    candidates: Sequence[Candidate], by_total: Sequence[Fit], *, fastest_s: float
) -> Taken | None:
    """The best of those that fit and are not too slow; None where none fits.

    Of those that the device multiplies as they are, one that stays whole goes before one that is
    streamed. Of whole ones that of least error is taken, of streamed ones that of the fewest bytes
    to copy. What is dequantized for each product comes after these, by its error.
    """
    ranked: list[tuple[tuple[bool, int, float], Taken]] = []
    for candidate, ever in zip(candidates, by_total, strict=True):
        if ever.plan is None or _is_slow(ever.plan, fastest_s):
            continue
        is_whole = ever.plan.placement.denoise == "resident"
        is_native = candidate.is_native
        taken = Taken(candidate.precision, candidate.error, is_whole, is_native)
        passing_bytes = count_copied_bytes(candidate, ever.plan.placement) if is_native else 0
        ranked.append(((not is_native, passing_bytes, candidate.error), taken))
    best = min(ranked, key=lambda row: row[0], default=None)
    return best[1] if best else None


def _is_slow(plan: MemoryPlan, fastest_s: float) -> bool:
    """Whether a picture takes longer than a better precision may."""
    return plan.picture_s > SLOWER * fastest_s


def _fit_now(
    candidate: Candidate,
    resources: Resources,
    *,
    free_bytes: int,
    margin_bytes: int,
    tiles: Collection[str],
) -> Fit:
    """The plan within what is free, without the margin where the rest is enough."""
    budget_bytes = free_bytes - margin_bytes
    host_bytes = host_limit_now(candidate.hardware)
    found = fit(
        candidate,
        offload=resources.offload,
        budget_bytes=budget_bytes,
        host_bytes=host_bytes,
        tiles=tiles,
    )
    if not margin_bytes:
        return found
    # The margin was learned in another moment: where nothing fits beside it, plan without it.
    if found.plan is None:
        return fit(
            candidate,
            offload=resources.offload,
            budget_bytes=free_bytes,
            host_bytes=host_bytes,
            tiles=tiles,
        )
    size = f"{margin_bytes / GIB:.1f} GiB"
    reason = f"{size} are left free: memory ran out here before"
    reasons = (*found.plan.reasons, reason)
    return Fit(replace(found.plan, reasons=reasons, margin_bytes=margin_bytes))


def judge(
    candidate: Candidate, ever: Fit, now: Fit, *, fastest_s: float, taken: Taken | None
) -> Candidate:
    """The candidate with its verdict, and the plan for now.

    `ever` is what fits into the total memory, which decides pixels; `now` into what is free, which
    decides the placement; `fastest_s` is of a picture whose model is loaded; `taken` is what the
    device gets. The first that holds is the verdict: it does not fit, it is more than `SLOWER`
    times as slow as `fastest_s`, another one is taken, it does not fit now; else it is chosen.
    """
    if ever.plan is None:
        return replace(candidate, verdict="does not fit", why=ever.why)
    candidate = replace(candidate, plan=now.plan)
    if _is_slow(ever.plan, fastest_s):
        why = f"{ever.plan.picture_s / fastest_s:.1f} times the fastest that fits"
        return replace(candidate, verdict="too slow", why=why)
    assert taken is not None, "it is one of those that are taken from"
    if candidate.precision != taken.precision:
        why = _explain_other(candidate, ever.plan, taken)
        return replace(candidate, verdict="fits", why=why)
    if now.plan is None:
        free = f"{candidate.hardware.free_bytes / GIB:.1f} GiB free"
        ram_free = f"{candidate.hardware.ram_free_bytes / GIB:.1f} GiB of RAM"
        return replace(candidate, verdict="not now", why=f"{now.why} ({free}, {ram_free})")
    return replace(candidate, verdict="chosen", why=candidate.basis)


def _explain_other(candidate: Candidate, ever: MemoryPlan, taken: Taken) -> str:
    """Why a candidate that fits and is not too slow is not what is taken.

    `ever` is the plan by which it was compared, in segments that are fixed.
    """
    if candidate.error >= taken.error:
        return "a better one does, too"
    if taken.is_native and not candidate.is_native:
        return f"dequantized for each product, as {taken.precision} is not"
    shown = candidate.plan or ever
    where = ""
    if shown.placement.denoise == "resident":
        shown = ever
        where = "where segments cannot grow "
    blocks = len(candidate.cost.blocks)
    # A placement that reads every block from its file has none in `streamed`.
    count = len(shown.placement.streamed) or blocks
    passing = f"{where}{count} of {blocks} blocks are streamed"
    if taken.is_whole:
        return f"{passing}, with {taken.precision} none is"
    return f"{passing}, with {taken.precision} fewer bytes"


def _explain_choice(judged: Sequence[Candidate], *, compiled: bool) -> list[Candidate]:
    """The same candidates; the plan of the chosen one says why it is, and why no better one.

    It says, too, whether the transformer's blocks are `compiled`.
    """
    explained = list(judged)
    for position, candidate in enumerate(judged):
        if candidate.verdict == "chosen" and candidate.plan:
            better = [f"not {each.precision}: {each.why}" for each in judged[:position]]
            chosen = f"{candidate.precision}: {candidate.why}"
            faster = _explain_faster(candidate.plan, judged[position + 1 :])
            reasons = (*candidate.plan.reasons, chosen, *better, *faster)
            if compiled:
                reasons = (*reasons, COMPILED)
            plan = replace(candidate.plan, reasons=reasons, compiled=compiled)
            explained[position] = replace(candidate, plan=plan)
    return explained


def _explain_faster(chosen: MemoryPlan, worse: Sequence[Candidate]) -> tuple[str, ...]:
    """What errs more and would not leave the chosen one, if what nobody has timed counted.

    In a busy moment that streams the chosen one others are faster for that alone: nothing is said.
    """
    plans = [each.plan for each in worse if each.verdict == "fits" and each.plan]
    if chosen.placement.denoise != "resident" or not plans:
        return ()
    fastest = min(plans, key=lambda plan: plan.picture_s)
    if not _is_slow(chosen, fastest.picture_s):
        return ()
    times = chosen.picture_s / fastest.picture_s
    return (f"{fastest.precision} may be {times:.1f} times as fast, but nobody has timed it",)


# --- candidates


class Dtypes(NamedTuple):
    """What each component computes in, and why."""

    by_component: dict[str, str]
    why: str


def _list_candidates(
    workload: Workload,
    resources: Resources,
    checkpoints: Sequence[Checkpoint],
    hardware: Hardware,
    *,
    model: str,
) -> list[Candidate]:
    """One candidate for each precision that is asked for; raises `UsageError` where there is none.

    Of several checkpoints that give the same precision the first is taken; but int8 is packed anew
    where the file that is there was made without a rotation.
    """
    found: dict[str, Candidate] = {}
    for checkpoint in checkpoints:
        for asked, spec in _list_precisions(checkpoint, resources.precision):
            dtypes = _choose_dtypes(workload, checkpoint, hardware, precision=asked, spec=spec)
            basis = dtypes.why
            name = asked
            if checkpoint.components["transformer"].precision:
                basis = "the weights are stored so"
            elif spec:
                basis = "packed while loading (flux quantize does that once for all)"
            else:
                name = SHORT[dtypes.by_component["transformer"]]
            if resources.precision not in ("auto", name):
                continue
            known = found.get(name)
            if known is not None and (spec is None or known.error <= find_error(spec.to)):
                continue
            candidate = make_candidate(
                workload,
                checkpoint,
                hardware,
                precision=name,
                spec=spec,
                dtypes=dtypes.by_component,
                basis=basis,
            )
            found[name] = candidate
    if not found:
        stored = [each.components["transformer"].precision or "16 bit" for each in checkpoints]
        why = f"its weights are {' and '.join(dict.fromkeys(stored))}"
        hint = "the 16-bit model, or --precision auto"
        what = f"--precision {resources.precision} is impossible"
        raise UsageError(what, which=model, why=why, hint=hint)
    return list(found.values())


def _list_precisions(checkpoint: Checkpoint, wanted: str) -> Iterator[tuple[str, QuantSpec | None]]:
    """The precisions that a checkpoint can give, each with what is quantized while loading for it.

    The first of a 16-bit checkpoint is the wanted dtype, or "auto" for the device's own.
    """
    stored = checkpoint.components["transformer"].precision
    if stored:
        yield stored, None
        return
    yield (wanted if wanted in LONG else "auto"), None
    for scheme in BAKEABLE:
        yield scheme, QuantSpec(scheme, SCHEMES[scheme].text_encoder)


def _choose_dtypes(
    workload: Workload,
    checkpoint: Checkpoint,
    hardware: Hardware,
    *,
    precision: str,
    spec: QuantSpec | None,
) -> Dtypes:
    """What each component computes in: what was asked for, else what the device does at best."""
    in_float32 = dict.fromkeys(checkpoint.components, "float32")
    in_bfloat16 = dict.fromkeys(checkpoint.components, "bfloat16")
    # Before sm80 cuDNN has no convolutions in bfloat16, which the VAE needs.
    if precision == "bf16" and (hardware.bf16 or hardware.kind != "cuda"):
        return Dtypes(in_bfloat16, "asked for")
    stepping = [name for name in checkpoint.components if costs.is_control(name)]
    stepping.append("transformer")
    if precision in LONG:
        return Dtypes(in_float32 | dict.fromkeys(stepping, LONG[precision]), "asked for")
    if hardware.bf16:
        return Dtypes(in_bfloat16, "the device computes it")
    if hardware.kind != "cpu":
        # T5 and the VAE overflow in float16.
        why = "the device has no bfloat16 (encoders and VAE compute in float32)"
        return Dtypes(in_float32 | dict.fromkeys(stepping, "float16"), why)
    cost = costs.estimate_cost(
        workload, checkpoint, dtypes=in_float32, spec=spec, lines=SIXTEEN_BIT_LINES
    )
    of_steps_bytes = cost.transformer_bytes + cost.controls_bytes + cost.vae_bytes
    needed_bytes = max(cost.t5_bytes, of_steps_bytes)
    if needed_bytes <= hardware.total_bytes * CPU_SHARE:
        return Dtypes(in_float32, "this CPU has no fast bfloat16")
    return Dtypes(in_bfloat16, "slowly: float32 does not fit into this RAM")


# --- what would fit instead

SMALLEST = ("w4a8", "nf4")  # which is smaller by a tenth, and errs more
# Changes of resources, and a side in pixels, in the order in which they are tried.
TRIES: tuple[tuple[dict[str, Any], int | None], ...] = (
    ({"offload": "auto"}, None),
    *(({"precision": name}, None) for name in SMALLEST),
    ({"precision": "auto"}, None),
    *(({"precision": name}, side_px) for side_px in (1024, 768, 512, 256) for name in SMALLEST),
)


def suggest_options(
    request: GenerationRequest,
    resources: Resources,
    checkpoints: Sequence[Checkpoint],
    hardware: Hardware,
    *,
    adapters: Sequence[Adapter] = (),
    references: Sequence[Measured] = (),
    controls: Sequence[Window] = (),
) -> str:
    """The command-line options with which the request would fit, "" where none of `TRIES` helps.

    Smaller pictures keep their ratio; none is suggested that is larger than what was asked for.
    """
    for changes, side_px in TRIES:
        tried = request
        if side_px is not None:
            tried = replace(request, image_size=side_px, width=None, height=None)
        with_resources = replace(resources, **changes)
        is_same = tried == request and with_resources == resources
        if is_same or max(tried.size) > max(request.size):
            continue
        workload = costs.make_workload(tried, adapters, references=references, controls=controls)
        try:
            candidates = survey(workload, with_resources, checkpoints, hardware=hardware)
        except UsageError:  # a precision that these weights do not have
            continue
        if find_chosen(candidates):
            options = [
                f"{flag(name)} {value}"
                for name, value in changes.items()
                if value != getattr(resources, name)
            ]
            if side_px is not None and side_px != request.image_size:
                options.append(f"{flag('image_size')} {side_px}")
            return " ".join(options)
    return ""
