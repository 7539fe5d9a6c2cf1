"""What `generate`, `replay` and `decode` have in common: one request is planned, drawn and shown."""

from typing import TYPE_CHECKING

from fluxcli.cli import console
from fluxcli.cli.settings import STARTED, check_stdout, job_options, reporter_of
from fluxcli.errors import ExitCode
from fluxcli.pictures.names import check_writable, parse_target
from fluxcli.plan.placement import GIB, MemoryPlan
from fluxcli.request.fields import Order
from fluxcli.request.job import Job, Row
from fluxcli.run.dispatch import Dispatcher

if TYPE_CHECKING:
    from fluxcli.pictures.latents import Latents


def draw(
    order: Order, options: dict, given: dict, *, dry_run: bool = False, made: str | None = None,
    resume: "Latents | None" = None,
) -> int:  # fmt: skip
    """Plan, then run and show. `given` is what the command line said; `made` the model of the picture to make again."""
    target = parse_target(order.output, force=options["force"])
    check_stdout(options, picture=target.stdout)
    order = order.with_seed()
    if dry_run:
        return _dry_run(order, options)
    check_writable(target, order)
    if not options["quiet"]:
        if "quality" in given and order.output.format == "png":
            console.say("--quality does nothing for png")
        if options["force"] and not target.exact:
            console.say("--force does nothing here: automatic names never replace a file")
    job = Job((Row(0, order, target=target),), expected_model=made, **job_options(options))
    alone = options["no_worker"] or options["debug"]
    with reporter_of(options) as reporter, Dispatcher(alone=alone) as dispatcher:
        for event in dispatcher.run(job, kept=resume):
            reporter.show(event)
    return ExitCode.OK


def _dry_run(order: Order, options: dict) -> int:
    from fluxcli.run.session import Session

    with console.Reporter(quiet=options["quiet"], started=STARTED) as reporter:
        plan = reporter.result(Session().prepare(order, lock=False)).plan
    return _show_plan(order, plan, as_json=options["json_output"] or options["events"])


def _show_plan(order: Order, plan: MemoryPlan, *, as_json: bool) -> int:
    """What a run would do."""
    if as_json:
        console.data_json({"request": order.to_json(), "size": order.request.size, "plan": plan.to_json()})
        return ExitCode.OK
    request = order.request
    (width, height), guidance = request.size, "none" if request.guidance is None else f"{request.guidance:g}"
    dtypes = ", ".join(f"{name} {dtype}" for name, dtype in plan.dtypes.items())
    for name, text in (
        ("picture", f"{width}x{height}, {request.steps} steps, guidance {guidance}, seed {request.seed}"),
        ("model", f"{request.model} (preset {order.preset})"),
        ("device", f"{plan.device}, {plan.precision}; computes {dtypes}"),
        *((phase, f"{peak / GIB:.2f} GiB") for phase, peak in plan.peak_bytes.items()),
        *(("because", reason) for reason in plan.reasons),
    ):
        console.data(f"{name:<10}{text}")
    return ExitCode.OK
