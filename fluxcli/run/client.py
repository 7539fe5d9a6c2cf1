"""The other end of the warm worker: hand it a job and relay its events, ask it something, start it.

Knows nothing of models. Stdlib only and quick to import, since every `flux generate` goes through
here: nothing of it loads sockets where no worker is up. Times are in seconds.

The wire is `multiprocessing.connection` over a Unix socket, with JSON objects as bytes, never
pickles. The client sends one hello {"protocol", "identity", "kind", ...} and no more. The worker
answers with frames: first {"accepted": protocol} or {"refused": why}, then for the kind "generate"
the events as `events.to_json` gives them and {"end": true}, for other kinds {"answer": {...}}.
{"alive": true} comes between where the worker has nothing else to say. The socket lies in a folder
that only this user can enter, which both sides check. There is none on Windows yet.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fluxcli
from fluxcli import paths
from fluxcli.errors import DeviceUnusable, ExitCode
from fluxcli.events import Done, Event, Failed, Skipped, from_json
from fluxcli.request.job import Job
from quant.errors import ExplainedError
from quant.files import open_appending

if TYPE_CHECKING:
    import socket
    from multiprocessing.connection import Connection

AVAILABLE = os.name != "nt"
PROTOCOL = 2
ANSWER_S = 5.0  # until the worker takes or refuses a hello
SILENCE_S = 60.0  # without a frame: the worker hangs
START_S = 10.0  # until a started worker answers
STOP_S = 60.0  # until a stopped worker has ended
FRAME_S = 30  # for a client to take or send the rest of a frame
HELLO_BYTES = 4 << 20
FRAME_BYTES = 64 << 20  # a Done may name ten thousand pictures
LOG_BYTES = 1 << 20  # a longer log begins anew

# What is read of an answer, where it is there; "pid" always is.
READ_OF_ANSWERS: dict[str, tuple[type, ...]] = {"pid": (int,), "idle_limit_s": (int, float)}

# What a peer that is gone, or a stranger, gives rise to.
BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError)

# Variables that decide which models are found and how they compute: a worker with others is of no
# use.
VARIABLES = (
    "FLUX_KERNELS",
    "FLUX_MIRROR",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HOME",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
)
PREFIXES = ("CUDA_", "HIP_", "PYTORCH_", "OMP_", "MKL_")


class Lost(ExplainedError):
    """No worker can be used; str() says why, and is empty where there simply is none."""

    exit_code = ExitCode.DEVICE


class Ended(Lost):
    """The worker closed the connection, or something broke it."""


class Misunderstood(Lost):
    """What listens at the socket says what no worker of this version does."""

    def __init__(self) -> None:
        what = "the worker answers what this flux does not understand"
        super().__init__(what, hint=f"end it and remove {locate_socket()}")


class RemoteError(ExplainedError):
    """What ended a job in the worker, or the worker at its start.

    Message, hint and exit code are those of a run in process.
    """

    def __init__(self, message: str, *, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = ExitCode(exit_code)


# --- what commands ask for


def run(job: Job) -> Iterator[Event]:
    """Yield the events of a job that the worker runs. Closing the generator cancels the job.

    Raises `RemoteError` where the job failed, `Lost` where the worker did.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    try:
        folder = os.getcwd()
    except OSError as error:
        raise Lost("the current folder is gone", hint="cd to another one") from error
    left = {row.number for row in job.rows}
    with _say_hello("generate", job=job.to_json(), folder=folder, umask=mask) as connection:
        while True:
            frame = _receive(connection, within_s=SILENCE_S)
            if frame.get("end") is True:
                if left:
                    raise Misunderstood
                return
            if frame.get("alive") is True:
                continue
            event = _read_event(frame)
            if isinstance(event, Failed) and not event.row:
                raise RemoteError(event.message, hint=event.hint, exit_code=event.exit_code)
            if isinstance(event, Done | Failed | Skipped):
                left.discard(event.row)
            yield event


def _read_event(frame: dict[str, Any]) -> Event:
    """Return the event of a frame; raises `Misunderstood` for what is none."""
    try:
        return from_json(frame)
    except BROKEN as error:
        raise Misunderstood from error


def ask(what: str) -> dict[str, Any] | None:
    """Return the answer to "status", "stop" or "evict"; None where there is no worker.

    The answer to "stop" comes once the worker has ended. Raises `Lost` for a worker that does not
    answer.
    """
    try:
        with _say_hello(what) as connection:
            answer = _receive_answer(connection)
            if what == "stop":
                _wait_for_end(connection, pid=answer["pid"])
            return answer
    except Ended:
        return None
    except Lost as lost:
        if str(lost):
            raise
        return None


def _receive_answer(connection: "Connection") -> dict[str, Any]:
    """Return what a worker answers, perhaps after signs of life.

    Raises `Misunderstood` where it has not what is read of it.
    """
    while True:
        frame = _receive(connection, within_s=SILENCE_S)
        if frame.get("alive") is True:
            continue
        answer = frame.get("answer")
        if not isinstance(answer, dict):
            raise Misunderstood
        for name, kinds in READ_OF_ANSWERS.items():
            if not isinstance(answer.get(name, 0), kinds):
                raise Misunderstood
        if "pid" not in answer:
            raise Misunderstood
        return answer


def _wait_for_end(connection: "Connection", *, pid: int) -> None:
    """Return once the worker closes the connection; raises `Lost` where it takes too long."""
    until = time.monotonic() + STOP_S
    with contextlib.suppress(Ended):
        while time.monotonic() < until:
            _receive(connection, within_s=SILENCE_S)
        raise Lost("the worker has not ended yet", hint=f"kill {pid}")


def start(idle_s: float) -> dict[str, Any]:
    """Return the status of the worker, which is started unless there is one.

    The key "started" tells whether this call did it. Raises `RemoteError` where it does not start,
    `DeviceUnusable` where there are no workers.
    """
    check_available()
    log = paths.cache_folder() / "worker.log"
    process = None
    until = time.monotonic() + START_S
    with tempfile.TemporaryFile() as said:
        while (status := ask("status")) is None:
            if time.monotonic() >= until:
                why = f"the worker does not answer after {START_S:g} s"
                raise RemoteError(why, hint=f"see {log}", exit_code=ExitCode.DEVICE)
            # A worker that exits with 0 met another one, which was about to end.
            if process is None or process.poll() == 0:
                process = _spawn(log, idle_s=idle_s, said=said)
            if process.poll():
                raise _explain_death(process.returncode, said=said, log=log)
            time.sleep(0.05)
    return status | {"started": process is not None}


def _spawn(log: Path, *, idle_s: float, said: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start a worker in a session of its own, which writes what ends it to `said` as an event."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open_appending(log) as stderr:
            if stderr.tell() > LOG_BYTES:
                stderr.truncate(0)
            # In the package's parent folder -m finds fluxcli, and nothing of the caller's folder.
            return subprocess.Popen(
                _command(idle_s),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=stderr,
                cwd=Path(fluxcli.__file__).parent.parent,
                start_new_session=True,
            )
    except OSError as error:
        hint = f"{log} must be writable"
        why = f"the worker did not start: {error}"
        raise RemoteError(why, hint=hint, exit_code=ExitCode.OUTPUT) from error


def _command(idle_s: float) -> list[str]:
    return [sys.executable, "-m", "fluxcli", "worker", "run", "--idle", str(idle_s), "--events"]


def _explain_death(returncode: int, *, said: IO[bytes], log: Path) -> RemoteError:
    """Return the error of a worker that ended before it answered.

    It is that of the worker's Failed event, where it could say one, else its exit code.
    """
    message = f"exit {returncode}"
    hint = ""
    exit_code = ExitCode.BUG
    said.seek(0)
    with contextlib.suppress(*BROKEN):  # killed before it could say anything
        last_line = said.read().strip().rpartition(b"\n")[2]
        event = from_json(json.loads(last_line))
        if isinstance(event, Failed):
            message = event.message
            hint = event.hint
            exit_code = ExitCode(event.exit_code)
    hint = f"{hint}; {log} has it all".removeprefix("; ")
    return RemoteError(f"the worker did not start: {message}", hint=hint, exit_code=exit_code)


# --- what both ends agree on


def check_available() -> None:
    """Raise `DeviceUnusable` on a system that has no workers."""
    if not AVAILABLE:
        hint = "flux generate runs without it"
        raise DeviceUnusable("the worker is not available on Windows yet", hint=hint)


def describe_installation() -> dict[str, str | int]:
    """Return what a worker must share with whoever uses it: version, installation and variables."""
    described: dict[str, str | int] = {
        "version": fluxcli.__version__,
        "protocol": PROTOCOL,
        "prefix": sys.prefix,
        "package": str(Path(fluxcli.__file__).parent),
    }
    for name, value in os.environ.items():
        if name in VARIABLES or name.startswith(PREFIXES):
            described[name] = value
    return described


def locate_socket() -> Path:
    """Return the path of the worker's socket; its lock lies beside it, with the suffix .lock.

    The name is made of the cache folder's, so that homes of their own have workers of their own.
    """
    name = name_socket(paths.cache_folder())
    return Path(tempfile.gettempdir(), f"flux-{os.getuid()}", name)


def name_socket(cache_folder: Path) -> str:
    """Return the name of the socket that belongs to a user's cache folder."""
    return f"{hashlib.sha256(os.fsencode(cache_folder)).hexdigest()[:12]}.sock"


def check_private(folder: Path) -> None:
    """Raise `Lost` for a folder that others can enter or could have made.

    Raises OSError where there is none.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        hint = f"chmod 700 {folder}, or remove it"
        raise Lost("the worker's folder is not private", which=folder, hint=hint)


def send(connection: "Connection", value: dict[str, Any]) -> None:
    """Send one frame; raises OSError."""
    connection.send_bytes(json.dumps(value).encode())


def receive(
    connection: "Connection", *, within_s: float, limit_bytes: int = FRAME_BYTES
) -> dict[str, Any]:
    """Return the next frame.

    Raises TimeoutError where none comes in time, one of `BROKEN` for what is no frame.
    """
    if not connection.poll(within_s):
        raise TimeoutError
    value = json.loads(connection.recv_bytes(limit_bytes))
    if not isinstance(value, dict):
        raise TypeError
    return value


def limit_waits(plain: "socket.socket", *, within_s: float) -> None:
    """Let no read or write of a socket block longer than that in the middle of a frame."""
    import socket
    import struct

    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        plain.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", math.ceil(within_s), 0))


# --- the client's side of the wire


@contextlib.contextmanager
def _say_hello(kind: str, **more: object) -> "Iterator[Connection]":
    """Give a connection whose hello the worker takes; raises `Lost`."""
    about = {"protocol": PROTOCOL, "identity": describe_installation(), "kind": kind}
    hello = json.dumps(about | more).encode()
    if len(hello) > HELLO_BYTES:
        raise Lost("the job is too long for the worker", hint="--no-worker")
    with connect() as connection:
        with contextlib.suppress(OSError):  # it may have said why before it closed
            connection.send_bytes(hello)
        answer = _receive(connection, within_s=ANSWER_S)
        if isinstance(answer.get("refused"), str):
            why = f"the worker is of no use here: {answer['refused']}"
            raise Lost(why, hint="flux worker stop")
        if answer.get("accepted") != PROTOCOL:
            raise Misunderstood
        yield connection


def _receive(connection: "Connection", *, within_s: float) -> dict[str, Any]:
    """Return the worker's next frame; raises `Lost` for silence, `Ended` if it has closed."""
    try:
        return receive(connection, within_s=within_s)
    except TimeoutError as error:
        raise Lost("the worker does not answer", hint="flux worker stop") from error
    except (OSError, EOFError) as error:
        raise Ended("the worker closed the connection", hint="run it again") from error
    except BROKEN as error:  # no JSON, or no object
        raise Misunderstood from error


def connect() -> "Connection":
    """Return a connection to whatever listens at the socket; raises `Lost`."""
    if not AVAILABLE:
        raise Lost("")
    path = locate_socket()
    try:
        os.lstat(path)  # there is none: nothing more is imported
        check_private(path.parent)
        return _connect_to(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        raise Lost("") from error
    except TimeoutError as error:
        raise Lost("the worker does not answer", hint="flux worker stop") from error
    except OSError as error:
        hint = f"remove {path}"
        raise Lost("the worker cannot be reached", why=str(error), hint=hint) from error


def _connect_to(path: Path) -> "Connection":
    import socket
    from multiprocessing.connection import Connection

    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(ANSWER_S)
        plain.connect(str(path))
        plain.settimeout(None)
        limit_waits(plain, within_s=ANSWER_S)
        return Connection(plain.detach())
