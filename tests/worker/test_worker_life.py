"""A worker starts once, ends when it is idle, told or broken, and leaves only its lock."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fluxcli.errors import ExitCode, UsageError
from fluxcli.events import Done, Failed, Step
from fluxcli.run import client
from tests.support.invariant import assert_failed, call
from tests.support.workers import (
    FAKE,
    client_process,
    eventually,
    job,
    notes,
    outcome,
    serves,
)

pytestmark = [pytest.mark.serial, pytest.mark.skipif(os.name == "nt", reason="sockets of POSIX")]


def test_an_idle_worker_ends_and_leaves_only_its_lock(start, home):
    process = start(0.5)
    assert serves()
    assert process.wait(5) == 0 and client.ask("status") is None
    assert [path.suffix for path in client.locate_socket().parent.iterdir()] == [".lock"]


def test_a_job_keeps_an_idle_worker_alive(start):
    process = start(0.6)
    assert [type(event) for event in client.run(job("deaf"))] == [Step, Done]
    assert client.ask("status")["idle_s"] < 0.6
    assert process.wait(5) == 0


def test_stop_in_the_middle_of_a_job_ends_both(worker, home):
    events = client.run(job("gate"))
    next(events)
    assert client.ask("stop") == {"pid": worker.pid}
    assert notes(home) == ["closed", "released"] and worker.wait(1) == 0
    with pytest.raises(client.Lost):
        list(events)
    assert client.ask("stop") is None


def test_a_stop_that_is_not_heeded_yet_is_not_called_done(worker, monkeypatch):
    busy = client_process(job("deaf"))
    eventually(lambda: client.ask("status")["running"])
    monkeypatch.setattr(client, "STOP_S", 0.31)  # a little more than between two signs of life
    with pytest.raises(client.Lost, match="has not ended yet") as lost:
        client.ask("stop")
    assert lost.value.hint == f"kill {worker.pid}" and worker.wait(5) == 0
    busy.communicate()


def test_a_worker_whose_socket_somebody_removed_ends(worker, home):
    os.unlink(client.locate_socket())
    assert worker.wait(5) == 0 and (home / "log").read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_it_and_its_socket(worker, number, busy):
    events = client.run(job("gate"))
    if busy:
        next(events)
    worker.send_signal(number)
    assert worker.wait(5) == -number
    assert [path.suffix for path in client.locate_socket().parent.iterdir()] == [".lock"]
    events.close()


@pytest.mark.parametrize("prompt, code", [("bug", 1), ("broken", 8)])
def test_after_a_bug_or_a_broken_device_it_ends(worker, home, prompt, code):
    assert outcome(client.run(job(prompt)))[1][0] == code
    assert worker.wait(5) == 0
    assert ("ZeroDivisionError" in (home / "log").read_text()) == (prompt == "bug")


def test_a_wish_for_a_device_that_is_not_there_leaves_it_alive(worker):
    assert outcome(client.run(job("nowhere")))[1][0] == 8
    assert serves()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_starts_at_once_give_one_worker(home, monkeypatch):
    monkeypatch.setattr(
        client, "_command", lambda idle_s: [sys.executable, "-c", FAKE, str(idle_s)]
    )
    before = psutil.Process().children()
    Path("fluxcli.py").write_text("raise SystemExit('from the folder of whoever started it')")
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(client.start, (30, 30, 30)))
        assert len({status["pid"] for status in found}) == 1 and any(
            status["started"] for status in found
        )
        started = [each for each in psutil.Process().children() if each not in before]
        psutil.wait_procs([each for each in started if each.pid != found[0]["pid"]], 5)
        alive = [each.pid for each in started if each.is_running() and each.status() != "zombie"]
        assert alive == [found[0]["pid"]]
        assert not client.start(30)["started"] and os.getsid(found[0]["pid"]) == found[0]["pid"]
        assert psutil.Process(found[0]["pid"]).cwd() == "/"
    finally:
        client.ask("stop")


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_start_that_met_a_worker_about_to_end_is_tried_again(home, monkeypatch):
    codes = iter(["", FAKE])
    monkeypatch.setattr(
        client, "_command", lambda idle_s: [sys.executable, "-c", next(codes), str(idle_s)]
    )
    assert client.start(30)["started"] and next(codes, None) is None
    assert client.ask("stop")


TELL = "import json, sys; from fluxcli.events import *; "
TELL += "print(json.dumps(to_json({}))); sys.exit(5)"


@pytest.mark.parametrize(
    "code, expected",
    [
        (TELL.format(Failed(5, "no room", "x")), (5, "did not start: no room$")),
        ("print('nonsense'); raise RuntimeError('oh')", (1, "exit 1")),
        ("import os; os.abort()", (1, "exit -6")),
    ],
)
def test_a_worker_that_dies_at_its_start_is_an_error_with_its_last_words(
    home, monkeypatch, code, expected
):
    monkeypatch.setattr(client, "_command", lambda _: [sys.executable, "-c", code])
    with pytest.raises(client.RemoteError, match=expected[1]) as failed:
        client.start(30)
    assert failed.value.exit_code == expected[0] and "worker.log" in failed.value.hint


def test_what_ends_a_real_worker_at_its_start_is_said_by_the_command_that_started_it(home, capsys):
    folder = client.locate_socket().parent
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(
        client.RemoteError, match="did not start: the worker's folder is not private"
    ) as failed:
        client.start(30)
    assert failed.value.exit_code == ExitCode.DEVICE


def test_windows_has_no_worker_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(client, "AVAILABLE", False)
    for command in (("start",), ("status",), ("status", "--json"), ("stop",), ("evict",), ("run",)):
        said = assert_failed(call(capsys, "worker", *command), ExitCode.DEVICE)
        assert "the worker is not available on Windows yet" in said
    small = ("generate", "a red circle", "-p", "tiny", "--steps", "1", "--size", "64")
    assert "not available" not in call(capsys, *small).stderr
    for choice in ("on", "auto"):
        monkeypatch.setenv("FLUX_WORKER", choice)
        result = call(capsys, *small)
        assert (
            result.returncode == 0
            and "the worker is not available on Windows yet: running here" in result.stderr
        )
    monkeypatch.setenv("FLUX_WORKER", "off")
    assert "not available" not in call(capsys, *small).stderr


def test_the_client_is_stdlib_only_and_imports_nothing_more_without_a_worker(home):
    code = "import sys; before = set(sys.modules)\n"
    code += "from fluxcli.run import client\nclient.ask('status')\n"
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(found) <= set(sys.stdlib_module_names) | {"fluxcli", "quant"}
    assert "fluxcli" in found and "multiprocessing" not in found and "socket" not in found


@pytest.mark.parametrize(
    "text, seconds", [("30s", 30), ("10m", 600), ("2h", 7200), ("45", 45), ("0.5m", 30)]
)
def test_idle_takes_units(text, seconds):
    from fluxcli.cli.worker import parse_duration

    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "10 d", "m", "1e3", "99999h", "٣s", "nan"])
def test_idle_refuses_others(text):
    from fluxcli.cli.worker import parse_duration

    with pytest.raises(UsageError, match="--idle"):
        parse_duration(text)


def test_the_commands_say_what_there_is(start, capsys):
    from fluxcli.cli.worker import worker_app

    def told(*arguments: str) -> tuple[str, str]:
        worker_app(args=list(arguments), standalone_mode=False)
        return capsys.readouterr()

    assert told("status") == ("no worker is running\n", "") and told("status", "--json") == (
        "null\n",
        "",
    )
    assert told("stop") == ("", "flux: no worker is running\n") == told("evict")
    process = start()
    assert json.loads(told("status", "--json")[0])["pid"] == process.pid
    text, _ = told("status")
    assert f"pid         {process.pid}\n" in text and "held        1.00 GiB\n" in text
    assert told("start")[1].startswith(f"flux: worker {process.pid} was up already")
    assert told("evict") == ("", f"flux: worker {process.pid} holds no models\n")
    assert told("stop") == ("", f"flux: worker {process.pid} has ended\n") and process.wait(1) == 0
