"""The warm process: one session, kept between commands, and whoever of this user asks for it.

Knows the wire (see `client`) and the queue, nothing of models: the session does. Jobs run one at a
time in the main thread, where torch and signals want to be; every connection has a thread that only
talks. The worker ends when idle, when told to, by a signal, and after an error that leaves the
device in doubt; the next one begins with a clean device. Times are in seconds.
"""

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
from typing import TYPE_CHECKING, Any, NamedTuple

import fluxcli
from fluxcli import signals
from fluxcli.errors import DoesNotFit, ExitCode, NoSuchDevice, OutputError
from fluxcli.events import Event, Failed, Notice, Phase, Saved, explain, to_json
from fluxcli.paths import cache_folder
from fluxcli.request.job import Job
from fluxcli.run import client
from quant.errors import MissingLibrary

if TYPE_CHECKING:
    from multiprocessing.connection import Connection, Listener

    from fluxcli.run.session import Session

HELLO_S = 5.0  # for a client to say what it wants
ALIVE_S = 5.0  # between two signs of life
LOOK_S = 2.0  # between two looks at whether the socket is still there
PATH_BYTES = 100  # some systems take no longer path for a socket
BACKLOG = 64  # connections that wait to be accepted
DOUBTFUL = (ExitCode.BUG, ExitCode.DEVICE)  # after these the device may be broken for this process
HARMLESS = (NoSuchDevice, MissingLibrary)  # though their exit code is one of DOUBTFUL

Explain = Callable[[Exception], Failed]


def serve(idle_s: float, *, session: "Session | None" = None, explain: Explain = explain) -> None:
    """Be the user's worker in this process; returns at once where there is one.

    `session` and `explain` are for tests. Raises `OutputError` where the socket's path is too long,
    `Lost` where its folder is not private, and OSError.
    """
    from filelock import FileLock, Timeout

    if session is None:
        from fluxcli.run.session import Session

        session = Session()
    # Absolute, so that nothing is imported from the folder of a caller.
    sys.path[:] = [os.path.abspath(each) for each in sys.path]
    os.umask(0o077)
    path = client.locate_socket()
    with contextlib.suppress(FileExistsError):
        os.mkdir(path.parent, 0o700)
    client.check_private(path.parent)
    if len(os.fsencode(path)) > PATH_BYTES:
        raise OutputError(
            "no socket can be here", which=path, why="the path is too long", hint="set TMPDIR"
        )
    with contextlib.ExitStack() as held:
        try:
            for lock in _list_locks(path):
                held.enter_context(FileLock(lock).acquire(timeout=0))
        except Timeout:
            return
        listener = held.enter_context(_listen(path))
        worker = Worker(session, idle_s=idle_s, path=path, explain=explain)
        os.chdir(os.sep)
        threading.Thread(target=worker.accept, args=(listener,), daemon=True).start()
        worker.work()


def _list_locks(path: Path) -> list[Path]:
    """Where a worker holds locks, so that it stays the only one.

    The one beside its socket goes where somebody cleans the folder for temporary files, hence the
    second.
    """
    locks = [path.with_suffix(".lock")]
    folder = cache_folder() / "locks"
    with contextlib.suppress(OSError):  # nowhere to put it
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(folder / f"worker-{path.stem}.lock")
    return locks


@contextlib.contextmanager
def _listen(path: Path) -> "Iterator[Listener]":
    """Give what accepts connections at the path; replaces a socket that a dead worker left."""
    from multiprocessing.connection import Listener

    try:
        path.unlink(missing_ok=True)
        listener = Listener(str(path), "AF_UNIX", backlog=BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        hint = f"remove {path}"
        raise OutputError("no socket can be here", which=path, why=why, hint=hint) from error
    try:
        yield listener
    finally:
        # Closing removes the socket's file, which somebody may have removed before.
        with contextlib.suppress(FileNotFoundError):
            listener.close()


@dataclass(eq=False)
class Call:
    """What one client asked for. Only its thread closes the connection; anybody may send."""

    connection: "Connection"
    job: Job | None = None  # None: evict
    folder: str = ""
    umask: int = 0
    gone: bool = False  # nobody listens any more
    done: bool = False  # nothing more will be said
    lock: threading.RLock = field(default_factory=threading.RLock)

    def send(self, value: dict[str, Any]) -> None:
        """Send a frame, unless the client is gone, or is found to be."""
        with self.lock:
            if self.gone:
                return
            try:
                client.send(self.connection, value)
            except OSError:  # perhaps in the middle of a frame: no other can follow
                self.gone = True


class Outcome(NamedTuple):
    """How a job ended."""

    frame: dict[str, Any] | None  # its last; None where it was cancelled
    is_doubtful: bool = False


class Worker:
    """The queue of one session, and what is told about it.

    `work` is for the main thread, `accept` for one of its own, which gives each connection another.
    """

    def __init__(self, session: "Session", *, idle_s: float, path: Path, explain: Explain) -> None:
        self._session = session
        self._idle_s = idle_s
        self._path = path
        self._explain = explain
        # Described now, before a library changes the environment.
        self._installation = client.describe_installation()
        self._changed = threading.Condition()  # guards the next three
        self._waiting: list[Call] = []
        self._running: Call | None = None
        self._stopping = False
        self._started = time.monotonic()
        self._idle_since = self._started
        self._counts = Counter(jobs=0, pictures=0)
        self._loads: Counter[str] = Counter()  # by component

    # --- the main thread

    def work(self) -> None:
        """Serve what is queued until idle, stopped, out of reach or in doubt."""
        while call := self._wait_for_call():
            if call.job is None:
                self._session.evict()
                outcome = Outcome({"answer": {"pid": os.getpid()}})
            else:
                outcome = self._run(call, call.job)
                self._counts["jobs"] += 1
                self._idle_since = time.monotonic()
            with self._changed:
                self._running = None
            if outcome.frame:
                call.send(outcome.frame)
            call.done = True
            if outcome.is_doubtful:
                return

    def _wait_for_call(self) -> Call | None:
        """Take the next call of the queue; None where the worker should end."""
        with self._changed:
            while not self._stopping:
                signals.check_signals()
                self._waiting = [call for call in self._waiting if not call.gone]
                if self._waiting:
                    self._running = self._waiting.pop(0)
                    return self._running
                left_s = self._idle_since + self._idle_s - time.monotonic()
                if left_s <= 0 or not os.path.lexists(self._path):
                    return None
                self._changed.wait(min(left_s, LOOK_S))
        return None

    def _run(self, call: Call, job: Job) -> Outcome:
        """Run a job in the folder and under the umask of its client."""
        mask = os.umask(call.umask)
        had_bug = False
        try:
            _enter(call.folder)
            with contextlib.closing(self._session.run(job)) as events:
                for event in events:
                    signals.check_signals()
                    self._count(event)
                    had_bug |= isinstance(event, Failed) and event.exit_code == ExitCode.BUG
                    call.send(to_json(event))
                    if call.gone or self._stopping:
                        return Outcome(None)
            return Outcome({"end": True}, is_doubtful=had_bug)
        except Exception as error:  # noqa: BLE001 - a boundary like that of the command line
            failed = self._explain(error)
            if failed.exit_code == ExitCode.BUG:
                traceback.print_exc()  # for the log
            is_doubtful = failed.exit_code in DOUBTFUL and not isinstance(error, HARMLESS)
            return Outcome(to_json(failed), is_doubtful)
        finally:
            os.umask(mask)
            os.chdir(os.sep)
            self._session.release()

    def _count(self, event: Event) -> None:
        if isinstance(event, Saved):
            self._counts["pictures"] += 1
        if isinstance(event, Phase) and event.name == "load":
            self._loads[event.detail] += 1

    # --- the threads that talk

    def accept(self, listener: "Listener") -> None:
        """Give every connection a thread."""
        while not self._stopping:
            try:
                connection = listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # no descriptor or thread is left
                time.sleep(0.1)

    def _talk(self, connection: "Connection") -> None:
        """Answer one client, and say that the worker is alive until nothing more is to be said."""
        call = Call(connection)
        try:
            if _is_of_this_user(connection):
                limit_bytes = client.HELLO_BYTES
                hello = client.receive(connection, within_s=HELLO_S, limit_bytes=limit_bytes)
                self._answer(call, hello)
                while not call.done and not call.gone:
                    if connection.poll(ALIVE_S):  # a client says no more: it has gone
                        break
                    call.send({"alive": True})
        except (OSError, EOFError):
            # Anything else that a stranger provokes ends this thread, too, and stands in the log.
            pass
        finally:
            with call.lock:
                call.gone = True
                connection.close()

    def _answer(self, call: Call, hello: dict[str, Any]) -> None:
        """Answer a hello, or queue it. Raises what a stranger's JSON gives rise to."""
        kind = hello["kind"]
        if kind == "generate":
            if other := self._compare(hello["identity"]):
                call.send({"refused": f"it has another {', '.join(other)}"})
                call.done = True
                return
            call.job = Job.from_json(hello["job"])
            call.folder = str(hello["folder"])
            call.umask = hello["umask"] & 0o777
        call.send({"accepted": client.PROTOCOL})
        if kind in ("generate", "evict"):
            self._queue(call)
        elif kind == "stop":
            call.send({"answer": {"pid": os.getpid()}})  # the client waits for the end
            with self._changed:
                self._stopping = True
                self._changed.notify()
        elif kind == "status":
            call.send({"answer": self._describe()})
            call.done = True
        else:
            raise ValueError(kind)

    def _compare(self, theirs: dict[str, Any]) -> list[str]:
        """Name what a client's installation has otherwise than this one."""
        mine = self._installation
        return sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))

    def _queue(self, call: Call) -> None:
        """Let a call wait for its turn, and say behind how many.

        One that would rather not wait is told so at once, and is over.
        """
        with call.lock:  # so that nothing precedes what is said here
            with self._changed:
                before = sum(not each.gone for each in self._waiting)
                if self._running:
                    before += 1
                is_refused = before > 0 and call.job is not None and call.job.no_wait
                if is_refused:
                    call.done = True
                else:
                    self._waiting.append(call)
                    self._changed.notify()
            if is_refused:
                error = DoesNotFit(
                    "the device is busy",
                    which=f"worker {os.getpid()}",
                    why="another flux computes on it",
                    hint="leave --no-wait out to wait for it",
                )
                call.send(to_json(self._explain(error)))
            elif before and call.job:
                text = f"the worker is busy: {before} before this one (--no-wait gives up instead)"
                call.send(to_json(Notice(text)))

    def _describe(self) -> dict[str, Any]:
        """Return what `flux worker status` shows."""
        import psutil

        with self._changed:
            is_running = self._running is not None
            queued = len(self._waiting)
        now = time.monotonic()
        return self._session.status() | {
            "pid": os.getpid(),
            "version": fluxcli.__version__,
            "protocol": client.PROTOCOL,
            "uptime_s": round(now - self._started, 1),
            "idle_s": 0.0 if is_running else round(now - self._idle_since, 1),
            "idle_limit_s": self._idle_s,
            "running": is_running,
            "queue": queued,
            "jobs": self._counts["jobs"],
            "pictures": self._counts["pictures"],
            "loads": dict(self._loads),
            "rss_bytes": psutil.Process().memory_info().rss,
        }


def _enter(folder: str) -> None:
    """Make a client's folder the current one; raises `OutputError`."""
    try:
        os.chdir(folder)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        hint = "cd to another one"
        raise OutputError(
            "the folder cannot be entered", which=folder, why=why, hint=hint
        ) from error


def _is_of_this_user(connection: "Connection") -> bool:
    """Return whether the other end is of this user; a socket's waits are limited from here on."""
    import socket
    import struct

    with socket.socket(fileno=os.dup(connection.fileno())) as plain:
        client.limit_waits(plain, within_s=client.FRAME_S)
        if not hasattr(socket, "SO_PEERCRED"):  # then the folder alone keeps others out
            return True
        size = struct.calcsize("3i")  # pid, uid, gid
        peer = plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, uid, _ = struct.unpack("3i", peer)
        return bool(uid == os.getuid())
