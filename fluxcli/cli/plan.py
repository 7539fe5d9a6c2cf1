"""`flux plan`: which precision and placement generate would take, and why not another.

Needs no weights, and with --card no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, NamedTuple, Optional

import typer

from fluxcli.cli import console
from fluxcli.cli.options import with_request_options
from fluxcli.cli.settings import given_settings, read_prompt
from fluxcli.engine.cards import describe_card
from fluxcli.engine.check import check_torch
from fluxcli.errors import DoesNotFit, ExitCode, WeightsUnavailable
from fluxcli.models import find, loras
from fluxcli.models.shapes import read_known_shapes
from fluxcli.paths import config_folder
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, PHASES, Candidate, MemoryPlan
from fluxcli.plan.planner import find_chosen, suggest_options, survey
from fluxcli.request.fields import Order
from fluxcli.resolve import resolve_order
from fluxcli.run.margin import read_margin
from quant.checkpoint import Checkpoint
from quant.lora import Adapter


@with_request_options
def plan_command(
    prompt: Annotated[
        str, typer.Argument(help="As for generate; it costs nothing.", show_default=False)
    ] = "a plan",
    card: Annotated[
        Optional[str],
        typer.Option("--card", metavar="CARD", help="A card that is not here: SIZE[:smNN]."),
    ] = None,
    **options: object,
) -> int:
    """Say which precision and placement generate would take, and why not another.

    Needs no weights.
    """
    order = resolve_order(read_prompt(prompt), given_settings(options))
    model = _find_model(order)
    hardware, margin_bytes = _find_hardware(order, card)
    adapters = _find_adapters(order, model.checkpoints)
    if not adapters:
        order = replace(order, request=replace(order.request, lora=()))
    candidates = survey(
        make_workload(order.request, adapters),
        order.resources,
        model.checkpoints,
        hardware=hardware,
        margin_bytes=margin_bytes,
        model=order.request.model,
    )
    if options["json_output"]:
        console.data_json(_describe(order, model, hardware=hardware, candidates=candidates))
    else:
        _show(order, model, hardware=hardware, candidates=candidates)
    if find_chosen(candidates) is None:
        found = suggest_options(
            order.request, order.resources, model.checkpoints, hardware=hardware, adapters=adapters
        )
        hint = found or "a larger card, or -p tiny"
        why = candidates[0].why
        raise DoesNotFit("nothing fits", which=hardware.name, why=why, hint=hint)
    return ExitCode.OK


class Model(NamedTuple):
    """What there is of a model, or its published shapes, and how much would be downloaded."""

    checkpoints: Sequence[Checkpoint]
    missing_bytes: int


def _find_model(order: Order) -> Model:
    """Raises `WeightsUnavailable` for a model that is not here and whose shapes are not known."""
    try:
        return Model(find.list_checkpoints(order, config_folder(), console.say), 0)
    except WeightsUnavailable:
        shapes = read_known_shapes(order.request.model)
        if shapes is None:
            raise
        find.check_guidance(order.request, shapes)
        return Model([shapes], shapes.nbytes)


def _find_hardware(order: Order, card: str | None) -> tuple[Hardware, int]:
    """The card of --card, or the device that is here; and what plans for it leave alone."""
    if card:
        return describe_card(card), 0
    check_torch()
    from fluxcli.engine import device

    hardware = device.probe(order.resources.device)
    return hardware, read_margin(hardware)


def _find_adapters(order: Order, checkpoints: Sequence[Checkpoint]) -> tuple[Adapter, ...]:
    """The adapters of --lora, each header read once; none where one of them is not here."""
    try:
        return loras.resolve_loras(order.request.lora, checkpoints[-1].components)
    except WeightsUnavailable as error:
        console.say(f"planned without adapters: {error}")
        return ()


def _describe(
    order: Order,
    model: Model,
    *,
    hardware: Hardware,
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    """What --json prints."""
    chosen = find_chosen(candidates)
    rows = []
    for candidate in candidates:
        stored = candidate.checkpoint.components["transformer"].precision
        rows.append(
            {
                "precision": candidate.precision,
                "verdict": candidate.verdict,
                "why": candidate.why,
                "folder_is_packed": bool(stored),
                "plan": candidate.plan.to_json() if candidate.plan else None,
            }
        )
    return {
        "request": order.to_json(),
        "size": order.request.size,
        "hardware": asdict(hardware),
        "download_bytes": model.missing_bytes,
        "chosen": chosen.precision if chosen else None,
        "candidates": rows,
    }


def _show(
    order: Order,
    model: Model,
    *,
    hardware: Hardware,
    candidates: Sequence[Candidate],
) -> None:
    """The table of candidates, then seconds and reasons of the one that is chosen."""
    request = order.request
    width_px, height_px = request.size
    what = f"{request.model}, {width_px}x{height_px}, {request.steps} steps"
    memory = f"{_gib(hardware.total_bytes)} GiB, {_gib(hardware.free_bytes)} free"
    console.data(f"{what}, on {hardware.name} ({memory})")
    if model.missing_bytes:
        size = f"{model.missing_bytes / 1e9:.1f} GB"
        console.data(f"not downloaded: {size}, planned by its known shapes")
    phases = " ".join(f"{phase:>9}" for phase in PHASES)
    console.data(f"{'':<6} {'blocks':<12} {phases} {'RAM':>6} {'total':>8}")
    for candidate in candidates:
        cells = _format_plan(candidate.plan) if candidate.plan else ""
        console.data(f"{candidate.precision:<6} {cells}{candidate.verdict}: {candidate.why}")
    chosen = find_chosen(candidates)
    if chosen and chosen.plan:
        console.data(f"seconds   {_format_seconds(chosen.plan.seconds)}")
        for reason in chosen.plan.reasons:
            console.data(f"because   {reason}")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f}"


def _format_plan(plan: MemoryPlan) -> str:
    """The cells of a candidate's row between its name and its verdict."""
    peaks = " ".join(f"{plan.peak_bytes[phase] / GIB:>5.2f} GiB" for phase in PHASES)
    host = f"{plan.host_bytes / GIB:>6.2f}"
    return f"{plan.placement.level('denoise'):<12} {peaks} {host} {plan.total_s:>6.0f} s  "


def _format_seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
