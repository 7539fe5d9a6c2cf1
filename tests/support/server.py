"""Commands in forks of one process that has imported everything and computed nothing.

A cold `flux generate` spends seconds on importing torch, diffusers and transformers. `Server`
starts a process that has done so once and forks it for every command: the fork gets the arguments,
folder, environment, umask and standard streams of the command, and runs it as a new interpreter
would.

It is no new interpreter in these ways: modules are imported already, and what they read from the
environment while they were (HF_*, PYTHON*, OMP_*, TRANSFORMERS_* and DIFFUSERS_* variables) is as
it was then. `check` refuses commands for which that matters; the fixture `flux_cold` is for them.
Linux only: elsewhere a fork of a process with torch in it is not safe. Times are in seconds.

The control socket carries one message a command (JSON, with four descriptors: the three streams and
a status pipe). The server writes the fork's process id into the status pipe, and its wait status
when it has ended, a line each. It ends when the control socket is closed.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, TextIO

ROOT = Path(__file__).resolve().parents[2]
START_S = 120
MESSAGE_BYTES = 1 << 20
READ_AT_IMPORT = (
    "PYTHON",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "OMP_",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "_FLUX",
    "COMP_",
)


def is_available() -> bool:
    """Whether commands can be forked here."""
    return sys.platform == "linux"


class Server:
    """The process that forks; one for each process that runs tests."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._starting = threading.Lock()  # the umask is the whole process's
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        if not select.select([self._control], [], [], START_S)[0] or not self._control.recv(16):
            self._process.kill()
            raise RuntimeError("the server of commands did not start")

    def close(self) -> None:
        """End the server and what still runs in it."""
        self._control.close()
        self._process.wait(30)

    def start(
        self,
        *command: str,
        stdin: int | BinaryIO = subprocess.DEVNULL,
        stdout: int | BinaryIO = subprocess.PIPE,
        stderr: int | BinaryIO = subprocess.PIPE,
        cwd: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> "Command":
        """Run `python COMMAND` in a fork, its environment this process's with `environment` over
        it.
        """
        ours, theirs = {}, []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
            elif stream == subprocess.PIPE:
                reading, writing = os.pipe()
                ours[number] = writing if number == 0 else reading
                theirs.append(reading if number == 0 else writing)
            else:
                theirs.append(os.dup(stream if isinstance(stream, int) else stream.fileno()))
        status, reported = os.pipe()
        theirs.append(reported)
        with self._starting:
            umask = os.umask(0)
            os.umask(umask)
        message = {"command": command, "folder": str(cwd or Path.cwd()), "umask": umask}
        message |= {"environment": {**os.environ, **check(environment or {})}}
        data = json.dumps(message).encode()
        socket.send_fds(self._control, [data], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        return Command(command, status, ours)

    def run(
        self,
        *command: str,
        stdin: str | None = None,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess:
        """Run `python COMMAND` to its end, as subprocess.run does."""
        process = self.start(
            *command,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            environment=environment,
        )
        try:
            out, err = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


class Interpreters:
    """The same for new interpreters: a cold start for every command."""

    def close(self) -> None:
        """Nothing stays between commands."""

    def start(
        self,
        *command: str,
        stdin: int | BinaryIO = subprocess.DEVNULL,
        stdout: int | BinaryIO = subprocess.PIPE,
        stderr: int | BinaryIO = subprocess.PIPE,
        cwd: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen:
        """Run `python COMMAND`, its environment this process's with `environment` over it."""
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=variables,
            text=True,
        )

    def run(
        self,
        *command: str,
        stdin: str | None = None,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess:
        """Run `python COMMAND` to its end."""
        return subprocess.run(
            [sys.executable, *command],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {}),
        )


def check(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The environment; raises ValueError at variables that a fork would read too late."""
    late = [name for name in environment if name.startswith(READ_AT_IMPORT)]
    if late:
        raise ValueError(f"{late} are read while modules are imported: use flux_cold")
    return environment


class Command:
    """A command in a fork, with the part of subprocess.Popen's interface that tests use; streams
    are text.
    """

    def __init__(self, args: tuple[str, ...], status: int, ours: Mapping[int, int]) -> None:
        self.args = args
        self.returncode: int | None = None
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._line())
        self.stdin: TextIO | None = os.fdopen(ours[0], "w") if 0 in ours else None
        self.stdout: TextIO | None = os.fdopen(ours[1]) if 1 in ours else None
        self.stderr: TextIO | None = os.fdopen(ours[2]) if 2 in ours else None

    def _line(self) -> bytes:
        line = self._status.readline()
        if not line:
            raise RuntimeError("the server of commands has ended")
        return line

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._line()))
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(
        self, text: str | None = None, timeout: float | None = None
    ) -> tuple[str | None, str | None]:
        """Write stdin, read both streams to their ends, wait; closes the streams."""
        end = None if timeout is None else time.monotonic() + timeout
        found: dict[TextIO, str] = {}
        readers = []
        for stream in (self.stdout, self.stderr):
            if stream and not stream.closed:
                readers.append(threading.Thread(target=_read, args=(stream, found), daemon=True))
                readers[-1].start()
        if self.stdin and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(text or "")
                self.stdin.close()
        for reader in readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        return found.get(self.stdout), found.get(self.stderr)


def _read(stream: TextIO, found: dict[TextIO, str]) -> None:
    with stream:
        found[stream] = stream.read()


# The server's side


def serve(control: socket.socket) -> None:
    """Fork for each message until the other end is closed."""
    _import_everything()
    tasks = len(os.listdir("/proc/self/task"))
    assert tasks == 1, f"a process of {tasks} threads cannot be forked"
    gc.freeze()  # the forks share what is there
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: pytest closes the socket
    control.send(b"ready")
    running: dict[int, int] = {}  # status pipes by process id
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                os.read(woken, 1 << 16)
                _report_the_dead(running)
            if control in ready:
                data, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 4)
                if not data:
                    break
                pid = os.fork()
                if pid == 0:
                    _become(json.loads(data), descriptors)
                *streams, status = descriptors
                for descriptor in streams:
                    os.close(descriptor)
                os.write(status, f"{pid}\n".encode())
                running[pid] = status
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _report_the_dead(running: dict[int, int]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            pipe = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                os.write(pipe, f"{status}\n".encode())
            os.close(pipe)


def _import_everything() -> None:
    """Import what a picture takes, as the command line would: its settings for the libraries come
    first.
    """
    from fluxcli.cli import app

    before = dict(os.environ)
    app.quieten_libraries(is_debug=False)
    import quant
    from fluxcli.engine import classes

    for package in (sys.modules["fluxcli"], quant):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in ("transformer", "vae", "scheduler", "clip", "t5", "clip_tokenizer", "t5_tokenizer"):
        getattr(classes, name)()
    for name in (
        "PIL.PngImagePlugin",
        "PIL.JpegImagePlugin",
        "PIL.WebPImagePlugin",
        "psutil",
        "rich.progress",
    ):
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(before)
    tempfile.tempdir = None


def _become(message: dict, descriptors: list[int]) -> None:
    """Turn this fork into the command; does not return."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 4096 else 4096)
    os.chdir(message["folder"])
    os.umask(message["umask"])
    os.environ.clear()
    os.environ.update(message["environment"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as an interpreter opens them
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    code = 1
    try:
        _run(message["command"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as an interpreter ends
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(command: list[str]) -> None:
    """`python -c CODE ARGUMENTS` or `python -m MODULE ARGUMENTS`."""
    option, what, *arguments = command
    if option == "-c":
        sys.argv = ["-c", *arguments]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), vars(main))
        return
    sys.argv = [what, *arguments]
    runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
