"""The planner: which precision, and why. Every precision that a model's folders offer is a rung.

By the device's TOTAL memory the best one is taken that is not predicted slower than 1.25 times the fastest that fits
(by the table of cards: nothing is timed); by its FREE memory only where weights
are (`residency`). Arithmetic on headers; docs/memory.md explains it. Stdlib only. Sizes are in bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fluxcli.errors import DoesNotFit, UsageError
from fluxcli.plan import costs
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, MemoryPlan, Offer, fit, host_limit, make_offer
from fluxcli.request.fields import Order
from fluxcli.request.settings import flag
from quant.checkpoint import Checkpoint
from quant.spec import BAKEABLE, SCHEMES, QuantSpec

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LONG = {short: long for long, short in SHORT.items()}
QUALITY = ("fp32", "bf16", "fp16", "fp8", "int8", "gguf", "nf4")  # best first
USABLE_SHARE = 0.92  # of the total: the rest is the desktop's and the driver's
CPU_SHARE = 0.8  # of the RAM, that weights in float32 may take
SLOWER = 1.25


@dataclass(frozen=True)
class Rung:
    """An offer and its verdict: chosen, fits, too slow, does not fit, or not now (in what is free)."""

    offer: Offer
    verdict: str
    why: str
    plan: MemoryPlan | None


def make_plan(
    order: Order, checkpoints: Sequence[Checkpoint], hardware: Hardware, *, margin_bytes: int = 0
) -> tuple[Checkpoint, MemoryPlan]:  # fmt: skip
    """The folder and the plan to take; raises `DoesNotFit` with the numbers and with what would fit."""
    rungs = survey(order, checkpoints, hardware, margin_bytes=margin_bytes)
    if chosen := chosen_of(rungs):
        return chosen.offer.checkpoint, chosen.plan
    worst = next((rung for rung in rungs if rung.verdict == "not now"), rungs[0])
    hint = suggestion(order, checkpoints, hardware) or "another device, or -p tiny"
    why = f"{worst.offer.precision}: {worst.why}"
    raise DoesNotFit("the model does not fit", which=order.request.model, why=why, hint=hint)


def chosen_of(rungs: Sequence[Rung]) -> Rung | None:
    """The rung to take, None if nothing fits now."""
    return next((rung for rung in rungs if rung.verdict == "chosen"), None)


def survey(
    order: Order, checkpoints: Sequence[Checkpoint], hardware: Hardware, *, margin_bytes: int = 0
) -> list[Rung]:  # fmt: skip
    """Every rung with its verdict, best quality first.

    `margin_bytes` of what is free are left alone where that is possible: memory ran out on this card before. It moves
    placements and never the precision, which follows the total memory.
    """
    if hardware.kind == "cpu" and order.resources.offload != "auto":
        why = "on the CPU weights are in RAM already, or in their mapped files"
        raise UsageError(f"--offload {order.resources.offload} without effect", which="cpu", why=why, hint="leave it out")
    total = int(min(order.resources.vram_limit or hardware.total_bytes, hardware.total_bytes * USABLE_SHARE))
    free = total if hardware.kind == "cpu" else min(total, hardware.free_bytes)
    offers = sorted(_offers(order, checkpoints, hardware), key=lambda offer: QUALITY.index(offer.precision))
    by_total = [fit(offer, budget=total, host=host_limit(hardware, ever=True)) for offer in offers]
    seconds = [sum(plan.seconds.values()) for plan, _ in by_total if plan]
    limit, rungs = SLOWER * min(seconds, default=0.0), []
    for offer, (whole, over) in zip(offers, by_total, strict=True):
        plan, short, taken = None, "", any(rung.verdict in ("chosen", "not now") for rung in rungs)
        if whole:
            tiled = whole.residency.decode == "tiled"  # other pixels: never by what is free in a moment
            plan, short = fit(offer, budget=free - margin_bytes, host=host_limit(hardware), tiled=tiled)
            if plan is None and margin_bytes:  # what ran out in another moment forbids nothing
                plan, short = fit(offer, budget=free, host=host_limit(hardware), tiled=tiled)
        slow = sum(whole.seconds.values()) / limit * SLOWER if whole else 0.0
        verdict, why = (
            ("does not fit", over) if not whole
            else ("too slow", f"{slow:.1f} times the fastest that fits") if slow > SLOWER
            else ("fits", "a better one fits") if taken
            else ("chosen", offer.why) if plan
            else ("not now", f"{short} free")
        )  # fmt: skip
        if verdict == "chosen":
            because = [f"{offer.precision}: {why}", *(f"not {rung.offer.precision}: {rung.why}" for rung in rungs)]
            if plan.budget_bytes < free:
                because.append(f"{margin_bytes / GIB:.1f} GiB are left free: memory ran out on this card before")
            plan = replace(plan, reasons=(*plan.reasons, *because))
        rungs.append(Rung(offer, verdict, why, plan))
    return rungs


# --- precision


def _offers(order: Order, checkpoints: Sequence[Checkpoint], hardware: Hardware) -> Iterator[Offer]:
    """Every precision of every folder that was asked for; raises `UsageError` where there is none."""
    found, stored_as, wanted = set(), [], order.resources.precision
    for checkpoint in checkpoints:
        stored = checkpoint.components["transformer"].precision
        stored_as.append(stored or "16 bit")
        for precision in [stored] if stored else [wanted if wanted in LONG else "auto", *BAKEABLE]:
            packs = precision in BAKEABLE and not stored
            spec = QuantSpec(precision, SCHEMES[precision].text_encoder) if packs else None
            dtypes, why = _dtypes(order, precision, checkpoint, hardware, spec)
            name = precision if stored or packs else SHORT[dtypes["transformer"]]
            if name in found or wanted not in ("auto", name):
                continue
            found.add(name)
            why = "the weights are stored so" if stored else why
            why = "packed while loading (flux quantize does that once for all)" if spec else why
            yield make_offer(order, checkpoint, hardware, name, spec, dtypes, why)
    if not found:
        why = f"its weights are {' and '.join(dict.fromkeys(stored_as))}"
        hint = "the 16-bit model, or --precision auto"
        raise UsageError(f"--precision {wanted} is impossible", which=order.request.model, why=why, hint=hint)


def _dtypes(
    order: Order, asked: str, checkpoint: Checkpoint, hardware: Hardware, spec: QuantSpec | None
) -> tuple[dict[str, str], str]:  # fmt: skip
    """The dtype that each component computes in, and why."""
    every = dict.fromkeys(checkpoint.components, "float32")
    if asked in LONG:
        dtypes = every | {"transformer": LONG[asked]}
        return dtypes | (dict.fromkeys(every, "bfloat16") if asked == "bf16" else {}), "asked for"
    if hardware.bf16:
        return dict.fromkeys(every, "bfloat16"), "the device computes it"
    if hardware.kind != "cpu":
        return every | {"transformer": "float16"}, "the device has no bfloat16 (encoders and VAE compute in float32)"
    cost = costs.cost_of(order, checkpoint, every, spec)
    if max(cost.t5, cost.transformer + cost.vae) <= hardware.total_bytes * CPU_SHARE:
        return every, "this CPU has no fast bfloat16"
    return dict.fromkeys(every, "bfloat16"), "slowly: float32 does not fit into this RAM"


def suggestion(order: Order, checkpoints: Sequence[Checkpoint], hardware: Hardware) -> str:
    """Options with which the order would fit, "" where none of the usual ones helps."""
    tries = [{"offload": "auto"}, {"precision": "nf4"}, {"precision": "auto"}]
    tries += [{"precision": "nf4", "image_size": side, "width": None, "height": None} for side in (1024, 768, 512, 256)]
    now = order.settings()
    for changes in tries:
        tried = Order.from_settings(order.request.prompt, now | changes)
        if tried == order or max(tried.request.size) > max(order.request.size):
            continue
        try:
            if chosen_of(survey(tried, checkpoints, hardware)):
                changed = {key: value for key, value in changes.items() if value != now[key] and value}
                return " ".join(f"{flag(key)} {value}" for key, value in changed.items())
        except UsageError:  # a precision that these weights do not have
            continue
    return ""
