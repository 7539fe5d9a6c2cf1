"""Files of rows: text, JSON lines and CSV, each line a row or an error of its own."""

import contextlib
import csv
import io
import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxcli.errors import UsageError
from fluxcli.request import rows as batch
from fluxcli.request.job import Row
from fluxcli.request.rows import BOM, LIMIT_BYTES


def read(data: bytes | str, name: str = "x.txt", make: Callable = dict) -> list[Row]:
    """The rows of these bytes; their requests are plain settings."""
    raw = data.encode() if isinstance(data, str) else data
    return list(batch.read_rows(io.BytesIO(raw), name, make))


def requests(rows: list[Row]) -> list:
    """Settings, or the text of the error."""
    return [str(row.error) if row.error else row.order for row in rows]


def prompts(*texts: str) -> list[dict]:
    return [{"prompt": text} for text in texts]


JSONL = '{"prompt": "a", "seed": 1}\n{"prompt": "b"}\n'
AS_JSON = [{"prompt": "a", "seed": 1}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("x.txt", "a\nb\n", prompts("a", "b")),
        ("x", "a\nb", prompts("a", "b")),
        ("x.txt", '{"prompt": "a"}\n', prompts('{"prompt": "a"}')),
        ("x.txt", "a,b\n# c\n", prompts("a,b", "# c")),
        ("x.jsonl", JSONL, AS_JSON),
        ("x.NDJSON", JSONL, AS_JSON),
        ("x.csv", "prompt,seed\na,1\nb,\n", [{"prompt": "a", "seed": "1"}, {"prompt": "b"}]),
        ("x.TSV", "prompt\tseed\na, b\t1\n", [{"prompt": "a, b", "seed": "1"}]),
        ("-", "a\n{b\n", prompts("a", "{b")),
        ("-", " \n\n" + JSONL, AS_JSON),
        ("-", BOM + " " + JSONL, AS_JSON),
        ("-", "prompt,seed\n", prompts("prompt,seed")),
    ],
)
def test_the_extension_decides_the_format_and_on_stdin_the_first_line(name, data, expected):
    assert requests(read(data, name)) == expected


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "-"])
@pytest.mark.parametrize("mark", ["", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_marks_line_ends_and_blank_lines_are_no_part_of_a_prompt(name, mark, end, last):
    is_json = name in ("x.jsonl", "-")
    lines = [
        "",
        *["prompt"] * (name == "x.csv"),
        '{"prompt": "ä 🦊"}' if is_json else "ä 🦊",
        "  \t",
    ]
    lines += ['{"prompt": "b"}' if is_json else "b", " " * 3][: 1 + last]
    data = mark + end.join(lines)
    rows = read(data, name)
    assert requests(rows) == prompts("ä 🦊", "b")
    first = 3 if name == "x.csv" else 2
    assert [(row.number, row.where) for row in rows] == [
        (1, f"{'stdin' if name == '-' else name}:{first}"),
        (2, f"{'stdin' if name == '-' else name}:{first + 2}"),
    ]


def test_a_mark_counts_on_the_first_line_only_and_inner_spaces_stay():
    assert requests(read(f"{BOM}{BOM}a\n{BOM}b\n  c \td \n")) == prompts(
        f"{BOM}a", f"{BOM}b", "  c \td "
    )


def test_only_a_newline_ends_a_line():
    text = "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h"
    assert requests(read(f"{text}\r\n{text}\r")) == prompts(text, text)


WRONG = {
    "no UTF-8": ("x.txt", b"abc\xffd", "not UTF-8", "byte offset 3 of line 2"),
    "no UTF-8, cut": ("x.txt", "ab狐".encode()[:-1], "not UTF-8", "byte offset 2 of line 2"),
    "no UTF-8 JSON": ("x.jsonl", b'{"prompt": "\xff"}', "not UTF-8", "byte offset 12"),
    "UTF-16": ("x.txt", "äb".encode("utf-16"), "not UTF-8", "byte offset 0"),
    "bad JSON": ("x.jsonl", b'{"prompt": "a",}', "not JSON", "column"),
    "two values": ("x.jsonl", b'{"prompt": "a"} {}', "not JSON", "column 17"),
    "no JSON": ("x.jsonl", b"a fox", "not JSON", "column 1"),
    "NaN": ("x.jsonl", b'{"guidance": NaN}', "not JSON", "NaN is none"),
    "Infinity": ("x.jsonl", b'{"guidance": -Infinity}', "not JSON", "-Infinity is none"),
    "a key twice": (
        "x.jsonl",
        b'{"prompt": "a", "seed": 1, "seed": 2}',
        "a repeated key",
        "'seed'",
    ),
    "a key twice within": ("x.jsonl", b'{"prompt": {"a": 1, "a": 2}}', "a repeated key", "'a'"),
    "deep": ("x.jsonl", b'{"a":' * 200_000, "not usable JSON", "recursion"),
    "deep lists": ("x.jsonl", b"[" * 200_000, "not usable JSON", "recursion"),
    "many digits": ("x.jsonl", b'{"seed": ' + b"9" * 5000 + b"}", "not usable JSON", "digits"),
    "a list": ("x.jsonl", b'["a"]', "no JSON object", ""),
    "a text": ("x.jsonl", b'"a"', "no JSON object", ""),
    "null": ("x.jsonl", b"null", "no JSON object", ""),
    "long": ("x.txt", b"a" * (LIMIT_BYTES + 1), "too long", "1,048,576"),
    "long JSON": ("x.jsonl", b'{"prompt": "' + b"a" * LIMIT_BYTES + b'"}', "too long", "1,048,576"),
    "long blank": ("x.txt", b" " * (LIMIT_BYTES + 1), "too long", "1,048,576"),
    "extra cells": ("x.csv", b"a,1,2", "more cells", "3 cells, 2 columns"),
    "cells outside quotes": ("x.csv", b'"a"b,1', "not CSV", "expected after"),
    "no UTF-8 CSV": ("x.csv", b"ab\xff,1", "not UTF-8", "byte offset 2 of line 2"),
    "a return in a cell": ("x.csv", b"a\rb,1", "not CSV", "new-line"),
    "a long cell": ("x.csv", b"a" * 200_000 + b",1", "not CSV", "field limit"),
    "long CSV": ("x.csv", b"a" * (LIMIT_BYTES + 1), "too long", "1,048,576"),
}


@pytest.mark.parametrize("name, line, what, why", WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_an_error_of_its_row_and_the_rest_goes_on(name, line, what, why):
    good = b'{"prompt": "%s"}' if name == "x.jsonl" else b"%s"
    before = b"prompt,seed" if name == "x.csv" else good % b"before"
    rows = read(b"\n".join([before, line, good % b"one", good % b"two"]), name)
    wrong, *others = rows if name == "x.csv" else rows[1:]
    assert (
        isinstance(wrong.error, UsageError) and wrong.order is None and wrong.where == f"{name}:2"
    )
    assert what in str(wrong.error) and why in str(wrong.error)
    assert requests(others) == prompts("one", "two")
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert [row.where for row in others] == [f"{name}:3", f"{name}:4"]


def test_what_makes_requests_may_refuse_a_row_but_a_bug_is_no_row():
    def make(settings: dict) -> dict:
        if settings["prompt"] == "b":
            raise UsageError("no b")
        return {"c": lambda: 1 / 0}.get(settings["prompt"], lambda: settings)()

    found = batch.read_rows(io.BytesIO(b"a\nb\nc\n"), "x.txt", make)
    assert next(found).order == {"prompt": "a"}
    row = next(found)
    assert row.order is None and str(row.error) == "no b" and row.where == "x.txt:2"
    with pytest.raises(ZeroDivisionError):
        next(found)


@pytest.mark.parametrize("name", ["x.txt", "x.csv"])
def test_a_line_of_just_the_limit_is_taken_and_one_byte_more_swallows_nothing(name):
    head = b"" if name == "x.txt" else b"prompt\n"
    # with its end: just the limit; a CSV cell of that length is refused
    line = b" " * (LIMIT_BYTES - 5) + b"over"
    fits, over = read(head + line + b"\nafter", name), read(head + b" " + line + b"\nafter", name)
    assert requests(fits)[1:] == requests(over)[1:] == prompts("after")
    assert "too long" in str(over[0].error)
    assert (
        "field limit" in str(fits[0].error)
        if name == "x.csv"
        else fits[0].order["prompt"].endswith("over")
    )


class Endless(io.RawIOBase):
    """A line that begins and never ends; remembers how much was asked for at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def readline(self, size: int = -1) -> bytes:
        self.asked.append(size)
        return b"a" * size


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "-"])
def test_an_endless_line_is_an_error_at_once_and_read_in_pieces(name):
    source = Endless()
    row = next(batch.read_rows(source, name, dict))
    assert "too long" in str(row.error) and source.asked == [LIMIT_BYTES + 1]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_rest_of_a_long_line_is_skipped_in_pieces_to_its_end(end):
    class Asked(io.BytesIO):
        def readline(self, size: int = -1) -> bytes:
            asked.append(size)
            return super().readline(size)

    asked: list[int] = []
    rows = list(batch.read_rows(Asked(b"a" * (3 * LIMIT_BYTES) + end), "x.txt", dict))
    assert len(rows) == 1 and "too long" in str(rows[0].error)
    assert len(asked) < 8 and set(asked) == {LIMIT_BYTES + 1, LIMIT_BYTES}


def test_an_endless_csv_header_ends_the_batch_and_an_endless_record_its_row():
    with pytest.raises(UsageError, match="too long"):
        next(batch.read_rows(Endless(), "x.csv", dict))
    source = Endless()
    real, first = source.readline, iter([b"prompt\n", b'"a\n'])
    source.readline = lambda size: next(first, None) or real(size)
    row = next(batch.read_rows(source, "x.csv", dict))
    assert (
        "too long" in str(row.error)
        and row.where == "x.csv:2"
        and source.asked == [LIMIT_BYTES + 1]
    )


@pytest.mark.parametrize(
    "line, lines, what",
    [
        (b"b" * 1023 + b"\n", 1024, "field limit"),
        (b'x","' + b"b" * 1019 + b"\n", 1024, "record is too long"),
    ],
    ids=["one cell", "many cells"],
)
def test_many_lines_under_an_open_quote_are_bounded_and_rows_come_after_them(line, lines, what):
    rows = read(b'prompt\n"a\n' + line * lines + b"c\n", "x.csv")
    assert (
        what in str(rows[0].error) and "quote" in rows[0].error.hint and rows[0].where == "x.csv:2"
    )
    assert rows[-1].order == {"prompt": "c"} and rows[-1].where == f"x.csv:{lines + 3}"


@pytest.mark.parametrize(
    "data, expected",
    [
        ('prompt,seed\n"a, ""b""\r\nc\n\n d",1\n', [{"prompt": 'a, "b"\r\nc\n\n d', "seed": "1"}]),
        (" prompt , seed \na,1\n", [{"prompt": "a", "seed": "1"}]),
        ('"prompt","seed"\na\n', [{"prompt": "a"}]),
        ("prompt,seed\n , 2\n", [{"seed": " 2"}]),
        (
            'prompt,seed\na,1\n"b\nc,2\n',
            [
                {"prompt": "a", "seed": "1"},
                "the record is not CSV: unexpected end of data; lines 3 to 4 were taken for it",
            ],
        ),
        ('prompt\n"a"\n\n"b"\n', prompts("a", "b")),
        ("prompt,seed\r\n,\r\nb,\r\n ,\r\n", prompts("b")),
        ("prompt;seed\na, b;1\n", [{"prompt": "a, b", "seed": "1"}]),
        ("sep=;\r\nprompt;seed\r\na;1\r\n", [{"prompt": "a", "seed": "1"}]),
        ("prompt\tseed\na\t1\n", [{"prompt": "a", "seed": "1"}]),
        ("prompt,seed\na,1,,\n", [{"prompt": "a", "seed": "1"}]),
        ("prompt,seed\ra,1\rb,2", [{"prompt": "a", "seed": "1"}, {"prompt": "b", "seed": "2"}]),
    ],
)
def test_cells_of_csv(data, expected):
    assert requests(read(data, "x.csv")) == expected


def test_a_record_of_several_lines_is_named_by_its_first():
    rows = read('prompt\n"a\nb"\n\nc,d\n"e\nf', "x.csv")
    assert [row.where for row in rows] == ["x.csv:2", "x.csv:5", "x.csv:6"]
    assert [bool(row.error) for row in rows] == [False, True, True]
    assert "quote" in rows[2].error.hint


def test_bad_bytes_in_a_records_later_line_name_that_line():
    rows = read(b'prompt\n"a\nb\xff"\nc\n', "x.csv")
    assert "byte offset 1 of line 3" in str(rows[0].error) and rows[1].order == {"prompt": "c"}


@pytest.mark.parametrize(
    "header, why",
    [
        ("prompt,,seed", "column 2"),
        ("prompt, ", "column 2"),
        ("prompt,seed, prompt", "'prompt'"),
        ('"prompt', "unexpected end"),
        ('"prompt"x', "expected after"),
        (b"\xff", "byte offset 0"),
        ("promt,seed", "'promt' is no setting"),
        ("a red circle", "'a red circle' is no setting"),
    ],
)
def test_a_bad_header_ends_the_batch_with_its_place(header, why):
    data = b"\n" + (header if isinstance(header, bytes) else header.encode())
    with pytest.raises(UsageError, match="no usable header") as caught:
        read(data + b"\na\n", "d/x.csv")
    assert "d/x.csv:2" in str(caught.value) and why in str(caught.value)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "-"])
@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \t\n"])
def test_no_rows_is_an_error_that_names_the_source(name, data):
    with pytest.raises(UsageError, match="no prompts") as caught:
        read(data, name)
    assert caught.value.which == ("stdin" if name == "-" else name)


def test_a_header_alone_has_no_rows():
    with pytest.raises(UsageError, match="no prompts"):
        read("prompt,seed\n", "x.csv")


def test_only_wrong_rows_are_rows():
    assert len(read("[]\n[]\n", "x.jsonl")) == 2


LIST = '[{"prompt": "a", "seed": 1},\n {"prompt": "b"}, 5]'


@pytest.mark.parametrize("name", ["x.json", "-", "x"])
@pytest.mark.parametrize("mark", ["", BOM, "\n "])
def test_a_json_list_is_its_items(name, mark):
    rows = read(mark + LIST, name)
    label = "stdin" if name == "-" else name
    assert requests(rows) == [*AS_JSON, "the item is no JSON object"]
    assert [row.where for row in rows] == [f"{label}:item {k}" for k in (1, 2, 3)]


def test_a_json_file_may_be_one_object_or_an_object_a_line():
    assert requests(read('{\n "prompt": "a",\n "seed": 1\n}\n', "x.json")) == AS_JSON[:1]
    assert requests(read(JSONL, "x.json")) == AS_JSON
    assert requests(read(f"{JSONL}[]\n", "x.json")) == [*AS_JSON, "the line is no JSON object"]


@pytest.mark.parametrize(
    "data, why",
    [(LIST[:-1], "not JSON"), ("[{}," + " " * batch.MAX_JSON_BYTES, "too long")],
    ids=["cut", "long"],
)
def test_a_list_that_is_none_ends_the_batch(data, why):
    with pytest.raises(UsageError, match=why):
        read(data.replace("     ", "    \n"), "x.json")


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.json", "-"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_end_the_batch_by_their_mark(name, encoding):
    data = (BOM * encoding.endswith("be") + "prompt,seed\na,1\n").encode(encoding)
    with pytest.raises(UsageError, match=encoding[:6].upper()) as caught:
        read(data, name)
    assert caught.value.hint == "save it as UTF-8"


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("x.txt", "# a\na # b\n  # c\nd", prompts("a # b", "d")),
        ("x.csv", "# a\nprompt\n# b\nc\n", prompts("c")),
        ("x.json", "# a\n" + LIST[:-4] + "]", AS_JSON),
        ("-", "# a\n" + JSONL + "# b", AS_JSON),
    ],
)
def test_notes_are_left_out_where_that_is_asked_for(name, data, expected):
    source = io.BytesIO(data.encode())
    assert requests(list(batch.read_rows(source, name, dict, comments=True))) == expected


def test_old_line_ends_separate_prompts():
    assert requests(read("a\rb\r\rc")) == prompts("a", "b", "c")
    assert requests(read("a\r" * 600_000)) == prompts("a") * 600_000


class Zeros(io.RawIOBase):
    """Bytes without an end."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data

    def read1(self, size: int) -> bytes:
        return (self.data * size)[:size]


@pytest.mark.parametrize("data", [b"\0", b"\n", b"y\n", b"{", b"\xff\n", b"prompt\n\n"])
@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.json", "-"])
def test_a_stream_without_an_end_is_refused(name, data):
    found = batch.read_rows(batch.read_stream(Zeros(data), name), name, dict)
    with pytest.raises(UsageError, match=r"have no end|are no rows|no usable header|too long"):
        for _ in found:
            time.sleep(0.001)  # to draw takes longer than to read


def test_a_stream_has_the_bytes_of_its_source():
    data = bytes(range(256)) * 4096
    assert batch.read_stream(io.BytesIO(data), "-").read() == data


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError("gone")])
def test_a_source_that_fails_later_is_an_error_after_its_rows(error):
    class Failing(io.BytesIO):
        def readline(self, size: int = -1) -> bytes:
            if not (data := super().readline(size)):
                raise error
            return data

    found = batch.read_rows(Failing(b"a\nb\n"), "x.txt", dict)
    assert [next(found).order, next(found).order] == prompts("a", "b")
    with pytest.raises(UsageError, match="unreadable prompts") as caught:
        next(found)
    assert caught.value.why == (error.strerror or "gone")


def test_rows_are_read_one_at_a_time():
    class Counting(io.BytesIO):
        count = 0

        def readline(self, size: int = -1) -> bytes:
            self.count += 1
            return super().readline(size)

    for name, head in (("x.txt", b""), ("-", b""), ("x.csv", b"prompt\n")):
        source = Counting(head + b"a\nb\nc\n")
        found = batch.read_rows(source, name, dict)
        assert next(found).order == {"prompt": "a"} and source.count == 1 + bool(head), name


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
# A text of one line with a return in it is a file of an old Mac.
LINE = TEXT.map(lambda text: text.replace("\n", "").replace("\r", "")).filter(str.strip)


@given(texts=st.lists(LINE, min_size=1, max_size=5), end=st.sampled_from(["\n", "\r\n"]))
def test_prompts_survive_text(texts, end):
    assert requests(read(BOM + end.join(texts))) == prompts(*texts)


@given(
    texts=st.lists(TEXT, min_size=1, max_size=5),
    plain=st.booleans(),
    name=st.sampled_from(["x.jsonl", "-"]),
)
def test_prompts_survive_jsonl(texts, plain, name):
    data = "\n".join(json.dumps({"prompt": text, "seed": 1}, ensure_ascii=plain) for text in texts)
    assert requests(read(data, name)) == [{"prompt": text, "seed": 1} for text in texts]


@given(
    texts=st.lists(TEXT, min_size=1, max_size=5),
    kind=st.sampled_from([(".csv", ","), (".tsv", "\t")]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_prompts_survive_csv(texts, kind, end):
    suffix, delimiter = kind
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["seed", "prompt"], *([1, text] for text in texts)])
    assert requests(read(file.getvalue(), f"x{suffix}")) == [
        {"seed": "1", "prompt": text} for text in texts
    ]


@given(
    data=st.binary(max_size=200), name=st.sampled_from(["x.txt", "x.jsonl", "x.csv", "x.tsv", "-"])
)
def test_any_bytes_are_rows_or_a_usage_error(data, name):
    with contextlib.suppress(UsageError):
        for number, row in enumerate(read(data, name), 1):
            assert row.number == number and (row.order is None) == isinstance(row.error, UsageError)
