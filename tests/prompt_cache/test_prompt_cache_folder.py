"""The folder of prompt embeddings: within its limit, shared by processes, nobody else's to read."""

import contextlib
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from fluxcli import paths
from fluxcli.cli import cache
from fluxcli.engine import prompt_cache as embeddings
from fluxcli.engine.prompt_cache import key_of, read, write
from tests.support.invariant import Fault, files
from tests.support.prompt_cache import (
    KEY,
    OTHER,
    bits,
    forged,
    in_a_child,
    made,
    path_of,
    patient,
    posix,
)


def size_of(tokens: int) -> int:
    return len(forged(KEY, made(tokens=tokens)))


def test_a_read_keeps_an_entry_alive_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", 3 * size_of(4))
    keys = [key_of(n=n) for n in range(4)]
    for n, key in enumerate(keys[:3]):
        write(key, made())
        os.utime(path_of(key), (1000 + n, 1000 + n))
    assert read(keys[0])
    write(keys[3], made())
    assert [bool(read(key)) for key in keys] == [True, False, True, True]


@patient
@given(st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 40)), max_size=25))
def test_the_folder_is_within_the_limit_and_holds_the_last_used(quick, steps):
    """A step is (entry, tokens to write, or None to read).

    Whatever was done, the oldest went, and no more than had to.
    """
    embeddings.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "LIMIT_BYTES", limit := size_of(4) + size_of(30))
        expected: dict[str, int] = {}  # tokens by key, the last used last
        for clock, (n, tokens) in enumerate(steps):
            key = key_of(n=n)
            if tokens is None:
                assert bits(read(key)) == (
                    bits(made(n, expected[key])) if key in expected else None
                )
                used = expected.pop(key, None)
            else:
                write(key, made(n, tokens))
                expected.pop(key, None)
                used = tokens
            if used:
                expected[key] = used
                while sum(map(size_of, expected.values())) > limit:
                    del expected[next(iter(expected))]
                os.utime(path_of(key), (1000 + clock, 1000 + clock))
            found = [(entry.path, entry.size_bytes) for entry in embeddings.list_entries()]
            assert sum(size for _, size in found) <= limit
            assert found == [(path_of(key), size_of(tokens)) for key, tokens in expected.items()]


def test_leftovers_of_killed_writers_go_by_their_age_as_entries_do(monkeypatch):
    write(OTHER, made())
    os.utime(path_of(OTHER), (2000, 2000))
    left = embeddings.folder() / ".flux-000000000001.tmp"
    left.write_bytes(bytes(size_of(4)))
    os.utime(left, (1000, 1000))
    strangers = {"notes.tmp", ".flux-notes"}
    for name in strangers:
        (embeddings.folder() / name).write_bytes(bytes(10_000))
        os.utime(embeddings.folder() / name, (100, 100))
    for limit, more in (
        (3, {left.name, path_of(OTHER).name}),
        (2, {path_of(OTHER).name}),
        (1, set()),
    ):
        monkeypatch.setattr(embeddings, "LIMIT_BYTES", limit * size_of(4))
        write(KEY, made())
        assert set(files(embeddings.folder())) == strangers | {path_of().name} | more


@posix
def test_a_link_counts_as_itself_and_only_itself_is_deleted(tmp_path):
    write(KEY, made())
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    path_of(OTHER).symlink_to(tmp_path / "large")
    path_of("2" * 64).symlink_to("nowhere")
    for foreign in ("mine.safetensors", "0.safetensors", ".flux-x.tmp"):
        (embeddings.folder() / foreign).write_bytes(b"")
    gone = embeddings.clear()
    assert len(gone) == 3 and sum(entry.size_bytes for entry in gone) < 1 << 20
    assert (tmp_path / "large").exists() and embeddings.list_entries() == []
    assert len(list(embeddings.folder().iterdir())) == 3


@posix
@pytest.mark.parametrize("level", ["embeddings", "flux"])
def test_nothing_is_kept_or_deleted_where_the_folder_is_a_link(level, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    place = theirs if level == "embeddings" else theirs / "embeddings"
    place.mkdir(parents=True)
    for name in (path_of(KEY).name, ".flux-0123.tmp", "mine.txt"):
        (place / name).write_bytes(b"mine")
    link = embeddings.folder() if level == "embeddings" else embeddings.folder().parent
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(theirs)
    before = files(theirs)
    write(KEY, made())
    assert read(KEY) is None and embeddings.list_entries() == embeddings.clear() == []
    assert "is a link" in run(capsys, "--clear")[1] and files(theirs) == before


# --- others at the same time, and failures


@pytest.mark.serial
@posix
def test_processes_that_share_the_folder_see_good_entries_or_none(quick, monkeypatch):
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", limit := 3 * size_of(512))

    def work(luck: random.Random) -> None:
        hits = 0
        for k in range(250):
            n = luck.randrange(6)
            if luck.random() < 0.5:
                write(key_of(n=n), made(n, 512))
            else:
                found = read(key_of(n=n))
                hits += found is not None
                assert found is None or bits(found) == bits(made(n, 512))
            if k % 50 == 49:
                embeddings.clear()
        assert hits

    children = [in_a_child(lambda seed=seed: work(random.Random(seed))) for seed in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    write(KEY, made())
    left = files(embeddings.folder())
    assert path_of().name in left and all(name.endswith(".safetensors") for name in left)
    assert sum(map(len, left.values())) <= limit
    assert all(read(name.removesuffix(".safetensors")) for name in left)


def test_files_that_vanish_between_two_looks_are_no_error(monkeypatch):
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", 2 * size_of(4))
    for n in range(2):
        write(key_of(n=n), made())
    looked = embeddings.list_entries

    def vanish() -> list:
        found = looked()
        for entry in found[:2]:
            entry.path.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "list_entries", vanish)
        write(KEY, made())
    assert read(KEY) and len(embeddings.list_entries()) == 1
    write(OTHER, made())
    really = os.scandir

    @contextlib.contextmanager
    def slow(folder: Path) -> Iterator[list]:
        with really(folder) as found:
            first, *others = list(found)
        os.unlink(first)
        yield [first, *others]

    monkeypatch.setattr(os, "scandir", slow)
    assert len(embeddings.list_entries()) == 1


@pytest.mark.serial
@posix
def test_a_process_that_is_killed_in_mid_write_leaves_no_bad_entry_and_its_rest_goes_later(
    monkeypatch,
):
    write(OTHER, made())
    first, left, k, ended = made(5), 0, 0, False
    while not ended:
        k += 1

        def work(k: int = k) -> None:
            Fault(k, lambda _: os.kill(os.getpid(), signal.SIGKILL)).install(monkeypatch)
            write(KEY, first)

        status = os.waitpid(in_a_child(work), 0)[1]
        assert status in (0, signal.SIGKILL)
        ended = status == 0
        assert bits(read(KEY)) in (None, bits(first)) and read(OTHER)
        left += sum(entry.path.suffix == ".tmp" for entry in embeddings.list_entries())
        embeddings.clear()
        write(OTHER, made())
        assert set(files(embeddings.folder())) == {path_of(OTHER).name}
    assert left > 3 and k > left


@pytest.mark.parametrize("code", [28, 13, 30], ids=os.strerror)
def test_a_write_that_fails_anywhere_is_no_error_and_leaves_nothing(code):
    def fail(name: str) -> None:
        raise OSError(code, os.strerror(code))

    k, names = 0, []
    while k <= len(names):  # until none failed
        k += 1
        shutil.rmtree(paths.cache_folder(), ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            names = Fault(k, fail).install(patch).names
            write(KEY, made())
        placed = "replace" in names[: k - 1]
        assert list(files(paths.cache_folder())) == [f"embeddings/{path_of().name}"] * placed, (
            names[:k]
        )
        assert bits(read(KEY)) == (bits(made()) if placed else None)
    assert {"mkdir", "open", "write", "fsync", "replace"} <= set(names)


@posix
@pytest.mark.parametrize("place", ["/proc/none", "a file", "no home"])
def test_without_a_place_there_is_no_cache_and_nothing_is_said(place, monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("kept")
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", place.replace("a file", str(tmp_path / "file")))
    before = files(tmp_path)
    write(KEY, made())
    assert read(KEY) is None and embeddings.list_entries() == [] and embeddings.clear() == []
    assert (
        files(tmp_path) == before
        and list(Path().iterdir()) == []
        and capfd.readouterr() == ("", "")
    )


def test_a_folder_that_is_only_readable_is_read(monkeypatch):
    write(KEY, made())
    before = files(embeddings.folder())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    for name in ("unlink", "utime", "replace", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    really = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *mode: refuse() if flags & 3 else really(path, flags, *mode)
    )
    write(OTHER, made())
    assert bits(read(KEY)) == bits(made()) and read(OTHER) is None and embeddings.clear() == []
    path_of().write_bytes(b"damaged")
    assert read(KEY) is None and set(files(embeddings.folder())) == set(before)


@posix
def test_the_folder_is_the_users_alone():
    before = os.umask(0)
    try:
        write(KEY, made())
    finally:
        os.umask(before)
    assert stat.S_IMODE(embeddings.folder().stat().st_mode) == 0o700


# --- the command


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[list[str], str]:
    """(lines of stdout, stderr) of `flux cache ARGUMENTS`."""
    app = typer.Typer()
    app.command("cache")(cache.cache_command)
    capsys.readouterr()
    assert not app(args=list(arguments), standalone_mode=False)
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_the_command_says_what_is_kept_and_where(capsys):
    place = str(embeddings.folder())
    assert run(capsys) == ([place, "entries 0, 0.0 of 1024 MiB"], "")
    write(KEY, made())
    write(OTHER, made(tokens=1 << 17))
    size = size_of(4) + size_of(1 << 17)
    assert run(capsys) == ([place, "entries 2, 2.0 of 1024 MiB"], "")
    (line,), _ = run(capsys, "--json")
    assert json.loads(line) == {
        "folder": place,
        "entries": 2,
        "bytes": size,
        "limit_bytes": 1 << 30,
        "inputs_folder": str(paths.cache_folder() / "inputs"),
        "inputs_bytes": 0,
        "compiled_folder": str(paths.compiled_folder()),
        "compiled_bytes": 0,
    }
    assert len(files(embeddings.folder())) == 2


def test_clear_deletes_entries_and_leftovers_and_says_so(capsys):
    place = str(embeddings.folder())
    for tokens, key in ((4, KEY), (1 << 17, OTHER)):
        write(key, made(tokens=tokens))
    (embeddings.folder() / ".flux-0123.tmp").write_bytes(bytes(1 << 20))
    (embeddings.folder() / "mine.txt").write_text("kept")
    assert run(capsys, "--clear") == (
        [place, "entries 0, 0.0 of 1024 MiB"],
        "flux: deleted 3 entries, 3.0 MiB\n",
    )
    assert list(files(paths.cache_folder())) == [os.path.join("embeddings", "mine.txt")]
    write(KEY, made())
    (line,), said = run(capsys, "--clear", "--json")
    assert json.loads(line) == {
        "folder": place,
        "entries": 0,
        "bytes": 0,
        "limit_bytes": 1 << 30,
        "inputs_folder": str(paths.cache_folder() / "inputs"),
        "inputs_bytes": 0,
        "compiled_folder": str(paths.compiled_folder()),
        "compiled_bytes": 0,
        "deleted": 1,
        "deleted_bytes": size_of(4),
        "deleted_inputs_bytes": 0,
        "deleted_compiled_bytes": 0,
    }
    assert "deleted 1 entries" in said


def test_a_folder_cannot_command_the_terminal(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "\x1b[31m"))
    assert run(capsys)[0][0] == str(tmp_path / r"\x1b[31m" / "flux" / "embeddings")
