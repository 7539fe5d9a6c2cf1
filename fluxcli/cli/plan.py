"""`flux plan`: which precision and placement generate would take, and why not another.

Needs no weights, and with --card no torch.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import typer

from fluxcli.cli import console
from fluxcli.cli.options import MACHINE, with_request_options
from fluxcli.cli.settings import given_settings, read_prompt, take_stdin
from fluxcli.engine.cards import describe_card
from fluxcli.engine.check import check_torch
from fluxcli.errors import DoesNotFit, ExitCode, UsageError, WeightsUnavailable
from fluxcli.models import find, loras
from fluxcli.models.abilities import apply_kind, check_abilities
from fluxcli.models.parts import Parts, resolve_parts
from fluxcli.models.shapes import read_known_shapes
from fluxcli.paths import config_folder
from fluxcli.pictures.inputs import load_inputs
from fluxcli.plan.card import Ram
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, PHASES, PREPARE, Candidate
from fluxcli.plan.planner import find_chosen, suggest_options, survey
from fluxcli.request.fields import Order
from fluxcli.request.settings import parse_bytes
from fluxcli.resolve import resolve_order
from fluxcli.run.margin import read_margin
from quant.checkpoint import Checkpoint
from quant.lora import Adapter
from quant.spec import SCHEMES

MIN_RAM_BYTES = 1 << 30
MAX_RAM_BYTES = 1 << 44
COLUMNS = 79
FREE_SHARE = 7 / 8  # of a RAM that is only described: the rest is the system's


@with_request_options
def plan_command(
    prompt: Annotated[
        str, typer.Argument(help="As for generate; it costs nothing.", show_default=False)
    ] = "a plan",
    card: Annotated[
        Optional[str],
        typer.Option(
            "--card",
            metavar="CARD",
            rich_help_panel=MACHINE,
            help='A card that is not here: its name ("4090", "RX 7900 XTX"), or SIZE[:smNN|:rocm|'
            ":xpu|:mps]; a bare number is GiB.",
        ),
    ] = None,
    ram: Annotated[
        Optional[str],
        typer.Option(
            "--ram",
            metavar="SIZE",
            rich_help_panel=MACHINE,
            help="Plan for so much RAM instead of this machine's.",
        ),
    ] = None,
    **options: object,
) -> int:
    """Say which precision and placement generate would take, and why not another.

    Needs no weights.
    """
    given = take_stdin(given_settings(options), prompt=prompt)
    order = resolve_order(read_prompt(prompt), given)
    inputs = load_inputs(order.request)
    model = _find_model(order)
    hardware, margin_bytes = _find_hardware(order, card, ram=_read_ram(ram))
    adapters = _find_adapters(order, model.checkpoints)
    parts = _find_parts(order, model.checkpoints, adapters)
    model = Model(
        [parts.add_to(each) for each in model.checkpoints],
        model.missing_bytes + _count_missing_bytes(parts),
    )
    if not adapters:
        order = replace(order, request=replace(order.request, lora=()))
    candidates = survey(
        make_workload(
            order.request, adapters, references=inputs.references, controls=parts.controls
        ),
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
            order.request,
            order.resources,
            model.checkpoints,
            hardware=hardware,
            adapters=adapters,
            references=inputs.references,
            controls=parts.controls,
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
        shapes = apply_kind(order.request, shapes)
        check_abilities(order.request, shapes)
        return Model([shapes], shapes.nbytes)


def _find_hardware(order: Order, card: str | None, *, ram: Ram | None) -> tuple[Hardware, int]:
    """The card of --card, or the device that is here; and what plans for it leave alone."""
    if card is not None:
        return describe_card(card, ram), 0
    check_torch()
    from fluxcli.engine import device

    hardware = device.probe(order.resources.device)
    if ram is None:
        return hardware, read_margin(hardware)
    hardware = replace(hardware, ram_bytes=ram.total_bytes, ram_free_bytes=ram.free_bytes)
    if hardware.kind == "cpu":  # whose memory the RAM is
        hardware = replace(hardware, total_bytes=ram.total_bytes, free_bytes=ram.free_bytes)
    return hardware, read_margin(hardware)


def _read_ram(text: str | None) -> Ram | None:
    """The RAM of --ram, of which the system and other programs take a share."""
    if text is None:
        return None
    try:
        total_bytes = parse_bytes(text)
    except ValueError:
        total_bytes = 0
    if not MIN_RAM_BYTES <= total_bytes <= MAX_RAM_BYTES:
        why = "it is no size from 1GiB to 16TiB"
        raise UsageError("no such memory", which=f"--ram {text}", why=why, hint="--ram 16GiB")
    return Ram(total_bytes, int(total_bytes * FREE_SHARE))


def _find_adapters(order: Order, checkpoints: Sequence[Checkpoint]) -> tuple[Adapter, ...]:
    """The adapters of --lora, each header read once; none where one of them is not here."""
    try:
        return loras.resolve_loras(
            order.request.lora,
            checkpoints[-1].components,
            channels=loras.count_channels(order.request),
        )
    except WeightsUnavailable as error:
        console.say(f"planned without adapters: {error}")
        return ()


def _find_parts(
    order: Order, checkpoints: Sequence[Checkpoint], adapters: Sequence[Adapter]
) -> Parts:
    """What the request's controls and looks add to the model, or its published shapes.

    Nothing where it is not here, and its shapes are not known.
    """
    try:
        return resolve_parts(order.request, checkpoints[-1], adapters, planned=True)
    except WeightsUnavailable as error:
        console.say(f"planned without what is not here: {error}")
        return Parts()


def _count_missing_bytes(parts: Parts) -> int:
    """Bytes of the parts of which only the published shapes are here."""
    return sum(part.nbytes for part in parts.components.values() if part.folder == Path())


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
                "error": round(candidate.error, 4),
                "verdict": candidate.verdict,
                "why": candidate.why,
                "folder_is_packed": bool(stored),
                "multiply": candidate.multiply,
                "multiply_why": hardware.explain_multiply(candidate.scheme),
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
    """Print what is planned for what, the table of candidates, and the reasons below it."""
    request = order.request
    width_px, height_px = request.size
    console.line(f"{request.model} at {width_px}x{height_px}, {request.describe_steps()}")
    console.line(_describe_machine(hardware))
    if model.missing_bytes:
        size = f"{model.missing_bytes / 1e9:.1f} GB"
        console.line(f"not downloaded: {size}; planned by the model's published shapes")
    console.line("")
    for line in _format_table(candidates, has_ram_column=hardware.kind != "cpu"):
        console.line(line)
    console.line("")
    for candidate in candidates:
        name = f"{_mark(candidate)} {candidate.precision}"
        _show_wrapped(f"{name:<8}{candidate.verdict}: {candidate.why}")
    _show_unpacked(hardware, candidates)
    chosen = find_chosen(candidates)
    if chosen and chosen.plan:
        console.line("")
        _show_wrapped(f"time of {chosen.precision}: {_format_seconds(chosen.plan.seconds)}")
        for reason in chosen.plan.reasons:
            if reason != f"{chosen.precision}: {chosen.why}":  # which stands above
                _show_wrapped(f"because {reason}")


def _show_unpacked(hardware: Hardware, candidates: Sequence[Candidate]) -> None:
    """Print which schemes of the candidates the device does not multiply in, and why."""
    for candidate in candidates:
        how = hardware.explain_multiply(candidate.scheme)
        if how and candidate.verdict != "chosen":  # whose reasons have it
            _show_wrapped(f"{candidate.scheme}: {how}")
    is_by_capability = not hardware.multiply and hardware.capability > (0, 0)
    in_8_bit = [name for name, scheme in SCHEMES.items() if scheme.multiply]
    if is_by_capability and any(each.scheme in in_8_bit for each in candidates):
        _show_wrapped("8-bit products are assumed by the capability, with torch for Linux")


def _show_wrapped(text: str) -> None:
    """Print a line, its words after the 79th column below it and eight columns in."""
    for line in textwrap.wrap(text, COLUMNS, subsequent_indent=" " * 8, break_long_words=False):
        console.line(line)


def _describe_machine(hardware: Hardware) -> str:
    """The device and what memory it has."""
    memory = f"{_gib(hardware.total_bytes)} GiB, {_gib(hardware.free_bytes)} free"
    if hardware.kind == "cpu":
        return f"on the CPU, {hardware.name} (RAM {memory})"
    ram = f"{_gib(hardware.ram_bytes)} GiB, {_gib(hardware.ram_free_bytes)} free"
    return f"on {hardware.name} ({memory}; RAM {ram})"


# Under 80 columns: mark and precision, error, blocks, a column a phase, RAM, time.
PLAN_ROW = "{:<7}{:<6}{:<12} {:>7} {:>9} {:>7} {:>7} {:>7} {:>11}"
# The same where the VAE encodes pictures, too, and one head is shorter for that.
PREPARED_ROW = "{:<7}{:<6}{:<12} {:>6} {:>7} {:>5} {:>7} {:>6} {:>6} {:>10}"
SHORT_HEADS = {"condition": "cond."}


def _format_table(candidates: Sequence[Candidate], *, has_ram_column: bool) -> list[str]:
    """The lines of the table: a head, and a row for each candidate that has a plan."""
    plans = [candidate.plan for candidate in candidates if candidate.plan]
    phases = tuple(plans[0].peak_bytes) if plans else PHASES
    row = PREPARED_ROW if PREPARE in phases else PLAN_ROW
    heads = [SHORT_HEADS.get(phase, phase) if PREPARE in phases else phase for phase in phases]
    heads += ["RAM" if has_ram_column else "", "time"]
    what = "peak memory in GiB while it does" if has_ram_column else "peak RAM in GiB while it does"
    lines = [f"{'':<25} {what}"]
    lines.append(row.format("", "error", "blocks", *heads).rstrip())
    for candidate in candidates:
        name = f"{_mark(candidate)} {candidate.precision}"
        plan = candidate.plan
        if plan is None:
            lines.append(f"{name:<7}-")
            continue
        peaks = [f"{plan.peak_bytes[phase] / GIB:.2f}" for phase in phases]
        ram = f"{plan.host_bytes / GIB:.2f}" if has_ram_column else ""
        error = f"{candidate.error:.3f}" if candidate.error else "0"
        blocks = plan.placement.level("denoise")
        taken_s = format_duration(plan.total_s)
        lines.append(row.format(name, error, blocks, *peaks, ram, taken_s))
    return lines


def _mark(candidate: Candidate) -> str:
    """A star before the chosen one, so that it is found without colours."""
    return "*" if candidate.verdict == "chosen" else " "


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f}"


def _format_seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {format_duration(value)}" for phase, value in seconds.items())


def format_duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 1 min 30 s, 8 h 20 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
