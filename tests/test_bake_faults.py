"""Whatever happens to a bake, its target is absent, the old one or the new one.

Nothing else is left beside it.
"""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch

from quant.bake import bake
from quant.errors import CheckpointError, WriteError
from quant.files import COPY_BYTES, Unchanged
from quant.placing import LOCK, NEW, OLD, STALE_S, remove_remains
from quant.recipe import Recipe
from tests.support.bakes import (
    ORIGIN,
    Hook,
    age,
    bake_all,
    change,
    content,
    put_old,
    recipe_of,
)
from tests.support.helpers import ROOT
from tests.support.invariant import files

KINDS = ["diffusers", "comfy"]
# Kinds of result, and whether an old one is there.
CASES = [(kind, replaces) for kind in KINDS for replaces in (False, True)]


@pytest.mark.parametrize("kind, replaces", CASES)
def test_a_disk_that_is_full_at_any_call_leaves_a_whole_checkpoint_or_none(kind, replaces, ram):
    recipe = recipe_of(ram / "micro", kind)
    failed = 0
    for k in count(1):
        target = ram / str(k) / "x"
        target.parent.mkdir()
        old = put_old(target, kind) if replaces else {}

        def fail(name: str) -> None:
            if name not in ("unlink", "rmdir"):  # who cannot remove cannot clean up
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            hook = Hook(k, fail).install(patch.setattr)
            try:
                bake_all(recipe, target)
            except WriteError as error:
                failed += 1
                assert "No space left on device" in str(error) and str(target) in str(error)
                # The second rename is that of the manifest beside a file.
                if kind == "diffusers" or hook.names.count("replace") < 2:
                    assert content(target) == old, hook.names[k - 1]
        assert not list(target.parent.glob("*.tmp-*")), hook.names[k - 1]
        if len(hook.names) < k:
            break
        shutil.rmtree(target.parent)
    assert failed > len(recipe.tensors) and content(target) != old
    assert hook.names.count("fsync") == len(recipe.sizes) + len(recipe.copies) + 1


class BrokenFile:
    """A file on a broken disk."""

    def __init__(self, file: io.IOBase, number: int) -> None:
        self._file, self._number = file, number

    def __enter__(self) -> "BrokenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def read(self, *_: object) -> bytes:
        raise OSError(self._number, os.strerror(self._number))

    readinto = read


def break_reading(patch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Make reads fail of all files of weights that are opened below a folder."""
    real = Path.open

    def opened(path: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        file = real(path, mode, *arguments, **options)
        is_broken = mode == "rb" and path.suffix == ".safetensors" and folder in path.parents
        return BrokenFile(file, number) if is_broken else file

    patch.setattr(Path, "open", opened)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("broken, kind", [("micro", CheckpointError), ("out", WriteError)])
def test_an_error_is_of_the_side_that_has_it(number, broken, kind, ram, monkeypatch):
    recipe = recipe_of(ram / "micro", "diffusers")
    break_reading(monkeypatch, ram / broken, number)
    with pytest.raises(kind, match=os.strerror(number)) as failed:
        bake_all(recipe, ram / "out" / "x")
    assert str(ram / broken) in str(failed.value)
    assert not (ram / "out" / "x").exists()


def test_a_file_system_may_refuse_to_forget_pages(ram, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    bake_all(recipe_of(ram / "micro", "diffusers"), ram / "x")
    assert (ram / "x").is_dir()


@pytest.mark.parametrize("stop", ["close", "interrupt"])
@pytest.mark.parametrize("kind, replaces", CASES)
def test_ctrl_c_after_any_tensor_leaves_nothing_behind(kind, replaces, stop, micro, tmp_path):
    recipe = recipe_of(micro, kind)
    target = tmp_path / "out" / "x"
    target.parent.mkdir()
    old = put_old(target, kind) if replaces else {}
    before = files(target.parent)
    for n in range(1, len(recipe.tensors)):
        run = bake(recipe, target, origin=ORIGIN)
        for _ in range(n):
            next(run)
        if stop == "close":
            run.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                run.throw(KeyboardInterrupt())
        assert files(target.parent) == before and content(target) == old


@pytest.mark.serial
def test_rounds_leave_no_descriptors_threads_or_files(micro, copy, tmp_path):
    change(copy, "proj_out.weight", torch.full((64, 128), float("nan")))
    good = recipe_of(micro)
    bad = recipe_of(copy)
    process = psutil.Process()
    for n in range(6):
        bake_all(good, tmp_path / "out" / "x")
        with pytest.raises(CheckpointError):
            bake_all(bad, tmp_path / "out" / "x")
        run = bake(good, tmp_path / "out" / "x", origin=ORIGIN)
        next(run)
        run.close()
        if n == 0:
            before = process.num_fds(), process.num_threads()
    assert (process.num_fds(), process.num_threads()) == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def leave(folder: Path, name: str, *, seconds: float) -> Path:
    """The staging folder of a bake that was killed so many seconds ago."""
    left = folder / name
    (left / NEW).mkdir(parents=True)
    (left / LOCK).write_bytes(b"")
    (left / NEW / "a.safetensors").write_bytes(b"a")
    age(left, seconds)
    return left


@pytest.mark.parametrize("name", ["x", "x[1]", "*", "a.b"])
def test_the_remains_of_dead_bakes_are_removed_after_a_day_and_no_others(name, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "out"
    target = folder / name
    mine = leave(folder, f"{name}.tmp-{dead.pid}-01234567", seconds=STALE_S + 60)
    # A process of another container is not to be seen, and may have any number.
    young = leave(folder, f"{name}.tmp-{dead.pid}-89abcdef", seconds=STALE_S - 60)
    others = [
        leave(folder, other, seconds=10 * STALE_S)
        for other in (f"{name}.tmp-x", f"y.tmp-{dead.pid}-01234567", f"{name}.tmp-1-0123", name)
    ]
    assert remove_remains(target) == [young]
    assert set(folder.iterdir()) == {young, *others} and not mine.exists()
    assert remove_remains(tmp_path / "absent" / "x") == []


def test_remains_that_a_process_locks_are_not_removed_whatever_their_age(tmp_path):
    left = leave(tmp_path, "x.tmp-1-01234567", seconds=10 * STALE_S)
    code = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(left / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        age(left, 10 * STALE_S)
        assert remove_remains(tmp_path / "x") == [left]
    assert (left / NEW / "a.safetensors").exists()
    # Who looked whether it is locked has not made it younger.
    assert remove_remains(tmp_path / "x") == [] and not left.exists()


def test_a_link_that_is_called_as_remains_are_is_not_followed(tmp_path):
    theirs = leave(tmp_path, "theirs", seconds=10 * STALE_S)
    (tmp_path / "x.tmp-1-01234567").symlink_to(theirs)
    remove_remains(tmp_path / "x")
    assert (theirs / NEW / "a.safetensors").exists() and (
        tmp_path / "x.tmp-1-01234567"
    ).is_symlink()


def test_an_old_checkpoint_that_was_moved_away_gets_its_name_back_at_once(tmp_path):
    old = put_old(tmp_path / "x", "diffusers")
    left = leave(tmp_path, "x.tmp-1-01234567", seconds=0)
    (tmp_path / "x").rename(left / OLD)
    assert remove_remains(tmp_path / "x") == [left] and content(tmp_path / "x") == old


def test_foreign_files_in_an_old_checkpoint_that_was_moved_away_stay(tmp_path):
    put_old(tmp_path / "x", "diffusers")
    left = leave(tmp_path, "x.tmp-1-01234567", seconds=0)
    (tmp_path / "x").rename(left / OLD)
    (left / OLD / "mine.txt").write_text("mine")
    put_old(tmp_path / "x", "diffusers")
    age(left)
    remove_remains(tmp_path / "x")
    assert (left / OLD / "mine.txt").read_text() == "mine"


# --- what appears while it runs


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "link", "beside"])
def test_what_appears_meanwhile_is_left_alone_and_the_bake_kept(what, kind, force, micro, tmp_path):
    target = tmp_path / "out" / "x.safetensors"
    run = bake(recipe_of(micro, kind), target, origin=ORIGIN, force=force)
    next(run)
    put = {
        "folder": lambda: (target.mkdir(), (target / "a").write_bytes(b"mine")),
        "empty folder": target.mkdir,
        "file": lambda: target.write_bytes(b"mine"),
        "link": lambda: target.symlink_to("elsewhere"),
        "beside": lambda: Path(f"{target}.json").write_bytes(b"mine"),
    }
    put[what]()
    before = files(target.parent)
    before = {name: data for name, data in before.items() if ".tmp-" not in name}
    is_free = kind == "diffusers" and (what == "beside" or (force and what == "empty folder"))
    if is_free:
        list(run)
        kept = target
    else:
        with pytest.raises(WriteError, match="not replaced") as caught:
            list(run)
        kept = target.with_name("x.safetensors-2" if kind == "diffusers" else "x-2.safetensors")
        assert f"the new checkpoint is {kept}" in str(caught.value)
    after = files(target.parent)
    assert {name: after[name] for name in before} == before
    assert (what == "beside" or os.path.lexists(target)) and not list(target.parent.glob("*.tmp-*"))
    bake_all(recipe_of(micro, kind), tmp_path / "same")
    assert list(content(kept).values()) == list(content(tmp_path / "same").values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_put_into_the_old_checkpoint_meanwhile_stays(kind, micro, tmp_path):
    target = tmp_path / "x.safetensors"
    put_old(target, kind)
    run = bake(recipe_of(micro, kind), target, origin=ORIGIN, force=True)
    next(run)
    mine = target / "mine.txt" if kind == "diffusers" else target
    mine.write_text("mine")
    with pytest.raises(WriteError, match=f"flux quantize did not make {mine.name}"):
        list(run)
    assert mine.read_text() == "mine" and len(list(tmp_path.glob("*-2*"))) > 0


# --- the source


def test_a_source_that_changed_since_its_headers_were_read_is_named(copy, tmp_path):
    recipe = recipe_of(copy)
    change(copy, "proj_out.weight", torch.zeros(64, 64, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="source has changed"):
        bake_all(recipe, tmp_path / "out" / "x")
    assert files(tmp_path / "out") == {}


def test_a_source_that_is_written_while_it_is_read_is_named(copy, tmp_path, monkeypatch):
    (path,) = (copy / "transformer").glob("*.safetensors")
    check = Unchanged.check

    def write_and_check(reading: Unchanged) -> None:
        os.utime(path)
        check(reading)

    # A thread reads ahead: between two tensors it may have read the whole file already.
    monkeypatch.setattr(Unchanged, "check", write_and_check)
    run = bake(recipe_of(copy), tmp_path / "out" / "x", origin=ORIGIN)
    with pytest.raises(CheckpointError, match="source has changed"):
        list(run)
    assert files(tmp_path / "out") == {}


def test_a_file_that_is_written_while_it_is_copied_is_named(copy, tmp_path, monkeypatch):
    def touch(reading: io.BufferedReader, _: object) -> bool:
        os.utime(reading.name)
        return False

    monkeypatch.setattr("quant.files._clone", touch)
    with pytest.raises(CheckpointError, match="source has changed"):
        bake_all(recipe_of(copy), tmp_path / "out" / "x")
    assert files(tmp_path / "out") == {}


class Broken(io.FileIO):
    """A file whose header can be read, and no more."""

    def readinto(self, _: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def read(self, size: int = -1) -> bytes:
        if size == COPY_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_source_that_cannot_be_read_is_no_write_error(name, micro, tmp_path, monkeypatch):
    real = Path.open

    def opened(path: Path, mode: str = "r", **options: object) -> object:
        if path.is_relative_to(micro / name) and mode == "rb":
            return Broken(path)
        return real(path, mode, **options)

    recipe = recipe_of(micro)
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(CheckpointError, match=r"cannot read the source.*Input/output error"):
        bake_all(recipe, tmp_path / "out" / "x")
    assert files(tmp_path / "out") == {}


def test_kept_files_are_copies(micro, tmp_path):
    recipe = recipe_of(micro)
    bake_all(recipe, tmp_path / "x")
    for name, source in recipe.copies.items():
        assert not os.path.samefile(source, tmp_path / "x" / name)
        assert source.read_bytes() == (tmp_path / "x" / name).read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("replaces", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_bake_that_is_killed_at_any_write_leaves_the_old_checkpoint_or_the_new_one(replaces, ram):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    given = [str(ram / "micro"), str(ram / "sweep"), "replaces" if replaces else "is new"]
    command = [sys.executable, "-m", "tests.test_bake_faults", *given]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    assert result.stdout.count("kill points") == len(KINDS)


def sweep(micro: Path, folder: Path, *, replaces: bool) -> None:
    """Kill a bake before its k-th write, for each k until one ends untouched.

    This runs in a process without threads, since it forks.
    """
    torch.set_num_threads(1)
    for kind in KINDS:
        started = time.perf_counter()
        recipe = recipe_of(micro, kind)
        target = folder / f"{kind}-{replaces}" / "x"
        bake_all(recipe, target.with_name("y"))
        new = content(target.with_name("y"))
        if kind != "diffusers":
            new = {name.replace("y", "x", 1): data for name, data in new.items()}
        states: list[str] = []
        for k in count(1):
            shutil.rmtree(target.parent, ignore_errors=True)
            target.parent.mkdir(parents=True)
            old = put_old(target, kind) if replaces else {}
            names = _killed(recipe, target, k)
            found = content(target)
            if found == old:
                states.append("old")
            elif found == new:
                states.append("new")
            elif not target.exists():
                states.append("absent")
            else:  # a file whose manifest is not there yet
                assert kind != "diffusers" and found["x"] == new["x"], (k, names, set(found))
                states.append("")
            # Every fourth is often enough: these are most of the seconds.
            if k % 4 == 0 or len(names) < k:
                for left in target.parent.glob("*.tmp-*"):
                    age(left)
                bake_all(recipe, target)
                assert content(target) == new and not list(target.parent.glob("*.tmp-*"))
            if len(names) < k:
                break
        must = sum(len(tensor.stored) for tensor in recipe.tensors)
        must += sum(names.count(name) for name in ("fsync", "rename", "replace"))
        flushed = len(recipe.sizes) + len(recipe.copies) + 1
        assert k - 1 >= must and names.count("fsync") == flushed
        assert states[-1] == "new"
        assert states == sorted(states, key=["old", "absent", "", "new"].index)
        out_of_the_way = 1 if kind == "diffusers" and replaces else 0
        assert states.count("absent") == out_of_the_way and states.count("") <= 1
        seconds = time.perf_counter() - started
        case = f"{kind}, {'replaced' if replaces else 'new'}"
        print(f"{case}: {k - 1} kill points (at least {must}), {seconds:.1f} s")


def _killed(recipe: Recipe, target: Path, k: int) -> list[str]:
    """The calls of a bake in a process of its own that is killed before the k-th."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        hook = Hook(k, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        tick = hook._tick
        hook._tick = lambda name: (os.write(write, f"{name} ".encode()), tick(name))
        hook.install()
        bake_all(recipe, target)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        names = pipe.read().split()
    assert os.waitpid(pid, 0)[1] in (0, signal.SIGKILL)
    return names


if __name__ == "__main__":
    sweep(Path(sys.argv[1]), Path(sys.argv[2]), replaces=sys.argv[3] == "replaces")
