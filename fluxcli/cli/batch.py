"""`flux generate --from`: rows of a file or a stream become pictures, chunk by chunk.

A row that fails does not end the others. Reading rows is `request.rows`, drawing them `run`; here
they are made into orders, counted, and said.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fluxcli.cli import console
from fluxcli.cli.ending import count_written, explain_early_end
from fluxcli.cli.settings import (
    STARTED,
    check_stdout,
    given_settings,
    job_options,
    read_prompt,
    reporter_of,
    say_what_is_meant,
    take_stdin,
)
from fluxcli.errors import BatchFailed, ExitCode, UsageError, WeightsUnavailable
from fluxcli.events import Done, Event, Failed, Kept, Notice, Saved, Skipped, Summary, explain
from fluxcli.models import find, loras
from fluxcli.paths import config_folder
from fluxcli.pictures import names
from fluxcli.request import presets
from fluxcli.request.fields import Order, Output
from fluxcli.request.inputs import STDIN, rename_pictures
from fluxcli.request.job import Job, Row
from fluxcli.request.rows import (
    check_file_size,
    find_advice,
    is_streaming,
    make_chunks,
    read_rows,
    read_stream,
)
from fluxcli.request.settings import LoraRef, coerce_all, find_name
from fluxcli.request.target import Target
from fluxcli.resolve import resolve_order
from fluxcli.run import processes
from fluxcli.run.dispatch import Dispatcher
from quant.errors import ExplainedError

CHUNK_ROWS = 16  # rows that are handed on together, where so many are there
COUNTED_CHUNKS = (
    64  # that are read on, where a batch ends early, to say how much it would have been
)


def draw_rows(
    source: str,
    prompt: str | None,
    options: dict[str, Any],
    *,
    resume: bool,
    fail_fast: bool,
    comments: bool = False,
) -> int:
    """Draw every row of the source, with `prompt` for rows without one.

    Returns exit code 0. Raises `BatchFailed` at the end where rows failed, `UsageError` at once for
    what is wrong whatever a row says.
    """
    given = take_stdin(given_settings(options), prompt=prompt, source=source)
    check_stdout(options, picture=given.get("output") == names.STDOUT)
    if source == prompt == "-":
        raise UsageError("stdin cannot be read twice", which="--from -", hint="give a file")
    common = {} if prompt is None else {"prompt": read_prompt(prompt)}
    if not options["quiet"]:
        say_what_is_meant(given)
    folder = Path() if source == "-" else Path(os.path.expanduser(source)).parent
    orders = OrderMaker(common, given, folder=folder, force=options["force"], resume=resume)
    withheld = Withheld(orders.weights)
    advice = Advice()
    tally = Tally(resumed_by="" if resume else " with --resume")
    with (
        _open(source) as file,
        explain_early_end(tally, quiet=options["quiet"]),
        reporter_of(options) as reporter,
    ):
        streaming = is_streaming(file)
        if processes.count() > 1 and (streaming or source == "-"):
            raise UsageError(
                "rows of a stream cannot be shared",
                which=source,
                why="each of the processes would get others",
                hint="give a file",
            )
        share = processes.Share()
        bounded = read_stream(file, source) if streaming else file
        read = read_rows(bounded, source, orders.make, comments=comments)
        rows = orders.complete(read)
        chunks = make_chunks(share.take(rows), CHUNK_ROWS, streaming=streaming)
        job = Job((), batch=True, resume=resume, **job_options(options))
        with Dispatcher(alone=options["no_worker"] or options["debug"]) as dispatcher:
            for chunk in tally.watch(chunks, is_endless=streaming):
                advice.show(chunk, reporter)
                for event in _draw_chunk(dispatcher, chunk, job):
                    tally.add(event)
                    for each in withheld.take(event, chunk):
                        reporter.show(each)
                    if fail_fast and isinstance(event, Failed):
                        break
                tally.rows += len(chunk)
                if streaming:
                    withheld.raise_error()
                    reporter.say_alike()
                    dispatcher.pause()  # the next row may be hours away
                if fail_fast and tally.failed:
                    break
        withheld.raise_error()
        summary = _sum_up(tally, share)
        if share.is_main:
            reporter.show(summary)
    if summary.failed and share.is_main:
        raise BatchFailed(
            f"{summary.failed} of {summary.rows} rows failed",
            which=source,
            why=f"the first here is row {min(tally.failed)}" if tally.failed else "",
            hint="the rows' own messages say why; with --resume only these are drawn again",
        )
    return ExitCode.OK


@contextmanager
def _open(source: str) -> Iterator[BinaryIO]:
    """Open the source of rows, - for stdin; raises `UsageError`."""
    if source == "-":
        yield _open_stdin()
        return
    path = Path(os.path.expanduser(source))
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        hint = "--from prompts.txt, a prompt a line"
        raise UsageError("cannot read the rows", which=source, why=why, hint=hint) from error
    if is_streaming(file):
        yield file  # not closed: a thread may wait on it for ever
        return
    with file:
        check_file_size(file, source)
        yield file


def _open_stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "no rows on stdin",
            which="--from -",
            why="it is a terminal" if sys.stdin else "it is closed",
            hint="flux generate --from prompts.txt",
        )
    return sys.stdin.buffer


def _draw_chunk(dispatcher: Dispatcher, chunk: list[Row], job: Job) -> Iterator[Event]:
    """Yield the events of a chunk of rows; a row that fails is named by where it stands."""
    places = {row.number: row.where for row in chunk}
    for row in chunk:
        if row.error:
            failed = explain(row.error, row.number)
            yield replace(failed, message=f"{row.where}: {failed.message}")
    good = tuple(row for row in chunk if row.order)
    if not good:
        return
    for event in dispatcher.run(replace(job, rows=good)):
        if isinstance(event, Failed):
            yield replace(event, message=f"{places[event.row]}: {event.message}")
        else:
            yield event


class Withheld:
    """Failures of rows for want of the command line's weights, while nothing else has happened.

    Where it stays so, they become one error instead of one a row. Of several processes none knows
    the others' rows: nothing is withheld there.
    """

    def __init__(self, weights: "Weights") -> None:
        self._weights = weights
        self._failed: list[Failed] = []
        self._error: WeightsUnavailable | None = None
        self._is_over = processes.count() > 1

    def take(self, event: Event, chunk: Sequence[Row]) -> list[Event]:
        """Return the events that are to be shown now, of which there may be none."""
        if self._is_over:
            return [event]
        if isinstance(event, Failed) and event.exit_code == ExitCode.WEIGHTS:
            row = next(row for row in chunk if row.number == event.row)
            if row.order and weights_of(row.order.settings()) == self._weights:
                message = event.message.removeprefix(f"{row.where}: ")
                self._error = self._error or WeightsUnavailable(message, hint=event.hint)
                self._failed.append(event)
                return []
        self._is_over = True
        return [*self._failed, event]

    def raise_error(self) -> None:
        """Raise `WeightsUnavailable` if that is all that has happened."""
        if self._error and not self._is_over:
            raise self._error


class Advice:
    """Says once what prompts of other tools mean here."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def show(self, chunk: Sequence[Row], reporter: console.Reporter) -> None:
        """Show what there is to say of a chunk's prompts."""
        for row in chunk:
            text = find_advice(row.order.request.prompt) if row.order else ""
            if text and text not in self._said:
                self._said.add(text)
                reporter.show(Notice(f"{row.where}: {text}"))


class Tally:
    """What became of the rows, by their numbers."""

    def __init__(self, *, resumed_by: str = "") -> None:
        """`resumed_by` is what the same command lacks to draw what this one has left."""
        self._resumed_by = resumed_by
        self._asked = 0  # pictures of the rows so far
        self._found = 0  # pictures that were there before
        self._rest: Iterator[list[Row]] = iter(())  # of the chunks
        self._is_endless = False
        self.has_begun = False
        self.rows = 0
        self.pictures = 0
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self.skipped: set[int] = set()

    def add(self, event: Event) -> None:
        """Count what an event says of a row."""
        match event:
            case Saved():
                self.pictures += 1
                self.has_begun = True
            case Kept():
                self.has_begun = True
            case Done():
                self.done.add(event.row)
            case Failed():
                self.failed.add(event.row)
            case Skipped():
                self._found += 1
                self.skipped.add(event.row)

    def watch(self, chunks: Iterator[list[Row]], *, is_endless: bool) -> Iterator[list[Row]]:
        """Yield the chunks, and count the pictures that they ask for."""
        self._rest = chunks
        self._is_endless = is_endless
        for chunk in chunks:
            self._asked += _count_pictures(chunk)
            yield chunk

    def describe(self) -> str:
        """Return how many pictures are written, and what draws the others."""
        written = self.pictures + self._found
        text = f"{written} of the pictures are written"
        if not self._is_endless:
            rest = islice(self._rest, COUNTED_CHUNKS)
            total = self._asked + sum(_count_pictures(chunk) for chunk in rest)
            if next(self._rest, None) is None:
                text = count_written(written, total)
                if written == total:
                    return text
        return f"{text}; the others: the same command{self._resumed_by}"


def _count_pictures(chunk: list[Row]) -> int:
    """Return how many pictures the rows of a chunk ask for."""
    return sum(row.order.output.count for row in chunk if row.order)


def _sum_up(tally: Tally, share: processes.Share) -> Summary:
    """Return the summary of all processes. A row is skipped if nothing of it was drawn."""
    counts = [
        tally.rows,
        len(tally.done - tally.failed),
        len(tally.failed),
        len(tally.skipped - tally.done - tally.failed),
        tally.pictures,
    ]
    rows, done, failed, skipped, pictures = share.add_up(counts)
    return Summary(
        rows=rows,
        done=done,
        failed=failed,
        skipped=skipped,
        pictures=pictures,
        seconds=round(time.perf_counter() - STARTED, 3),
    )


class OrderMaker:
    """Makes the orders of rows: what a row says goes before what the command line says."""

    def __init__(
        self,
        common: Mapping[str, Any],
        given: Mapping[str, Any],
        *,
        folder: Path,
        force: bool,
        resume: bool,
    ) -> None:
        """Check what is wrong whatever a row says; raises `UsageError`.

        `common` has the prompt of rows without one, `given` the settings of the command line. What
        a row says of files of pictures counts from `folder`, that of the rows.
        """
        self._folder = folder
        self._common = dict(common)
        self._given = given
        self._force = force
        self._resume = resume
        self._files: set[str | None] = set()  # that rows have named
        self._asked: Counter[Order] = Counter()  # equal pictures of the rows so far
        values = presets.merge(given, config_folder()).values
        format_given = values["format"] if given.get("format") else None
        names.read_format(values["output"], given=format_given)
        self._common_output = values["output"]
        self.weights = weights_of(values)
        _check_target(names.parse_target(Output(values["output"])))

    def make(self, row: Mapping[str, Any]) -> Order:
        """Return the order of a row's fields; raises `UsageError`."""
        # null says no more than an empty cell does
        row = self._common | {key: value for key, value in row.items() if value is not None}
        prompt = row.get("prompt") or ""
        if not isinstance(prompt, str):
            hint = 'a prompt is in quotes: {"prompt": "a red circle"}'
            raise UsageError("wrong value", which="prompt", why="it is no text", hint=hint)
        said = _coerce_fields(row)
        said |= rename_pictures(said, self._place_picture)
        return resolve_order(prompt, presets.override(self._given, said))

    def _place_picture(self, name: str) -> str:
        """Return the name of a row's picture from the current folder on."""
        if name == STDIN:
            hint = "--image - beside --from FILE is the picture of every row"
            raise UsageError("a row reads no picture from stdin", which=name, hint=hint)
        return str(self._folder / os.path.expanduser(name))

    def complete(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows with their targets, and with which of equal pictures they ask for.

        A row whose pictures can go nowhere has the error instead of its order.
        """
        for row in rows:
            if row.order is None:
                yield row
                continue
            try:
                target = self._find_target(row.order)
            except ExplainedError as error:
                yield replace(row, order=None, error=error)
                continue
            nth = 1
            if not target.has_field("row"):  # else its names are no other row's
                nth = self._count_equal(row.order)
            yield replace(row, target=target, nth=nth)

    def _find_target(self, order: Order) -> Target:
        """Return where a row's pictures go; raises `UsageError` for the file of another row."""
        output = order.output
        target = names.parse_target(output, force=self._force)
        _check_target(target)
        if target.exact:
            if output.output == self._common_output or output.output in self._files:
                raise UsageError(
                    "one file name for several pictures",
                    which=output.output,
                    hint="a folder, or {row} in it",
                )
            self._files.add(output.output)
        if self._resume and not output.metadata:
            why = "a picture without metadata does not say what made it"
            hint = "leave one of them out"
            raise UsageError("--resume excludes --no-metadata", why=why, hint=hint)
        return target

    def _count_equal(self, order: Order) -> int:
        """Return which of equal pictures the row's first one is, in the whole batch, from 1.

        The pictures of a row without a seed are equal but for the seeds that they will get.
        """
        picture = replace(order, output=replace(order.output, count=1))
        nth = self._asked[picture] + 1
        self._asked[picture] += order.output.count if order.request.seed < 0 else 1
        return nth


def _coerce_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a row's fields by their full names; raises `UsageError`."""
    said = {}
    keys = {}
    for key, value in row.items():
        if key == "prompt":
            continue
        name = find_name(key, where=f"column {key[:60]!r}", also=("prompt",))
        if name in said:
            hint = "give it once"
            raise UsageError("the same field twice", which=key, why="under two names", hint=hint)
        said[name] = value
        keys[name] = key[:60]
    return coerce_all(said, lambda name: f"column {keys.get(name, 'size')!r}")


Weights = tuple[str, tuple[LoraRef, ...]]  # a model and its adapters


def weights_of(settings: Mapping[str, Any]) -> Weights:
    """Return the model and the adapters that settings ask for, with absolute paths."""
    return find.make_absolute(settings["model"]), loras.make_absolute(settings["lora"])


def _check_target(target: Target) -> None:
    if target.stdout:
        hint = "-o FOLDER/, or a template"
        raise UsageError("-o - takes one picture", which="--from", hint=hint)
