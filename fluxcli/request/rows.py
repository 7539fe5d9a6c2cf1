"""Rows of a batch: a file or a stream of prompts as text, JSON or CSV, and chunks of these rows.

Knows the names of settings, but nothing of their values, of models or of the command line: its
caller makes the orders. All is read in bounded memory. Stdlib only.
"""

import codecs
import csv
import io
import json
import os
import re
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
from fluxcli.request.settings import find_name
from quant.errors import ExplainedError

LIMIT_BYTES = 1 << 20  # of a line with its end, and of a CSV record
MAX_LINE_BYTES = 1 << 24  # what is longer is no line: the source ends there
MAX_JSON_BYTES = 1 << 24  # of a list of rows, which is read as a whole
MAX_AHEAD_BYTES = 1 << 24  # that a stream may be ahead of what is drawn
MAX_FILE_BYTES = 1 << 28
BLOCK_BYTES = 1 << 16  # that are read of a stream at once
PAUSE_S = 0.1  # a stream without a new row for so long has paused
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SEPARATORS = (",", ";", "\t")
SEPARATOR_LINE = re.compile(r"sep=([,;\t])\s*")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
LIST_BEGINS = re.compile(r"\s*\[\s*(\{|$)")
BOM = "\ufeff"
JSON_HINT = '{"prompt": "a red circle", "seed": 1}'
OTHER_ENCODINGS = {  # by the mark that a file begins with; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

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
            raise UsageError("the line is too long", why=why, hint="a row is one line")
        try:
            return self.decode("strict")
        except UnicodeDecodeError as error:
            why = f"at byte offset {error.start} of line {self.number}"
            hint = "save the file as UTF-8"
            raise UsageError("the line is not UTF-8", why=why, hint=hint) from error


class Record(NamedTuple):
    """What one row says, or what is wrong with it, and its place: the number of its first line."""

    place: int | str
    settings: Settings | ExplainedError


def read_rows(
    source: BinaryIO, name: str, make_order: Callable[[Settings], Order], *, comments: bool = False
) -> Iterator[Row]:
    """Yield a row for each prompt of `source`, as soon as it is there.

    A row that `make_order` refuses, or that cannot be read, has the error instead of an order. The
    format goes by the extension of `name`; without a known one it is JSON if the first line begins
    with { or with a list of these, else text. With `comments` lines that begin with # are left out.
    Raises `UsageError` for a source that is unreadable, no UTF-8 by its mark or too big, has no
    rows, or has no usable CSV header.
    """
    label = "stdin" if name == "-" else name
    number = 0
    for record in _read_records(_read_lines(source, label), name, label, comments=comments):
        number += 1
        yield _make_row(number, record, label, make_order=make_order)
    if not number:
        raise UsageError("no prompts", which=label, hint="give one prompt a line")


def _make_row(
    number: int, record: Record, label: str, make_order: Callable[[Settings], Order]
) -> Row:
    where = f"{label}:{record.place}"
    if isinstance(record.settings, ExplainedError):
        return Row(number, None, where=where, error=record.settings)
    try:
        order = make_order(record.settings)
    except ExplainedError as error:
        return Row(number, None, where=where, error=error)
    return Row(number, order, where=where)


def _read_lines(source: BinaryIO, label: str) -> Iterator[Line]:
    """Yield the lines of a source in bounded memory.

    Raises `UsageError` where a read fails, and for what are no lines: other encodings, and lines of
    more than `MAX_LINE_BYTES`.
    """
    number = 0
    try:
        data = source.readline(LIMIT_BYTES + 1)
        _check_encoding(data, label)
        if b"\r" in data.rstrip() and not data.endswith(b"\n"):
            yield from _split_at_returns(data, source)
            return
        while data:
            number += 1
            line = Line(number, data)
            yield line
            if line.is_too_long:
                _skip_rest(data, source, f"{label}:{number}")
            data = source.readline(LIMIT_BYTES + 1)
    except OSError as error:
        why = error.strerror or str(error)
        hint = "check its disk and its permissions"
        raise UsageError("unreadable prompts", which=label, why=why, hint=hint) from error


def _check_encoding(data: bytes, label: str) -> None:
    """Raise `UsageError` for a source that begins with the mark of UTF-16 or UTF-32."""
    for mark, name in OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise UsageError(
                "the rows are not UTF-8", which=label, why=f"it is {name}", hint="save it as UTF-8"
            )


def _split_at_returns(data: bytes, source: BinaryIO) -> Iterator[Line]:
    """Yield the lines of a source whose lines end in carriage returns alone, as on old Macs."""
    number = 0
    while data:
        *whole, rest = data.split(b"\r")
        for each in whole:
            number += 1
            yield Line(number, each + b"\n")
        more = source.readline(LIMIT_BYTES)
        if not more or len(rest) > LIMIT_BYTES:
            yield Line(number + 1, rest)
            return
        data = rest + more


def _skip_rest(data: bytes, source: BinaryIO, where: str) -> None:
    """Read what remains of a line that is too long; raises `UsageError` if that is endless."""
    size_bytes = len(data)
    while data and not data.endswith(b"\n"):
        if size_bytes > MAX_LINE_BYTES:
            why = f"more than {MAX_LINE_BYTES >> 20} MiB without a line end"
            raise UsageError("these are no rows", which=where, why=why, hint="one prompt a line")
        data = source.readline(LIMIT_BYTES)
        size_bytes += len(data)


def _read_records(
    lines: Iterator[Line], name: str, label: str, *, comments: bool
) -> Iterator[Record]:
    """Yield what every row says, by the format that the extension or the first line tells."""
    suffix = PurePath(name).suffix.lower()
    if suffix in DELIMITERS:
        yield from _read_csv(lines, DELIMITERS[suffix], label, comments=comments)
        return
    parse: Callable[[Line], Settings] | None = None
    if suffix in JSON_SUFFIXES:
        parse = _parse_json
    elif suffix == ".txt":
        parse = _parse_text
    may_be_list = suffix == ".json" or parse is None
    for line in lines:
        if _says_nothing(line, comments=comments):
            continue
        begins = line.decode("replace")
        if may_be_list and (suffix == ".json" or LIST_BEGINS.match(begins)):
            yield from _read_json(chain([line], lines), label, comments=comments)
            return
        may_be_list = False
        if parse is None:
            parse = _parse_json if begins.lstrip().startswith("{") else _parse_text
        try:
            yield Record(line.number, parse(line))
        except ExplainedError as error:
            yield Record(line.number, error)


def _says_nothing(line: Line, *, comments: bool) -> bool:
    """Return whether a line is blank, or with `comments` a note."""
    return line.is_blank or (comments and line.data.lstrip().startswith(b"#"))


# --- text and JSON


def _parse_text(line: Line) -> Settings:
    return {"prompt": line.text().removesuffix("\n").removesuffix("\r")}


def _read_json(lines: Iterator[Line], label: str, *, comments: bool) -> Iterator[Record]:
    """Yield the rows of a JSON document: those of a list, one object, or an object a line.

    Raises `UsageError` for a list that is too long, and for one that is no JSON as a whole.
    """
    kept: list[Line] = []
    size_bytes = 0
    for line in lines:
        size_bytes += len(line.data)
        if line.is_too_long or size_bytes > MAX_JSON_BYTES:
            hint = "a .jsonl file has an object a line, without an end"
            why = (
                f"more than {MAX_JSON_BYTES >> 20} MiB, or a line of more than {LIMIT_BYTES >> 20}"
            )
            raise UsageError("the list is too long", which=label, why=why, hint=hint)
        if not _says_nothing(line, comments=comments):
            kept.append(line)
    try:
        value = _load_json("".join(line.text() for line in kept))
    except ExplainedError as error:
        if LIST_BEGINS.match(kept[0].decode("replace")):
            hint = '[{"prompt": "a red circle", "seed": 1}, ...]'
            raise UsageError(
                "the list is not JSON", which=label, why=error.why, hint=hint
            ) from error
        value = None
    if isinstance(value, list):
        for k, each in enumerate(value, start=1):
            yield Record(f"item {k}", _check_object(each, "item"))
    elif isinstance(value, dict):
        yield Record(kept[0].number, value)
    else:
        for line in kept:
            try:
                yield Record(line.number, _parse_json(line))
            except ExplainedError as error:
                yield Record(line.number, error)


def _parse_json(line: Line) -> Settings:
    """Return the object of a line; raises `UsageError` for anything else, and for repeated keys."""
    found = _check_object(_load_json(line.text().rstrip()), "line")
    if isinstance(found, ExplainedError):
        raise found
    return found


def _load_json(text: str) -> Any:
    """Return the value of a JSON text; raises `UsageError`."""
    try:
        return json.loads(text, object_pairs_hook=_make_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if error.lineno > 1:
            place = f"line {error.lineno}, {place}"
        why = f"{error.msg} at {place}"
        raise UsageError("the line is not JSON", why=why, hint=JSON_HINT) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        raise UsageError("the line is not usable JSON", why=str(error), hint=JSON_HINT) from error


def _check_object(value: Any, what: str) -> Settings | UsageError:
    """Return the value if it is an object, else the error that says so."""
    if isinstance(value, dict):
        return value
    return UsageError(f"the {what} is no JSON object", hint=JSON_HINT)


def _make_object(pairs: list[tuple[str, Any]]) -> Settings:
    _check_unique([key for key, _ in pairs], "key")
    return dict(pairs)


def _refuse_constant(text: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have but Python's reader takes."""
    why = f"{text} is none of its numbers"
    raise UsageError("the line is not JSON", why=why, hint=JSON_HINT)


def _check_unique(names: list[str], what: str) -> None:
    """Raise `UsageError` naming the first name that stands twice."""
    for name, count in Counter(names).items():
        if count > 1:
            hint = f"give each {what} once"
            raise UsageError(f"a repeated {what}", why=repr(name[:60]), hint=hint)


# --- CSV


def _read_csv(
    lines: Iterator[Line], delimiter: str, label: str, *, comments: bool
) -> Iterator[Record]:
    """Yield the records below the header; raises `UsageError` where that is not usable.

    What the header has most of separates the columns: commas, semicolons or tabs; `delimiter` does
    if it has none. Excel may say it in a line before, such as sep=;
    """
    header: list[str] | None = None
    for line in lines:
        if _says_nothing(line, comments=comments):
            continue
        try:
            if header is None:
                text = line.decode("replace")
                if match := SEPARATOR_LINE.fullmatch(text):
                    delimiter = match[1]
                    continue
                delimiter = max((delimiter, *SEPARATORS), key=text.count)
                header = _parse_header(_read_cells(line, lines, delimiter))
                continue
            cells = _read_cells(line, lines, delimiter)
            if any(cell.strip() for cell in cells):  # spreadsheets write empty rows as ,,
                yield Record(line.number, _name_cells(header, cells))
        except ExplainedError as error:
            if header is None:
                which = f"{label}:{line.number}"
                why = str(error)
                raise UsageError(
                    "no usable header", which=which, why=why, hint=error.hint
                ) from error
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
        hint = "the first line names the columns: prompt,seed"
        raise UsageError("a column without a name", why=why, hint=hint)
    _check_unique(names, "column")
    for name in names:
        if name != "prompt":
            find_name(name, where="header", also=("prompt",))
    return names


def _name_cells(header: list[str], cells: list[str]) -> Settings:
    """Return the cells that are not empty by their columns; raises `UsageError` for too many."""
    if any(cell.strip() for cell in cells[len(header) :]):
        why = f"{len(cells)} cells, {len(header)} columns"
        hint = "a cell with a comma is in quotes"
        raise UsageError("more cells than columns", why=why, hint=hint)
    return {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


# --- what other tools take for more than words

OTHER_FLAGS = re.compile(
    r"(?<!\S)--(n|w|h|s|d|l|g|ar|prompt|negative[-_]prompt|steps|width|height|seed|cfg[-_]scale"
    r"|sampler[-_]name|batch[-_]size|styles)\s+\S"
)


def find_advice(prompt: str) -> str:
    """Return what to do about a prompt that means more to other tools than words; "" for none."""
    if OTHER_FLAGS.search(prompt):
        return (
            "flags in a prompt, as kohya's and A1111's files have them, are drawn as words; give"
            ' them as columns of CSV or as JSON: {"prompt": "a fox", "width": 512, "steps": 28}'
        )
    if prompt.startswith("#"):
        return "a prompt that begins with # is drawn; --comments leaves such lines out"
    return ""


# --- chunks


def is_streaming(source: BinaryIO) -> bool:
    """Return whether a read may wait: of a pipe, a terminal or a device.

    It does not of a regular file, nor of bytes in memory.
    """
    try:
        return not stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except OSError:  # io.UnsupportedOperation, of bytes in memory, is one
        return False


def check_file_size(source: BinaryIO, name: str) -> None:
    """Raise `UsageError` for a file of more than `MAX_FILE_BYTES`."""
    size_bytes = os.fstat(source.fileno()).st_size
    if size_bytes > MAX_FILE_BYTES:
        why = f"{size_bytes >> 20} MiB, at most {MAX_FILE_BYTES >> 20} are taken"
        raise UsageError("the rows are too many", which=name, why=why, hint="split the file")


class _Ahead(io.RawIOBase):
    """A stream that a thread reads ahead, so that what is endless is told from what is slow.

    Where more than `MAX_AHEAD_BYTES` wait to be drawn (of /dev/zero, or of `yes`), `check` raises
    `UsageError`.
    """

    def __init__(self, source: BinaryIO, label: str) -> None:
        super().__init__()
        self._source = source
        self._label = label
        self._blocks: Queue[bytes | OSError] = Queue()
        self._rest = b""
        self._arrived_bytes = 0
        self._taken_bytes = 0
        Thread(target=self._fill, name="stream", daemon=True).start()

    @property
    def _is_endless(self) -> bool:
        return self._arrived_bytes - self._taken_bytes > MAX_AHEAD_BYTES

    def _fill(self) -> None:
        """Read blocks until the stream ends or is too far ahead; an empty one is its end."""
        block = b"?"
        try:
            while block and not self._is_endless:
                block = self._source.read1(BLOCK_BYTES)  # type: ignore[attr-defined]
                self._arrived_bytes += len(block)
                self._blocks.put(block)
        except (OSError, ValueError) as error:  # the latter: it is closed
            self._blocks.put(OSError(str(error)))

    def readable(self) -> bool:
        return True

    def check(self) -> None:
        """Raise `UsageError` where the stream is too far ahead."""
        if self._is_endless:
            why = f"more than {MAX_AHEAD_BYTES >> 20} MiB wait to be drawn"
            raise UsageError("the rows have no end", which=self._label, why=why, hint="give a file")

    def readinto(self, buffer: Any) -> int:
        """Take bytes that are there, or wait for some; raises OSError."""
        if not self._rest:
            found = self._blocks.get()
            if isinstance(found, OSError):
                raise found
            self._rest = found
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        self._taken_bytes += len(taken)
        return len(taken)


class _Stream(io.BufferedReader):
    """The lines of a stream that is read ahead."""

    raw: _Ahead

    def readline(self, size: int | None = -1) -> bytes:
        """Return a line; raises `UsageError` where the stream is too far ahead, and OSError."""
        self.raw.check()
        return super().readline(size)


def read_stream(source: BinaryIO, name: str) -> BinaryIO:
    """Return a stream that has the bytes of another one, and an end where that has none."""
    return _Stream(_Ahead(source, name), BLOCK_BYTES)


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
