"""The only printer: data on stdout, everything else on stderr. Knows nothing of models.

Where stderr is a terminal that can move its cursor a run is shown by a bar; elsewhere by a line
every ten seconds, without escape sequences. Colours are for terminals, and not with NO_COLOR.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self, TextIO, TypeVar, cast

from fluxcli.errors import OutputError, explain_stdout
from fluxcli.events import (
    Done,
    Event,
    Failed,
    Notice,
    Phase,
    Preview,
    Saved,
    Skipped,
    Step,
    Summary,
    to_json,
)
from fluxcli.signals import LAST_WORDS, check_signals

# What would control a terminal or change how a line reads, and what is no text at all: control
# characters, those without width or that turn the direction of writing, ends of lines, surrogates.
HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
# Wipes the line with the bar and brings the cursor back.
WIPE_BAR = b"\r\x1b[2K\x1b[?25h"
# Seconds between two lines of progress where there is no bar.
LINE_EVERY_S = 10.0
RED = "1;31"
YELLOW = "33"
GREEN = "32"
# Verdicts in tables.
COLOURS = {"ok": GREEN, "complete": GREEN, "warn": YELLOW, "partial": YELLOW, "bad": RED}

Result = TypeVar("Result")


# --- data: stdout


def data(text: str) -> None:
    """Print one line of data on stdout at once: it may be a path for another program.

    It is unchanged but on a terminal, where hidden characters are spelled out. Raises `OutputError`
    where that fails, and BrokenPipeError if nobody reads any more.
    """
    write_line(spell_out(text) if is_terminal(sys.stdout) else text)


def line(text: str) -> None:
    """Print one line for people on stdout; raises as `data` does."""
    write_line(spell_out(text))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; one that is closed (None) is none."""
    return stream is not None and stream.isatty()


def write_line(text: str) -> None:
    """Print one line on stdout as it is, colours too: for what is clean; raises as `data` does."""
    if sys.stdout is None:
        raise OutputError("cannot write to stdout", why="it is closed", hint="> FILE opens it")
    line = text + "\n"
    try:
        try:
            sys.stdout.write(line)
        except UnicodeEncodeError:
            # A file name that is no text, or a terminal that cannot show it: its bytes.
            sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise explain_stdout(error) from error


def data_json(value: object, *, indent: int | None = None) -> None:
    """Print one JSON value on stdout, a single line unless it is indented.

    Control characters are JSON escapes; other characters are themselves only where it is indented
    for people and stdout can show them.
    """
    encoding = getattr(sys.stdout, "encoding", None) or ""
    shows_all = encoding.lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=indent is None or not shows_all, indent=indent)
    # The json module leaves some of these as they are. The ends of its own lines stay.
    lines = [HIDDEN.sub(_to_json_escape, each) for each in text.split("\n")]
    write_line("\n".join(lines))


def _to_json_escape(match: re.Match[str]) -> str:
    """A character as JSON spells it."""
    return json.dumps(match[0])[1:-1].replace("\x7f", "\\u007f")


def table(rows: Iterable[Sequence[str]], value: object, *, as_json: bool) -> None:
    """Print `value` as JSON, or else rows of cells as lines of aligned columns.

    A cell may come from a file's name: what would control the terminal is spelled out there. The
    JSON has such characters as escapes, so nothing is lost in it.
    """
    if as_json:
        data_json(value)
        return
    lines = [[spell_out(cell) for cell in row] for row in rows]
    widths: list[int] = []
    for line in lines:
        widths += [0] * (len(line) - len(widths))
        for column, cell in enumerate(line[:-1]):  # the last cell is as long as it is
            widths[column] = max(widths[column], len(cell))
    for line in lines:
        cells = [_pad(cell, width) for cell, width in zip(line, widths, strict=False)]
        write_line("  ".join(cells).rstrip())


def _pad(cell: str, width: int) -> str:
    """The cell of a table on stdout as wide as its column, a verdict in its colour."""
    padding = " " * (width - len(cell))
    if cell in COLOURS:
        cell = paint(cell, COLOURS[cell], sys.stdout)
    return cell + padding


def paint(text: str, colour: str, stream: TextIO | None) -> str:
    """Return the text in a colour, if the stream is a terminal with colours and they are wanted.

    rich knows terminals, and the variables NO_COLOR and TERM.
    """
    if stream is None or not stream.isatty():
        return text
    from rich.console import Console

    terminal = Console(file=stream)
    if terminal.no_color or terminal.legacy_windows or not terminal.color_system:
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


# --- words: stderr


def say(text: str) -> None:
    """Print one line for people on stderr."""
    sys.stderr.write(f"flux: {spell_out(' '.join(text.split()))}\n")  # a line is flushed at once


def error(message: str, hint: str) -> None:
    """Print the error line, and below it the hint if there is one; never anything else."""
    text = spell_out(" ".join(message.split())).rstrip(".")
    lines = f"flux: {paint('error:', RED, sys.stderr)} {text}.\n"
    if hint:
        lines += f"hint: {spell_out(' '.join(hint.split()))}\n"
    sys.stderr.write(lines)


def count(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s but for one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_numbers(numbers: Sequence[int]) -> str:
    """Return ascending numbers as people list them: 2 to 5, 7, 9 to 10."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(str(number) for number in run) for run in runs)


def confirm(question: str) -> bool:
    """Ask on the terminal; whether the answer is yes."""
    sys.stderr.write(f"{spell_out(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def spell_out(text: str) -> str:
    """Return the text with its hidden characters spelled out, as a Python string has them."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def describe_seconds(seconds: float) -> str:
    """Return a time as people say it: 40 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    minutes, rest_s = divmod(whole, 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest_min} min" if rest_min else f"{hours} h"
    if minutes:
        return f"{minutes} min {rest_s} s" if rest_s else f"{minutes} min"
    return f"{whole} s"


class Reporter:
    """Shows a run's events, or how many bytes are done, and adds up the seconds of each phase.

    On stdout it prints the paths of pictures, or with `events` every event as JSON, or with
    `json_output` those that say how the run or a row ended. `quiet` leaves only errors on stderr.
    """

    def __init__(
        self,
        *,
        started: float,
        quiet: bool = False,
        events: bool = False,
        json_output: bool = False,
        show_picture: Callable[[str], None] | None = None,
    ) -> None:
        """Report a run that began at `started`, the perf_counter when the command was given.

        `show_picture` draws the picture of a path on stdout.
        """
        self.timings_s: dict[str, float] = {}
        self._quiet = quiet
        self._events = events
        self._json = json_output
        self._started = started
        self._phase = "load"
        self._phase_started = started
        self._noticed: set[Notice] = set()
        self._has_preview = False
        self._show_picture = show_picture
        # The first row that failed for a reason (its message and hint), and those after it of which
        # nothing has been said yet.
        self._first_failed: dict[tuple[str, str], int] = {}
        self._alike: dict[int, list[int]] = {}
        self._said = time.perf_counter()  # when the last line of progress was
        self._bar: Any = None  # a rich Progress with one task
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._start_bar()
        return self

    def __exit__(self, *_: object) -> None:
        self.say_alike()
        self._end_run()
        if self._bar:
            self._bar.stop()
            LAST_WORDS.clear()

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress

        stderr = Console(stderr=True)
        if stderr.is_dumb_terminal:
            return
        bar = BarColumn(bar_width=30, complete_style="green", pulse_style="green")
        columns = ("{task.description}", bar, "{task.fields[speed]}")
        self._bar = Progress(*columns, console=stderr, transient=True, redirect_stdout=False)
        self._task = self._bar.add_task("", total=None, visible=False, speed="")
        self._bar.start()
        LAST_WORDS.append(WIPE_BAR)

    def result(self, run: Generator[Event, None, Result]) -> Result:
        """Show the events of a generator; returns what it returns."""
        while True:
            try:
                event = next(run)
            except StopIteration as finished:
                return cast(Result, finished.value)
            self.show(event)

    def show(self, event: Event) -> None:
        """Show one event; raises `Terminated` if a signal arrived that a library has swallowed."""
        check_signals()
        if isinstance(event, Notice):
            if event in self._noticed:  # a batch is many jobs, and says it once
                return
            self._noticed.add(event)
        if isinstance(event, Done):
            self._end_run()
            event = replace(event, timings_s=dict(self.timings_s))
        self._print_json(event)
        if isinstance(event, Saved | Notice | Skipped | Summary):
            self.say_alike()
        match event:
            case Phase():
                self._begin_phase(event)
            case Step():
                self._show_step(event)
            case Preview():
                self._show_preview(event)
            case Saved():
                self._show_saved(event)
            case Done() if len(event.images) > 1 and not event.row and not self._quiet:
                text = f"{count(len(event.images), 'picture')} in {self.timings_s['total']:.1f} s"
                self._print(lambda: say(text))
            case Failed():
                self._show_failed(event)
            case Notice() | Skipped() | Summary() if not self._quiet:
                say(_describe(event))

    def _print_json(self, event: Event) -> None:
        """Print an event for programs, where that was asked for."""
        if self._events:
            self._print(lambda: data_json(to_json(event)))
        elif self._json and isinstance(event, Preview | Done | Failed | Skipped | Summary):
            self._print(lambda: data_json(asdict(event)))

    def show_bytes(self, done_bytes: int, total_bytes: int, what: str) -> None:
        """Show how much is done, with GB/s and the time left; raises as `show` does."""
        check_signals()
        elapsed_s = max(1e-6, time.perf_counter() - self._started)
        speed = max(1, done_bytes) / elapsed_s
        left_s = (total_bytes - done_bytes) / speed
        amount = f"{done_bytes / 1e9:.1f}/{total_bytes / 1e9:.1f} GB"
        text = f"{amount}, {speed / 1e9:.2f} GB/s, {describe_seconds(left_s)} left"
        self._say_sometimes(f"{what}: {text}")
        self._update_bar(completed=done_bytes, total=total_bytes, description=what, speed=text)

    def _begin_phase(self, phase: Phase) -> None:
        self._end_phase()
        self._phase = phase.name
        text = f"{phase.name} {phase.detail}".strip()
        so_far = describe_seconds(time.perf_counter() - self._started)
        self._say_sometimes(f"{text}, {so_far} so far")
        # An empty bar: how much of a phase is done is known of denoising alone.
        self._update_bar(description=text, completed=0, total=1, speed="")

    def _show_step(self, step: Step) -> None:
        step_s = (time.perf_counter() - self._phase_started) / step.index
        steps_left = step.total - step.index + (step.images - step.image) * step.total
        where = f"step {step.index} of {step.total}"
        if step.images > 1:
            where = f"picture {step.image} of {step.images}, {where}"
        left = f"{describe_seconds(step_s * steps_left)} left"
        self._say_sometimes(f"{where}, {left}")
        self._update_bar(
            description=where,
            completed=step.index,
            total=step.total,
            speed=f"{step_s:.2f} s/it, {left}",
        )

    def _show_preview(self, preview: Preview) -> None:
        """Say where previews are, once: the others lie where theirs should."""
        if not self._quiet and not self._has_preview:
            self._has_preview = True
            self._print(lambda: say(f"{preview.path} shows what it will be"))

    def _show_saved(self, saved: Saved) -> None:
        image = saved.image
        shows_path = not (self._json or self._events) and image.path != "-"
        if shows_path:
            self._print(lambda: data(image.path))
        if not self._quiet:
            text = f"{image.width}x{image.height}, seed {image.seed}, {saved.seconds:.1f} s"
            if not (shows_path and is_terminal(sys.stdout)):  # there it stands already
                text = f"{image.path}: {text}"
            if saved.row:
                text = f"row {saved.row}: {text}"
            self._print(lambda: say(text))
        if self._show_picture and image.path != "-":
            self._print(partial(self._show_picture, image.path))

    def _show_failed(self, failed: Failed) -> None:
        # The message begins with where the row stands, which is another for each.
        reason = (failed.message.partition(": ")[2], failed.hint)
        first = self._first_failed.setdefault(reason, failed.row)
        if first != failed.row:
            self._alike.setdefault(first, []).append(failed.row)
            return
        text = f"row {failed.row} failed: {failed.message}"
        if failed.hint:
            text += f" (hint: {failed.hint})"
        self._print(lambda: say(text))

    def say_alike(self) -> None:
        """Say which rows have failed as an earlier one, in one line for all of them."""
        for first, rows in self._alike.items():
            noun = "row" if len(rows) == 1 else "rows"
            text = f"{noun} {list_numbers(rows)} failed as row {first} did"
            self._print(partial(say, text))
        self._alike.clear()

    def _print(self, printing: Callable[[], None]) -> None:
        """Print while the bar is away: stdout may be the same terminal."""
        if self._bar:
            self._bar.stop()
        printing()
        if self._bar:
            self._bar.start()

    def _say_sometimes(self, text: str) -> None:
        """Say how far it is where there is no bar, at most every ten seconds."""
        now = time.perf_counter()
        if not self._bar and not self._quiet and now - self._said >= LINE_EVERY_S:
            self._said = now
            say(text)

    def _update_bar(self, **fields: object) -> None:
        if not self._bar:
            return
        from rich.markup import escape

        for name, value in fields.items():
            if isinstance(value, str):
                fields[name] = escape(spell_out(value))
        self._bar.update(self._task, visible=True, **fields)

    def _end_run(self) -> None:
        self._end_phase()
        self.timings_s["total"] = round(self._phase_started - self._started, 4)

    def _end_phase(self) -> None:
        now = time.perf_counter()
        before = self.timings_s.get(self._phase, 0.0)
        self.timings_s[self._phase] = round(before + now - self._phase_started, 4)
        self._phase_started = now


def _describe(event: Notice | Skipped | Summary) -> str:
    """The line for people of an event that has no more to it."""
    match event:
        case Notice(message):
            return message
        case Skipped(row, path):
            return f"row {row}: {path} is there"
        case Summary():
            outcome = f"{event.done} done, {event.failed} failed, {event.skipped} skipped"
            pictures = f"{count(event.pictures, 'picture')} in {event.seconds:.1f} s"
            return f"{count(event.rows, 'row')}: {outcome}; {pictures}"
