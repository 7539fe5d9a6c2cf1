"""The warm process: one session, kept between commands, and whoever of this user asks for it.

Knows the wire (see `client`) and the queue, nothing of models: the session does. Jobs run one at a time in the main
thread, where torch and signals want to be; every connection has a thread that only talks. It ends when idle, when told
to, by a signal, and after an error that leaves the device in doubt; the next one begins with a clean device.
"""

import base64
import contextlib
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import fluxcli
from fluxcli import explain, signals
from fluxcli.errors import DoesNotFit, ExitCode, NoSuchDevice, OutputError
from fluxcli.events import Failed, Notice, Phase, Saved, to_json
from fluxcli.pictures import names as output
from fluxcli.request.job import Job
from fluxcli.run import client
from quant.errors import MissingLibrary
from quant.lazy import psutil

if TYPE_CHECKING:
    from multiprocessing.connection import Connection, Listener

    from fluxcli.run.session import Session

HELLO_S, ALIVE_S, LOOK_S = 5.0, 5.0, 10.0  # the last: between two looks at whether the socket is still there
PIECE_BYTES, PATH_BYTES = 1 << 20, 100  # of what goes to stdout; of a socket's path, some systems take no more
Explain = Callable[[Exception], Failed]
DOUBTFUL, HARMLESS = (ExitCode.BUG, ExitCode.DEVICE), (NoSuchDevice, MissingLibrary)


def serve(idle_s: float, *, session: "Session | None" = None, explained: Explain = explain.explained) -> None:
    """Be the user's worker in this process; at once back where there is one. Raises OSError, `Lost` and `FluxError`."""
    from filelock import FileLock, Timeout

    if session is None:
        from fluxcli.run.session import Session

        session = Session()
    sys.path[:] = map(os.path.abspath, sys.path)  # the folder is each caller's: nothing is imported from there
    os.umask(0o077)
    address, stem = client.place()
    if os.name != "nt":
        with contextlib.suppress(FileExistsError):
            os.mkdir(stem.parent, 0o700)
        client.check_private(stem.parent)
        if len(os.fsencode(address)) > PATH_BYTES:
            raise OutputError("no socket can be here", which=address, why="the path is too long", hint="set TMPDIR")
    try:
        held = FileLock(stem.with_suffix(".lock")).acquire(timeout=0)
    except Timeout:
        return
    with held, _listening(address, stem.with_suffix(".key")) as (listener, key):
        worker = Worker(session, explained, idle_s, address, key)
        os.chdir(os.sep)
        threading.Thread(target=worker.accept, args=(listener,), daemon=True).start()
        worker.work()


@contextlib.contextmanager
def _listening(address: str, path: Path) -> "Iterator[tuple[Listener, bytes | None]]":
    """(what accepts connections, the key to prove where that is a pipe); replaces a socket that a dead worker left."""
    from multiprocessing.connection import Listener

    key = os.urandom(32) if os.name == "nt" else None
    if key:
        output.write_atomically(path, key, place=os.replace)
    else:
        Path(address).unlink(missing_ok=True)
    gone = contextlib.suppress(FileNotFoundError)  # the socket, if somebody tidied up
    with gone, Listener(address, "AF_PIPE" if key else "AF_UNIX", backlog=64) as listener:
        try:
            yield listener, key
        finally:
            path.unlink(missing_ok=True)


@dataclass(eq=False)
class Call:
    """What one client asked for. Only its thread closes the connection; anybody may send."""

    connection: "Connection"
    job: Job | None = None  # None: evict
    folder: str = ""
    umask: int = 0
    gone: bool = False  # nobody listens any more
    done: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def send(self, value: dict) -> None:
        """Send a frame, unless the client is gone, or is found to be."""
        with self.lock:
            try:
                if not self.gone:
                    client.send(self.connection, value)
            except OSError:  # perhaps in the middle of a frame
                self.gone = True


class Stdout:
    """Stands for the stdout of a client."""

    encoding = "utf-8"

    def __init__(self, call: Call) -> None:
        self.buffer, self._call = self, call

    def write(self, data: bytes | str) -> int:
        raw = memoryview(data.encode() if isinstance(data, str) else data).cast("B")
        for k in range(0, len(raw), PIECE_BYTES):
            self._call.send({"stdout": base64.b64encode(raw[k : k + PIECE_BYTES]).decode()})
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return False


class Worker:
    """The queue of one session, and what is told about it."""

    def __init__(
        self, session: "Session", explained: Explain, idle_s: float, address: str, key: bytes | None
    ) -> None:  # fmt: skip
        self._session, self._explained, self._idle_s, self._key = session, explained, idle_s, key
        self._address = address
        self._identity = client.identity()  # before a library changes the environment
        self._changed = threading.Condition()  # guards the next three
        self._waiting: list[Call] = []
        self._running: Call | None = None
        self._stopping = False
        self._started = self._since = time.monotonic()
        self._counts, self._loads = Counter(jobs=0, pictures=0), Counter()

    def work(self) -> None:
        """Serve what is queued until idle, stopped, out of reach or in doubt. For the main thread."""
        doubtful = False
        while not doubtful and (call := self._next()):
            if call.job is None:
                self._session.evict()
                last = {"answer": {"pid": os.getpid()}}
            else:
                last, doubtful = self._draw(call)
                self._counts["jobs"] += 1
                self._since = time.monotonic()
            with self._changed:
                self._running = None
            if last:
                call.send(last)
            call.done = True

    def _next(self) -> Call | None:
        with self._changed:
            while not self._stopping:
                signals.check_signals()
                self._waiting = [call for call in self._waiting if not call.gone]
                if self._waiting:
                    self._running = self._waiting.pop(0)
                    return self._running
                left = self._since + self._idle_s - time.monotonic()
                if left <= 0 or not (self._key or os.path.lexists(self._address)):
                    break
                self._changed.wait(min(left, LOOK_S))
        return None

    def _draw(self, call: Call) -> tuple[dict | None, bool]:
        """(a job's last frame, None if cancelled; whether the device is in doubt). In the client's place and umask."""
        mask, stdout, sys.stdout = os.umask(call.umask), sys.stdout, Stdout(call)
        try:
            try:
                os.chdir(call.folder)
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise OutputError("the folder cannot be entered", which=call.folder, why=why) from error
            with contextlib.closing(self._session.run(call.job)) as events:
                for event in events:
                    signals.check_signals()
                    self._counts["pictures"] += isinstance(event, Saved)
                    if isinstance(event, Phase) and event.name == "load":
                        self._loads[event.detail] += 1
                    call.send(to_json(event))
                    if call.gone or self._stopping:
                        return None, False
            return {"end": True}, False
        except Exception as error:  # noqa: BLE001 - a boundary like that of the command line
            failed = self._explained(error)
            if failed.exit_code == ExitCode.BUG:
                traceback.print_exc()  # for the log
            return to_json(failed), failed.exit_code in DOUBTFUL and not isinstance(error, HARMLESS)
        finally:
            sys.stdout = stdout
            os.umask(mask)
            os.chdir(os.sep)
            self._session.release()

    def accept(self, listener: "Listener") -> None:
        """Give every connection a thread."""
        while not self._stopping:
            try:
                threading.Thread(target=self._talk, args=(listener.accept(),), daemon=True).start()
            except (OSError, RuntimeError, AssertionError):  # no descriptor or thread is left; or the client is
                time.sleep(0.1)

    def _talk(self, connection: "Connection") -> None:
        call = Call(connection)
        try:
            if self._is_mine(connection):
                self._answer(call, client.receive(connection, HELLO_S, limit=client.HELLO_BYTES))
                while not (call.done or call.gone or connection.poll(ALIVE_S)):  # a client says no more: it has gone
                    call.send({"alive": True})
        except (OSError, EOFError):  # anything else that a stranger can provoke ends this thread, too, and is logged
            pass
        finally:
            with call.lock:
                call.gone = True
                connection.close()

    def _is_mine(self, connection: "Connection") -> bool:
        """Whether the other end is of this user; a socket's reads and writes are bounded from here on."""
        if self._key:
            from multiprocessing import AuthenticationError
            from multiprocessing.connection import answer_challenge, deliver_challenge

            with contextlib.suppress(AuthenticationError, AssertionError):
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                return True
            return False
        import socket
        import struct

        with socket.socket(fileno=os.dup(connection.fileno())) as plain:
            client.bound(plain)
            if hasattr(socket, "SO_PEERCRED"):  # elsewhere the folder alone keeps others out
                peer = plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                return struct.unpack("3i", peer)[1] == os.getuid()
            return True

    def _answer(self, call: Call, hello: dict) -> None:
        """Answer a hello, or queue it. Raises what a stranger's JSON gives rise to."""
        kind = hello["kind"]
        if kind == "generate":
            mine, theirs = self._identity, hello["identity"]
            if other := sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key)):
                call.send({"refused": f"it has another {', '.join(other)}"})
                call.done = True
                return
            call.job = Job.from_json(hello["job"])
            call.folder, call.umask = str(hello["folder"]), hello["umask"] & 0o777
        call.send({"accepted": client.PROTOCOL})
        if kind in ("generate", "evict"):
            self._queue(call)
        elif kind == "stop":
            call.send({"answer": {"pid": os.getpid()}})  # and then the end, which the client waits for
            with self._changed:
                self._stopping = True
                self._changed.notify()
        elif kind == "status":
            call.send({"answer": self._status()})
            call.done = True
        else:
            raise ValueError(kind)

    def _queue(self, call: Call) -> None:
        """Let a call wait for its turn, and say behind how many; or not, where it would rather not wait."""
        with call.lock:  # so that nothing precedes what is said here
            with self._changed:
                before = sum(not each.gone for each in self._waiting) + (self._running is not None)
                if refused := before and call.job and call.job.no_wait:
                    call.done = True
                else:
                    self._waiting.append(call)
                    self._changed.notify()
            if refused:
                why, hint = "another flux computes on it", "leave --no-wait out to wait for it"
                error = DoesNotFit("the device is busy", which=f"worker {os.getpid()}", why=why, hint=hint)
                call.send(to_json(self._explained(error)))
            elif before and call.job:
                call.send(to_json(Notice(f"the worker is busy: {before} before this one (--no-wait gives up instead)")))

    def _status(self) -> dict:
        with self._changed:
            running, queue = self._running is not None, len(self._waiting)
        now = time.monotonic()
        return self._session.status() | {
            "pid": os.getpid(), "version": fluxcli.__version__, "protocol": client.PROTOCOL,
            "uptime_s": round(now - self._started, 1), "idle_s": 0.0 if running else round(now - self._since, 1),
            "idle_limit_s": self._idle_s, "running": running, "queue": queue, **self._counts,
            "loads": dict(self._loads), "rss_bytes": psutil.Process().memory_info().rss,
        }  # fmt: skip
