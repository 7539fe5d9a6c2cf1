"""Signals and loops: the death that a shell expects, no partial file, and no growth over many
rounds.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest

from fluxcli import signals
from fluxcli.errors import Terminated
from fluxcli.pictures import names as output
from fluxcli.request.fields import Order
from tests.support.helpers import ROOT, changed, engine_of, order, run, tiny
from tests.support.invariant import Fault, files
from tests.support.terminals import read_until

pytestmark = [pytest.mark.serial, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]
LONG = (
    "generate",
    "a fox",
    "-p",
    "tiny",
    "--steps",
    "1000",
    "--size",
    "64",
    "--events",
    "-o",
    "pics/",
)
REQUEST = order("a fox", seed=5, preset="tiny", aspect_ratio="1:1", image_size=64, format="png")


def start(*command: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def finished(process: subprocess.Popen, within_s: float) -> tuple[int, str]:
    """(returncode, stderr) of a process that ends in time."""
    try:
        _, stderr = process.communicate(timeout=within_s)
    finally:
        process.kill()
    return process.returncode, stderr


def test_a_signal_in_the_middle_of_a_picture_ends_it_by_that_signal_without_a_trace(commands):
    process = commands.start("-m", "fluxcli", *LONG)
    assert any('"step"' in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    code, stderr = finished(process, 20)
    assert code == -signal.SIGTERM and "Traceback" not in stderr and "error" not in stderr
    assert files(Path("pics")) == {}


def test_ctrl_c_while_the_command_is_still_imported_leaves_no_traceback(tmp_path, monkeypatch):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "typer.py").write_text(
        "print('running', flush=True); import time; time.sleep(30)"
    )
    command = [sys.executable, "-m", "fluxcli", "--help"]
    path = f"{tmp_path / 'slow'}{os.pathsep}{ROOT}"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert finished(process, 10) == (-signal.SIGINT, "")


def test_a_shell_loop_stops_at_the_first_ctrl_c():
    import pty

    command = f"{sys.executable} -m fluxcli {' '.join(map(repr, LONG))}"
    loop = f"for i in 1 2 3; do echo round $i; {command}; done; echo end"
    child, terminal = pty.fork()
    if not child:
        os.environ |= {"PYTHONPATH": str(ROOT)}
        os.execvp("bash", ["bash", "-c", loop])
    seen = read_until(terminal, b'"step"', 60)
    assert b'"step"' in seen
    os.write(terminal, b"\x03")
    seen += read_until(terminal, b"round 2", 20)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT
    assert b"round 2" not in seen and b"\nend" not in seen and b"Traceback" not in seen
    assert files(Path("pics")) == {}


HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
DRAWING = f"{sys.executable} -m fluxcli generate 'a fox' -p tiny --steps 1000 --size 64 -o pics/"
# The work is stuck, and what cleans up after it, too.
STUCK = """
import time
from fluxcli.cli import app, console
def stuck(_):
    with console.Reporter(started=time.perf_counter()) as reporter:
        try:
            reporter.show_bytes(1, 2, "step"); time.sleep(30)
        finally:
            print("cleaning", flush=True); time.sleep(30)
app.run = stuck
app.main()
"""


def interrupt_on_a_terminal(command: str, after: Sequence[bytes]) -> tuple[int, bytes]:
    """Run a command on a terminal of its own, with a Ctrl-C when each of the words is shown.

    Returns the signal that ended it, and all that the terminal was sent.
    """
    import pty

    child, terminal = pty.fork()
    if not child:
        os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        os.environ.pop("NO_COLOR", None)
        os.execvp("bash", ["bash", "-c", f"exec {command}"])
    seen = b""
    for word in after:
        seen += read_until(terminal, word, 60)
        assert word in seen
        os.write(terminal, b"\x03")
    seen += read_until(terminal, b"what is never shown", 20)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.WIFSIGNALED(status), status
    return os.WTERMSIG(status), seen


def test_ctrl_c_on_a_terminal_brings_the_cursor_back():
    number, seen = interrupt_on_a_terminal(DRAWING, after=[b"step"])
    assert number == signal.SIGINT and b"Traceback" not in seen
    assert HIDE in seen and seen.rindex(SHOW) > seen.rindex(HIDE)
    assert files(Path("pics")) == {}


def test_two_ctrl_c_bring_the_cursor_back_though_nothing_is_unwound():
    Path("stuck.py").write_text(STUCK)
    command = f"{sys.executable} stuck.py"
    number, seen = interrupt_on_a_terminal(command, after=[b"step", b"cleaning"])
    assert number == signal.SIGINT and b"Traceback" not in seen
    assert HIDE in seen and seen.rindex(SHOW) > seen.rindex(HIDE)


def test_ctrl_c_sends_no_escape_codes_where_stderr_is_no_terminal():
    # The events say on the terminal when the drawing is under way.
    command = f"{DRAWING} --events 2>words.txt"
    number, seen = interrupt_on_a_terminal(command, after=[b'"step"'])
    assert number == signal.SIGINT
    assert b"\x1b" not in seen and b"\x1b" not in Path("words.txt").read_bytes()


def test_two_ctrl_c_send_no_escape_codes_where_stderr_is_no_terminal():
    # Inside the block: a signal right after the word must find it.
    said = "try:\n            print('running', flush=True)"
    Path("stuck.py").write_text(STUCK.replace("try:", said))
    command = f"{sys.executable} stuck.py 2>words.txt"
    number, seen = interrupt_on_a_terminal(command, after=[b"running", b"cleaning"])
    assert number == signal.SIGINT
    assert b"\x1b" not in seen and b"\x1b" not in Path("words.txt").read_bytes()


SLOW_CLEANUP = """
import sys, time
from fluxcli.cli import app
def slow(_):
    try:
        print("running", flush=True); time.sleep(30)
    finally:
        print("cleaning", flush=True); time.sleep({cleanup})
    return 0
app.run = slow
app.main()
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGXCPU,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ],
)
@pytest.mark.parametrize("times, cleanup", [(1, 0), (2, 30)])
def test_the_first_signal_cleans_up_and_the_second_ends_at_once(number, times, cleanup):
    process = start("-c", SLOW_CLEANUP.format(cleanup=cleanup))
    for word in ("running", "cleaning")[:times]:
        assert process.stdout.readline().strip() == word
        process.send_signal(number)
    assert finished(process, 10) == (-number, "")
    assert files(Path()) == {}  # no core either


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_in_a_row_leave_the_cleaning_its_time(second):
    code = SLOW_CLEANUP.replace(
        "time.sleep({cleanup})", "time.sleep(0.3); print('cleaned', flush=True)"
    )
    process = start("-c", code)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(second)
    stdout, stderr = process.communicate(timeout=10)
    assert stdout == "cleaning\n" + "cleaned\n"
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


SWALLOWED = """
import time
from fluxcli.cli import console
from fluxcli.cli import app
from fluxcli.events import Step
def slow(_=None):
    print("running", flush=True); time.sleep(30)
Slow = type("Slow", (), {{"__del__": slow}})
def command(**_):
    try:
        {swallow}
    except BaseException:
        pass
    {then}
app.app = command
app.main()
"""


@pytest.mark.parametrize("swallow", ["slow()", "Slow()"], ids=["except", "__del__"])
@pytest.mark.parametrize(
    "then",
    [
        "return 0",
        "raise ImportError('half a module')",
        "console.Reporter(started=0.0).show(Step(1, 9)); time.sleep(30)",
    ],
    ids=["ends", "fails", "goes on"],
)
def test_a_signal_that_a_library_swallows_still_ends_the_run(swallow, then):
    code = SWALLOWED.format(swallow=swallow, then=then).replace("time.sleep(30)", "time.sleep(5)")
    process = start("-c", code)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert finished(process, 4) == (-signal.SIGINT, "")


def test_a_signal_during_a_librarys_import_is_no_exception_in_it(tmp_path):
    lines = "import os, time\ntry:\n    print('running', flush=True); time.sleep(30)\n"
    lines += "except BaseException:\n    os.abort()"
    (tmp_path / "library.py").write_text(lines)
    code = SLOW_CLEANUP.replace(
        "    try:", f"    sys.path.append({str(tmp_path)!r}); import library\n    try:"
    )
    process = start("-c", code.format(cleanup=0))
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert finished(process, 10) == (-signal.SIGINT, "")


def test_a_signal_during_a_short_import_cleans_up_after_it(tmp_path):
    lines = "import time\ntry:\n    print('running', flush=True); time.sleep(0.3)\n"
    lines += "except BaseException:\n    print('broken')"
    (tmp_path / "library.py").write_text(lines)
    code = SLOW_CLEANUP.replace(
        "    try:", f"    sys.path.append({str(tmp_path)!r})\n    try:\n        import library"
    )
    process = start("-c", code.format(cleanup=0))
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert stdout.splitlines()[-1] == "cleaning" and "broken" not in stdout
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


def test_a_signal_that_the_parent_ignores_stays_ignored():
    code = SLOW_CLEANUP.replace("time.sleep(30)", "time.sleep(0.5)").format(cleanup=0)
    process = start("-c", code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert finished(process, 10) == (0, "")


PAINTED = """
import sys, pytest
from fluxcli.cli import app
from tests.support.invariant import paint_instead
paint_instead(pytest.MonkeyPatch())
app.main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("presets",),
        ("generate", "a fox", "-p", "tiny", "-o", "-"),
        ("generate", "a fox", "-p", "tiny", "-q"),
        ("generate", "a fox", "-p", "tiny", "--events", "-q"),
    ],
    ids=" ".join,
)
def test_a_closed_pipe_dies_quietly(arguments, commands):
    process = commands.start("-c", PAINTED, *arguments)
    process.stdout.close()  # long before the first byte
    process.stdout = None
    code, stderr = finished(process, 30)
    assert code == -signal.SIGPIPE
    assert (
        "Traceback" not in stderr
        and "error" not in stderr
        and not [f for f in files(Path()) if f.endswith(".tmp")]
    )


def _killed_at(k: int, text: str) -> bool:
    """Save in a process that is killed at its k-th call; whether that call came."""
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patch:
            request = _with_output(text)
            target = output.parse_target(request.output, force=True)
            Fault(k, lambda _: os.kill(os.getpid(), signal.SIGKILL)).install(patch)
            output.check_writable(target, request)
            output.save(b"a new picture", output.Destination(target, request))
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _with_output(text: str) -> Order:

    return changed(REQUEST, output=text)


@pytest.mark.parametrize(
    "text, name, before", [("x.png", "x.png", b"old"), ("{seed}", "5.png", None)]
)
def test_killed_at_any_write_point_the_old_file_or_the_new_one_is_whole(text, name, before):
    seen = set()
    for k in count(1):
        for path in Path().iterdir():
            path.unlink()
        if before:
            Path(name).write_bytes(before)
        killed = _killed_at(k, text)
        left = {file: data for file, data in files(Path()).items() if not file.endswith(".tmp")}
        assert left in ({name: before} if before else {}, {name: b"a new picture"})
        seen.add(left.get(name))
        if not killed:
            break
    assert k > 10 and seen == {before, b"a new picture"}


def test_many_rounds_leave_memory_descriptors_and_files_flat(tiny_folder):
    import psutil

    from quant.checkpoint import inspect

    engine, process = engine_of(inspect(tiny_folder)), psutil.Process()
    measured = []
    for k in range(100):
        request = tiny(steps=1, seed=k, output="x.png")
        target = output.parse_target(request.output, force=True)
        for _ in run(engine, request, target):
            pass
        measured.append((process.memory_info().rss, process.num_fds()))
    assert measured[-1][1] <= measured[9][1]
    assert measured[-1][0] - measured[9][0] < 24 << 20
    assert list(files(Path())) == ["x.png"]


def test_a_signal_during_an_import_unwinds_the_stack_once(monkeypatch):
    monkeypatch.setattr(signals, "ARRIVED", [])
    monkeypatch.setattr(signals, "_is_importing", lambda _: True)
    before = signal.getsignal(signal.SIGALRM)
    try:
        signals._unwind(signal.SIGINT, None)
        with pytest.raises(Terminated):  # somebody asks before the alarm does
            signals.check_signals()
        monkeypatch.setattr(signals, "_is_importing", lambda _: False)
        time.sleep(3 * signals.AGAIN_S)  # an alarm would raise here, while files are deleted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
