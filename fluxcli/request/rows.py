"""Rows of a batch: a file or a stream of prompts as text, JSONL or CSV, and windows of the rows that are there.

Knows nothing of settings, models or the command line: its caller makes the requests. Stdlib only.
"""

import csv
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import PurePath
from queue import Empty, Queue
from threading import Event, Thread
from typing import BinaryIO, NamedTuple

from fluxcli.errors import UsageError
from fluxcli.request.fields import Order
from fluxcli.request.job import Row
from quant.errors import ExplainedError

LIMIT_BYTES = 1 << 20  # of a line with its end, and of a CSV record
PAUSE_S = 0.1  # a stream without a new row for so long has paused
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = "\ufeff"


class Line(NamedTuple):
    """A line of the source: its number from 1, its bytes with their end; of one that is too long only the first."""

    number: int
    data: bytes

    @property
    def too_long(self) -> bool:
        return len(self.data) > LIMIT_BYTES

    @property
    def blank(self) -> bool:
        return not self.too_long and not self.decoded("replace").strip()

    def decoded(self, errors: str) -> str:
        text = self.data.decode(errors=errors)
        return text.removeprefix(BOM) if self.number == 1 else text

    def text(self) -> str:
        """The text with its end, without the file's mark; raises `UsageError` for a long line and for no UTF-8."""
        if self.too_long:
            raise UsageError("the line is too long", why=f"at most {LIMIT_BYTES:,} bytes are taken")
        try:
            return self.decoded("strict")
        except UnicodeDecodeError as error:
            raise UsageError(
                "the line is not UTF-8", why=f"at byte offset {error.start} of line {self.number}"
            ) from error


def rows(source: BinaryIO, name: str, make: Callable[[dict], Order]) -> Iterator[Row]:
    """A row for each prompt of `source`, as soon as it is there; one that is no request has the error instead.

    The format goes by the extension of `name`; without a known one it is JSONL if it begins with {, else text. Raises
    `UsageError` for a source that is unreadable, has no rows, or has no usable CSV header.
    """
    label, number = "stdin" if name == "-" else name, 0
    for number, (line, settings) in enumerate(_settings(_lines(source, label), name, label), 1):
        made = settings if isinstance(settings, ExplainedError) else _tried(make, settings)
        request, error = (None, made) if isinstance(made, ExplainedError) else (made, None)
        yield Row(number, request, f"{label}:{line}", error)
    if not number:
        raise UsageError("no prompts", which=label, hint="give one prompt a line")


def _tried(function: Callable, *arguments: object) -> object:
    """What the function gives, or the error that it raises."""
    try:
        return function(*arguments)
    except ExplainedError as error:
        return error


def _lines(source: BinaryIO, label: str) -> Iterator[Line]:
    number = 0
    try:
        while data := source.readline(LIMIT_BYTES + 1):
            number += 1
            yield (line := Line(number, data))
            while line.too_long and data and not data.endswith(b"\n"):
                data = source.readline(LIMIT_BYTES)
    except OSError as error:
        raise UsageError("unreadable prompts", which=label, why=error.strerror or str(error)) from error


def _settings(lines: Iterator[Line], name: str, label: str) -> Iterator[tuple[int, dict | ExplainedError]]:
    """(line number, settings or what is wrong) of every row."""
    kind = PurePath(name).suffix.lower()
    if kind in DELIMITERS:
        yield from _csv_settings(lines, DELIMITERS[kind], label)
        return
    parse = _json_settings if kind in (".jsonl", ".ndjson", ".json") else _text_settings if kind == ".txt" else None
    for line in lines:
        if not line.blank:
            parse = parse or (_json_settings if line.decoded("replace").lstrip().startswith("{") else _text_settings)
            yield line.number, _tried(parse, line)


def _text_settings(line: Line) -> dict:
    return {"prompt": line.text().removesuffix("\n").removesuffix("\r")}


def _json_settings(line: Line) -> dict:
    try:
        value = json.loads(line.text().rstrip(), object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise UsageError("the line is not JSON", why=f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        raise UsageError("the line is not usable JSON", why=str(error)) from error
    if not isinstance(value, dict):
        raise UsageError("the line is no JSON object", hint='{"prompt": "a red circle", "seed": 1}')
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    _check_unique([key for key, _ in pairs], "key")
    return dict(pairs)


def _no_constant(text: str) -> None:
    raise UsageError("the line is not JSON", why=f"{text} is none of its numbers")


def _check_unique(names: list[str], what: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UsageError(f"a repeated {what}", why=repr(repeated[0][:60]))


def _csv_settings(lines: Iterator[Line], delimiter: str, label: str) -> Iterator[tuple[int, dict | ExplainedError]]:
    records = ((line.number, _tried(_cells, line, lines, delimiter)) for line in lines if not line.blank)
    for number, cells in records:
        header = cells if isinstance(cells, ExplainedError) else _tried(_header, cells)
        if isinstance(header, ExplainedError):
            raise UsageError("no usable header", which=f"{label}:{number}", why=str(header)) from header
        break
    for number, cells in records:
        yield number, cells if isinstance(cells, ExplainedError) else _tried(_by_column, header, cells)


def _cells(first: Line, following: Iterator[Line], delimiter: str) -> list[str]:
    """The cells of the record that begins with a line; takes those that follow while a quote is open."""
    taken: list[Line] = []
    try:
        cells = next(csv.reader(_of_record(chain([first], following), taken), delimiter=delimiter, strict=True))
    except csv.Error as error:
        why = f"{error}; lines {first.number} to {taken[-1].number} were taken for it"
        raise UsageError("the record is not CSV", why=why, hint="is every quote closed?") from error
    for line in taken:
        line.text()  # raises
    return cells


def _of_record(lines: Iterable[Line], taken: list[Line]) -> Iterator[str]:
    size = 0
    for line in lines:
        taken.append(line)
        size += len(line.data)
        if size > LIMIT_BYTES:
            why = f"at most {LIMIT_BYTES:,} bytes are taken"
            raise UsageError("the record is too long", why=why, hint="is every quote closed?")
        yield line.decoded("replace")


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names:
        raise UsageError("a column without a name", why=f"column {names.index('') + 1}")
    _check_unique(names, "column")
    return names


def _by_column(header: list[str], cells: list[str]) -> dict:
    if len(cells) > len(header):
        raise UsageError("more cells than columns", why=f"{len(cells)} cells, {len(header)} columns")
    return {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


def is_streaming(source: BinaryIO) -> bool:
    """Whether a read may wait: a pipe, a terminal, a device; not a regular file, nor bytes in memory."""
    try:
        return not stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except OSError:  # io.UnsupportedOperation is one
        return False


def in_windows(rows: Iterator[Row], size: int, *, streaming: bool) -> Iterator[list[Row]]:
    """Lists of at most `size` rows, in order; when `streaming`, those that are there: a pause ends a window, too.

    What `rows` raises comes after the rows before it. Streaming, `rows` runs in a thread that may wait on its source
    for ever: do not close a source that is not at its end.
    """
    window: list[Row] = []
    with closing(_as_they_come(rows, size) if streaming else (row for row in rows)) as arriving:
        try:
            for row in arriving:
                window += [row] if row else []
                if len(window) == size or (window and not row):
                    yield window
                    window = []
        except Exception:
            if window:
                yield window
            raise
    if window:
        yield window


def _as_they_come(rows: Iterator[Row], size: int) -> Iterator[Row | None]:
    """The rows that a thread reads ahead, at most `size` of them; None where no more came for a while."""
    waiting: Queue[Row | BaseException | None] = Queue(size)
    stopped = Event()
    Thread(target=_read, args=(rows, waiting, stopped), name="batch", daemon=True).start()
    try:
        while True:
            try:
                item = waiting.get(timeout=PAUSE_S)  # in a loop, as Windows delivers no signal while it waits
            except Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while not waiting.empty():  # a thread that waits for room finds it, and then that it is to stop
            waiting.get_nowait()


def _read(rows: Iterator[Row], waiting: Queue, stopped: Event) -> None:
    end = None
    try:
        for row in rows:
            waiting.put(row)
            if stopped.is_set():
                return
    except BaseException as error:  # noqa: BLE001 - the consumer raises it
        end = error
    waiting.put(end)
