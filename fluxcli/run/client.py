"""The other end of the warm worker: hand it a job and relay its events, ask it something, start it.

Knows nothing of models. Stdlib only and quick to import, since every `flux generate` goes through here. The wire is
`multiprocessing.connection` with JSON objects as bytes, never pickles: a hello from the client, then frames from the
worker, the first of which says whether it takes the hello. POSIX: a socket in a folder that only this user can enter,
which both sides check. Windows: a pipe, and a key in the user's cache folder that both sides prove to have.
"""

import base64
import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fluxcli
from fluxcli import paths
from fluxcli.errors import ExitCode
from fluxcli.events import Event, Failed, from_json
from fluxcli.request.job import Job
from quant.errors import ExplainedError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROTOCOL = 1
ANSWER_S, SILENCE_S, START_S, STOP_S, FRAME_S = 5.0, 60.0, 10.0, 60.0, 30  # the last: for the rest of a frame
HELLO_BYTES, FRAME_BYTES, LOG_BYTES = 4 << 20, 64 << 20, 1 << 20  # a Done may name ten thousand pictures
BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError)  # of a peer that is gone, or a stranger
VARIABLES = (
    "HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME",
    "FLUX_MIRROR", "LOCALAPPDATA", "APPDATA",
)  # fmt: skip
PREFIXES = ("CUDA_", "HIP_", "PYTORCH_", "OMP_", "MKL_")


class Lost(ExplainedError):
    """No worker that can be used; str() says why, and is empty where there simply is none."""

    exit_code = ExitCode.DEVICE


class Ended(Lost):
    """It closed the connection; or something broke it."""


class RemoteError(ExplainedError):
    """What ended a job in the worker, or the worker at its start, with the exit code it has in process."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = ExitCode(code)


def run(job: Job) -> Iterator[Event]:
    """Yield the events of a job that the worker runs, and write what it writes to stdout just before the next one.

    Closing the generator cancels the job. Raises `RemoteError` as the job failed, `Lost` where the worker did.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    try:
        caller = {"folder": os.getcwd(), "umask": mask}
    except OSError as error:
        raise Lost("the current folder is gone") from error
    written = b""
    with _asked("generate", job=job.to_json(), **caller) as connection:
        while "end" not in (frame := _receive(connection, SILENCE_S)):
            written, event = _taken(frame, written)
            if event is None:
                continue
            if written:
                sys.stdout.buffer.write(written)
                sys.stdout.buffer.flush()
                written = b""
            if isinstance(event, Failed) and not event.row:
                raise RemoteError(event.message, event.hint, event.exit_code)
            yield event


def _taken(frame: dict, written: bytes) -> tuple[bytes, Event | None]:
    """(what was written to stdout since the last event, the frame's event)."""
    try:
        return written + base64.b64decode(frame.get("stdout", "")), from_json(frame) if "event" in frame else None
    except BROKEN as error:
        raise Lost("the worker answers what this flux does not understand") from error


def ask(what: str) -> dict | None:
    """The answer to "status", "stop" (once the worker has ended) or "evict"; None where there is no worker.

    Raises `Lost` for one that does not answer.
    """
    try:
        with _asked(what) as connection:
            while "answer" not in (frame := _receive(connection, SILENCE_S)):
                pass
            until = time.monotonic() + STOP_S
            with contextlib.suppress(Ended):
                while what == "stop":
                    _receive(connection, STOP_S)
                    if time.monotonic() > until:
                        raise Lost("the worker has not ended yet", hint=f"kill {frame['answer']['pid']}")
            return frame["answer"]
    except Ended:
        return None
    except Lost as lost:
        if str(lost):
            raise
        return None


def start(idle_s: float) -> dict:
    """The status of the worker, which is started unless there is one. Raises `RemoteError` where it does not start."""
    path = paths.cache_folder() / "worker.log"
    until, process = time.monotonic() + START_S, None
    while (status := ask("status")) is None and time.monotonic() < until:
        if process is None or process.poll() == 0:  # 0: it met another one, that was about to end
            process, begin = _spawn(path, idle_s)
        if process.poll():
            with path.open(encoding="utf-8", errors="replace") as log:
                log.seek(begin)
                lines = [line for line in log.read().splitlines() if line.strip() and not line.startswith("hint: ")]
            code = process.returncode if process.returncode in iter(ExitCode) else ExitCode.BUG
            why = lines[-1].removeprefix("flux: error: ").rstrip(".") if lines else f"exit {process.returncode}"
            raise RemoteError(f"the worker did not start: {why}", f"{path} has it all", code)
        time.sleep(0.05)
    if status is None:
        raise RemoteError(f"the worker does not answer after {START_S:g} s", f"see {path}", ExitCode.DEVICE)
    return status | {"started": process is not None}


def _spawn(path: Path, idle_s: float) -> tuple[subprocess.Popen, int]:
    """(a worker in a session of its own, where in the log its words begin)."""
    alone = {"start_new_session": True}
    if os.name == "nt":
        alone = {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            if log.tell() > LOG_BYTES:
                log.truncate(0)
            begin = path.stat().st_size
            null = subprocess.DEVNULL
            package = identity()["package"]  # found there by -m, and nothing in the folder of the caller
            return subprocess.Popen(
                _command(idle_s), stdin=null, stdout=null, stderr=log, cwd=Path(package).parent, **alone
            ), begin
    except OSError as error:
        raise RemoteError(f"the worker did not start: {error}", f"{path} must be writable", ExitCode.OUTPUT) from error


def _command(idle_s: float) -> list[str]:
    return [sys.executable, "-m", "fluxcli", "worker", "run", "--idle", str(idle_s)]


def identity() -> dict[str, str | int]:
    """What a worker shares with whoever uses it: version, installation, and the variables that models depend on."""
    here = {"version": fluxcli.__version__, "protocol": PROTOCOL, "prefix": sys.prefix}
    here |= {"package": str(Path(fluxcli.__file__).parent)}
    return here | {k: v for k, v in os.environ.items() if k in VARIABLES or k.startswith(PREFIXES)}


def place() -> tuple[str, Path]:
    """(the worker's address, the path that its lock and its key are named after)."""
    cache = paths.cache_folder()
    name = hashlib.sha256(os.fsencode(cache)).hexdigest()[:12]
    if os.name == "nt":
        return rf"\\.\pipe\flux-{name}", cache / "worker"
    folder = Path(tempfile.gettempdir(), f"flux-{os.getuid()}")
    return str(folder / f"{name}.sock"), folder / name


def check_private(folder: Path) -> None:
    """Raise `Lost` for a folder that others can enter, or could have made; OSError where there is none."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Lost("the worker's folder is not private", which=folder, hint=f"chmod 700 {folder}, or remove it")


def send(connection: "Connection", value: dict) -> None:
    """Send one frame; raises OSError."""
    connection.send_bytes(json.dumps(value).encode())


def receive(connection: "Connection", within_s: float, *, limit: int = FRAME_BYTES) -> dict:
    """The next frame; raises one of `BROKEN` for anything else."""
    if not connection.poll(within_s):
        raise TimeoutError
    value = json.loads(connection.recv_bytes(limit))
    if not isinstance(value, dict):
        raise TypeError
    return value


def _receive(connection: "Connection", within_s: float) -> dict:
    try:
        return receive(connection, within_s)
    except TimeoutError as error:
        raise Lost("the worker does not answer") from error
    except BROKEN as error:
        raise Ended("the worker closed the connection") from error


@contextlib.contextmanager
def _asked(kind: str, **more: object) -> "Iterator[Connection]":
    """A connection whose hello the worker takes; raises `Lost`."""
    hello = json.dumps({"protocol": PROTOCOL, "identity": identity(), "kind": kind} | more).encode()
    if len(hello) > HELLO_BYTES:
        raise Lost("the job is too long for the worker")
    with _connected() as connection:
        with contextlib.suppress(OSError):  # it may have said why before it closed
            connection.send_bytes(hello)
        answer = _receive(connection, ANSWER_S)
        if "refused" in answer:
            raise Lost(f"the worker is of no use here: {answer['refused']}", hint="flux worker stop")
        yield connection


def _connected() -> "Connection":
    """A connection to whatever listens; raises `Lost`."""
    try:
        address, stem = place()
        return _piped(address, stem.with_suffix(".key")) if os.name == "nt" else _plugged(address, stem.parent)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        raise Lost("") from error
    except TimeoutError as error:
        raise Lost("the worker does not answer") from error
    except (OSError, EOFError) as error:
        raise Lost("the worker cannot be reached", why=str(error)) from error


def _plugged(address: str, folder: Path) -> "Connection":
    os.lstat(address)  # none: nothing more is imported
    check_private(folder)
    import socket
    from multiprocessing.connection import Connection

    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(ANSWER_S)
        plain.connect(address)
        plain.settimeout(None)
        bound(plain)
        return Connection(plain.detach())


def _piped(address: str, key: Path) -> "Connection":
    proof = key.read_bytes()
    from multiprocessing import AuthenticationError
    from multiprocessing.connection import Client

    try:
        return Client(address, family="AF_PIPE", authkey=proof)
    except (AuthenticationError, AssertionError) as error:
        raise Lost("what listens is no worker of this user") from error


def bound(plain: object) -> None:
    """Let no read or write of a socket block for ever in the middle of a frame."""
    import socket
    import struct

    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        plain.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", FRAME_S, 0))
