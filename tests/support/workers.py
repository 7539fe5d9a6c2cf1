"""A worker with a fake session, and clients of it, well-behaved and not."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluxcli.events import Done, to_json
from fluxcli.request.job import Job, Row
from fluxcli.run import client
from tests.support.helpers import order

FAKE = """
import os, sys, time, tempfile
from pathlib import Path
from fluxcli import signals
from fluxcli.cli import console
from fluxcli.run import client, worker
from fluxcli.errors import DeviceUnusable, DoesNotFit, NoSuchDevice, Terminated, exit_code_of
from fluxcli.events import Done, Failed, GeneratedImage, Notice, Phase, Saved, Step
from quant.errors import ExplainedError

TMP = Path(tempfile.gettempdir())

def note(text):
    with (TMP / "notes").open("a") as file:
        file.write(text + "\\n")

def saved(path, row=0):
    return Saved(GeneratedImage(path, 1, 64, 64, "jpg", 3, "a", "b"), row)

class Session:
    def run(self, job):
        for row in job.rows:
            yield from getattr(self, row.order.request.prompt.split()[0])(job, row)
            yield Done((), row.order.to_json(), {}, {}, {}, {}, row.number)

    def draw(self, job, row):
        note(row.order.request.prompt)
        yield Phase("load", "transformer")
        yield Phase("load", "vae")
        yield Step(1, 1)
        yield saved("\\udcff fox.jpg", row.number)

    def here(self, job, row):
        Path("out").mkdir()
        Path("out/x.jpg").write_bytes(b"abc")
        yield saved("out/x.jpg")

    def flood(self, job, row):
        for k in range(100):
            yield Notice("x" * 100_000)

    def gate(self, job, row):
        try:
            for k in range(2000):
                if (TMP / "go").exists():
                    return
                time.sleep(0.02)
                yield Step(k + 1, 2000)
        finally:
            note("closed")

    def deaf(self, job, row):
        time.sleep(1)
        yield Step(1, 1)

    def stranger(self, job, row):
        import left_there
        yield saved("-")

    def half(self, job, row):
        yield Failed(4, "row two", "a hint", row=2)

    def full(self, job, row):
        where = {"which": "cuda:0", "why": "it is small", "hint": "a smaller --size"}
        raise DoesNotFit("out of memory", **where)
        yield

    def broken(self, job, row):
        raise DeviceUnusable("the device does not answer", hint="again")
        yield

    def nowhere(self, job, row):
        raise NoSuchDevice("no such device", which="cuda:9")
        yield

    def bug(self, job, row):
        yield Step(1, 2)
        raise ZeroDivisionError

    def release(self):
        note("released")

    def evict(self):
        note("evicted")

    def status(self):
        return {"model": "fake", "held_bytes": 1 << 30}

def explain(error):
    if isinstance(error, ExplainedError):
        return Failed(int(exit_code_of(error)), str(error), error.hint)
    return Failed(1, f"this is a bug: {type(error).__name__}", "report it")

if __name__ == "__main__":
    worker.ALIVE_S = worker.HELLO_S = worker.LOOK_S = 0.3
    client.FRAME_S = 1
    signals.install_signals()
    try:
        worker.serve(float(sys.argv[1]), session=Session(), explain=explain)
    except Terminated as stop:
        signals.die_by(*stop.args)
    except ExplainedError as error:
        sys.exit(f"flux: error: {error}.")
"""
CLIENT = """
import sys
from fluxcli.run import client
from fluxcli.request.job import Job
import json
for event in client.run(Job.from_json(json.loads(sys.argv[1]))):
    print(event, file=sys.stderr, flush=True)
"""


def job(*prompts: str, **options: object) -> Job:
    rows = tuple(
        Row(k * (len(prompts) > 1), order(text, seed=1)) for k, text in enumerate(prompts, 1)
    )
    return Job(rows, **options)


def outcome(events: Iterator) -> tuple[list, tuple | None]:
    """(events as JSON, (exit code, message, hint) of what ended them)."""
    seen = []
    try:
        seen.extend(to_json(event) for event in events)  # what came before an error stays
    except client.RemoteError as error:
        return seen, (error.exit_code, str(error), error.hint)
    return seen, None


def eventually(check: Callable[[], object], within_s: float = 5) -> object:
    until = time.monotonic() + within_s
    while not (found := check()) and time.monotonic() < until:
        time.sleep(0.01)
    assert found
    return found


def notes(home: Path) -> list[str]:
    return (home / "notes").read_text().splitlines() if (home / "notes").exists() else []


def serves() -> bool:
    return isinstance(list(client.run(job("draw again")))[-1], Done)


def client_process(what: Job, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT, json.dumps(what.to_json())]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def raw(hello: object = None) -> "client.Connection":
    """A connection of a client that says `hello`, or nothing."""
    connection = client.connect()
    if hello is not None:
        connection.send_bytes(hello if isinstance(hello, bytes) else json.dumps(hello).encode())
    return connection


def hello(what: Job | object, **changes: object) -> dict:
    sent = what.to_json() if isinstance(what, Job) else what
    known = {
        "protocol": client.PROTOCOL,
        "identity": client.describe_installation(),
        "kind": "generate",
        "job": sent,
    }
    return known | {"folder": os.getcwd(), "umask": 0o22} | changes


def closes(connection: "client.Connection", within_s: float = 5) -> bool:
    with pytest.raises((EOFError, ConnectionResetError)):
        while connection.poll(within_s):
            connection.recv_bytes()
        return False
    return True
