"""The only printer: data on stdout, the rest on stderr, plain where that is no terminal. Knows nothing of models."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Self

from fluxcli.errors import OutputError
from fluxcli.events import Done, Event, Failed, Notice, Phase, Saved, Skipped, Step, Summary, to_json
from fluxcli.signals import LAST_WORDS, check_signals

TEXT = object()  # in place of a JSON value: the table itself is wanted
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def data(text: str) -> None:
    """One line of data on stdout, at once; raises `OutputError` where that fails, BrokenPipeError for a closed pipe."""
    if sys.stdout is None:
        raise OutputError("cannot write to stdout", why="it is closed")
    try:
        try:
            sys.stdout.write(text + "\n")
        except UnicodeEncodeError:  # a file name that is no text, or a terminal that cannot show it: its bytes
            sys.stdout.buffer.write((text + "\n").encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError("cannot write to stdout", why=why) from error


def data_json(value: object, *, indent: int | None = None) -> None:
    """One JSON value on stdout: a single line unless indented; control characters only as JSON escapes."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    text = json.dumps(value, ensure_ascii=indent is None or encoding != "utf8", indent=indent)
    data(re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text))


def table(rows: Iterable[Sequence[str]], *, json: object = TEXT) -> None:
    """Print rows of cells as lines of aligned columns, or instead the value that `json` is.

    A cell may come from a file's name: what would control the terminal is spelled out. The JSON
    has such characters as escapes, so nothing is lost there.
    """
    if json is not TEXT:
        data_json(json)
        return
    lines = [[_one_line(cell) for cell in row] for row in rows]
    widths: list[int] = []
    for line in lines:
        widths += [0] * (len(line) - len(widths))
        for k, cell in enumerate(line[:-1]):  # the last is as long as it is
            widths[k] = max(widths[k], len(cell))
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        data("  ".join(cells).rstrip())


def say(text: str) -> None:
    """One line for people on stderr."""
    sys.stderr.write(f"flux: {_one_line(text)}\n")  # a line is flushed at once


def confirmed(question: str) -> bool:
    """Whether the user types yes to a question on the terminal."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def error(message: str, hint: str) -> None:
    """The error line and the hint; never anything else."""
    below = f"hint: {_one_line(hint)}\n" if hint else ""
    sys.stderr.write(f"flux: error: {_one_line(message).rstrip('.')}.\n{below}")


def _one_line(text: str) -> str:
    """The text on one line, control characters (a file name may hold some) spelled out."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), " ".join(text.split()))


class Reporter:
    """Shows a run's events, or a bake's bytes: on a terminal with a bar; adds up seconds per phase."""

    def __init__(
        self, *, quiet: bool = False, events: bool = False, json_output: bool = False, started: float
    ) -> None:  # fmt: skip
        """`started` is the perf_counter at the command's start. On stdout come paths, or one of the JSON forms."""
        self.timings_s: dict[str, float] = {}
        self._noticed: set[Notice] = set()
        self._quiet, self._events, self._json = quiet, events, json_output
        self._started, self._phase, self._since = started, "load", started
        self._progress = self._task = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress

            columns = ("{task.description}", BarColumn(bar_width=30), "{task.fields[speed]}")
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
            self._task = self._progress.add_task("", total=None, visible=False, speed="")
            self._progress.start()
            if not self._progress.console.is_dumb_terminal:
                LAST_WORDS.append(b"\r\x1b[2K\x1b[?25h")  # the line wiped, the cursor back
        return self

    def __exit__(self, *_: object) -> None:
        self._close_run()
        if self._progress:
            self._progress.stop()
            LAST_WORDS.clear()

    def show(self, event: Event) -> None:
        """Show one event; raises `Terminated` if a signal arrived and was swallowed since the last one."""
        check_signals()
        if isinstance(event, Notice) and event in self._noticed:  # a batch is many jobs, and says it once
            return
        self._noticed |= {event} if isinstance(event, Notice) else set()
        if isinstance(event, Done):
            self._close_run()
            event = replace(event, timings_s=dict(self.timings_s))
        ends = isinstance(event, Done | Failed | Skipped | Summary)
        if self._events or (self._json and ends):
            self._pause(lambda: data_json(to_json(event) if self._events else asdict(event)))
        match event:
            case Phase():
                self._close_phase()
                self._phase = event.name
                self._update(description=f"{event.name} {event.detail}".strip(), speed="")
            case Step(index, total, image, images):
                seconds = (time.perf_counter() - self._since) / index
                left = seconds * (total - index + (images - image) * total)
                text = f"picture {image}/{images}, step {index}/{total}" if images > 1 else f"step {index}/{total}"
                speed = f"{seconds:.2f} s/it, {left:.0f} s left"
                self._update(description=f"denoise {text}", completed=index, total=total, speed=speed)
            case Notice() if not self._quiet:
                say(event.message)
            case Saved(image, row):
                taken, place = time.perf_counter() - self._started, f"row {row}: " * bool(row)
                if not (self._json or self._events) and image.path != "-":
                    self._pause(lambda: data(image.path))
                if not self._quiet:
                    about = f"{image.width}x{image.height}, seed {image.seed}, {taken:.1f} s"
                    self._pause(lambda: say(f"{place}{image.path}: {about}"))
            case Skipped(row, path) if not self._quiet:
                say(f"row {row}: {path} is there")
            case Failed(_, message, hint, row):
                self._pause(lambda: say(f"row {row} failed: {message}" + f" (hint: {hint})" * bool(hint)))
            case Summary(rows, done, failed, skipped, pictures, seconds) if not self._quiet:
                text = f"{rows} rows: {done} done, {failed} failed, {skipped} skipped; {pictures} pictures"
                say(f"{text} in {seconds:.1f} s")

    def result(self, run: Generator) -> object:
        """Show a generator's events; returns its result."""
        while True:
            try:
                self.show(next(run))
            except StopIteration as finished:
                return finished.value

    def _pause(self, printing: Callable[[], None]) -> None:
        """Print while the bar is away: stdout may be the same terminal."""
        if self._progress:
            self._progress.stop()
        printing()
        if self._progress:
            self._progress.start()

    def show_bytes(self, done: int, total: int, detail: str) -> None:
        """Show `done` of `total` bytes with GB/s and time left; raises `Terminated` as `show` does."""
        check_signals()
        speed = max(1, done) / max(1e-6, time.perf_counter() - self._started)
        text = f"{done / 1e9:.1f}/{total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, {(total - done) / speed:.0f} s left"
        self._update(completed=done, total=total, description=detail, speed=text)

    def _update(self, **fields: object) -> None:
        if self._progress:
            self._progress.update(self._task, visible=True, **fields)

    def _close_run(self) -> None:
        self._close_phase()
        self.timings_s["total"] = round(self._since - self._started, 4)

    def _close_phase(self) -> None:
        now = time.perf_counter()
        self.timings_s[self._phase] = round(self.timings_s.get(self._phase, 0.0) + now - self._since, 4)
        self._since = now
