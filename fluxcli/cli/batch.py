"""`flux generate --from`: rows of a file or a stream become pictures, window by window."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from fluxcli.cli.settings import STARTED, check_stdout, given_settings, job_options, read_prompt, reporter_of
from fluxcli.errors import BatchFailed, ExitCode, UsageError
from fluxcli.events import Done, Event, Failed, Saved, Skipped, Summary, explain
from fluxcli.paths import config_folder
from fluxcli.pictures import names as output
from fluxcli.request import presets
from fluxcli.request import rows as batch
from fluxcli.request.fields import GenerationRequest, Order, Output
from fluxcli.request.job import Job, Row
from fluxcli.request.settings import ALIASES, coerce
from fluxcli.resolve import build_order
from fluxcli.run import processes
from fluxcli.run.dispatch import Dispatcher

WINDOW = 16  # rows that are handed on together, where so many are there


def draw_rows(source: str, prompt: str | None, options: dict, *, resume: bool, fail_fast: bool) -> int:
    """Draw every row; raises `BatchFailed` at the end where some of them failed."""
    given = given_settings(options)
    check_stdout(options, picture=given.get("output") == output.STDOUT)
    if source == prompt == "-":
        raise UsageError("stdin cannot be read twice", which="--from -", hint="give a file")
    requests = Requests({} if prompt is None else {"prompt": read_prompt(prompt)}, given, resume=resume)
    tally = Tally()
    with _opened(source) as file, reporter_of(options) as reporter:
        streaming = batch.is_streaming(file)
        if processes.count() > 1 and (streaming or source == "-"):
            why = "each of the processes would get others"
            raise UsageError("rows of a stream cannot be shared", which=source, why=why, hint="give a file")
        share = processes.Share()
        rows = batch.read_rows(file, source, requests.make)
        rows = share.take(_count_equal(rows))
        windows = batch.make_chunks(rows, WINDOW, streaming=streaming)
        with Dispatcher(alone=options["no_worker"] or options["debug"]) as runner:
            for window in windows:
                for event in _events(runner, window, job_options(options) | {"resume": resume}):
                    tally.add(event)
                    reporter.show(event)
                    if fail_fast and isinstance(event, Failed):
                        break
                tally.rows += len(window)
                if streaming:
                    runner.pause()  # the next row may be hours away
                if fail_fast and tally.failed:
                    break
        summary = Summary(*share.add_up(tally.counts()), round(time.perf_counter() - STARTED, 3))
        if share.is_main:
            reporter.show(summary)
    if summary.failed and share.is_main:
        first = f"the first here is row {min(tally.failed)}" if tally.failed else ""
        raise BatchFailed(f"{summary.failed} of {summary.rows} rows failed", which=source, why=first, hint=(
            "the rows' own messages say why; with --resume only these are drawn again"))  # fmt: skip
    return ExitCode.OK


class Tally:
    """What became of the rows."""

    def __init__(self) -> None:
        self.rows, self.pictures = 0, 0
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self.skipped: set[int] = set()

    def add(self, event: Event) -> None:
        match event:
            case Saved():
                self.pictures += 1
            case Done():
                self.done.add(event.row)
            case Failed():
                self.failed.add(event.row)
            case Skipped():
                self.skipped.add(event.row)

    def counts(self) -> tuple[int, int, int, int, int]:
        """Rows, and of these done, failed and skipped as a whole; and pictures."""
        skipped = self.skipped - self.done - self.failed
        return self.rows, len(self.done - self.failed), len(self.failed), len(skipped), self.pictures


class Requests:
    """What the rows of a batch ask for: their fields before those of the command line."""

    def __init__(self, base: dict, given: dict, *, resume: bool) -> None:
        """`base` has the prompt of rows without one. Raises `UsageError` for what is wrong whatever a row says."""
        self._base, self._given, self._resume = base, given, resume
        self._named: set[str] = set()  # files that rows have named
        values = presets.merge(given, config_folder()).values
        output.format_of(values["output"], given=given.get("format") and values["format"])
        self._check(output.parse_target(Order(GenerationRequest("x"), output=Output(values["output"]))))

    def make(self, row: dict) -> Order:
        """The request of a row. Raises `UsageError`."""
        said, order = _requested(self._base | row, self._given)
        target = output.parse_target(order)
        self._check(target)
        if target.exact and ("output" not in said or order.output.output in self._named):
            raise UsageError(
                "one file name for several pictures", which=order.output.output, hint="a folder, or {row} in it"
            )
        if self._resume and not order.output.metadata:
            why = "a picture without metadata does not say what made it"
            raise UsageError("--resume excludes --no-metadata", why=why)
        if target.exact:
            self._named.add(order.output.output)
        return order

    @staticmethod
    def _check(target: output.Target) -> None:
        if target.stdout:
            raise UsageError("-o - takes one picture", which="--from", hint="-o FOLDER/, or a template")


def _requested(row: dict, given: dict) -> tuple[dict, Order]:
    """(what a row says, its request). Raises `UsageError`."""
    settings = {ALIASES.get(key, key): value for key, value in row.items() if key != "prompt"}
    if twice := [key for key in row if ALIASES.get(key) in row]:
        raise UsageError("the same field twice", which=twice[0], why=f"beside {ALIASES[twice[0]]}")
    said = {key: coerce(key, value, where=f"column {key!r}") for key, value in settings.items()}
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str):
        raise UsageError("wrong value", which="prompt", why="it is no text")
    if said.get("width") or said.get("height"):  # instead of the command line's, as in every later layer
        given = {key: value for key, value in given.items() if key not in ("aspect_ratio", "image_size")}
    merged = presets.overlay(given, said)
    return said, build_order(prompt, presets.merge(merged, config_folder()).values, merged)


def _count_equal(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows that know how many equal pictures the rows before them ask for, in the same place.

    A row without a seed asks for `count` pictures that differ in nothing that it says.
    """
    asked: Counter[Order] = Counter()
    for row in rows:
        if row.order is None:
            yield row
            continue
        picture = replace(row.order, output=replace(row.order.output, count=1))
        yield replace(row, nth=asked[picture] + 1)
        asked[picture] += row.order.output.count if row.order.request.seed < 0 else 1


def _events(runner: Dispatcher, window: list[Row], options: dict) -> Iterator[Event]:
    """The events of a window of rows; a row that fails is named by where it stands."""
    where = {row.number: row.where for row in window}
    good = tuple(row for row in window if row.order)
    for row in window:
        if row.error:
            yield replace(explain(row.error, row.number), message=f"{row.where}: {row.error}")
    for event in runner.run(Job(good, batch=True, **options)) if good else ():
        yield replace(event, message=f"{where[event.row]}: {event.message}") if isinstance(event, Failed) else event


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            why = "it is a terminal" if sys.stdin else "it is closed"
            raise UsageError("no rows on stdin", which="--from -", why=why, hint="flux generate --from prompts.txt")
        yield sys.stdin.buffer
        return
    try:
        file = Path(source).expanduser().open("rb")
    except (OSError, ValueError, RuntimeError) as error:  # the last: a ~ of nobody
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError("cannot read the rows", which=source, why=why) from error
    if batch.is_streaming(file):
        yield file  # its thread may wait on it for ever
    else:
        with file:
            yield file
