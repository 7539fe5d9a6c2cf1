"""`flux plan` and `flux decode`: what would be done and why; and finishing a picture for which memory ran out."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli import console, hardware, models, output, presets, state
from fluxcli.cli.generate import check_torch, checkpoints_of, draw, session, settled
from fluxcli.cli.options import config_folder, given_settings, read_prompt, with_request_options
from fluxcli.errors import DoesNotFit, ExitCode, UsageError, WeightsUnavailable
from fluxcli.plan import Rung, check_guidance, suggestion, survey
from fluxcli.request import GenerationRequest, flag
from fluxcli.residency import GIB, PHASES
from quant.checkpoint import Checkpoint


@with_request_options
def plan_command(
    prompt: Annotated[
        Optional[str], typer.Argument(help="As for generate; it costs nothing.", show_default=False)
    ] = None,
    card: Annotated[Optional[str], typer.Option("--card", help="A card that is not here: SIZE[:smNN].")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's speeds again, two seconds.")
    ] = False,
    **options: object,
) -> int:
    """Say which precision and placement generate would take, and why not another. Needs no weights."""
    given = given_settings(options)
    settings = presets.merge(given, config_folder())
    request = settled(read_prompt(prompt or "a plan"), settings.values, given)
    if card and measure:
        raise UsageError("--measure excludes --card", why="a card that is not here cannot be measured")
    checkpoints, here = _checkpoints(request)
    files = [path for part in checkpoints[-1].components.values() for path in part.files if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if not card:
        check_torch()
    machine = hardware.card(card) if card else hardware.probe(request.device, measure=measure or None, sample=largest)
    rungs = survey(request, checkpoints, machine, {} if card else state.peaks())
    chosen = next((rung for rung in rungs if rung.verdict == "chosen"), None)
    missing = 0 if here else sum(part.nbytes for part in checkpoints[-1].components.values())
    if options["json_output"]:
        console.data_json({
            "request": request.to_json(), "size": request.size, "hardware": asdict(machine), "download_bytes": missing,
            "rungs": [_row(rung) for rung in rungs], "chosen": chosen and chosen.offer.precision,
        })  # fmt: skip
    else:
        _show(request, machine, rungs, missing)
    if chosen is None:
        hint = suggestion(request, checkpoints, machine) or "a larger card, or -p tiny"
        raise DoesNotFit("nothing fits", which=machine.name, why=rungs[0].why, hint=hint)
    return ExitCode.OK


def _checkpoints(request: GenerationRequest) -> tuple[list[Checkpoint], bool]:
    """(what there is of the model, or its known shapes; whether its weights are here)."""
    try:
        return checkpoints_of(request), True
    except WeightsUnavailable:
        shapes = models.known_shapes(request.model)
        if shapes is None:
            raise
        check_guidance(request, shapes)
        return [shapes], False


def _row(rung: Rung) -> dict:
    plan, baked = rung.plan, rung.offer.checkpoint.components["transformer"].precision
    return {
        "precision": rung.offer.precision, "verdict": rung.verdict, "why": rung.why, "folder_is_packed": bool(baked),
        "plan": plan and plan.to_json(),
    }  # fmt: skip


def _show(request: GenerationRequest, machine: hardware.Hardware, rungs: list[Rung], missing: int) -> None:
    """The table of rungs, and the reasons of the one that is chosen."""
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
    for rung in rungs:
        if rung.verdict == "chosen":
            seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in rung.plan.seconds.items())
            console.data(f"seconds   {seconds}")
            for reason in rung.plan.reasons:
                console.data(f"because   {reason}")


@with_request_options
def decode_command(
    path: Annotated[Path, typer.Argument(help="A .latents.safetensors file.", show_default=False)], **options: object
) -> int:
    """Finish a picture for which memory ran out, from its kept latents. Options say how and where, not what."""
    from fluxcli import latents

    given = given_settings(options)
    where = {"output", "format", "quality", "metadata", "device", "vram_limit", "offload"}
    if odd := sorted(set(given) - where):
        raise UsageError("the latents say what is drawn", which=flag(odd[0]), hint="flux generate draws another")
    kept = latents.load(path)
    values = kept.request.to_json() | {"output": None, "count": 1}
    request = settled(
        kept.request.prompt, presets.overlay({k: v for k, v in values.items() if k != "prompt"}, given), given
    )
    target = output.parse_target(request, force=options["force"])
    output.check_writable(target, request)
    with session(request, options) as engine:
        if kept.model != engine.checkpoint.fingerprint and not options["quiet"]:
            console.say("the model here is not the one that made the latents: expect another picture")
        return draw(engine.run(request, target, resume=replace(kept, request=request)), request, target,
                    engine=engine, options=options)  # fmt: skip
