"""The warm worker: what a job says and does there it says and does here."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import fluxcli
from fluxcli.errors import ExitCode
from fluxcli.events import Done, Failed, Notice, Phase, Step
from fluxcli.run import client
from quant.errors import ExplainedError
from tests.support.workers import (
    FAKE,
    client_process,
    eventually,
    hello,
    job,
    notes,
    outcome,
    raw,
    serves,
)

VERSION = fluxcli.__version__

pytestmark = [pytest.mark.serial, pytest.mark.skipif(os.name == "nt", reason="sockets of POSIX")]

VERSION = fluxcli.__version__  # before a test changes it


@pytest.mark.parametrize(
    "prompts", [("draw a fox",), ("draw 1", "half", "draw 3"), ("draw 1", "full")]
)
def test_events_exit_code_message_and_hint_are_those_of_a_run_in_process(worker, prompts):
    fake: dict = {"__name__": "fake"}
    exec(FAKE, fake)

    def here() -> Iterator:
        try:
            yield from fake["Session"]().run(job(*prompts))
        except ExplainedError as error:
            failed = fake["explain"](error)
            raise client.RemoteError(
                failed.message, hint=failed.hint, exit_code=failed.exit_code
            ) from error

    expected = outcome(here())
    assert outcome(client.run(job(*prompts))) == expected
    assert expected[0] and bool(expected[1]) == ("full" in prompts)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_folder_and_the_umask_are_the_callers(worker, mask):
    before = os.umask(mask)
    try:
        list(client.run(job("here")))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert Path("out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert Path("out/x.jpg").stat().st_mode & 0o777 == 0o666 & ~mask
    assert psutil.Process(worker.pid).cwd() == "/"


def test_nothing_is_imported_from_the_callers_folder(worker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the worker was started elsewhere
    Path("left_there.py").touch()
    assert "ModuleNotFoundError" in outcome(client.run(job("stranger")))[1][1]


def test_a_folder_that_is_gone_is_an_error_of_the_job(worker):
    with raw(hello(job("here"), folder="/no/such/folder")) as connection:
        frames = [client.receive(connection, within_s=5) for _ in range(2)]
    assert (frames[1]["event"], frames[1]["exit_code"]) == ("failed", ExitCode.OUTPUT)
    assert serves()


def test_ctrl_c_cancels_within_a_step_and_the_next_job_is_served(worker, home):
    process = client_process(job("gate"))
    assert "Step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    eventually(lambda: "closed" in notes(home), 1)
    assert serves() and client.ask("status")["pid"] == worker.pid
    assert notes(home) == ["closed", "released", "draw again", "released"]


def test_closing_the_generator_cancels(worker, home):
    events = client.run(job("gate"))
    next(events)
    events.close()
    eventually(lambda: "closed" in notes(home), 1)
    assert serves()


def test_a_worker_that_is_killed_in_the_middle_is_lost_at_once(worker):
    events = client.run(job("gate"))
    next(events)
    worker.kill()
    since = time.monotonic()
    with pytest.raises(client.Lost, match="closed the connection"):
        list(events)
    assert time.monotonic() - since < 1


def test_a_worker_that_hangs_is_lost(worker, monkeypatch):
    events = client.run(job("gate"))
    next(events)
    worker.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(client, "SILENCE_S", 0.3)
    monkeypatch.setattr(client, "ANSWER_S", 0.3)
    with pytest.raises(client.Lost, match="does not answer"):
        list(events)
    with pytest.raises(client.Lost, match="does not answer"):
        client.ask("status")


def test_a_long_step_is_no_silence(worker, monkeypatch):
    monkeypatch.setattr(client, "SILENCE_S", 0.7)
    assert [type(event) for event in client.run(job("deaf"))] == [Step, Done]


def test_without_a_worker_there_is_no_reason_and_nothing_is_asked(home):
    with pytest.raises(client.Lost) as lost:
        list(client.run(job("draw")))
    assert str(lost.value) == ""
    assert [client.ask(what) for what in ("status", "stop", "evict")] == [None] * 3
    assert list(home.iterdir()) == []


def test_a_socket_that_a_killed_worker_left_is_replaced(worker, start):
    worker.kill()
    worker.wait()
    assert Path(client.locate_socket()).exists() and client.ask("status") is None
    assert start().pid == client.ask("status")["pid"] and serves()


@pytest.mark.parametrize("change", ["version", "CUDA_VISIBLE_DEVICES", "HF_HOME"])
def test_a_worker_of_another_version_or_environment_is_not_used_but_can_be_told(
    worker, home, monkeypatch, change
):
    if change == "version":
        monkeypatch.setattr(fluxcli, "__version__", "9.9")
    else:
        monkeypatch.setenv(change, "7")
    with pytest.raises(client.Lost, match=f"another {change}$"):
        list(client.run(job("draw")))
    assert client.ask("evict") == {"pid": worker.pid} and notes(home) == ["evicted"]
    assert client.ask("status")["version"] == VERSION
    assert client.ask("stop") and worker.wait(1) == 0


def test_jobs_wait_in_order_and_hear_how_many_are_before_them(worker, home):
    said: dict = {}
    threads = []
    for k, prompt in enumerate(("gate", "draw 1", "draw 2")):
        threads.append(
            threading.Thread(
                target=lambda text=prompt: said.update({text: list(client.run(job(text)))})
            )
        )
        threads[-1].start()
        eventually(lambda k=k: (status := client.ask("status"))["running"] and status["queue"] == k)
    (home / "go").touch()
    for thread in threads:
        thread.join(10)
    assert [each for each in notes(home) if each.startswith("draw")] == ["draw 1", "draw 2"]
    assert not [event for event in said["gate"] if isinstance(event, Notice)]
    for k in (1, 2):
        assert (
            isinstance(said[f"draw {k}"][0], Notice)
            and f"busy: {k} before" in said[f"draw {k}"][0].message
        )
        assert said[f"draw {k}"][1] == Phase("load", "transformer")


def test_a_job_that_would_rather_not_wait_does_not(worker):
    assert outcome(client.run(job("draw", no_wait=True)))[1] is None
    events = client.run(job("gate"))
    next(events)
    seen, error = outcome(client.run(job("draw", no_wait=True)))
    assert seen == [] and error[0] == ExitCode.DOES_NOT_FIT and "the device is busy" in error[1]
    assert error[2] == "leave --no-wait out to wait for it"
    events.close()


def test_a_client_that_leaves_the_queue_is_not_served(worker, home):
    events = client.run(job("gate"))
    next(events)
    raw(hello(job("draw never"))).close()
    eventually(lambda: client.ask("status")["queue"] == 1, 1)
    time.sleep(0.5)
    events.close()
    assert serves() and "draw never" not in notes(home)


def test_status_counts_and_answers_while_a_job_runs(worker):
    assert serves()
    events = client.run(job("gate"))
    next(events)
    status = client.ask("status")
    assert {
        key: status[key]
        for key in ("pid", "running", "queue", "jobs", "pictures", "loads", "model")
    } == {
        "pid": worker.pid,
        "running": True,
        "queue": 0,
        "jobs": 1,
        "pictures": 1,
        "loads": {"transformer": 1, "vae": 1},
        "model": "fake",
    }
    assert status["uptime_s"] >= 0 == status["idle_s"] and status["rss_bytes"] > 1 << 20
    events.close()


def test_a_batch_row_that_failed_is_no_end(worker):
    seen = list(client.run(job("half", "draw 2", batch=True)))
    assert Failed(4, "row two", "a hint", row=2) in seen and isinstance(seen[-1], Done)
