"""`flux generate` with a real worker: the same pictures, one load, nothing lost when it goes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluxcli.events import Done, Event, GeneratedImage, Notice, Phase, Preview, Saved, Skipped
from fluxcli.request.fields import Order
from fluxcli.request.job import Job, Row
from fluxcli.run import client, dispatch
from tests.support.helpers import ROOT, tiny
from tests.support.invariant import assert_failed, call, files
from tests.support.server import Interpreters, Server
from tests.support.terminals import read_until
from tests.support.workers import eventually

pytestmark = [pytest.mark.serial, pytest.mark.skipif(os.name == "nt", reason="sockets of POSIX")]
SMALL = ("-p", "tiny", "--steps", "2", "--size", "64")
LONG = (
    "generate",
    "a red circle",
    "-p",
    "tiny",
    "--steps",
    "900",
    "--seed",
    "1",
    "--events",
    "-o",
    "pics/",
)
WITHOUT_TORCH = """
import sys
from fluxcli.cli import app
code = app.run(sys.argv[1:])
heavy = {"torch", "numpy", "PIL", "transformers", "diffusers", "rich"}
print(sorted(heavy & set(sys.modules)), code)
"""


@pytest.fixture
def worker(
    commands: Server | Interpreters, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], dict]]:
    """A real worker of this test alone; gives its status."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with open("worker.log", "wb") as log:
        process = commands.start(
            "-m", "fluxcli", "worker", "run", "--idle", "600", stdout=log, stderr=log
        )
    eventually(lambda: client.ask("status"), within_s=60)
    yield lambda: client.ask("status")
    client.ask("stop")
    process.wait(20)


def flux_bytes(*arguments: str) -> bytes:
    command = [sys.executable, "-m", "fluxcli", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout


def pixels(result: subprocess.CompletedProcess) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [image["pixels_sha256"] for image in json.loads(result.stdout)["images"]]


def test_twenty_mixed_calls_load_once_and_draw_what_runs_without_a_worker_draw(worker, capsys):
    colors, sizes = ("red", "green", "blue", "yellow"), ("64", "96", "128", "80", "112")
    for k in range(20):
        command = [
            "generate",
            f"a {colors[k % 4]} circle",
            *SMALL,
            "--size",
            sizes[k % 5],
            "--seed",
            str(k),
            "--json",
        ]
        command += ["--guidance", str(2 + k % 3), "-n", str(1 + k % 2)]
        there = pixels(call(capsys, *command, "-o", "there/"))
        if k % 5 == 0:
            assert there == pixels(call(capsys, *command, "-o", "here/", "--no-worker"))
    status = worker()
    assert (
        status["jobs"] == 20
        and status["pictures"] == 30
        and status["queue"] == 0
        and not status["running"]
    )
    assert status["loads"] == dict.fromkeys(
        ["tokenizers", "text_encoder", "text_encoder_2", "transformer", "vae"], 1
    )
    assert status["model"].endswith("tiny") and status["uptime_s"] > 0 and status["rss_bytes"] > 0


def test_a_warm_call_imports_no_torch_and_gives_the_path_and_the_picture(worker, flux):
    assert (
        flux("generate", "a red circle", *SMALL, "--seed", "1", "-o", "sub/").stdout
        == "sub/a-red-circle-1.png\n"
    )
    run = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        "generate",
        "a red circle",
        *SMALL,
        "--seed",
        "1",
        "-q",
    ]
    warm = subprocess.run([*run, "-o", "sub/"], capture_output=True, text=True, check=True)
    assert warm.stdout.splitlines() == ["sub/a-red-circle-1-2.png", "[] 0"]
    raw = flux_bytes(*run[3:], "-o", "-")  # no worker has this stdout
    assert raw == Path("sub/a-red-circle-1.png").read_bytes() and worker()["jobs"] == 2
    watched = flux(
        "generate", "a red circle", *SMALL, "--seed", "2", "--preview-every", "1", "--events",
        "-o", "sub/",
    )  # fmt: skip
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [each["path"] for each in events if each["event"] == "preview"] == [
        "sub/a-red-circle-2.preview.jpg"
    ]
    assert not list(Path("sub").glob("*.preview.jpg")) and worker()["jobs"] == 3


def test_errors_are_those_of_a_run_without_it(worker, capsys):
    for arguments, code in (
        (("a fox", *SMALL, "--guidance", "none"), 2),
        (("a fox", *SMALL, "--lora", "nowhere"), 3),
        (("a fox", *SMALL, "--vram-limit", "2MiB"), 5),
        (("a fox", *SMALL, "-o", "/proc/x.png"), 6),
        (("a fox", *SMALL, "--device", "cuda:7"), 8),
    ):
        found = [
            call(capsys, "generate", *arguments, "-q", *more) for more in ((), ("--no-worker",))
        ]
        assert len({assert_failed(result, code) for result in found}) == 1
    assert worker()["pid"]  # none of them ended it


def test_a_batch_and_its_failures_come_through(worker, capsys):
    Path("p.jsonl").write_text(
        '{"prompt": "a red circle"}\n{"prompt": "x", "steps": 0}\n{"prompt": "a blue square"}\n'
    )
    batch = ("generate", "--from", "p.jsonl", *SMALL, "--seed", "3", "--json")
    there, here = call(capsys, *batch, "-o", "a/"), call(capsys, *batch, "-o", "b/", "--no-worker")
    for result in (there, here):
        assert result.returncode == 7 and "row 2 failed: p.jsonl:2: steps" in result.stderr
    shas = [
        [
            image["pixels_sha256"]
            for line in result.stdout.splitlines()
            for image in json.loads(line).get("images", [])
        ]
        for result in (there, here)
    ]
    assert shas[0] == shas[1] and len(shas[0]) == 2 and worker()["pictures"] == 2
    assert "2 skipped" in call(capsys, *batch, "-o", "a/", "--resume").stderr


def test_one_ctrl_c_stops_a_shell_loop_and_the_worker_lives(worker):
    import pty

    before = worker()["pid"]
    command = f"{sys.executable} -m fluxcli {' '.join(map(repr, LONG))}"
    loop = f"for i in 1 2 3; do echo round $i; {command}; done; echo end"
    child, terminal = pty.fork()
    if not child:
        os.execvp("bash", ["bash", "-c", loop])
    seen = read_until(terminal, b'"step"', 60)
    os.write(terminal, b"\x03")
    seen += read_until(terminal, b"round 2", 20)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert b'"step"' in seen and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT
    assert (
        b"round 2" not in seen
        and b"\nend" not in seen
        and b"Traceback" not in seen
        and files(Path("pics")) == {}
    )
    until = time.monotonic() + 10
    while worker()["running"] and time.monotonic() < until:
        time.sleep(0.05)
    assert worker()["pid"] == before and not worker()["running"]


@pytest.mark.parametrize(
    "kind, count", [pytest.param("step", 3, marks=pytest.mark.exhaustive), ("saved", 1)]
)
def test_a_worker_that_is_killed_in_mid_job_costs_no_picture(kind, count, worker, capsys, commands):
    command = [
        "generate",
        "a red circle",
        "-p",
        "tiny",
        "--size",
        "128",
        "--steps",
        "40",
        "--seed",
        "1",
        "-n",
        "3",
    ]
    expected = pixels(call(capsys, *command, "--json", "-o", "here/x-{n}", "--no-worker"))
    started = commands.start("-m", "fluxcli", *command, "--events", "-o", "there/x-{n}")
    events = []
    for line in started.stdout:
        events.append(json.loads(line))
        if sum(event["event"] == kind for event in events) == count and worker():
            os.kill(worker()["pid"], signal.SIGKILL)
    assert started.wait() == 0 and started.stderr.read().count("running here") == 1
    started.stderr.close()
    started.stdout.close()
    assert [
        event["image"]["pixels_sha256"] for event in events if event["event"] == "saved"
    ] == expected
    assert set(files(Path("there"))) == set(files(Path("here")))
    done = events[-1]
    assert [image["pixels_sha256"] for image in done["images"]] == expected and len(expected) == 3
    assert (done["request"]["seed"], done["request"]["count"]) == (1, 3)


def test_who_waits_for_a_busy_worker_to_make_room_is_told(monkeypatch):
    asked = []
    busy = {"pid": 5, "model": "a model", "device": "cuda:0", "running": True}
    monkeypatch.setattr(client, "ask", lambda what: asked.append(what) or busy)
    (notice,) = dispatch._evict_worker(Job(()), always=False)
    assert "worker 5" in notice.message and asked == ["status", "evict"]
    assert list(dispatch._evict_worker(Job((), no_wait=True), always=False)) == [] and asked[
        2:
    ] == ["status"]


def lose_after(monkeypatch: pytest.MonkeyPatch, *events: Event) -> None:
    """Have a worker that says these events and is lost."""

    def run(job: Job) -> Iterator[Event]:
        yield from events
        raise client.Lost("the worker closed the connection", hint="a hint")

    monkeypatch.setattr(client, "run", run)


def run_lost(*requests: Order, batch: bool = False, resume: bool = False) -> list[Event]:
    first = 1 if batch else 0
    rows = tuple(Row(number, request) for number, request in enumerate(requests, first))
    with dispatch.Dispatcher(alone=False) as dispatcher:
        return list(dispatcher.run(Job(rows, batch=batch, resume=resume)))


def images(events: list[Event]) -> list[GeneratedImage]:
    return [event.image for event in events if isinstance(event, Saved)]


def test_a_word_that_is_lost_with_the_worker_is_said_here(monkeypatch):
    request = tiny(output="o/")
    lose_after(monkeypatch)
    (image,) = images(run_lost(request))
    lose_after(monkeypatch, Phase("save"), Saved(image))
    events = run_lost(request)
    assert [type(event) for event in events] == [Phase, Saved, Notice, Notice, Done] and events[
        -1
    ].images == (image,)
    assert events[2].message == "the worker closed the connection: running here (hint: a hint)"
    lose_after(monkeypatch, Phase("save"))  # and killed before it could say what it saved
    events = run_lost(request)
    assert (
        images(events) == [image] and events[-1].images == (image,) and len(files(Path("o"))) == 1
    )
    lose_after(monkeypatch)  # which drew nothing
    assert images(run_lost(request))[0].path == "o/a-red-circle-on-a-blue-background-7-2.png"


def test_previews_of_a_lost_worker_are_deleted_and_those_of_finished_pictures_left(monkeypatch):
    request = tiny(output="o/")
    for name in ("mine", "begun"):
        Path(f"{name}.preview.jpg").touch()
    lose_after(monkeypatch)
    (image,) = images(run_lost(request))
    said = [Preview(f"{name}.preview.jpg", 1, 3, seed=7) for name in ("mine", "begun")]
    lose_after(monkeypatch, said[0], Saved(image), said[1])
    run_lost(request)
    assert Path("mine.preview.jpg").exists() and not Path("begun.preview.jpg").exists()


def test_of_a_lost_batch_only_what_is_not_there_is_drawn(monkeypatch):
    rows = [
        tiny(output="o/", seed=1, count=3),
        tiny(output="o/x.png", seed=9),
        tiny(output="p/", seed=-1),
    ]
    lose_after(monkeypatch)
    before = images(run_lost(*rows, batch=True))
    for image in (before[1], before[4]):
        Path(image.path).unlink()
    lose_after(monkeypatch, Saved(before[0], 1))
    events = run_lost(*rows, batch=True)
    assert images(events)[:4] == [before[0], before[2], before[3], before[1]]
    done = {event.row: len(event.images) for event in events if isinstance(event, Done)}
    assert done == {1: 3, 2: 1, 3: 1} and len(files(Path("o"))) == 4 and len(files(Path("p"))) == 1


def test_a_lost_batch_that_was_resumed_says_everything_once(monkeypatch):
    rows = [
        tiny(output="o/", seed=1),
        tiny(output="p/", seed=-1, count=2),
        tiny(output="q/", seed=3),
    ]
    lose_after(monkeypatch)
    before = images(run_lost(*rows, batch=True))
    for image in before[2:]:
        Path(image.path).unlink()
    lose_after(monkeypatch, Skipped(1, before[0].path), Saved(before[1], 2))
    events = run_lost(*rows, batch=True, resume=True)
    assert [event for event in events if isinstance(event, Skipped)] == [Skipped(1, before[0].path)]
    drawn = images(events)
    assert (
        drawn[0] == before[1]
        and len(drawn) == 3
        and drawn[2].pixels_sha256 == before[3].pixels_sha256
    )
    done = {event.row: event.images for event in events if isinstance(event, Done)}
    assert done == {2: (before[1], drawn[1]), 3: (drawn[2],)}


def test_another_variable_makes_the_worker_give_way(worker, capsys, monkeypatch):
    pixels(call(capsys, "generate", "a red circle", *SMALL, "--seed", "1", "--json"))
    assert worker()["model"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    other = call(capsys, "generate", "a red circle", *SMALL, "--seed", "1")
    assert (
        other.returncode == 0
        and "OMP_NUM_THREADS" in other.stderr
        and "running here" in other.stderr
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert worker()["model"] is None and worker()["jobs"] == 1


def test_flux_worker_auto_starts_one_and_off_uses_none(flux):
    command = ("generate", "a red circle", *SMALL, "--seed", "1")
    try:
        first = flux(*command, FLUX_WORKER="auto")
        assert first.returncode == 0 and client.ask("status")["jobs"] == 1
        assert "flux worker stop" in first.stderr  # what it leaves behind, and what ends that
        assert client.ask("status")["held_bytes"] > 0
        assert (
            flux(*command, FLUX_WORKER="off").returncode == 0 and client.ask("status")["jobs"] == 1
        )
        assert flux(*command).returncode == 0 and client.ask("status")["jobs"] == 2
        assert "FLUX_WORKER" in assert_failed(flux(*command, FLUX_WORKER="sometimes"), 2)
    finally:
        client.ask("stop")


@pytest.mark.exhaustive
def test_a_hundred_warm_calls_leave_memory_descriptors_and_files_flat(worker, capsys):
    import psutil

    process, measured = psutil.Process(worker()["pid"]), []
    for k in range(100):
        arguments = (
            "-p",
            "tiny",
            "--steps",
            "1",
            "--size",
            "64",
            "--seed",
            str(k),
            "-o",
            "x.png",
            "--force",
            "-q",
        )
        assert call(capsys, "generate", f"a red circle {k % 7}", *arguments).returncode == 0
        measured.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    assert measured[-1][1] <= measured[19][1] + 1 and measured[-1][2] <= measured[19][2] + 1
    assert measured[-1][0] - measured[19][0] < 24 << 20
    assert list(files(Path())) == ["worker.log", "x.png"]
