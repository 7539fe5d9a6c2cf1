"""Fault rows: hostile, broken or missing inputs, each run against `flux` as a process of its own.

A row is a function that prepares its input in the folder of a `Case` and runs commands there:

    @fault("vocab-fifo", "tokenizer/vocab.json is a FIFO", codes=[4], says="vocab.json")
    def vocab_fifo(case):
        model = case.model()
        (model / "tokenizer/vocab.json").unlink()
        os.mkfifo(model / "tokenizer/vocab.json")
        case.draw("-m", model)

After every command the invariant of all failures is checked: it ended in time and in bounded
memory, with a documented exit code, without a traceback and without escape codes; an error is one
line, and what to do next follows from it or from a hint; what was in the case's folder before is
there byte for byte; no temporary file is left. The last command must have one of the row's `codes`
(a negative one is a signal). `python -m tests.faults` runs all and prints tried and survived.

Times are in seconds, sizes in bytes.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.server import Command, Interpreters, Server

TINY = Path(__file__).resolve().parents[2] / "presets" / "tiny"
PROMPT = "a red circle on a blue background"
# A picture in well under a second: what its pixels are does not matter here.
QUICK = ("--size", "64", "--steps", "1", "--text-tokens", "24", "--seed", "1", "--no-cache")

TIMEOUT_S = 60.0
MEMORY_BYTES = 3 << 30
WATCH_S = 0.02
HOMES = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "HF_HOME")
TEMPORARY = re.compile(r"\.flux-[0-9a-f]+\.tmp|.*\.tmp-\d+-[0-9a-f]+(\..*)?|.*\.incomplete")
# An error says by itself what to do where it names the values that are allowed.
SAYS_ENOUGH = re.compile(
    r" is not (in )?[\w.,\[\]: -]+ (or|to) |known are |the nearest are|exclude each other"
    r"|is none of| needs --"
)
# A process that limits itself and becomes the command: a thread of the runner starts it, where
# Python's `preexec_fn` is not safe.
LIMITED = """
import json, os, resource, sys
for number, value in json.loads(sys.argv[1]):
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""
ENDS_WITHOUT_A_WORD = (-signal.SIGINT, -signal.SIGTERM, 130, 143)


@dataclass(frozen=True)
class Row:
    """A fault by its name, and the exit codes and words that are right."""

    name: str
    title: str
    run: Callable[["Case"], object]
    codes: Collection[int]
    says: str
    exhaustive: bool


ROWS: dict[str, Row] = {}


def fault(
    name: str, title: str, *, codes: Collection[int], says: str = "", exhaustive: bool = False
) -> Callable[[Callable[["Case"], object]], Callable[["Case"], object]]:
    """Enter the function under it as a row.

    `says` must be in the stderr of the last command, upper and lower case alike. An `exhaustive`
    row takes seconds, and is left out where time is short. Raises ValueError at a name twice.
    """

    def enter(run: Callable[["Case"], object]) -> Callable[["Case"], object]:
        if name in ROWS:
            raise ValueError(f"two rows are called {name}")
        ROWS[name] = Row(name, title, run, codes, says, exhaustive)
        return run

    return enter


@dataclass(frozen=True)
class Ended:
    """A command that ended: a negative code is a signal's number."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int


@dataclass
class Case:
    """A folder of its own, and commands that run in it.

    `folder` is the current folder of the commands; `home` holds the user's folders, by the names of
    their variables. `problems` collects what was wrong. A row may write anything before a command.
    """

    root: Path
    server: Server | Interpreters
    problems: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        for name in HOMES:
            (self.home / name).mkdir(parents=True, mode=0o700)

    @property
    def folder(self) -> Path:
        return self.root / "work"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def config(self) -> Path:
        """The user's settings folder; made by the first use."""
        path = self.home / "XDG_CONFIG_HOME" / "flux"
        path.mkdir(exist_ok=True)
        return path

    def model(self, name: str = "model") -> Path:
        """Return a copy of the bundled model, to damage."""
        return Path(shutil.copytree(TINY, self.folder / name))

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file in the case's folder, with the folders above it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def draw(self, *arguments: str | Path, prompt: str = PROMPT, **options: Any) -> Ended:
        """Run `flux generate` for one small picture; of the bundled model without a `-m`."""
        model = () if "-m" in arguments or "-p" in arguments else ("-p", "tiny")
        return self.flux("generate", prompt, *model, *QUICK, *arguments, **options)

    def flux(
        self,
        *arguments: str | Path,
        stdin: str | None = None,
        cold: bool = False,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[int, int] | None = None,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int = MEMORY_BYTES,
        changes: Collection[str] = (),
    ) -> Ended:
        """Run `flux ARGUMENTS` to its end and check the invariant.

        `cold` is a new interpreter: for what is read while modules are imported, and with `limits`
        (numbers of `resource`, each with its soft limit). `changes` names what the command may
        change or delete below the case's folder.
        """
        process = self.start(
            *arguments,
            has_stdin=stdin is not None,
            cold=cold,
            environment=environment,
            limits=limits,
        )
        with self.watch(process, arguments, changes=changes, memory_bytes=memory_bytes) as watched:
            watched.end(stdin, timeout_s)
        return self.ended[-1]

    def start(
        self,
        *arguments: str | Path,
        has_stdin: bool = False,
        cold: bool = False,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[int, int] | None = None,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
    ) -> "Command | subprocess.Popen[str]":
        """Start `flux ARGUMENTS`, see `flux`; the end is the caller's, with `watch`."""
        homes = {name: str(self.home / name) for name in HOMES}
        variables = homes | {"HF_HUB_OFFLINE": "1", "FLUX_WORKER": "off"} | dict(environment or {})
        stdin = subprocess.PIPE if has_stdin else subprocess.DEVNULL
        command = ("-m", "fluxcli", *map(str, arguments))
        if not (cold or limits) and isinstance(self.server, Server):
            # Forks read these before they existed; the runner has set HF_HUB_OFFLINE for all.
            late = ("HF_HUB_OFFLINE", "HF_HOME")
            known = {name: value for name, value in variables.items() if name not in late}
            return self.server.start(
                *command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=self.folder,
                environment=known,
            )  # fmt: skip
        if not limits:
            return Interpreters().start(
                *command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=self.folder,
                environment=variables,
            )  # fmt: skip
        return start_limited(
            command, limits, stdin=stdin, stdout=stdout, stderr=stderr, cwd=self.folder,
            environment=variables,
        )  # fmt: skip

    @contextmanager
    def watch(
        self,
        process: "Command | subprocess.Popen[str]",
        arguments: Sequence[str | Path],
        *,
        changes: Collection[str] = (),
        memory_bytes: int = MEMORY_BYTES,
    ) -> Iterator["Watched"]:
        """Watch a command from now on; what is wrong at its end goes to `problems`."""
        watched = Watched(process, take_snapshot(self.folder))
        try:
            yield watched
        finally:
            watched.is_over = True
        ended = Ended(
            tuple(map(str, arguments)),
            watched.code,
            watched.stdout,
            watched.stderr,
            watched.seconds,
            watched.peak_bytes,
        )
        self.ended.append(ended)
        self.problems += find_problems(ended)
        if watched.is_late:
            self.problems.append(f"still running after {watched.seconds:.0f} s: killed")
        if ended.peak_bytes > memory_bytes:
            self.problems.append(f"took {ended.peak_bytes / 1e9:.1f} GB")
        self.problems += compare_snapshots(watched.before, take_snapshot(self.folder), changes)


class Watched:
    """A command under way: its memory is read every few milliseconds."""

    def __init__(self, process: "Command | subprocess.Popen[str]", before: dict[str, str]) -> None:
        self.process, self.before = process, before
        self.code, self.stdout, self.stderr = 0, "", ""
        self.seconds, self.peak_bytes = 0.0, 0
        self.is_late = self.is_over = False
        self._began = time.monotonic()
        threading.Thread(target=self._read_memory, daemon=True).start()

    def end(self, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """Wait for the end; kill what takes longer."""
        try:
            out, err = self.process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.is_late = True
            self.process.kill()
            self.process.wait(10)
            out = err = ""
        self.seconds = time.monotonic() - self._began
        self.code = self.process.returncode or 0
        self.stdout, self.stderr = out or "", err or ""

    def _read_memory(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status")
        while not self.is_over:
            try:
                found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            except OSError:
                return
            if found:
                self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)
            time.sleep(WATCH_S)


def start_limited(
    command: Sequence[str],
    limits: Mapping[int, int],
    *,
    environment: Mapping[str, str],
    **options: Any,
) -> "subprocess.Popen[str]":
    """Start `python COMMAND` in a new interpreter whose soft limits are `limits`."""
    asked = json.dumps(list(limits.items()))
    return subprocess.Popen(
        [sys.executable, "-c", LIMITED, asked, sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(TINY.parents[1])} | dict(environment),
        text=True,
        **options,
    )


def find_problems(ended: Ended) -> list[str]:
    """What of the invariant of all failures does not hold in the output of a command."""
    problems = []
    if "Traceback (most recent call last)" in ended.stderr + ended.stdout:
        problems.append("a traceback")
    if "this is a bug" in ended.stderr or ended.code == 1:
        problems.append("exit 1, or said to be a bug")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", ended.stderr):
        problems.append("control characters on stderr")
    if "\x1b" in ended.stdout and not ended.stdout.startswith("\x89"):
        problems.append("escape codes on stdout")
    lines = ended.stderr.splitlines()
    foreign = [line for line in lines if not line.startswith(("flux: ", "hint: ", "flux "))]
    errors = [line for line in lines if line.startswith("flux: error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    if foreign:
        problems.append(f"a line that is not ours: {foreign[0][:100]!r}")
    is_failure = ended.code not in (0, *ENDS_WITHOUT_A_WORD) and ended.code >= 0
    if ended.arguments[:1] == ("inspect",) and '"problems": [' in ended.stdout:
        is_failure = False  # its data say what is wrong
    if is_failure and len(errors) != 1:
        problems.append(f"{len(errors)} error lines")
    if is_failure and not hints and not SAYS_ENOUGH.search(" ".join(errors)):
        problems.append("no hint")
    if len(hints) > 1:
        problems.append(f"{len(hints)} hints")
    return problems


def take_snapshot(folder: Path) -> dict[str, str]:
    """Return what each path below a folder is: a hash for a file, else its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            found[name] = hash_file(path)
        else:
            found[name] = stat.filemode(mode)
    return found


def hash_file(path: Path) -> str:
    """Hash a file; one that may not be read, or is huge, is known by its size and time."""
    size = path.lstat().st_size
    try:
        if size > 1 << 26:
            raise PermissionError
        return hashlib.blake2b(path.read_bytes()).hexdigest()
    except PermissionError:
        return f"{size} bytes of {path.lstat().st_mtime_ns}"


def compare_snapshots(
    before: Mapping[str, str], after: Mapping[str, str], changes: Collection[str]
) -> list[str]:
    """What of a folder was changed, deleted, or left behind under a temporary name."""
    problems = []
    for name, was in before.items():
        if any(name == change or name.startswith(f"{change}/") for change in changes):
            continue
        if name not in after:
            problems.append(f"deleted {name}")
        elif after[name] != was:
            problems.append(f"changed {name}")
    for name in after:
        if name not in before and TEMPORARY.fullmatch(Path(name).name):
            problems.append(f"left {name}")
    return problems


def run_row(row: Row, server: Server | Interpreters) -> list[str]:
    """Run a row in a new folder, and return what was wrong."""
    with tempfile.TemporaryDirectory(prefix="flux-fault-", ignore_cleanup_errors=True) as root:
        case = Case(Path(root), server)
        try:
            row.run(case)
        except Exception as error:  # noqa: BLE001 - one row must not end the others
            return [f"the row itself failed: {type(error).__name__}: {error}"]
        problems = list(case.problems)
        if not case.ended:
            return ["the row ran no command"]
        last = case.ended[-1]
        if last.code not in row.codes:
            problems.append(f"exit {last.code}, not {' or '.join(map(str, row.codes))}")
        if row.says.lower() not in last.stderr.lower():
            problems.append(f"does not say {row.says!r}")
        if problems:
            problems.append(f"stderr: {last.stderr.strip()[-400:]!r}")
        for path in case.root.rglob("*"):  # so that the folder can be deleted
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        return problems
