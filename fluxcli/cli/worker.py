"""`flux worker`: start, look at, empty and stop the process that keeps models in memory."""

import re
from typing import Annotated

import typer

from fluxcli.cli import console
from fluxcli.cli.help import App
from fluxcli.cli.show import describe_value
from fluxcli.errors import UsageError
from fluxcli.run import client

worker_app = App(help="Keep models in memory between commands.")
UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}
LONGEST_S = 30 * 24 * 3600
GIB = 1 << 30
Idle = Annotated[
    str, typer.Option(metavar="TIME", help="End after so long without a job: 30s, 10m, 2h.")
]


@worker_app.callback()
def check_system() -> None:
    """Refuse every command where there are no workers."""
    client.check_available()


@worker_app.command()
def start(idle: Idle = "10m") -> None:
    """Start the worker, unless there is one; generate then uses it without being told."""
    status = client.start(parse_duration(idle))
    what = "is up" if status["started"] else "was up already"
    limit = console.describe_seconds(status["idle_limit_s"])
    end = f"it ends after {limit} without a job, or by: flux worker stop"
    console.say(f"worker {status['pid']} {what}; {end}")


@worker_app.command("status")
def status_command(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON value.")] = False,
) -> None:
    """Say what the worker does and holds.

    Where there is none: "no worker is running" (--json: null) and exit 0.
    """
    status = client.ask("status")
    rows: list[tuple[str, ...]] = [("no worker is running",)]
    if status is not None:
        rows = [(_name(name), _describe(name, status[name])) for name in sorted(status)]
    console.table(rows, status, as_json=json_output)


def _name(key: str) -> str:
    """A key of the status in words, without its unit."""
    return key.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def _describe(name: str, value: object) -> str:
    """Return a value of the worker's status for people."""
    if name.endswith("_s") and isinstance(value, int | float):
        return console.describe_seconds(value)
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / GIB:.2f} GiB"
    if isinstance(value, dict) and value:
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return describe_value(value)


@worker_app.command()
def stop() -> None:
    """End the worker, which gives all its memory back.

    A job that it runs is finished by the command that gave it.
    """
    _tell("stop", done="has ended")


@worker_app.command()
def evict() -> None:
    """Drop the worker's models, after the jobs before, and keep the worker.

    It loads them again when they are needed.
    """
    _tell("evict", done="holds no models")


@worker_app.command(hidden=True)
def run(
    idle: Idle = "10m",
    _events: Annotated[
        bool, typer.Option("--events", help="What ends it is a JSON object on stdout.")
    ] = False,
) -> None:
    """Serve jobs in this process until it is idle; `flux worker start` calls it."""
    from fluxcli.run import worker

    worker.serve(parse_duration(idle))


def _tell(what: str, *, done: str) -> None:
    answer = client.ask(what)
    console.say("no worker is running" if answer is None else f"worker {answer['pid']} {done}")


def parse_duration(text: str) -> float:
    """Return the seconds of 30s, 10m, 2h or a plain number; raises `UsageError`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smh]?)", text.strip())
    seconds = float(match[1]) * UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds <= LONGEST_S:
        why = "it takes 30s, 10m or 2h, up to 30 days"
        raise UsageError("no such time", which=f"--idle {text[:20]}", why=why, hint="--idle 10m")
    return seconds
