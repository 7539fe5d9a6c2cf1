"""Bakes: exactly the predicted bytes, verified; and whatever happens, DST is absent, the old one, or the new one."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import quant.bake
from quant import codecs
from quant.bake import bake, remove_remains
from quant.checkpoint import KEEP_FILE, MANIFEST, Checkpoint, inspect
from quant.errors import CheckpointError, WriteError
from quant.recipe import Recipe, make_file_recipe, make_recipe
from quant.spec import SCHEMES, QuantSpec
from quant.tensors import Reader
from quant.writer import SafetensorsWriter
from tests.bakes import ORIGIN, Hook, bake_all, make_micro
from tests.conftest import ROOT
from tests.invariant import files

SPECS = [
    QuantSpec(to, text_encoder, modulation, "absmax" if "nf4" in (to, text_encoder) else "search")
    for to in SCHEMES
    for text_encoder in ("keep", "nf4", "fp8")
    for modulation in (("keep",) if to == "int8" else ("keep", to))
]
MAIN = {"nf4": "diffusion_pytorch_model.safetensors", "fp8": "flux-fp8r.safetensors", "int8": "flux-int8.safetensors"}
LEFT = ("flux-manifest.json", "transformer/x.safetensors", "x.safetensors", "x.safetensors.json")


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro(ROOT / "presets" / "tiny", tmp_path_factory.mktemp("micro"))


@pytest.fixture
def copy(micro: Path, tmp_path: Path) -> Path:
    """A micro model that a test may change."""
    return Path(shutil.copytree(micro, tmp_path / "copy"))


@pytest.fixture
def ram(micro: Path) -> Iterator[Path]:
    """A folder in memory, where fsync and rmdir are quick, with the micro model in it; on the disk elsewhere."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        shutil.copytree(micro, Path(folder) / "micro")
        yield Path(folder)


def recipe_of(folder: Path, kind: str = "diffusers", spec: QuantSpec | None = None) -> Recipe:
    checkpoint = inspect(folder)
    if kind == "diffusers":
        return make_recipe(checkpoint, spec or QuantSpec("nf4", "nf4", scales="absmax"))
    return make_file_recipe(checkpoint.components["transformer"], spec or QuantSpec("fp8"), kind=kind)


def change(folder: Path, name: str, values: torch.Tensor) -> None:
    """Give a tensor of the model, wherever it is, other values."""
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: values}, path)


def content(target: Path) -> dict[str, bytes]:
    """The files of a checkpoint, without the manifest's seconds."""
    beside = [path for path in (target, Path(f"{target}.json")) if path.is_file()]
    found = files(target) if target.is_dir() else {path.name: path.read_bytes() for path in beside}
    for name in (MANIFEST, f"{target.name}.json"):
        if found.get(name, b"old") != b"old":
            found[name] = json.dumps(json.loads(found[name]) | {"seconds": 0}).encode()
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.to}-{spec.text_encoder}-{spec.modulation}")
def test_every_choice_has_exactly_the_predicted_bytes_and_is_a_model(spec, tiny_folder, tmp_path):
    source, target = inspect(tiny_folder), tmp_path / "deep" / "er" / "model"
    recipe = make_recipe(source, spec)
    progress = bake_all(recipe, target)
    written = {name for name in files(target) if name.endswith(".safetensors")} - set(recipe.links)
    assert recipe.sizes == {name: (target / name).stat().st_size for name in written}
    assert f"transformer/{MAIN[spec.to]}" in written and (f"transformer/{KEEP_FILE}" in written) == (spec.to == "nf4")
    assert {stat.S_IMODE((target / name).stat().st_mode) for name in written} == {0o666 & ~_umask()}
    assert [p.done for p in progress] == sorted(p.done for p in progress) and progress[-1].done <= progress[-1].total
    _assert_same_model(source, inspect(target), spec)
    assert not list(target.parent.glob("*.tmp-*"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _assert_same_model(source: Checkpoint, found: Checkpoint, spec: QuantSpec) -> None:
    assert found.scheduler == source.scheduler
    for name, part in source.components.items():
        weights = found.components[name].weights
        assert part.config == found.components[name].config and set(weights) == set(part.weights)
        reader = Reader()
        for weight in part.weights.values():
            packed = weights[weight.name]
            expected = "" if weight.name == "proj_out.weight" else spec.scheme(name, weight.name, weight.shape)
            assert (packed.scheme, packed.shape) == (expected, weight.shape)
            ours = reader.weight(weight)[""].float()
            read = codecs.decode(reader.weight(packed), packed.scheme, packed.shape, torch.float32)
            error = float((read - ours).norm())
            assert error <= {"": 0, "nf4": 0.1, "fp8": 0.037, "int8": 0.025}[expected] * float(ours.norm())


@pytest.mark.parametrize("kind", ["bfl", "comfy"])
def test_a_file_has_exactly_the_predicted_bytes_and_its_manifest_beside_it(kind, micro, tmp_path):
    recipe, target = recipe_of(micro, kind), tmp_path / "out" / "x.safetensors"
    bake_all(recipe, target)
    assert recipe.sizes == {"": target.stat().st_size} and set(load_file(target))
    assert set(files(target.parent)) == {"x.safetensors", "x.safetensors.json"}
    manifest = json.loads((tmp_path / "out" / "x.safetensors.json").read_text())
    assert (manifest["layout"], manifest["bytes"]) == (kind, recipe.sizes)


def test_the_manifest_says_what_was_made_of_what(micro, tmp_path):
    spec = QuantSpec("nf4", "nf4", keep=("x_embedder",))
    bake_all(recipe_of(micro, spec=spec), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert {key: manifest[key] for key in ORIGIN} == ORIGIN and manifest["verified"] is True
    assert manifest["recipe"] == json.loads(json.dumps(spec.to_json())) and manifest["seconds"] >= 0
    sources = [path for part in ("transformer", "text_encoder_2") for path in (micro / part).glob("*.safetensors")]
    sums = {hashlib.sha256(path.read_bytes()).hexdigest(): path.stat().st_size for path in sources}
    assert {found["sha256"]: found["bytes"] for found in manifest["source"].values()} == sums
    errors = manifest["relative_errors"]
    assert set(errors) == {*(f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"), "proj_out.weight",
                           "encoder.block.0.layer.0.SelfAttention.q.weight"}  # fmt: skip
    assert all(0 < error < 0.1 for error in errors.values())


def test_two_sources_of_the_same_file_name_both_stand_in_the_manifest(copy, tmp_path):
    transformer = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.rename(copy / "transformer" / "model.safetensors")
    bake_all(recipe_of(copy), tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]) == 2


@pytest.mark.parametrize("kind", ["diffusers", "bfl", "comfy"])
def test_the_same_source_gives_the_same_bytes(kind, micro, tmp_path):
    for name in ("a", "b"):
        bake_all(recipe_of(micro, kind), tmp_path / name / "x")
    assert content(tmp_path / "a" / "x") == content(tmp_path / "b" / "x") != {}


@pytest.mark.parametrize("to", SCHEMES)
def test_shards_and_wide_dtypes_give_the_same_model(to, copy, tmp_path):
    spec = QuantSpec(to)
    bake_all(recipe_of(copy, spec=spec), tmp_path / "whole")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    path.unlink()
    shards = {name: f"s-{k % 3}.safetensors" for k, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, path.parent / shard)
    (path.parent / f"{path.name}.index.json").write_text(json.dumps({"weight_map": shards}))
    bake_all(recipe_of(copy, spec=spec), tmp_path / "shards")
    file = f"transformer/{MAIN[to]}"
    whole, sharded = load_file(tmp_path / "whole" / file), load_file(tmp_path / "shards" / file)
    assert set(whole) == set(sharded)
    for name, tensor in whole.items():
        if "quant_state" not in name:  # it names the dtype
            assert torch.equal(tensor.float(), sharded[name].float()), name


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.bias",
                                  "proj_out.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_source_that_is_not_finite_is_refused_by_the_tensors_name(name, value, copy, tmp_path):
    values = next(t[name] for t in map(load_file, copy.rglob("*.safetensors")) if name in t)
    values[-1] = value
    change(copy, name, values)
    with pytest.raises(CheckpointError, match=f"not finite.*NaN or Inf in {name}"):
        bake_all(recipe_of(copy), tmp_path / "out" / "x")
    assert files(tmp_path / "out") == {}


@pytest.mark.parametrize("to", SCHEMES)
def test_what_is_quantized_already_is_refused(to, micro, tmp_path):
    bake_all(recipe_of(micro, spec=QuantSpec(to)), tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"quantized already.*is {to}") as caught:
        recipe_of(tmp_path / "x", spec=QuantSpec("fp8"))
    assert "16-bit" in caught.value.hint


def test_a_quantized_text_encoder_is_refused_unless_it_is_kept(micro, tmp_path):
    bake_all(recipe_of(micro, spec=QuantSpec("fp8", "fp8")), tmp_path / "x")
    for file in (tmp_path / "x" / "transformer").glob("*"):
        file.unlink()
    shutil.copytree(micro / "transformer", tmp_path / "x" / "transformer", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="quantized already"):
        recipe_of(tmp_path / "x", spec=QuantSpec("fp8", "fp8"))
    bake_all(recipe_of(tmp_path / "x", spec=QuantSpec("int8")), tmp_path / "y")
    assert inspect(tmp_path / "y").components["text_encoder_2"].precision == "fp8"


def test_the_top_proj_out_is_never_a_pattern_that_spares_every_single_block(micro):
    for keep in ((), ("proj_out",), ("*proj_out*",)):
        config = json.loads(recipe_of(micro, spec=QuantSpec("nf4", keep=keep)).texts["transformer/config.json"])
        assert "proj_out" not in config["quantization_config"]["llm_int8_skip_modules"]


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(micro, tmp_path, monkeypatch):
    usage, recipe = namedtuple("usage", "total used free"), recipe_of(micro)
    need = sum(recipe.sizes.values()) + quant.bake.MARGIN
    hook = Hook(0, lambda _: None).install(monkeypatch.setattr)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(need, 0, need - 1))
    with pytest.raises(WriteError, match=r"disk is too small.*needs 0\.07 GB, 0\.07 GB are free"):
        bake_all(recipe, tmp_path / "new" / "x")
    assert set(hook.names) <= {"unlink"} and not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(need, 0, need))
    assert bake_all(recipe, tmp_path / "new" / "x")


@pytest.mark.parametrize("kind", ["diffusers", "bfl"])
def test_a_byte_that_changes_on_the_disk_is_found_before_the_rename(kind, micro, tmp_path, monkeypatch):
    def finish(writer: SafetensorsWriter) -> None:
        real(writer)
        data = bytearray(writer.path.read_bytes())
        data[-1] ^= 1
        writer.path.write_bytes(data)

    real, target = SafetensorsWriter.finish, tmp_path / "out" / "x"
    monkeypatch.setattr(SafetensorsWriter, "finish", finish)
    with pytest.raises(WriteError, match=r"the file is damaged.*does not read back"):
        bake_all(recipe_of(micro, kind), target)
    assert list(target.parent.iterdir()) == []
    bake_all(recipe_of(micro, kind), target, verify=False)
    described = target / MANIFEST if kind == "diffusers" else Path(f"{target}.json")
    assert json.loads(described.read_text())["verified"] is False


def put_old(target: Path, kind: str) -> dict[str, bytes]:
    """An old checkpoint at the target."""
    names = [target / name for name in LEFT[:2]] if kind == "diffusers" else [target, Path(f"{target}.json")]
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    return content(target)


CASES = [("diffusers", False), ("diffusers", True), ("bfl", False), ("bfl", True)]


@pytest.mark.parametrize("kind, replaces", CASES)
def test_a_disk_that_is_full_at_any_call_leaves_a_whole_checkpoint_or_none(kind, replaces, ram):
    recipe, failed = recipe_of(ram / "micro", kind), 0
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
                if (
                    kind == "diffusers" or hook.names.count("replace") < 2
                ):  # the second is the manifest's, beside a file
                    assert content(target) == old, hook.names[k - 1]
        assert not list(target.parent.glob("*.tmp-*")), hook.names[k - 1]
        if len(hook.names) < k:
            break
        shutil.rmtree(target.parent)
    assert failed > len(recipe.jobs) and content(target) != old
    assert len([1 for name in hook.names if name == "fsync"]) == len(recipe.sizes) + 1


@pytest.mark.parametrize("stop", ["close", "interrupt"])
@pytest.mark.parametrize("kind, replaces", CASES)
def test_ctrl_c_after_any_tensor_leaves_nothing_behind(kind, replaces, stop, micro, tmp_path):
    recipe, target = recipe_of(micro, kind), tmp_path / "out" / "x"
    target.parent.mkdir()
    old = put_old(target, kind) if replaces else {}
    before = files(target.parent)
    for n in range(1, len(recipe.jobs)):
        run = bake(recipe, target, origin=ORIGIN)
        for _ in range(n):
            next(run)
        if stop == "close":
            run.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                run.throw(KeyboardInterrupt())
        assert files(target.parent) == before and content(target) == old


def test_rounds_leave_no_descriptors_threads_or_files(micro, copy, tmp_path):
    change(copy, "proj_out.weight", torch.full((64, 128), float("nan")))
    good, bad, process = recipe_of(micro), recipe_of(copy), psutil.Process()
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
    others = [f"{name}.tmp-{os.getpid()}-01234567", f"{name}.tmp-x", f"y.tmp-{dead.pid}-01234567", name]
    for file in (*mine, *others):
        (tmp_path / file).write_bytes(b"")
    remove_remains(target)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(others)
    target.rename(tmp_path / f"{name}.tmp-{dead.pid}-01234567.old")  # killed between the two renames
    remove_remains(target)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(others)
    remove_remains(tmp_path / "absent" / "x")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_bake_that_is_killed_at_any_write_leaves_the_old_checkpoint_or_the_new_one(ram):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.test_bake", str(ram / "micro"), str(ram / "sweep")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    assert result.stdout.count("kill points") == len(CASES)


def sweep(micro: Path, folder: Path) -> None:
    """Kill a bake before its k-th write, for each k until one ends untouched; in a process without threads."""
    torch.set_num_threads(1)
    for kind, replaces in CASES:
        started, recipe, target = time.perf_counter(), recipe_of(micro, kind), folder / f"{kind}-{replaces}" / "x"
        bake_all(recipe, target.with_name("y"))
        new = {name.replace("y", "x", 1) if kind != "diffusers" else name: data
               for name, data in content(target.with_name("y")).items()}  # fmt: skip
        states: list[str] = []
        for k in count(1):
            shutil.rmtree(target.parent, ignore_errors=True)
            target.parent.mkdir(parents=True)
            old = put_old(target, kind) if replaces else {}
            names = _killed(recipe, target, k)
            found = content(target)
            states.append("old" if found == old else "new" if found == new else "absent" if not target.exists() else "")
            assert states[-1] or (kind != "diffusers" and found["x"] == new["x"]), (k, names, set(found))  # no manifest
            if k % 4 == 0 or len(names) < k:  # often enough: these are most of the seconds
                bake_all(recipe, target)
                assert content(target) == new and not list(target.parent.glob("*.tmp-*"))
            if len(names) < k:
                break
        must = sum(len(job.outputs) for job in recipe.jobs) + sum(n in ("fsync", "rename", "replace") for n in names)
        assert k - 1 >= must and names.count("fsync") == len(recipe.sizes) + 1
        assert states[-1] == "new" and states == sorted(states, key=["old", "absent", "", "new"].index)
        assert states.count("absent") == (kind == "diffusers" and replaces) and states.count("") <= 1
        seconds = time.perf_counter() - started
        print(f"{kind}, {'replaced' if replaces else 'new'}: {k - 1} kill points (at least {must}), {seconds:.1f} s")


def _killed(recipe: Recipe, target: Path, k: int) -> list[str]:
    """The calls of a bake in a process of its own that is killed before the k-th."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        hook = Hook(k, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        tick = hook.tick
        hook.tick = lambda name: (os.write(write, f"{name} ".encode()), tick(name))
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
