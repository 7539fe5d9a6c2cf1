"""`flux generate` and `flux replay`: settings to a request, the request to pictures."""

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli import console, models, output, presets
from fluxcli.cli.options import config_folder, given_settings, read_prompt, with_request_options
from fluxcli.errors import BadInputFile, ExitCode, UsageError
from fluxcli.events import Done, Notice, Saved, to_json
from fluxcli.plan import MemoryPlan, check_guidance, make_plan
from fluxcli.request import OPTIONAL, GenerationRequest, coerce, from_settings
from quant.checkpoint import Checkpoint, inspect

STARTED = time.perf_counter()


@with_request_options
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; - reads it from stdin.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    **options: object,
) -> int:
    """Draw a prompt. Without weights of your own: -p tiny, the bundled model."""
    given = given_settings(options)
    settings = presets.merge(given, config_folder())
    request = from_settings(read_prompt(prompt), settings.values)
    return _run(request, options, format_given="format" in given, dry_run=dry_run)


@with_request_options
def replay(
    picture: Annotated[Path, typer.Argument(help="A picture made by flux.", show_default=False)],
    prompt: Annotated[Optional[str], typer.Option("--prompt", help="Another prompt.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say whether the pixels are identical (exit 1: different).")
    ] = False,
    **options: object,
) -> int:
    """Make a picture again from its own metadata; any option of generate overrides, e.g. -p quality."""
    from fluxcli import image

    metadata = image.read_metadata(picture)
    given = given_settings(options)
    request = _replayed(picture, metadata["request"], given, None if prompt is None else read_prompt(prompt))
    if check:
        if options["output"] or options["json_output"] or options["events"]:
            raise UsageError("--check excludes -o, --json and --events", why="it only says identical or different")
        return _check(picture, request, metadata, options)
    model = metadata.get("model")
    expected = model.get("fingerprint") if isinstance(model, dict) else None
    return _run(request, options, format_given="format" in given, expected=expected)


def _replayed(picture: Path, stored: dict, given: dict, prompt: str | None) -> GenerationRequest:
    """The stored request with overrides. Under another preset only what the picture's own preset did not say stays."""
    folder = config_folder()
    made = _stored_request(picture, stored)
    text = made.prompt if prompt is None else prompt
    values = {key: value for key, value in made.to_json().items() if key not in ("prompt", "output", "count")}
    if "preset" not in given:
        here = presets.read_config(folder) | presets.from_environment()
        return from_settings(text, presets.overlay(values | {"output": here.get("output")}, given))
    try:
        own = presets.merge({"preset": made.preset}, folder, {}).values
    except UsageError:  # the preset is gone: everything stored counts as said
        own = {}
    ruled_out = ("preset", "aspect_ratio", "image_size") if made.width else ("preset",)
    changed = {key: value for key, value in values.items() if key not in ruled_out and value != own.get(key, ...)}
    base = presets.merge({"preset": given["preset"]}, folder).values
    return from_settings(text, presets.overlay(presets.overlay(base, changed), given))


def _stored_request(picture: Path, stored: dict) -> GenerationRequest:
    """The request in a picture's metadata; raises `BadInputFile` for anything that flux does not write."""
    try:
        prompt, preset = stored["prompt"], stored["preset"]
        if not isinstance(prompt, str) or not isinstance(preset, str):
            raise UsageError("wrong value", why="prompt and preset are texts")
        settings = {key: value for key, value in stored.items() if key != "prompt"}
        checked = {
            key: value if value is None and key in OPTIONAL else coerce(key, value, where="metadata")
            for key, value in settings.items()
        }
        return from_settings(prompt, checked)
    except KeyError as error:
        raise BadInputFile("damaged metadata", which=picture, why=f"it has no {error}") from error
    except UsageError as error:
        raise BadInputFile("damaged metadata", which=picture, why=str(error)) from error


def _check(picture: Path, request: GenerationRequest, metadata: dict, options: dict) -> int:
    from fluxcli.engine import Engine
    from fluxcli.image import pixels_sha256

    checkpoint, plan = _prepare(request)
    with console.Reporter(quiet=options["quiet"], started=STARTED) as reporter:
        run, pixels = Engine(checkpoint, plan).picture(request), None
        while pixels is None:
            try:
                reporter.show(next(run))
            except StopIteration as finished:
                pixels = finished.value
    identical = pixels_sha256(pixels) == metadata.get("pixels_sha256")
    console.data(f"{picture}: {'identical' if identical else 'different'}")
    return ExitCode.OK if identical else ExitCode.BUG


def _run(
    request: GenerationRequest,
    options: dict,
    *,
    format_given: bool,
    dry_run: bool = False,
    expected: str | None = None,
) -> int:
    """Plan, then run and show. `expected` is the fingerprint of the model that a replayed picture was made with."""
    as_json, events = options["json_output"], options["events"]
    request, target = output.parse_target(request, force=options["force"], format_given=format_given)
    if sum((as_json, events, target.stdout)) > 1:
        raise UsageError("--json, --events and -o - exclude each other", why="each needs stdout for itself")
    if not dry_run:
        output.check_writable(target, request)
    request = request.with_seed()
    checkpoint, plan = _prepare(request)
    if dry_run:
        return _show_plan(request, plan, as_json=as_json or events)
    return _draw(request, target, checkpoint=checkpoint, plan=plan, options=options, expected=expected)


def _prepare(request: GenerationRequest) -> tuple[Checkpoint, MemoryPlan]:
    from fluxcli import hardware

    checkpoint = inspect(models.locate(request.model))
    check_guidance(request, checkpoint)
    return checkpoint, make_plan(request, checkpoint, hardware.probe(request.device))


def _show_plan(request: GenerationRequest, plan: MemoryPlan, *, as_json: bool) -> int:
    if as_json:
        console.data_json({"request": request.to_json(), "size": request.size, "plan": plan.to_json()})
        return ExitCode.OK
    width, height = request.size
    guidance = "none" if request.guidance is None else f"{request.guidance:g}"
    console.data(f"picture   {width}x{height}, {request.steps} steps, guidance {guidance}, seed {request.seed}")
    console.data(f"model     {request.model} (preset {request.preset})")
    console.data(f"device    {plan.device}, {', '.join(f'{name} {dtype}' for name, dtype in plan.dtypes.items())}")
    for phase, peak in plan.peak_bytes.items():
        console.data(f"{phase:<10}{peak / 2**30:.2f} GiB")
    for reason in plan.reasons:
        console.data(f"because   {reason}")
    return ExitCode.OK


def _draw(
    request: GenerationRequest,
    target: output.Target,
    *,
    checkpoint: Checkpoint,
    plan: MemoryPlan,
    options: dict,
    expected: str | None,
) -> int:
    from fluxcli import hardware
    from fluxcli.engine import Engine, versions

    images: list = []
    paths = not options["json_output"]
    if not options["quiet"]:
        width, height = request.size
        what = f"{request.model} on {plan.device} in {plan.dtypes['transformer']}"
        console.say(f"{width}x{height}, {request.steps} steps, seed {request.seed}, {what}")
    with console.Reporter(quiet=options["quiet"], events=options["events"], paths=paths, started=STARTED) as reporter:
        if expected and expected != checkpoint.fingerprint:
            reporter.show(Notice("the model here is not the one that made the picture: expect another one"))
        for event in Engine(checkpoint, plan).run(request, target):
            reporter.show(event)
            if isinstance(event, Saved):
                images.append(event.image)
    peaks = hardware.peak_memory(plan.device)
    done = Done(tuple(images), request.to_json(), plan.to_json(), reporter.timings_s, peaks, versions())
    if options["events"]:
        console.data_json(to_json(done))
    elif options["json_output"]:
        console.data_json({key: value for key, value in to_json(done).items() if key != "event"})
    return ExitCode.OK
