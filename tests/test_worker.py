"""The warm worker: what a job says and does there it says and does here; nothing that a client does ends it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import fluxcli
from fluxcli.errors import ExitCode, UsageError
from fluxcli.events import Done, Failed, Notice, Phase, Step, to_json
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.job import Job, Row
from fluxcli.run import client
from quant.errors import ExplainedError
from tests.support.helpers import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="its pipes want a Windows to be tried on")

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
            yield from getattr(self, row.request.prompt.split()[0])(job, row)
            yield Done((), row.request.to_json(), {}, {}, {}, {}, row.number)

    def draw(self, job, row):
        note(row.request.prompt)
        yield Phase("load", "transformer")
        yield Phase("load", "vae")
        yield Step(1, 1)
        yield saved("\\udcff fox.jpg", row.number)

    def here(self, job, row):
        Path("out").mkdir()
        Path("out/x.jpg").write_bytes(b"abc")
        yield saved("out/x.jpg")

    def bytes(self, job, row):
        sys.stdout.buffer.write(bytes(range(256)) * 20000)
        sys.stdout.buffer.flush()
        assert not sys.stdout.isatty()
        yield saved("-")

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
        raise DoesNotFit("out of memory", which="cuda:0", why="it is small", hint="a smaller --size")
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

def explained(error):
    if isinstance(error, ExplainedError):
        return Failed(int(exit_code_of(error)), str(error), error.hint)
    return Failed(1, f"this is a bug: {type(error).__name__}", "report it")

if __name__ == "__main__":
    worker.ALIVE_S = worker.HELLO_S = worker.LOOK_S = 0.3
    client.FRAME_S = 1
    signals.install_signals()
    try:
        worker.serve(float(sys.argv[1]), session=Session(), explained=explained)
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
    rows = tuple(Row(k * (len(prompts) > 1), GenerationRequest(text, seed=1)) for k, text in enumerate(prompts, 1))
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


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for temporary files; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a worker with a fake session, and wait until it answers."""
    processes = []

    def started(idle_s: float = 60, *, wait: bool = True) -> subprocess.Popen:
        command = [sys.executable, "-c", FAKE, str(idle_s)]
        with (home / "log").open("ab") as log:
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log))
        if wait:
            eventually(lambda: client.ask("status"))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def worker(start: Callable[..., subprocess.Popen]) -> subprocess.Popen:
    return start()


def notes(home: Path) -> list[str]:
    return (home / "notes").read_text().splitlines() if (home / "notes").exists() else []


def serves() -> bool:
    return isinstance(list(client.run(job("draw again")))[-1], Done)


def client_process(what: Job, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT, json.dumps(what.to_json())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def raw(hello: object = None) -> "client.Connection":
    """A connection of a client that says `hello`, or nothing."""
    connection = client._connected()
    if hello is not None:
        connection.send_bytes(hello if isinstance(hello, bytes) else json.dumps(hello).encode())
    return connection


def hello(what: Job | object, **changes: object) -> dict:
    sent = what.to_json() if isinstance(what, Job) else what
    known = {"protocol": client.PROTOCOL, "identity": client.identity(), "kind": "generate", "job": sent}
    return known | {"folder": os.getcwd(), "umask": 0o22} | changes


def closes(connection: "client.Connection", within_s: float = 5) -> bool:
    with pytest.raises((EOFError, ConnectionResetError)):
        while connection.poll(within_s):
            connection.recv_bytes()
        return False
    return True


@pytest.mark.parametrize("prompts", [("draw a fox",), ("draw 1", "half", "draw 3"), ("draw 1", "full")])
def test_events_exit_code_message_and_hint_are_those_of_a_run_in_process(worker, prompts):
    fake: dict = {"__name__": "fake"}
    exec(FAKE, fake)

    def here() -> Iterator:
        try:
            yield from fake["Session"]().run(job(*prompts))
        except ExplainedError as error:
            failed = fake["explained"](error)
            raise client.RemoteError(failed.message, failed.hint, failed.exit_code) from error

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
        frames = [client.receive(connection, 5) for _ in range(2)]
    assert (frames[1]["event"], frames[1]["exit_code"]) == ("failed", ExitCode.OUTPUT)
    assert serves()


def test_bytes_for_stdout_arrive(worker):
    process = client_process(job("bytes"))
    process.stdout.close()
    process.stdout = None
    assert process.wait(10) != 0 and "BrokenPipeError" in process.stderr.read()
    process.stderr.close()
    command = [sys.executable, "-c", CLIENT, json.dumps(job("bytes").to_json())]
    assert subprocess.run(command, capture_output=True, check=True).stdout == bytes(range(256)) * 20000
    assert worker.poll() is None


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
    assert Path(client.place()[0]).exists() and client.ask("status") is None
    assert start().pid == client.ask("status")["pid"] and serves()


@pytest.mark.parametrize("change", ["version", "CUDA_VISIBLE_DEVICES", "HF_HOME"])
def test_a_worker_of_another_version_or_environment_is_not_used_but_can_be_told(worker, home, monkeypatch, change):
    if change == "version":
        monkeypatch.setattr(fluxcli, "__version__", "9.9")
    else:
        monkeypatch.setenv(change, "7")
    with pytest.raises(client.Lost, match=f"another {change}$"):
        list(client.run(job("draw")))
    assert client.ask("evict") == {"pid": worker.pid} and notes(home) == ["evicted"]
    assert client.ask("status")["version"] == "0.1.0"
    assert client.ask("stop") and worker.wait(1) == 0


def test_jobs_wait_in_order_and_hear_how_many_are_before_them(worker, home):
    said: dict = {}
    threads = []
    for k, prompt in enumerate(("gate", "draw 1", "draw 2")):
        threads.append(threading.Thread(target=lambda text=prompt: said.update({text: list(client.run(job(text)))})))
        threads[-1].start()
        eventually(lambda k=k: (status := client.ask("status"))["running"] and status["queue"] == k)
    (home / "go").touch()
    for thread in threads:
        thread.join(10)
    assert [each for each in notes(home) if each.startswith("draw")] == ["draw 1", "draw 2"]
    assert not [event for event in said["gate"] if isinstance(event, Notice)]
    for k in (1, 2):
        assert isinstance(said[f"draw {k}"][0], Notice) and f"busy: {k} before" in said[f"draw {k}"][0].message
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
    assert {key: status[key] for key in ("pid", "running", "queue", "jobs", "pictures", "loads", "model")} == {
        "pid": worker.pid, "running": True, "queue": 0, "jobs": 1, "pictures": 1,
        "loads": {"transformer": 1, "vae": 1}, "model": "fake",
    }  # fmt: skip
    assert status["uptime_s"] >= 0 == status["idle_s"] and status["rss_bytes"] > 1 << 20
    events.close()


def test_an_idle_worker_ends_and_leaves_only_its_lock(start, home):
    process = start(0.5)
    assert serves()
    assert process.wait(5) == 0 and client.ask("status") is None
    assert [path.suffix for path in client.place()[1].parent.iterdir()] == [".lock"]


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
    os.unlink(client.place()[0])
    assert worker.wait(5) == 0 and (home / "log").read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_it_and_its_socket(worker, number, busy):
    events = client.run(job("gate"))
    if busy:
        next(events)
    worker.send_signal(number)
    assert worker.wait(5) == -number
    assert [path.suffix for path in client.place()[1].parent.iterdir()] == [".lock"]
    events.close()


@pytest.mark.parametrize("prompt, code", [("bug", 1), ("broken", 8)])
def test_after_a_bug_or_a_broken_device_it_ends(worker, home, prompt, code):
    assert outcome(client.run(job(prompt)))[1][0] == code
    assert worker.wait(5) == 0
    assert ("ZeroDivisionError" in (home / "log").read_text()) == (prompt == "bug")


def test_a_wish_for_a_device_that_is_not_there_leaves_it_alive(worker):
    assert outcome(client.run(job("nowhere")))[1][0] == 8
    assert serves()


NONSENSE = [
    b"",
    b"\0\xff",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b'"x"',
    b"[" * 100_000,
    b" " * client.HELLO_BYTES + b'{"kind": "status"}',
]
NONSENSE += [{"kind": kind} for kind in ("", "draw", None, 5, [], {})]
WRONG_JOBS = [None, [], 5, {"rows": 5}, {"rows": [5]}, {"rows": [[1, "", {"prompt": 5}]]}, {"rows": [[1, "", {}]]}]
WRONG_JOBS += [{"rows": [], "unknown": 1}, {"rows": [[1, "", {"prompt": "x", "steps": "many"}]]}]


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_strangers_lose_their_connection_and_nothing_else(worker, batch):
    wrong = [hello(each) for each in WRONG_JOBS]
    wrong += [hello(job("draw"), umask="x"), hello(job("draw"), identity=[]), hello(job("draw"), folder="a\0b")]
    for each in (NONSENSE[:9], NONSENSE[9:], wrong)[batch]:
        try:
            connection = raw(each)
        except (BrokenPipeError, ConnectionResetError):  # before the whole of it was sent
            continue
        with connection:
            frames = []
            while connection.poll(2):
                try:
                    frames.append(json.loads(connection.recv_bytes()))
                except (EOFError, OSError):
                    break
            else:
                raise AssertionError(f"{str(each)[:80]} keeps its connection")
            assert not [frame for frame in frames if {"answer", "end"} & set(frame)]
    assert serves() and client.ask("status")["pid"] == worker.pid


def test_a_silent_client_and_half_a_frame_are_dropped(worker):
    with raw() as silent, raw() as half, raw() as more:
        os.write(half.fileno(), b"\0\0")
        os.write(more.fileno(), b"\0\0\1\0{")
        assert serves()
        assert closes(silent) and closes(half) and closes(more)
    assert serves()


def test_a_client_that_stops_reading_blocks_nobody_for_ever(worker):
    with raw(hello(job("bytes"))):
        eventually(lambda: client.ask("status")["running"])
        since = time.monotonic()
        assert serves()
        assert 0.5 < time.monotonic() - since < 5


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED") or os.getuid() != 0, reason="takes another user")
@pytest.mark.parametrize("uid", [0, 65534])
def test_another_user_is_not_served_even_where_the_folder_lets_him_in(worker, home, uid):
    address, stem = client.place()
    for path, mode in ((home, 0o755), (stem.parent, 0o755), (Path(address), 0o777)):
        path.chmod(mode)
    child = os.fork()
    if not child:
        answered = 2  # not even connected
        try:
            os.setuid(uid)
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(address)
                answered = 0
                said = json.dumps({"kind": "status"}).encode()
                plain.sendall(len(said).to_bytes(4, "big") + said)
                answered = int(bool(plain.recv(1)))
        finally:
            os._exit(answered)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (uid == 0)


@pytest.mark.parametrize("how", ["0755", "link"])
def test_a_folder_that_others_could_enter_is_used_by_neither_side(start, home, how):
    folder = client.place()[1].parent
    if how == "link":
        (home / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(home / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o755)
    process = start(wait=False)
    assert process.wait(5) == 1 and "not private" in (home / "log").read_text()
    assert not Path(client.place()[0]).exists()
    Path(client.place()[0]).touch()
    with pytest.raises(client.Lost, match="not private"):
        list(client.run(job("draw")))


def test_the_folder_is_made_private_whatever_the_umask(start):
    before = os.umask(0)
    try:
        start()
    finally:
        os.umask(before)
    folder = client.place()[1].parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not any(path.stat().st_mode & 0o077 for path in folder.iterdir())


def test_a_hundred_clients_leave_descriptors_and_threads_flat(worker):
    process = psutil.Process(worker.pid)

    def after(rounds: int) -> tuple[int, int]:
        for k in range(rounds):
            raw().close()
            raw(b"{}" if k % 2 else hello(job("draw"))).close()
            assert client.ask("status")
        assert serves()
        eventually(lambda: process.num_threads() <= 2)
        return process.num_fds(), process.num_threads()

    fds, threads = after(10)
    assert after(100)[0] <= fds and threads <= 2


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_starts_at_once_give_one_worker(home, monkeypatch):
    monkeypatch.setattr(client, "_command", lambda idle_s: [sys.executable, "-c", FAKE, str(idle_s)])
    Path("fluxcli.py").write_text("raise SystemExit('from the folder of whoever started it')")
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(client.start, (30, 30, 30)))
        assert len({status["pid"] for status in found}) == 1 and any(status["started"] for status in found)
        children = psutil.Process().children()
        psutil.wait_procs([each for each in children if each.pid != found[0]["pid"]], 5)
        assert [each.pid for each in psutil.Process().children() if each.status() != "zombie"] == [found[0]["pid"]]
        assert not client.start(30)["started"] and os.getsid(found[0]["pid"]) == found[0]["pid"]
        assert psutil.Process(found[0]["pid"]).cwd() == "/"
    finally:
        client.ask("stop")


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_start_that_met_a_worker_about_to_end_is_tried_again(home, monkeypatch):
    codes = iter(["", FAKE])
    monkeypatch.setattr(client, "_command", lambda idle_s: [sys.executable, "-c", next(codes), str(idle_s)])
    assert client.start(30)["started"] and next(codes, None) is None
    assert client.ask("stop")


@pytest.mark.parametrize(
    "code, expected",
    [("import sys; print('flux: error: no room.\\nhint: x', file=sys.stderr); sys.exit(5)", (5, "no room")),
     ("raise RuntimeError('oh')", (1, "RuntimeError: oh")), ("import os; os.abort()", (1, "exit -6"))],
)  # fmt: skip
def test_a_worker_that_dies_at_its_start_is_an_error_with_its_last_words(home, monkeypatch, code, expected):
    monkeypatch.setattr(client, "_command", lambda _: [sys.executable, "-c", code])
    with pytest.raises(client.RemoteError, match=expected[1]) as failed:
        client.start(30)
    assert failed.value.exit_code == expected[0] and "worker.log" in failed.value.hint


def test_the_client_is_stdlib_only_and_imports_nothing_more_without_a_worker(home):
    code = "import sys; before = set(sys.modules)\nfrom fluxcli.run import client\nclient.ask('status')\n"
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) <= set(sys.stdlib_module_names) | {"fluxcli", "quant"}
    assert "fluxcli" in found and "multiprocessing" not in found and "socket" not in found


@pytest.mark.parametrize("text, seconds", [("30s", 30), ("10m", 600), ("2h", 7200), ("45", 45), ("0.5m", 30)])
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

    assert told("status") == ("no worker is running\n", "") and told("status", "--json") == ("null\n", "")
    assert told("stop") == ("", "flux: no worker is running\n") == told("evict")
    process = start()
    assert json.loads(told("status", "--json")[0])["pid"] == process.pid
    text, _ = told("status")
    assert f"pid           {process.pid}\n" in text and "held          1.00 GiB\n" in text
    assert told("start")[1].startswith(f"flux: worker {process.pid} was up already")
    assert told("evict") == ("", f"flux: worker {process.pid} holds no models\n")
    assert told("stop") == ("", f"flux: worker {process.pid} has ended\n") and process.wait(1) == 0


def test_a_batch_row_that_failed_is_no_end(worker):
    seen = list(client.run(job("half", "draw 2", batch=True)))
    assert Failed(4, "row two", "a hint", row=2) in seen and isinstance(seen[-1], Done)
