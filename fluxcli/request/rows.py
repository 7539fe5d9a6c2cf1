"""Rows of a batch: a file or a stream of prompts as text, JSONL or CSV, and chunks of these rows.

Knows nothing of settings, models or the command line: its caller makes the orders. Stdlib only.
"""

import csv
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import PurePath
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any, BinaryIO, NamedTuple

from fluxcli.errors import UsageError
from fluxcli.request.fields import Order
from fluxcli.request.job import Row
from quant.errors import ExplainedError

LIMIT_BYTES = 1 << 20  # of a line with its end, and of a CSV record
PAUSE_S = 0.1  # a stream without a new row for so long has paused
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
BOM = "\ufeff"

Settings = dict[str, Any]  # what a row says: the prompt and settings by their keys


class Line(NamedTuple):
    """A line of the source: its number from 1, and its bytes with their end.

    Of a line that is too long only the first `LIMIT_BYTES` + 1 bytes are kept.
    """

    number: int
    data: bytes

    @property
    def is_too_long(self) -> bool:
        return len(self.data) > LIMIT_BYTES

    @property
    def is_blank(self) -> bool:
        return not self.is_too_long and not self.decode("replace").strip()

    def decode(self, errors: str) -> str:
        """Return the line's text, without the byte order mark that a file may begin with."""
        text = self.data.decode(errors=errors)
        return text.removeprefix(BOM) if self.number == 1 else text

    def text(self) -> str:
        """Return the line's text with its end; raises `UsageError` if too long or no UTF-8."""
        if self.is_too_long:
            why = f"at most {LIMIT_BYTES:,} bytes are taken"
            raise UsageError("the line is too long", why=why)
        try:
            return self.decode("strict")
        except UnicodeDecodeError as error:
            why = f"at byte offset {error.start} of line {self.number}"
            raise UsageError("the line is not UTF-8", why=why) from error


class Record(NamedTuple):
    """What one row says, or what is wrong with it, and the number of its first line."""

    line: int
    settings: Settings | ExplainedError


def read_rows(
    source: BinaryIO, name: str, make_order: Callable[[Settings], Order]
) -> Iterator[Row]:
    """Yield a row for each prompt of `source`, as soon as it is there.

    A row that `make_order` refuses, or that cannot be read, has the error instead of an order. The
    format goes by the extension of `name`; without a known one it is JSONL if the first line begins
    with {, else text. Raises `UsageError` for a source that is unreadable, has no rows, or has no
    usable CSV header.
    """
    label = "stdin" if name == "-" else name
    number = 0
    for record in _read_records(_read_lines(source, label), name, label):
        number += 1
        yield _make_row(number, record, label, make_order=make_order)
    if not number:
        raise UsageError("no prompts", which=label, hint="give one prompt a line")


def _make_row(
    number: int, record: Record, label: str, make_order: Callable[[Settings], Order]
) -> Row:
    where = f"{label}:{record.line}"
    if isinstance(record.settings, ExplainedError):
        return Row(number, None, where=where, error=record.settings)
    try:
        order = make_order(record.settings)
    except ExplainedError as error:
        return Row(number, None, where=where, error=error)
    return Row(number, order, where=where)


def _read_lines(source: BinaryIO, label: str) -> Iterator[Line]:
    """Yield the lines of a source in bounded memory; raises `UsageError` where a read fails."""
    number = 0
    try:
        while data := source.readline(LIMIT_BYTES + 1):
            number += 1
            line = Line(number, data)
            yield line
            while line.is_too_long and data and not data.endswith(b"\n"):
                data = source.readline(LIMIT_BYTES)  # the rest of it is of no use
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError("unreadable prompts", which=label, why=why) from error


def _read_records(lines: Iterator[Line], name: str, label: str) -> Iterator[Record]:
    """Yield what every row says, by the format that the extension or the first line tells."""
    suffix = PurePath(name).suffix.lower()
    if suffix in DELIMITERS:
        yield from _read_csv(lines, DELIMITERS[suffix], label)
        return
    parse: Callable[[Line], Settings] | None = None
    if suffix in JSON_SUFFIXES:
        parse = _parse_json
    elif suffix == ".txt":
        parse = _parse_text
    for line in lines:
        if line.is_blank:
            continue
        if parse is None:
            is_json = line.decode("replace").lstrip().startswith("{")
            parse = _parse_json if is_json else _parse_text
        try:
            yield Record(line.number, parse(line))
        except ExplainedError as error:
            yield Record(line.number, error)


# --- text and JSON


def _parse_text(line: Line) -> Settings:
    return {"prompt": line.text().removesuffix("\n").removesuffix("\r")}


def _parse_json(line: Line) -> Settings:
    """Return the object of a line; raises `UsageError` for anything else, and for repeated keys."""
    try:
        value = json.loads(
            line.text().rstrip(), object_pairs_hook=_make_object, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}"
        raise UsageError("the line is not JSON", why=why) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        raise UsageError("the line is not usable JSON", why=str(error)) from error
    if not isinstance(value, dict):
        hint = '{"prompt": "a red circle", "seed": 1}'
        raise UsageError("the line is no JSON object", hint=hint)
    return value


def _make_object(pairs: list[tuple[str, Any]]) -> Settings:
    _check_unique([key for key, _ in pairs], "key")
    return dict(pairs)


def _refuse_constant(text: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have but Python's reader takes."""
    raise UsageError("the line is not JSON", why=f"{text} is none of its numbers")


def _check_unique(names: list[str], what: str) -> None:
    """Raise `UsageError` naming the first name that stands twice."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"a repeated {what}", why=repr(name[:60]))


# --- CSV


def _read_csv(lines: Iterator[Line], delimiter: str, label: str) -> Iterator[Record]:
    """Yield the records below the header; raises `UsageError` where that is not usable."""
    header: list[str] | None = None
    for line in lines:
        if line.is_blank:
            continue
        try:
            cells = _read_cells(line, lines, delimiter)
            if header is None:
                header = _parse_header(cells)
                continue
            yield Record(line.number, _name_cells(header, cells))
        except ExplainedError as error:
            if header is None:
                which = f"{label}:{line.number}"
                raise UsageError("no usable header", which=which, why=str(error)) from error
            yield Record(line.number, error)


def _read_cells(first: Line, following: Iterator[Line], delimiter: str) -> list[str]:
    """Return the cells of the record that begins with a line.

    While a quote is open the lines that follow belong to it, and are taken from `following`.
    Raises `UsageError` for a record that is no CSV, too long, or no UTF-8.
    """
    taken: list[Line] = []
    texts = _take_lines(chain([first], following), taken)
    try:
        cells = next(csv.reader(texts, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UsageError(
            "the record is not CSV",
            why=f"{error}; lines {first.number} to {taken[-1].number} were taken for it",
            hint="is every quote closed?",
        ) from error
    for line in taken:
        line.text()  # raises for what is no text
    return cells


def _take_lines(lines: Iterable[Line], taken: list[Line]) -> Iterator[str]:
    """Yield the texts of lines and note in `taken` which were asked for, up to `LIMIT_BYTES`."""
    size_bytes = 0
    for line in lines:
        taken.append(line)
        size_bytes += len(line.data)
        if size_bytes > LIMIT_BYTES:
            raise UsageError(
                "the record is too long",
                why=f"at most {LIMIT_BYTES:,} bytes are taken",
                hint="is every quote closed?",
            )
        yield line.decode("replace")


def _parse_header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names:
        why = f"column {names.index('') + 1}"
        raise UsageError("a column without a name", why=why)
    _check_unique(names, "column")
    return names


def _name_cells(header: list[str], cells: list[str]) -> Settings:
    """Return the cells that are not empty by their columns; raises `UsageError` for too many."""
    if len(cells) > len(header):
        why = f"{len(cells)} cells, {len(header)} columns"
        raise UsageError("more cells than columns", why=why)
    return {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


# --- chunks


def is_streaming(source: BinaryIO) -> bool:
    """Return whether a read may wait: of a pipe, a terminal or a device.

    It does not of a regular file, nor of bytes in memory.
    """
    try:
        return not stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except OSError:  # io.UnsupportedOperation, of bytes in memory, is one
        return False


def make_chunks(rows: Iterator[Row], size: int, *, streaming: bool) -> Iterator[list[Row]]:
    """Yield lists of at most `size` rows, in order.

    When `streaming`, a chunk also ends where the source pauses, so that rows that are there are
    drawn while others are awaited. What `rows` raises comes after the rows before it. A streaming
    source is read by a thread that may wait on it for ever: do not close it before its end.
    """
    chunk: list[Row] = []
    arriving = _read_ahead(rows, size) if streaming else _plainly(rows)
    with closing(arriving):
        try:
            for row in arriving:
                if row is not None:
                    chunk.append(row)
                has_paused = row is None
                if len(chunk) == size or (chunk and has_paused):
                    yield chunk
                    chunk = []
        except Exception:
            if chunk:
                yield chunk
            raise
    if chunk:
        yield chunk


def _plainly(rows: Iterator[Row]) -> Generator[Row | None, None, None]:
    """Yield the rows, from a generator that can be closed."""
    yield from rows


class _End(NamedTuple):
    """The last item of a thread that reads rows: the error that ended it, if one did."""

    error: BaseException | None


def _read_ahead(rows: Iterator[Row], size: int) -> Generator[Row | None, None, None]:
    """Yield the rows that a thread reads ahead, at most `size` of them; None at each pause."""
    waiting: Queue[Row | _End] = Queue(size)
    stopped = Event()
    reader = Thread(target=_fill, args=(rows, waiting, stopped), name="batch", daemon=True)
    reader.start()
    try:
        while True:
            try:
                # In a loop, since Windows delivers no signal to a thread that waits.
                item = waiting.get(timeout=PAUSE_S)
            except Empty:
                yield None
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        while not waiting.empty():
            # A thread that waits for room finds it, and then that it is to stop.
            waiting.get_nowait()


def _fill(rows: Iterator[Row], waiting: "Queue[Row | _End]", stopped: Event) -> None:
    """Put rows into the queue until they end or somebody stops it; for a thread of its own."""
    error = None
    try:
        for row in rows:
            waiting.put(row)
            if stopped.is_set():
                return
    except BaseException as raised:  # noqa: BLE001 - the consumer raises it
        error = raised
    waiting.put(_End(error))
