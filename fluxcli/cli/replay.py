"""`flux replay` and `decode`: a picture again from its own metadata, and one that memory ended from its latents."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli.cli import console
from fluxcli.cli.draw import draw
from fluxcli.cli.options import with_request_options
from fluxcli.cli.settings import STARTED, given_settings, read_prompt
from fluxcli.engine.check import check_torch
from fluxcli.errors import BadInputFile, ExitCode, UsageError
from fluxcli.events import Notice
from fluxcli.models import loras as lora
from fluxcli.paths import config_folder
from fluxcli.request import presets
from fluxcli.request.fields import Order
from fluxcli.request.settings import LORA_NONE, LoraRef, flag
from fluxcli.resolve import build_order


@with_request_options
def replay(
    picture: Annotated[Path, typer.Argument(help="A picture made by flux.", show_default=False)],
    prompt: Annotated[Optional[str], typer.Option("--prompt", help="Another prompt.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say whether the pixels are identical (exit 1: different).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    **options: object,
) -> int:
    """Make a picture again from its own metadata; any option of generate overrides, e.g. -p quality."""
    from fluxcli.pictures import image

    metadata = image.read_metadata(picture)
    given = given_settings(options)
    order = _replayed(picture, metadata["request"], given, None if prompt is None else read_prompt(prompt))
    if not check:
        return draw(order, options, given, dry_run=dry_run, made=_group(metadata, "model").get("fingerprint", ""))
    inert = [flag(name) for name in ("output", "format", "quality", "count", "metadata") if name in given]
    switches = {"--force": options["force"], "--json": options["json_output"], "--events": options["events"]}
    inert += [name for name, on in {**switches, "--dry-run": dry_run}.items() if on]
    if inert:
        raise UsageError(f"--check excludes {', '.join(inert)}", why="it writes nothing, it only says whether")
    return _check(picture, order, metadata, options)


@with_request_options
def decode(
    path: Annotated[Path, typer.Argument(help="A .latents.safetensors file.", show_default=False)], **options: object
) -> int:
    """Finish a picture for which memory ran out, from its kept latents. Options say how and where, not what."""
    from fluxcli.pictures import latents

    given = given_settings(options)
    if odd := sorted(set(given) - {"output", "format", "quality", "metadata", "device", "vram_limit", "offload"}):
        raise UsageError("the latents say what is drawn", which=flag(odd[0]), hint="flux generate draws another")
    kept = latents.load(path)
    values = kept.order.settings()
    order = build_order(kept.order.request.prompt, presets.overlay(values | {"output": None, "count": 1}, given), given)
    return draw(order, options, given, made=kept.model, resume=replace(kept, order=order))


def _replayed(picture: Path, stored: dict, given: dict, prompt: str | None) -> Order:
    """The stored request with overrides. Under another preset only what the picture's own preset did not say stays."""
    folder = config_folder()
    made = _stored_request(picture, stored)
    text = made.request.prompt if prompt is None else prompt
    values = {key: value for key, value in made.settings().items() if key not in ("output", "count")}
    if "preset" not in given:
        here = presets.read_config(folder) | presets.read_environment()
        return build_order(text, presets.overlay(values | {"output": here.get("output")}, given), given)
    try:
        own = presets.merge({"preset": made.preset}, folder, {}).values
    except UsageError:  # the preset is gone: everything stored counts as said
        own = {}
    values["lora"] = _said_loras(values["lora"], lora.make_absolute(own.get("lora", ())))
    ruled_out = ("preset", "aspect_ratio", "image_size") if made.request.width else ("preset",)
    changed = {key: value for key, value in values.items() if key not in ruled_out and value != own.get(key, ...)}
    base = presets.merge({"preset": given["preset"]}, folder).values
    return build_order(text, presets.overlay(presets.overlay(base, changed), given), given)


def _said_loras(stored: tuple[LoraRef, ...], own: tuple[LoraRef, ...]) -> tuple[LoraRef, ...]:
    """What was said beside a preset's own adapters; "none" first where one of these was dropped."""
    said = tuple(ref for ref in stored if ref not in own)
    return said if set(own) <= set(stored) else (LoraRef(LORA_NONE), *said)


def _stored_request(picture: Path, stored: dict) -> Order:
    """The request in a picture's metadata; raises `BadInputFile` for anything that flux does not write."""
    try:
        _ = stored["prompt"], stored["preset"]
        return Order.from_json(stored)
    except (KeyError, UsageError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise BadInputFile("damaged metadata", which=picture, why=why) from error


def _check(picture: Path, order: Order, metadata: dict, options: dict) -> int:
    check_torch()
    from fluxcli.engine.engine import Drawn
    from fluxcli.engine.picture import Picture
    from fluxcli.pictures.image import hash_pixels
    from fluxcli.run.saving import make_metadata
    from fluxcli.run.session import Session

    expected = metadata.get("pixels_sha256")
    if not isinstance(expected, str):
        raise BadInputFile("damaged metadata", which=picture, why="it has no pixels_sha256")
    with Session() as session, console.Reporter(quiet=options["quiet"], started=STARTED) as reporter:
        prepared = reporter.result(session.prepare(order, no_wait=options["no_wait"]))
        engine = session.open_engine(prepared)
        adapters = prepared.adapters
        for difference in _differences(metadata, make_metadata(engine, order, adapters)):
            reporter.show(Notice(difference))
        drawn = Picture(order.request, adapters)
        for event in engine.draw([drawn]):
            if not isinstance(event, Drawn):
                reporter.show(event)
        identical = hash_pixels(drawn.pixels) == expected
    console.data(f"{picture}: {'identical' if identical else 'different'}")
    return ExitCode.OK if identical else ExitCode.BUG


def _differences(made: dict, here: dict) -> Iterator[str]:
    """What may change the pixels between the picture's metadata and a run here: model, device, precision, versions."""
    for group in ("model", "compute", "lora", "versions"):
        then = _group(made, group)
        for key in here[group]:
            if key != "name" and then.get(key) != here[group][key]:
                yield f"made with another {group} {key}: {then.get(key)!s:.60} there, {here[group][key]} here"


def _group(metadata: dict, name: str) -> dict:
    """A group of a picture's metadata, {} where a stranger wrote something else."""
    return found if isinstance(found := metadata.get(name), dict) else {}
