"""What `generate`, `replay` and `decode` have in common: one order is planned, drawn and shown.

Knows nothing of where the order comes from. Loads the engine only where the picture is drawn here.
"""

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from fluxcli.cli import console
from fluxcli.cli.ending import Written, explain_early_end
from fluxcli.cli.settings import STARTED, check_stdout, job_options, reporter_of
from fluxcli.errors import ExitCode
from fluxcli.pictures.names import check_writable, parse_target
from fluxcli.plan.placement import GIB, MemoryPlan
from fluxcli.request.fields import Order
from fluxcli.request.job import Job, Row
from fluxcli.request.target import Target
from fluxcli.run.dispatch import Dispatcher

if TYPE_CHECKING:
    from fluxcli.pictures.latents import Latents


def draw(
    order: Order,
    options: Mapping[str, Any],
    *,
    given: Mapping[str, Any],
    dry_run: bool = False,
    expected_model: str | None = None,
) -> int:
    """Draw an order's pictures, in a live worker or here, or with `dry_run` say what would be done.

    See `draw_by` for the rest. Returns the exit code.
    """
    if dry_run:
        target = parse_target(order.output, force=options["force"])
        check_stdout(options, picture=target.stdout)
        _show_plan(order.with_seed(), options)
        return ExitCode.OK
    with Dispatcher(alone=options["no_worker"] or options["debug"]) as dispatcher:
        draw_by(dispatcher, order, options, given=given, expected_model=expected_model)
    return ExitCode.OK


def draw_by(
    dispatcher: Dispatcher,
    order: Order,
    options: Mapping[str, Any],
    *,
    given: Mapping[str, Any],
    expected_model: str | None = None,
    kept: "Latents | None" = None,
    target: Target | None = None,
) -> None:
    """Draw an order's pictures by a dispatcher, which keeps what it has loaded for the next order.

    `options` are those of the command line, `given` the settings among them. A picture that is made
    again was made by the model with the fingerprint `expected_model`; `kept` are the latents that
    there are of it. They go where the order says, unless there is a `target`.
    """
    if target is None:
        target = parse_target(order.output, force=options["force"])
    check_stdout(options, picture=target.stdout)
    order = order.with_seed()
    check_writable(target, order)
    if not options["quiet"]:
        _say_what_is_inert(order, target, given=given, force=options["force"])
    row = Row(0, order, target=target)
    job = Job((row,), expected_model=expected_model, **job_options(options))
    seed = order.request.seed
    written = Written(range(seed, seed + order.output.count))
    with explain_early_end(written, quiet=options["quiet"]):
        try:
            with (
                reporter_of(options) as reporter,
                closing(dispatcher.run(job, kept=kept)) as events,
            ):
                for event in events:
                    written.add(event)
                    reporter.show(event)
        finally:
            for event in dispatcher.take_untold():
                written.add(event)


def _say_what_is_inert(
    order: Order, target: Target, *, given: Mapping[str, Any], force: bool
) -> None:
    """Say which options of the command line do nothing here."""
    if "quality" in given and order.output.format == "png":
        console.say("--quality does nothing for png")
    if force and not target.exact:
        console.say("--force does nothing here: automatic names never replace a file")


def _show_plan(order: Order, options: Mapping[str, Any]) -> None:
    """Say what would be done, and with how much memory."""
    from fluxcli.run.session import Session

    with console.Reporter(quiet=options["quiet"], started=STARTED) as reporter:
        plan = reporter.result(Session().prepare(order, lock=False)).plan
    described = {
        "request": order.to_json(),
        "size": order.request.size,
        "plan": plan.to_json(),
    }
    as_json = options["json_output"] or options["events"]
    console.table(_make_rows(order, plan), described, as_json=as_json)


def _make_rows(order: Order, plan: MemoryPlan) -> list[tuple[str, str]]:
    """The lines of a plan, for people."""
    request = order.request
    width, height = request.size
    guidance = "none" if request.guidance is None else f"{request.guidance:g}"
    picture = (
        f"{width}x{height}, {request.describe_steps()}, guidance {guidance}, seed {request.seed}"
    )
    dtypes = ", ".join(f"{name} {dtype}" for name, dtype in plan.dtypes.items())
    rows = [
        ("picture", picture),
        ("model", f"{request.model} (preset {order.preset})"),
        ("device", f"{plan.device}, {plan.precision}; computes {dtypes}"),
    ]
    for phase, peak_bytes in plan.peak_bytes.items():
        rows.append((phase, f"{peak_bytes / GIB:.2f} GiB"))
    for reason in plan.reasons:
        rows.append(("because", reason))
    return rows
