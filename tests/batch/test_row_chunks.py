"""Rows come in chunks: full ones from a file, without waiting from a stream."""

import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxcli.errors import UsageError
from fluxcli.request import rows as batch
from fluxcli.request.job import Row
from fluxcli.request.rows import is_streaming, make_chunks


def read(data: bytes | str, name: str = "x.txt", make: Callable = dict) -> list[Row]:
    """The rows of these bytes; their requests are plain settings."""
    raw = data.encode() if isinstance(data, str) else data
    return list(batch.read_rows(io.BytesIO(raw), name, make))


def requests(rows: list[Row]) -> list:
    """Settings, or the text of the error."""
    return [str(row.error) if row.error else row.order for row in rows]


def prompts(*texts: str) -> list[dict]:
    return [{"prompt": text} for text in texts]


# Windows


def numbered(count: int) -> Iterator[Row]:
    return (Row(k, None) for k in range(1, count + 1))


def numbers(windows: Iterator[list[Row]]) -> list[list[int]]:
    return [[row.number for row in window] for window in windows]


@given(count=st.integers(0, 20), size=st.integers(1, 8))
def test_windows_of_what_is_there_are_full_but_the_last(count, size):
    expected = [list(range(at, min(at + size, count + 1))) for at in range(1, count + 1, size)]
    assert numbers(make_chunks(numbered(count), size, streaming=False)) == expected


@given(count=st.integers(0, 20), size=st.integers(1, 8))
def test_a_stream_gives_the_same_rows_in_order_within_the_bound(count, size):
    found = numbers(make_chunks(numbered(count), size, streaming=True))
    assert list(itertools.chain(*found)) == list(range(1, count + 1))
    assert all(0 < len(window) <= size for window in found)


def failing(count: int) -> Iterator[Row]:
    yield from numbered(count)
    raise UsageError("cut off")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "count, expected", [(0, []), (2, [[1, 2]]), (3, [[1, 2, 3]]), (4, [[1, 2, 3], [4]])]
)
def test_an_exception_comes_after_the_rows_before_it(streaming, count, expected, monkeypatch):
    monkeypatch.setattr(batch, "PAUSE_S", 30)
    found = make_chunks(failing(count), 3, streaming=streaming)
    assert [[row.number for row in next(found)] for _ in expected] == expected
    with pytest.raises(UsageError, match="cut off"):
        next(found)


def test_without_a_stream_no_thread_is_started_and_nothing_is_read_ahead():
    read_ahead = []
    rows = (read_ahead.append(row.number) or row for row in numbered(9))
    found = make_chunks(rows, 3, streaming=False)
    before = threading.active_count()
    assert len(next(found)) == 3 and read_ahead == [1, 2, 3] and threading.active_count() == before


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batch"]


def ended(within_s: float = 10.0) -> bool:
    """Whether the threads that read ahead are gone in time."""
    until = time.monotonic() + within_s
    for thread in readers():
        thread.join(max(0.0, until - time.monotonic()))
    return not readers()


@pytest.fixture
def pipe() -> Iterator[tuple]:
    """(a file that is read, a descriptor to write to); closed afterwards, and no thread stays."""
    out, into = os.pipe()
    file, held = os.fdopen(out, "rb"), [into]

    def write(data: bytes | None) -> None:
        if data is None:
            os.close(held.pop())
        else:
            os.write(into, data)

    yield file, write
    for descriptor in held:
        os.close(descriptor)
    assert ended()
    file.close()


def test_what_may_wait_is_a_stream(pipe, tmp_path):
    (tmp_path / "x").write_bytes(b"a")
    with (tmp_path / "x").open("rb") as file:
        assert not is_streaming(file)
    assert is_streaming(pipe[0]) and not is_streaming(io.BytesIO(b"a"))
    with open(os.devnull, "rb") as file:
        assert is_streaming(file)


@pytest.mark.parametrize(
    "name, line", [("-", b"%s\n"), ("x.jsonl", b'{"prompt": "%s"}\n'), ("x.csv", b"%s\n")]
)
def test_through_a_pipe_a_row_arrives_before_the_next_is_written(pipe, name, line):
    file, write = pipe
    found = make_chunks(batch.read_rows(file, name, dict), 16, streaming=True)
    write(b"prompt\n" if name == "x.csv" else b"\n")
    for text in (b"a", b"b", b"c"):
        write(line % text)
        assert requests(next(found)) == prompts(text.decode())
    write(line[:1])
    write(None)
    assert len(list(found)) <= 1


def test_a_pause_ends_a_window_and_rows_that_are_there_share_one(pipe, monkeypatch):
    monkeypatch.setattr(batch, "PAUSE_S", 0.5)
    file, write = pipe
    found = make_chunks(batch.read_rows(file, "-", dict), 4, streaming=True)
    write(b"a\nb\nc\n")
    assert requests(next(found)) == prompts("a", "b", "c")
    write(b"d\ne\nf\ng\nh\nunfinished")
    assert requests(next(found)) == prompts("d", "e", "f", "g")
    assert requests(next(found)) == prompts("h")
    write(None)
    assert [requests(window) for window in found] == [prompts("unfinished")]


def test_a_full_window_waits_for_no_pause_and_the_last_for_none(pipe, monkeypatch):
    monkeypatch.setattr(batch, "PAUSE_S", 60)
    file, write = pipe
    found = make_chunks(batch.read_rows(file, "-", dict), 2, streaming=True)
    write(b"a\nb\nc\n")
    assert requests(next(found)) == prompts("a", "b")
    write(None)
    assert [requests(window) for window in found] == [prompts("c")]


def test_an_empty_pipe_is_no_prompts_and_no_window(pipe):
    file, write = pipe
    write(None)
    with pytest.raises(UsageError, match="no prompts"):
        next(make_chunks(batch.read_rows(file, "-", dict), 4, streaming=True))


def test_a_thread_reads_ahead_no_more_than_a_window():
    taken = []
    rows = (taken.append(row.number) or row for row in numbered(10**9))
    found = make_chunks(rows, 4, streaming=True)
    next(found)
    time.sleep(0.2)
    assert 4 < len(taken) <= 4 + 4 + 1
    found.close()
    assert ended() and len(taken) <= 10


@pytest.mark.parametrize("size", [1, 4])
def test_closing_ends_the_thread_that_waits_for_room(size):
    for _ in range(50):
        found = make_chunks(numbered(10**9), size, streaming=True)
        next(found)
        found.close()
    assert ended()


def test_closing_waits_for_no_source_that_has_nothing(pipe):
    file, write = pipe
    found = make_chunks(batch.read_rows(file, "-", dict), 4, streaming=True)
    write(b"a\n")
    next(found)
    since = time.monotonic()
    found.close()
    assert time.monotonic() - since < 5 and all(thread.daemon for thread in readers()) and readers()
    write(b"b\n")  # it finds that it is to stop
    assert ended()


def test_a_consumer_that_raises_ends_the_thread():
    def consume() -> None:
        for _ in make_chunks(numbered(10**9), 2, streaming=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        consume()
    assert ended()
