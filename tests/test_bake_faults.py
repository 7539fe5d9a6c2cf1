"""Whatever happens to a bake, its target is absent, the old one or the new one.

Nothing else is left beside it.
"""

import errno
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

from quant.bake import bake, remove_remains
from quant.errors import CheckpointError, WriteError
from quant.recipe import Recipe
from tests.support.bakes import ORIGIN, Hook, bake_all, change, content, recipe_of
from tests.support.helpers import ROOT
from tests.support.invariant import files

# Kinds of result, and whether an old one is there.
CASES = [("diffusers", False), ("diffusers", True), ("bfl", False), ("bfl", True)]


def put_old(target: Path, kind: str) -> dict[str, bytes]:
    """An old checkpoint at the target."""
    if kind == "diffusers":
        paths = [target / "flux-manifest.json", target / "transformer" / "x.safetensors"]
    else:
        paths = [target, Path(f"{target}.json")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    return content(target)


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
    assert hook.names.count("fsync") == len(recipe.sizes) + 1


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


@pytest.mark.parametrize("name", ["x", "x[1]", "*", "a.b"])
def test_the_remains_of_dead_bakes_are_removed_and_no_others(name, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target = tmp_path / name
    mine = [f"{name}.tmp-{dead.pid}-01234567", f"{name}.tmp-{dead.pid}-89abcdef.json"]
    others = [
        f"{name}.tmp-{os.getpid()}-01234567",
        f"{name}.tmp-x",
        f"y.tmp-{dead.pid}-01234567",
        name,
    ]
    for file in (*mine, *others):
        (tmp_path / file).write_bytes(b"")
    remove_remains(target)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(others)
    # As if it was killed between the two renames.
    target.rename(tmp_path / f"{name}.tmp-{dead.pid}-01234567.old")
    remove_remains(target)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(others)
    remove_remains(tmp_path / "absent" / "x")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_bake_that_is_killed_at_any_write_leaves_the_old_checkpoint_or_the_new_one(ram):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    folders = [str(ram / "micro"), str(ram / "sweep")]
    command = [sys.executable, "-m", "tests.test_bake_faults", *folders]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    assert result.stdout.count("kill points") == len(CASES)


def sweep(micro: Path, folder: Path) -> None:
    """Kill a bake before its k-th write, for each k until one ends untouched.

    This runs in a process without threads, since it forks.
    """
    torch.set_num_threads(1)
    for kind, replaces in CASES:
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
                bake_all(recipe, target)
                assert content(target) == new and not list(target.parent.glob("*.tmp-*"))
            if len(names) < k:
                break
        must = sum(len(tensor.stored) for tensor in recipe.tensors)
        must += sum(names.count(name) for name in ("fsync", "rename", "replace"))
        assert k - 1 >= must and names.count("fsync") == len(recipe.sizes) + 1
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
    sweep(Path(sys.argv[1]), Path(sys.argv[2]))
