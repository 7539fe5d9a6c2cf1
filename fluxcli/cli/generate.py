"""`flux generate`: settings become a request, the request pictures; here or in a warm worker."""

import time
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fluxcli import console, lora, models, output, presets
from fluxcli.cli.options import given_settings, read_prompt, with_request_options
from fluxcli.errors import ExitCode, UsageError
from fluxcli.job import Job, Row
from fluxcli.request import GenerationRequest, from_settings
from fluxcli.residency import GIB, MemoryPlan
from fluxcli.runner import Runner
from fluxcli.state import config_folder

if TYPE_CHECKING:
    from fluxcli.latents import Latents

STARTED = time.perf_counter()


@with_request_options
def generate(
    prompt: Annotated[
        Optional[str], typer.Argument(help="What to draw; - reads it from stdin.", show_default=False)
    ] = None,
    source: Annotated[
        Optional[str], typer.Option("--from", help="Text, JSONL or CSV, a picture a row; - is stdin.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --from: skip rows whose picture is there.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="With --from: stop at a row that fails.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    **options: object,
) -> int:
    """Draw a prompt, or with --from many. Without weights of your own: -p tiny, the bundled model."""
    from fluxcli.cli import batch

    if source is not None:
        if dry_run:
            raise UsageError("--dry-run excludes --from", why="rows are planned one by one", hint="flux plan")
        return batch.draw_rows(source, prompt, options, resume=resume, fail_fast=fail_fast)
    if resume or fail_fast:
        raise UsageError(f"{'--resume' if resume else '--fail-fast'} needs --from", why="it is for many pictures")
    if prompt is None:
        raise UsageError("no prompt", hint='flux generate "a red circle on a blue background" -p tiny')
    request, given = requested(prompt, options)
    return draw(request, options, given, dry_run=dry_run)


def requested(prompt: str, options: dict) -> tuple[GenerationRequest, dict]:
    """(the request, what the command line said of it by field name)."""
    given = given_settings(options)
    return settled(read_prompt(prompt), presets.merge(given, config_folder()).values, given), given


def settled(prompt: str, values: dict, given: dict) -> GenerationRequest:
    """The request of merged settings: a file name decides the format, a model folder is stored absolute."""
    decided = output.format_of(values["output"], given=given.get("format") and values["format"])
    settled = {"format": decided or values["format"], "model": models.absolute(values["model"])}
    settled |= {"vae": values["vae"] and models.absolute(values["vae"]), "lora": lora.settled(values["lora"])}
    settled |= {"text_encoders": tuple(map(models.absolute, values["text_encoders"]))}
    return from_settings(prompt, values | settled)


def draw(
    request: GenerationRequest, options: dict, given: dict, *, dry_run: bool = False, made: str | None = None,
    resume: "Latents | None" = None,
) -> int:  # fmt: skip
    """Plan, then run and show. `given` is what the command line said; `made` the model of the picture to make again."""
    target = output.parse_target(request, force=options["force"])
    check_stdout(options, target.stdout)
    request = request.with_seed()
    if dry_run:
        return _dry_run(request, options)
    output.check_writable(target, request)
    if not options["quiet"]:
        if "quality" in given and request.format == "png":
            console.say("--quality does nothing for png")
        if options["force"] and not target.exact:
            console.say("--force does nothing here: automatic names never replace a file")
    with reporter_of(options) as reporter, Runner(alone=options["no_worker"] or options["debug"]) as runner:
        for event in runner.run(Job((Row(0, request),), made=made, **job_options(options)), resume=resume):
            reporter.show(event)
    return ExitCode.OK


def check_stdout(options: dict, stdout: bool) -> None:
    """Raise `UsageError` where several want stdout for themselves."""
    if sum((options["json_output"], options["events"], stdout)) > 1:
        raise UsageError("--json, --events and -o - exclude each other", why="each needs stdout for itself")


def job_options(options: dict) -> dict:
    """What a job takes of the command line, beside requests."""
    return {"force": options["force"], "no_wait": options["no_wait"], "cache": not options["no_cache"]}


def reporter_of(options: dict) -> console.Reporter:
    """Shows a run as the command line asks for."""
    shown = {"quiet": options["quiet"], "events": options["events"], "json_output": options["json_output"]}
    return console.Reporter(**shown, started=STARTED)


def _dry_run(request: GenerationRequest, options: dict) -> int:
    from fluxcli.session import Session

    with console.Reporter(quiet=options["quiet"], started=STARTED) as reporter:
        _, plan, *_ = reporter.result(Session().prepare(request, lock=False))
    return _show_plan(request, plan, as_json=options["json_output"] or options["events"])


def _show_plan(request: GenerationRequest, plan: MemoryPlan, *, as_json: bool) -> int:
    """What a run would do."""
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
