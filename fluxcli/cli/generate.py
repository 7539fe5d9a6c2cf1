"""Commands that draw, `flux generate`, `replay` and `decode`: settings to a request, the request to pictures."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

import fluxcli
from fluxcli import console, hardware, lora, models, output, presets, state
from fluxcli.cli.options import config_folder, given_settings, read_prompt, with_request_options
from fluxcli.errors import BadInputFile, DeviceUnusable, DoesNotFit, ExitCode, UsageError
from fluxcli.events import Done, Notice, Saved, to_json
from fluxcli.plan import check_guidance, learned_key, make_plan, suggestion
from fluxcli.request import GenerationRequest, coerce, flag, from_settings
from fluxcli.residency import GIB, MemoryPlan
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError

if TYPE_CHECKING:
    from fluxcli.engine import Engine
    from fluxcli.latents import Latents

STARTED = time.perf_counter()
LOCKED_SHARE = 0.25  # of the RAM: a run on the CPU that takes less disturbs nobody


@with_request_options
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; - reads it from stdin.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    **options: object,
) -> int:
    """Draw a prompt. Without weights of your own: -p tiny, the bundled model."""
    request, given = requested(prompt, options)
    return _run(request, options, given, dry_run=dry_run)


def requested(prompt: str, options: dict) -> tuple[GenerationRequest, dict]:
    """(the request, what the command line said of it by field name)."""
    given = given_settings(options)
    return settled(read_prompt(prompt), presets.merge(given, config_folder()).values, given), given


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
    from fluxcli import image

    metadata = image.read_metadata(picture)
    given = given_settings(options)
    request = _replayed(picture, metadata["request"], given, None if prompt is None else read_prompt(prompt))
    if not check:
        return _run(request, options, given, dry_run=dry_run, made=_group(metadata, "model").get("fingerprint", ""))
    inert = [flag(name) for name in ("output", "format", "quality", "count", "metadata") if name in given]
    switches = {"--force": options["force"], "--json": options["json_output"], "--events": options["events"]}
    inert += [name for name, on in {**switches, "--dry-run": dry_run}.items() if on]
    if inert:
        raise UsageError(f"--check excludes {', '.join(inert)}", why="it writes nothing, it only says whether")
    return _check(picture, request, metadata, options)


@with_request_options
def decode(
    path: Annotated[Path, typer.Argument(help="A .latents.safetensors file.", show_default=False)], **options: object
) -> int:
    """Finish a picture for which memory ran out, from its kept latents. Options say how and where, not what."""
    from fluxcli import latents

    given = given_settings(options)
    if odd := sorted(set(given) - {"output", "format", "quality", "metadata", "device", "vram_limit", "offload"}):
        raise UsageError("the latents say what is drawn", which=flag(odd[0]), hint="flux generate draws another")
    kept = latents.load(path)
    values = {key: value for key, value in vars(kept.request).items() if key != "prompt"}
    request = settled(kept.request.prompt, presets.overlay(values | {"output": None, "count": 1}, given), given)
    return _run(request, options, given, made=kept.model, resume=replace(kept, request=request))


def settled(prompt: str, values: dict, given: dict) -> GenerationRequest:
    """The request of merged settings: a file name decides the format, a model folder is stored absolute."""
    decided = output.format_of(values["output"], given=given.get("format") and values["format"])
    settled = {"format": decided or values["format"], "model": models.absolute(values["model"])}
    settled |= {"vae": values["vae"] and models.absolute(values["vae"]), "lora": lora.settled(values["lora"])}
    settled |= {"text_encoders": tuple(map(models.absolute, values["text_encoders"]))}
    return from_settings(prompt, values | settled)


def _replayed(picture: Path, stored: dict, given: dict, prompt: str | None) -> GenerationRequest:
    """The stored request with overrides. Under another preset only what the picture's own preset did not say stays."""
    folder = config_folder()
    made = _stored_request(picture, stored)
    text = made.prompt if prompt is None else prompt
    values = {key: value for key, value in vars(made).items() if key not in ("prompt", "output", "count")}
    if "preset" not in given:
        here = presets.read_config(folder) | presets.from_environment()
        return settled(text, presets.overlay(values | {"output": here.get("output")}, given), given)
    try:
        own = presets.merge({"preset": made.preset}, folder, {}).values
    except UsageError:  # the preset is gone: everything stored counts as said
        own = {}
    values["lora"] = _said_loras(values["lora"], lora.settled(own.get("lora", ())))
    ruled_out = ("preset", "aspect_ratio", "image_size") if made.width else ("preset",)
    changed = {key: value for key, value in values.items() if key not in ruled_out and value != own.get(key, ...)}
    base = presets.merge({"preset": given["preset"]}, folder).values
    return settled(text, presets.overlay(presets.overlay(base, changed), given), given)


def _said_loras(stored: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """What was said beside a preset's own adapters; "none" first where one of these was dropped."""
    return ("none",) * (not set(own) <= set(stored)) + tuple(text for text in stored if text not in own)


def _stored_request(picture: Path, stored: dict) -> GenerationRequest:
    """The request in a picture's metadata; raises `BadInputFile` for anything that flux does not write."""
    try:
        prompt, _ = stored["prompt"], stored["preset"]
        if not isinstance(prompt, str):
            raise UsageError("wrong value", why="the prompt is no text")
        settings = {key: coerce(key, value, where="metadata") for key, value in stored.items() if key != "prompt"}
        return from_settings(prompt, settings)
    except (KeyError, UsageError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise BadInputFile("damaged metadata", which=picture, why=why) from error


def _check(picture: Path, request: GenerationRequest, metadata: dict, options: dict) -> int:
    from fluxcli.image import pixels_sha256

    expected = metadata.get("pixels_sha256")
    if not isinstance(expected, str):
        raise BadInputFile("damaged metadata", which=picture, why="it has no pixels_sha256")
    reporter = console.Reporter(quiet=options["quiet"], started=STARTED)
    with session(request, options) as engine, reporter:
        for difference in _differences(metadata, engine.metadata(request)):
            reporter.show(Notice(difference))
        run, pixels = engine.picture(request), None
        while pixels is None:
            try:
                reporter.show(next(run))
            except StopIteration as finished:
                pixels = finished.value
    identical = pixels_sha256(pixels) == expected
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


def _run(
    request: GenerationRequest, options: dict, given: dict, *, dry_run: bool = False, made: str | None = None,
    resume: "Latents | None" = None,
) -> int:  # fmt: skip
    """Plan, then run and show. `given` is what the command line said; `made` the model of the picture to make again."""
    target = output.parse_target(request, force=options["force"])
    if sum((options["json_output"], options["events"], target.stdout)) > 1:
        raise UsageError("--json, --events and -o - exclude each other", why="each needs stdout for itself")
    request = request.with_seed()
    if not dry_run:
        output.check_writable(target, request)
    with session(request, options, lock=not dry_run) as engine:
        plan = engine.plan
        if dry_run:
            return _show_plan(request, plan, as_json=options["json_output"] or options["events"])
        if not options["quiet"]:
            width, height = request.size
            what = f"{request.model} on {plan.device} in {plan.precision}"
            console.say(f"{width}x{height}, {request.steps} steps, seed {request.seed}, {what}")
            if "quality" in given and request.format == "png":
                console.say("--quality does nothing for png")
            if options["force"] and not target.exact:
                console.say("--force does nothing here: automatic names never replace a file")
        return _draw(engine, request, target, options, made=made, resume=resume)


@contextlib.contextmanager
def session(request: GenerationRequest, options: dict, *, lock: bool = True) -> Iterator["Engine"]:
    """An engine with its plan, under the device's lock unless that is off; what it measured is remembered."""
    from fluxcli.engine import Engine

    checkpoints = checkpoints_of(request)
    check_torch()
    say = console.say if not options["quiet"] else lambda _: None
    with contextlib.ExitStack() as held:
        largest = max(checkpoints[-1].components["transformer"].files, key=os.path.getsize)
        machine = hardware.probe(request.device, measure=False)

        def locked() -> None:
            held.enter_context(state.device_lock(machine.identity, wait=not options["no_wait"], say=say))

        if lock and machine.kind != "cpu":  # before anything is measured or planned: another flux may hold all of it
            locked()
            machine = hardware.probe(request.device, sample=largest)
        checkpoint, plan = make_plan(request, checkpoints, machine, state.peaks())
        if lock and machine.kind == "cpu" and max(plan.peak_bytes.values()) > machine.total_bytes * LOCKED_SHARE:
            locked()
        engine = Engine(checkpoint, plan, machine)
        try:
            yield engine
        except DoesNotFit as error:
            less = suggestion(replace(request, vram_limit=int(plan.budget_bytes * 0.8)), checkpoints, machine)
            error.hint = " or ".join(filter(None, (error.hint, less and f"again with {less}")))
            raise
        finally:
            if engine.measured:
                key = learned_key(machine, plan.precision, request, checkpoint.nbytes)
                state.update("peaks", {key: state.peaks().get(key, {}) | engine.measured})


def checkpoints_of(request: GenerationRequest) -> list[Checkpoint]:
    """Every folder that can serve the request's model; a damaged one that was baked is left out and named."""
    found, folders = [], models.folders(request.model)
    for folder in folders:
        try:
            found.append(models.assembled(folder, request, lambda: presets.bases_of(request.preset, config_folder())))
            check_guidance(request, found[-1])
        except CheckpointError as error:
            if folder == folders[-1] and not found:
                raise
            console.say(f"left out: {error}")
    return found


def check_torch() -> None:
    """Raise `DeviceUnusable` where torch cannot be imported: a broken one fails with OSError and others, too."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:120]}"
        raise DeviceUnusable("torch cannot be imported", why=why, hint="pip install --force-reinstall torch") from error


def _show_plan(request: GenerationRequest, plan: MemoryPlan, *, as_json: bool) -> int:
    if as_json:
        console.data_json({"request": request.to_json(), "size": request.size, "plan": plan.to_json()})
        return ExitCode.OK
    (width, height), guidance = request.size, "none" if request.guidance is None else f"{request.guidance:g}"
    dtypes = ", ".join(f"{name} {dtype}" for name, dtype in plan.dtypes.items())
    for name, text in (
        ("picture", f"{width}x{height}, {request.steps} steps, guidance {guidance}, seed {request.seed}"),
        ("model", f"{request.model} (preset {request.preset})"),
        ("device", f"{plan.device}, {plan.precision}; computes {dtypes}"),
        *((phase, f"{peak / GIB:.2f} GiB") for phase, peak in plan.peak_bytes.items()),
        *(("because", reason) for reason in plan.reasons),
    ):
        console.data(f"{name:<10}{text}")
    return ExitCode.OK


def _draw(
    engine: "Engine", request: GenerationRequest, target: output.Target, options: dict, *, made: str | None,
    resume: "Latents | None",
) -> int:  # fmt: skip
    """Show a run to its end; where memory runs out for good, what is left of the picture is kept."""
    from fluxcli import latents

    images, shown = [], {"quiet": options["quiet"], "events": options["events"], "paths": not options["json_output"]}
    with console.Reporter(**shown, started=STARTED) as reporter:
        if made not in (None, engine.checkpoint.fingerprint):
            reporter.show(Notice("the model here is not the one that made the picture: expect another picture"))
        try:
            for event in engine.run(request, target, resume=resume):
                reporter.show(event)
                if isinstance(event, Saved):
                    images.append(event.image)
        except DoesNotFit as error:
            if engine.latents and engine.latents.step:
                with contextlib.suppress(OSError):  # what went wrong first is what must be said
                    place = latents.save(engine.latents, target)
                    error.why, error.hint = f"{error.why}; the latents are kept in {place}", f"flux decode {place}"
            raise
    peaks = hardware.peak_memory(engine.plan.device)
    plan = engine.plan.to_json() | {"multiply": engine.multiply}
    done = Done(tuple(images), request.to_json(), plan, reporter.timings_s, peaks, fluxcli.versions())
    if options["events"] or options["json_output"]:
        console.data_json(to_json(done) if options["events"] else asdict(done))
    return ExitCode.OK
