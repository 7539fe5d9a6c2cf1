"""Commands that say what would be: `flux plan` and `doctor`."""

from dataclasses import asdict, replace
from typing import Annotated, Optional

import typer

from fluxcli.cli import console
from fluxcli.cli.options import with_request_options
from fluxcli.cli.settings import given_settings, read_prompt
from fluxcli.engine import device as hardware
from fluxcli.engine.cards import describe_card
from fluxcli.errors import DoesNotFit, ExitCode, WeightsUnavailable
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from fluxcli.models.shapes import read_known_shapes
from fluxcli.paths import config_folder
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, PHASES
from fluxcli.plan.planner import Rung, chosen_of, suggestion, survey
from fluxcli.request.fields import Order
from fluxcli.request.settings import coerce
from fluxcli.resolve import resolve_order
from fluxcli.run.margin import read_margin
from quant.checkpoint import Checkpoint


@with_request_options
def plan_command(
    prompt: Annotated[str, typer.Argument(help="As for generate; it costs nothing.", show_default=False)] = "a plan",
    card: Annotated[Optional[str], typer.Option("--card", help="A card that is not here: SIZE[:smNN].")] = None,
    **options: object,
) -> int:
    """Say which precision and placement generate would take, and why not another. Needs no weights."""
    order = resolve_order(read_prompt(prompt), given_settings(options))
    checkpoints, missing = _checkpoints(order)
    if card:
        machine = describe_card(card)
    else:
        hardware.check_torch()
        machine = hardware.probe(order.resources.device)
    try:
        lora.resolve_loras(order.request.lora, checkpoints[-1].components)
    except WeightsUnavailable as error:
        console.say(f"planned without adapters: {error}")
        order = replace(order, request=replace(order.request, lora=()))
    rungs = survey(order, checkpoints, machine, margin_bytes=0 if card else read_margin(machine))
    chosen = chosen_of(rungs)
    if options["json_output"]:
        console.data_json({
            "request": order.to_json(), "size": order.request.size, "hardware": asdict(machine), "download_bytes": missing,
            "chosen": chosen and chosen.offer.precision,
            "rungs": [{
                "precision": rung.offer.precision, "verdict": rung.verdict, "why": rung.why,
                "folder_is_packed": bool(rung.offer.checkpoint.components["transformer"].precision),
                "plan": rung.plan and rung.plan.to_json(),
            } for rung in rungs],
        })  # fmt: skip
    else:
        _show_rungs(order, machine, rungs, missing)
    if chosen is None:
        hint = suggestion(order, checkpoints, machine) or "a larger card, or -p tiny"
        raise DoesNotFit("nothing fits", which=machine.name, why=rungs[0].why, hint=hint)
    return ExitCode.OK


def _checkpoints(order: Order) -> tuple[list[Checkpoint], int]:
    """(what there is of the model, or its known shapes; bytes that are not downloaded)."""
    try:
        return models.list_checkpoints(order, config_folder(), console.say), 0
    except WeightsUnavailable:
        shapes = read_known_shapes(order.request.model)
        if shapes is None:
            raise
        models.check_guidance(order.request, shapes)
        return [shapes], shapes.nbytes


def _show_rungs(order: Order, machine: Hardware, rungs: list[Rung], missing: int) -> None:
    """The table of rungs, and the reasons of the one that is chosen."""
    request = order.request
    width, height = request.size
    memory = f"{machine.total_bytes / GIB:.1f} GiB, {machine.free_bytes / GIB:.1f} free"
    console.data(f"{request.model}, {width}x{height}, {request.steps} steps, on {machine.name} ({memory})")
    if missing:
        console.data(f"not downloaded: {missing / 1e9:.1f} GB, planned by its known shapes")
    console.data(f"{'':<6} {'blocks':<12} " + " ".join(f"{phase:>9}" for phase in PHASES) + f" {'RAM':>6} {'total':>8}")
    for rung in rungs:
        plan, row = rung.plan, f"{rung.offer.precision:<6} "
        if plan:
            peaks = " ".join(f"{plan.peak_bytes[phase] / GIB:>5.2f} GiB" for phase in PHASES)
            host, total = plan.host_bytes / GIB, sum(plan.seconds.values())
            row += f"{plan.residency.level('denoise'):<12} {peaks} {host:>6.2f} {total:>6.0f} s  "
        console.data(f"{row}{rung.verdict}: {rung.why}")
    if chosen := chosen_of(rungs):
        seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in chosen.plan.seconds.items())
        console.data(f"seconds   {seconds}")
        for reason in chosen.plan.reasons:
            console.data(f"because   {reason}")


def doctor_command(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda[:n], mps or xpu[:n].")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Check driver, device, memory, disk, hub and libraries: ok, warn or bad, each with a fix (exit 8: one is bad)."""
    from fluxcli.cli import doctor

    checks = []
    for check in doctor.examine(coerce("device", device, where="--device")):
        checks.append(check)
        if not json_output:
            console.data(
                f"{check.verdict:<4}  {check.name:<15} {check.found}" + f"\n{'':<22}{check.fix}" * bool(check.fix)
            )
    if json_output:
        console.data_json({"checks": [asdict(check) for check in checks]})
    return ExitCode.DEVICE if any(check.verdict == "bad" for check in checks) else ExitCode.OK
