"""Prompt embeddings on disk: as written or absent, never an error, within the limit, nobody else's to read."""

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fluxcli import paths
from fluxcli.cli import cache
from fluxcli.engine import prompt_cache as embeddings
from fluxcli.engine.prompt_cache import Embeddings, key_of, read, write
from tests.support.invariant import Fault, files

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
KEY, OTHER = key_of(text="a fox"), key_of(text="a hare")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")
patient = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(seed: int = 0, tokens: int = 4, dtype: torch.dtype = torch.bfloat16, lost: str = "") -> Embeddings:
    """Embeddings of any bits at all, NaN among them."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((1, 8), (1, tokens, 8))
    pooled, sequence = (
        torch.randint(-(2**15), 2**15, shape, dtype=DTYPES[dtype], generator=draw).view(dtype) for shape in shapes
    )
    return Embeddings(pooled, sequence, lost)


def bits(found: Embeddings | None) -> tuple | None:
    """What can be compared, NaN and all."""
    if found is None:
        return None
    pair = (found.pooled, found.sequence)
    return tuple((each.dtype, each.view(DTYPES[each.dtype]).tolist()) for each in pair), found.lost


def path_of(key: str = KEY) -> Path:
    return embeddings.folder() / f"{key}.safetensors"


def forged(key: str, found: Embeddings, **more: torch.Tensor) -> bytes:
    """A file as `write` makes it, of things that it would refuse."""
    tensors = {"pooled": found.pooled, "sequence": found.sequence, **more}
    return save(tensors, {embeddings.DESCRIPTION: embeddings._description(key, found)})


def in_a_child(work: Callable[[], None]) -> int:
    """Fork a process that does this work: its id; it exits 0, or 1 and says why."""
    if pid := os.fork():
        return pid
    code = 1
    signal.alarm(60)
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing else would show it
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# --- the round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lost", ["", "the end of it", 'ü 🦊 "\\ \n\0', "\udcff"])
def test_what_is_written_is_read_bit_for_bit(dtype, lost):
    first = made(1, 5, dtype, lost)
    assert read(KEY) is None
    write(KEY, first)
    write(OTHER, made(2, 3, dtype))
    found = read(KEY)
    assert bits(found) == bits(first) and bits(read(OTHER)) == bits(made(2, 3, dtype))
    assert found.pooled.device.type == found.sequence.device.type == "cpu"
    write(KEY, made(3))  # replaces it
    assert bits(read(KEY)) == bits(made(3)) and len(embeddings.entries()) == 2


def test_parts_of_other_tensors_and_those_with_gradients_are_written_as_they_look():
    whole = torch.randn(3, 9, 8, requires_grad=True)
    given = Embeddings(whole[:1, 0], whole[1:2, ::2].transpose(1, 2))
    write(KEY, given)
    found = read(KEY)
    assert torch.equal(found.pooled, given.pooled) and torch.equal(found.sequence, given.sequence)


def test_tensors_outlive_their_file():
    write(KEY, made(tokens=4096))
    found = read(KEY)
    with path_of().open("r+b") as file:
        file.write(bytes(path_of().stat().st_size))
    assert bits(found) == bits(made(tokens=4096)) and read(KEY) is None
    found.pooled.zero_()  # and are the caller's own


# --- the key


values = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False).map(lambda x: x + 0.0)
parts = st.dictionaries(st.sampled_from(["text", "dtype", "adapters", "torch"]), values | st.lists(st.lists(values)))


@patient
@given(parts, parts)
def test_two_keys_are_equal_only_if_all_parts_are(one, other):
    assert (key_of(**one) == key_of(**other)) == (repr(sorted(one.items())) == repr(sorted(other.items())))


@patient
@given(parts.filter(bool), st.data())
def test_any_part_that_differs_gives_another_key(one, data):
    name = data.draw(st.sampled_from(sorted(one)))
    value = data.draw(values.filter(lambda value: repr(value) != repr(one[name])))
    keys = {key_of(**one), key_of(**one | {name: value}), key_of(**one | {"more": value})}
    keys.add(key_of(**{key: each for key, each in one.items() if key != name}))
    assert len(keys) == 4 and all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


def test_the_key_knows_no_order_of_its_parts_and_is_the_same_in_every_process():
    assert key_of(text="ü", scales=(0.5, 1)) == key_of(scales=[0.5, 1], text="ü")
    assert KEY == "6addad6f3cf072cf569455d57cc80dc5fbc6364f6f6de778f1c03be91848d6ea"


def test_no_prompt_is_in_a_file_or_its_name():
    write(key_of(text="SECRET fox, SEEN tail"), made(lost="SEEN tail"))
    ((name, data),) = files(paths.cache_folder()).items()
    assert "SECRET" not in name and b"SECRET" not in data and b"SEEN tail" in data


# --- damage


def test_a_bit_that_flips_anywhere_is_no_entry():
    write(KEY, made(lost="the ünd"))
    path, whole = path_of(), path_of().read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert read(KEY) is None and not path.exists(), (place, bit)
    path.write_bytes(whole)
    assert bits(read(KEY)) == bits(made(lost="the ünd"))


def test_a_file_that_is_cut_or_longer_is_no_entry():
    write(KEY, made())
    path, whole = path_of(), path_of().read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read(KEY) is None and not path.exists(), size
    for more in (b"\0", b" ", whole):
        path.write_bytes(whole + more)
        assert read(KEY) is None and not path.exists()


def test_bytes_that_move_within_a_file_are_no_entry():
    write(KEY, made())
    path, whole, luck = path_of(), path_of().read_bytes(), random.Random(1)
    for _ in range(500):
        start, stop, to = (luck.randrange(len(whole)) for _ in range(3))
        part = whole[min(start, stop) : max(start, stop) + 1]
        damaged = (whole[:to] + part + whole[to + len(part) :])[: len(whole)]
        path.write_bytes(damaged)
        assert (read(KEY) is None) == (damaged != whole) and path.exists() == (damaged == whole)


@pytest.mark.parametrize("said, instead", [(b'"BF16"', b'"F16" '), (b"[1,4,8]", b"[1,8,4]"), (b"[1,8]", b"[8,1]")])
def test_the_same_bits_in_another_dtype_or_shape_are_no_entry(said, instead):
    write(KEY, made())
    whole = path_of().read_bytes()
    assert said in whole
    path_of().write_bytes(whole.replace(said, instead))
    assert read(KEY) is None


good = made(1)
WRONG = {
    "another key's": forged(OTHER, good),
    "two prompts": forged(KEY, Embeddings(good.pooled.expand(2, 8).clone(), good.sequence.expand(2, 4, 8).clone())),
    "a flat sequence": forged(KEY, Embeddings(good.pooled, good.sequence[0])),
    "a deep pooled": forged(KEY, Embeddings(good.sequence.clone(), good.sequence)),
    "float64": forged(KEY, Embeddings(good.pooled.double(), good.sequence)),
    "integers": forged(KEY, Embeddings(good.pooled, good.sequence.view(torch.int16))),
    "more tensors": forged(KEY, good, more=torch.zeros(1)),
    "no description": save({"pooled": good.pooled, "sequence": good.sequence}),
    "one tensor": save({"pooled": good.pooled}, {embeddings.DESCRIPTION: embeddings._description(KEY, good)}),
    "swapped": save({"pooled": good.sequence, "sequence": good.pooled}, {embeddings.DESCRIPTION: "{}"}),
    "nothing": b"",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a deep header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a vast header": (2**63).to_bytes(8, "little") + b"{}",
    "a header of no object": (2).to_bytes(8, "little") + b"[]",
    "half bytes": (64).to_bytes(8, "little") + b'{"pooled":{"dtype":"F4","shape":[1,8],"data_offsets":[0,4]}}    0000',
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_another_file_in_the_place_is_no_entry(name):
    write(KEY, made())
    path_of().write_bytes(WRONG[name])
    assert read(KEY) is None and not path_of().exists()
    path_of().write_bytes(forged(KEY, good))  # the way to forge one is not what is refused
    assert bits(read(KEY)) == bits(good)


def test_a_file_beyond_the_limit_is_not_even_loaded(monkeypatch):
    write(KEY, made())
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", path_of().stat().st_size - 1)
    assert read(KEY) is None and not path_of().exists()


@posix
@pytest.mark.parametrize(
    "what", ["a folder", "a full folder", "a pipe", "a full pipe", "a link", "a dangling link", "a device"]
)
def test_what_is_no_file_is_no_entry_and_nobody_waits_for_it(what, tmp_path, request):
    write(OTHER, made())
    path, elsewhere = path_of(), tmp_path / "elsewhere"
    elsewhere.write_bytes(forged(KEY, made()))
    match what:
        case "a folder":
            path.mkdir()
        case "a full folder":
            (path / "below").mkdir(parents=True)
            (path / "below" / "file").touch()
        case "a pipe":
            os.mkfifo(path)
        case "a full pipe":
            os.mkfifo(path)
            held = os.open(path, os.O_RDWR)
            os.write(held, elsewhere.read_bytes())
            request.addfinalizer(lambda: os.close(held))
        case "a device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to(elsewhere if what == "a link" else tmp_path / "none")
    found = [good]
    reader = threading.Thread(target=lambda: found.append(read(KEY)), daemon=True)
    reader.start()
    reader.join(20)
    assert found == [good, None] and not os.path.lexists(path)
    assert elsewhere.read_bytes() == forged(KEY, made()) and read(OTHER)
    write(KEY, made(7))
    assert bits(read(KEY)) == bits(made(7))


# --- the limit


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
    """(entry, tokens to write, or None to read): the oldest went, no more than had to, whatever was done."""
    embeddings.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "LIMIT_BYTES", limit := size_of(4) + size_of(30))
        expected: dict[str, int] = {}  # tokens by key, the last used last
        for clock, (n, tokens) in enumerate(steps):
            key = key_of(n=n)
            if tokens is None:
                assert bits(read(key)) == (bits(made(n, expected[key])) if key in expected else None)
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
            found = [(path, size) for _, size, path in embeddings.entries()]
            assert sum(size for _, size in found) <= limit
            assert found == [(path_of(key), size_of(tokens)) for key, tokens in expected.items()]


def test_an_entry_beyond_the_limit_is_not_written_and_no_other_goes(monkeypatch):
    write(OTHER, made())
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", size_of(30) - 1)
    write(KEY, made(tokens=30))
    assert list(files(embeddings.folder())) == [path_of(OTHER).name]
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", size_of(30))
    write(KEY, made(tokens=30))
    assert list(files(embeddings.folder())) == [path_of(KEY).name]


def test_leftovers_count_and_only_the_old_ones_go(monkeypatch):
    write(OTHER, made())
    os.utime(path_of(OTHER), (1000, 1000))
    young, old, ahead = (embeddings.folder() / f".flux-{n:012x}.tmp" for n in range(3))
    for path, age in ((young, 3500), (old, 3700), (ahead, -3700)):
        path.write_bytes(bytes(size_of(4)))
        os.utime(path, (time.time() - age,) * 2)
    strangers = {"notes.tmp", ".flux-notes"}
    for name in strangers:
        (embeddings.folder() / name).write_bytes(bytes(10_000))
        os.utime(embeddings.folder() / name, (1000, 1000))
    stay = strangers | {path_of().name, young.name}
    for limit, more in ((3, {path_of(OTHER).name}), (2, set()), (1, set())):
        monkeypatch.setattr(embeddings, "LIMIT_BYTES", limit * size_of(4))
        write(KEY, made())
        assert set(files(embeddings.folder())) == stay | more


def test_the_new_one_stays_after_the_clock_was_put_back(monkeypatch):
    monkeypatch.setattr(embeddings, "LIMIT_BYTES", size_of(4))
    write(OTHER, made())
    os.utime(path_of(OTHER), (time.time() + 9999,) * 2)
    write(KEY, made())
    assert list(files(embeddings.folder())) == [path_of().name]


@posix
def test_a_link_counts_as_itself_and_only_itself_is_deleted(tmp_path):
    write(KEY, made())
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    path_of(OTHER).symlink_to(tmp_path / "large")
    path_of("2" * 64).symlink_to("nowhere")
    for foreign in ("mine.safetensors", "0.safetensors", ".flux-x.tmp"):
        (embeddings.folder() / foreign).write_bytes(b"")
    count, nbytes = embeddings.clear()
    assert count == 3 and nbytes < 1 << 20 and (tmp_path / "large").exists() and embeddings.entries() == []
    assert len(list(embeddings.folder().iterdir())) == 3


def test_an_error_of_the_moment_deletes_no_entry(monkeypatch):
    write(KEY, made())
    with monkeypatch.context() as full:
        full.setattr(embeddings, "_open", lambda *_: os.open("/nowhere/" * 2000, os.O_RDONLY))  # ENAMETOOLONG
        assert embeddings.read(KEY) is None
    assert embeddings.read(KEY)


# --- others at the same time, and failures


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
    looked = embeddings.entries

    def vanish() -> list:
        found = looked()
        for _, _, path in found[:2]:
            path.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "entries", vanish)
        write(KEY, made())
    assert read(KEY) and len(embeddings.entries()) == 1
    write(OTHER, made())
    really = os.scandir

    @contextlib.contextmanager
    def slow(folder: Path) -> Iterator[list]:
        with really(folder) as found:
            first, *others = list(found)
        os.unlink(first)
        yield [first, *others]

    monkeypatch.setattr(os, "scandir", slow)
    assert len(embeddings.entries()) == 1


@posix
def test_a_process_that_is_killed_in_mid_write_leaves_no_bad_entry_and_its_rest_goes_later(monkeypatch):
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
        for _, _, path in embeddings.entries():
            if path.suffix == ".tmp":
                left += 1
                os.utime(path, (1000, 1000))
        write(OTHER, made())
        assert set(files(embeddings.folder())) <= {path_of().name, path_of(OTHER).name}
        path_of().unlink(missing_ok=True)
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
        assert list(files(paths.cache_folder())) == [f"embeddings/{path_of().name}"] * placed, names[:k]
        assert bits(read(KEY)) == (bits(made()) if placed else None)
    assert {"mkdir", "open", "write", "fsync", "replace"} <= set(names)


@posix
@pytest.mark.parametrize("place", ["/proc/none", "a file", "no home"])
def test_without_a_place_there_is_no_cache_and_nothing_is_said(place, monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("kept")
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", place.replace("a file", str(tmp_path / "file")))
    before = files(tmp_path)
    write(KEY, made())
    assert read(KEY) is None and embeddings.entries() == [] and embeddings.clear() == (0, 0)
    assert files(tmp_path) == before and list(Path().iterdir()) == [] and capfd.readouterr() == ("", "")


def test_a_folder_that_is_only_readable_is_read(monkeypatch):
    write(KEY, made())
    before = files(embeddings.folder())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    for name in ("unlink", "utime", "replace", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    really = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: refuse() if flags & 3 else really(path, flags, *mode))
    write(OTHER, made())
    assert bits(read(KEY)) == bits(made()) and read(OTHER) is None and embeddings.clear() == (0, 0)
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
    assert app(args=list(arguments), standalone_mode=False) == 0
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
    assert json.loads(line) == {"folder": place, "entries": 2, "bytes": size, "limit_bytes": 1 << 30}
    assert len(files(embeddings.folder())) == 2


def test_clear_deletes_entries_and_leftovers_and_says_so(capsys):
    place = str(embeddings.folder())
    for tokens, key in ((4, KEY), (1 << 17, OTHER)):
        write(key, made(tokens=tokens))
    (embeddings.folder() / ".flux-0123.tmp").write_bytes(bytes(1 << 20))
    (embeddings.folder() / "mine.txt").write_text("kept")
    assert run(capsys, "--clear") == ([place, "entries 0, 0.0 of 1024 MiB"], "flux: deleted 3 entries, 3.0 MiB\n")
    assert list(files(paths.cache_folder())) == [os.path.join("embeddings", "mine.txt")]
    write(KEY, made())
    (line,), said = run(capsys, "--clear", "--json")
    gone = {"entries": 0, "bytes": 0, "deleted": 1, "deleted_bytes": size_of(4)}
    assert json.loads(line) == {"folder": place, "limit_bytes": 1 << 30, **gone} and "deleted 1 entries" in said


def test_a_folder_cannot_command_the_terminal(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "\x1b[31m"))
    assert run(capsys)[0][0] == str(tmp_path / "?[31m" / "flux" / "embeddings")
