"""`flux models list`, `verify` and `remove`, and the commands as processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.models import find as models
from quant.checkpoint import MANIFEST, inspect
from tests.support.helpers import ROOT
from tests.support.hub import DEV, LORA, T5, TOKEN, error_of, snapshot
from tests.support.hub_server import COMMIT
from tests.support.invariant import assert_failed, files


def test_the_list_says_what_is_here_and_how_much_of_it(server, run, baked, tmp_path):
    run("download", "dev", "--only", "tokenizers", "-q")
    run("download", "x/flux-lora:a.safetensors", "-q")
    (paths.hub_cache_folder() / "models--google--t5" / "snapshots" / COMMIT).mkdir(parents=True)
    paths.baked_folder().mkdir(parents=True)
    (paths.baked_folder() / "tiny-nf4").symlink_to(baked("nf4", modulation="nf4"))
    (paths.baked_folder() / "x.tmp-1-00000000").symlink_to(baked("nf4", modulation="nf4"))
    rows = json.loads(run("list", "--json").stdout)
    assert [(row["name"], row["kind"], row["state"]) for row in rows] == [
        ("tiny-nf4", "baked", "complete"),
        ("bundled/tiny", "bundled", "complete"),
        (DEV, "hub", "partial"),
        ("x/flux-lora", "hub", "files"),
    ]
    assert (
        rows[2]["commit"] == COMMIT and rows[2]["path"] == str(snapshot()) and rows[3]["bytes"] > 50
    )
    text = run("list").stdout
    assert len(text.splitlines()) == 4 and COMMIT[:12] in text and "MB" in text


def put_bake(baked, name: str = "x") -> Path:
    """A bake of one's own in the user's model folder, to damage."""
    paths.baked_folder().mkdir(parents=True)
    return Path(shutil.copytree(baked("nf4", modulation="nf4"), paths.baked_folder() / name))


OUTSIDE = [
    "../theirs.safetensors",
    "vae/../../theirs.safetensors",
    "{folder}",
    "a\\b",
    "c:/x",
    "\0",
]
OUTSIDE += ["", ".", "linked/theirs.safetensors", "\ud800"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["bytes", "files"])
def test_verify_looks_at_nothing_outside_of_a_bakes_folder(key, name, run, baked, tmp_path):
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"mine")
    folder = put_bake(baked)
    (folder / "linked").symlink_to(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[key] = {name.format(folder=tmp_path / theirs.name): 4}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    stderr = error_of(run("verify", "x"), ExitCode.INPUT_FILE)
    assert "leads out of the folder" in stderr


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"bytes": []}', '{"bytes": {"x": {}}, "files": 3}', "\ud83d"]
)
def test_verify_survives_any_manifest(text, run, baked):
    folder = put_bake(baked)
    (folder / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
    error_of(run("verify", "x"), ExitCode.INPUT_FILE)


def test_verify_reads_no_fifo(run, baked):
    folder = put_bake(baked)
    (folder / "vae/config.json").unlink()
    os.mkfifo(folder / "vae/config.json")
    assert "no regular file" in error_of(run("verify", "x"), ExitCode.INPUT_FILE)


def test_remove_deletes_only_what_a_manifest_names(run, baked):
    folder = put_bake(baked)
    (folder / "vae" / "mine.txt").write_text("mine")
    before = files(folder)
    stderr = error_of(run("remove", "x", "--yes"), ExitCode.OUTPUT)
    assert "vae/mine.txt" in stderr and files(folder) == before
    (folder / "vae" / "mine.txt").unlink()
    assert run("remove", "x", "--yes").returncode == 0 and not folder.exists()


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_verify_names_what_is_damaged_and_a_new_download_repairs_it(name, server, run):
    run("download", "dev", "-q")
    assert f"{COMMIT[:12]} complete" in run("verify", "dev").stdout
    blob = (snapshot() / name).resolve()
    data = bytearray(blob.read_bytes())
    data[-2] ^= 1
    blob.write_bytes(data)
    stderr = error_of(run("verify", "dev"), ExitCode.INPUT_FILE)
    assert f"{name}: its sha" in stderr and f"flux models remove {DEV} --yes" in stderr
    blob.unlink()
    assert f"{name}: " in error_of(run("verify", DEV), ExitCode.INPUT_FILE)
    assert run("remove", DEV, "--yes").returncode == run("download", "dev", "-q").returncode == 0
    assert run("verify", "dev").returncode == 0


def test_verify_takes_a_blob_that_is_a_link_into_the_librarys_shared_store(server, run):
    run("download", "dev", "-q")
    blob = (snapshot() / T5).resolve()
    store = paths.hub_cache_folder() / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert run("verify", "dev").returncode == 0
    store.write_bytes(store.read_bytes()[:-1])
    assert T5 in error_of(run("verify", "dev"), ExitCode.INPUT_FILE)


def test_a_sharded_model_whose_blobs_are_in_the_librarys_shared_store_is_usable(server, run):
    part = "vae/diffusion_pytorch_model"
    weights = server.repositories[DEV].pop(f"{part}.safetensors")
    names = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")]).keys() - {
        "__metadata__"
    }
    index = {"weight_map": dict.fromkeys(names, "x-00001-of-00001.safetensors")}
    server.repositories[DEV] |= {
        "vae/x-00001-of-00001.safetensors": weights,
        f"{part}.safetensors.index.json": json.dumps(index).encode(),
    }
    assert run("download", "dev", "-q").returncode == 0 and inspect(snapshot())
    blob = (snapshot() / "vae/x-00001-of-00001.safetensors").resolve()
    store = paths.hub_cache_folder() / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert inspect(models.locate(DEV))


def test_verify_knows_sizes_and_headers_of_what_quantize_made(baked, run, tmp_path):
    folder = paths.baked_folder() / "tiny-nf4"
    shutil.copytree(baked("nf4", modulation="nf4"), folder)
    assert all(
        "no checksum is known" in run("verify", name).stdout for name in ("tiny-nf4", "tiny")
    )
    name = max(json.loads((folder / MANIFEST).read_text())["bytes"])
    (folder / name).unlink()
    assert name in error_of(run("verify", "tiny-nf4"), ExitCode.INPUT_FILE)
    assert run("remove", "tiny-nf4", "--yes").returncode == 0 and not folder.exists()


@pytest.mark.parametrize("command", ["verify", "remove"])
@pytest.mark.parametrize("name", ["dev", "nothing", "../x", "", "bundled/none"])
def test_what_is_not_here_can_neither_be_verified_nor_removed(command, name, run):
    assert "flux models list" in error_of(run(command, name), ExitCode.WEIGHTS)


@pytest.mark.parametrize(
    "answer, gone", [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_remove_asks_on_a_terminal(answer, gone, server, run, monkeypatch):
    run("download", "dev", "-q")
    terminal = type("Terminal", (), {"isatty": lambda _: True, "readline": lambda _: answer})()
    monkeypatch.setattr(console.sys, "stdin", terminal)
    result = run("remove", "dev")
    assert result.returncode == 0 and str(snapshot()) in result.stderr and "GB" in result.stderr
    assert "[y/N]" in result.stderr and snapshot().exists() == models.get_repository(
        DEV
    ).exists() == (not gone)


def test_remove_never_guesses_and_leaves_the_bundled_model(server, run, tiny_folder):
    run("download", "dev", "-q")
    assert "flux models remove dev --yes" in run("remove", "dev").stderr and snapshot().exists()
    assert run("remove", "dev").returncode == ExitCode.USAGE
    assert (
        "comes with flux" in error_of(run("remove", "tiny", "--yes"), ExitCode.USAGE)
        and tiny_folder.exists()
    )


def test_verify_does_not_pass_a_model_that_is_not_whole(server, run, tmp_path, monkeypatch):
    run("download", "dev", "-q")
    (snapshot() / T5).unlink()
    stderr = error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert (
        "weights of text_encoder_2 are missing" in stderr
        and f"flux models download {DEV}" in stderr
    )
    (snapshot() / "vae/config.json").unlink()
    assert "configs or tokenizers" in error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert run("download", "dev", "--only", "vae", "--mirror", str(tmp_path), "-q").returncode == 0
    assert run("remove", "dev", "--yes").returncode == 0
    monkeypatch.setenv("FLUX_MIRROR", str(tmp_path))
    stderr = error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert f"--mirror {tmp_path}" in stderr and "by checksum" in stderr


def test_a_repository_without_flux_in_its_name_is_verified_and_removed_and_listed_with_a_lora(
    server, run
):
    server.repositories |= {
        "x/hyper": {"a.safetensors": LORA},
        "x/encoder": server.repositories["x/flux-lora"],
    }
    for name in ("x/hyper", "x/encoder"):
        assert run("download", f"{name}:a.safetensors", "-q").returncode == 0
    rows = [row["name"] for row in json.loads(run("list", "--json").stdout)]
    assert "x/hyper" in rows and "x/encoder" not in rows
    for name in ("x/hyper", "x/encoder"):
        assert "1 files, 1 by checksum" in run("verify", name).stdout
        assert (
            run("remove", name, "--yes").returncode == 0
            and not models.get_repository(name).exists()
        )


def test_an_exact_name_goes_before_the_model_of_a_preset(server, run, baked):
    run("download", "dev", "-q")
    folder = shutil.copytree(baked("nf4", modulation="nf4"), paths.baked_folder() / "dev")
    assert (
        run("remove", "dev", "--yes").returncode == 0
        and not folder.exists()
        and snapshot().exists()
    )
    assert run("remove", "dev", "--yes").returncode == 0 and not snapshot().exists()


# --- as a process


def test_the_command_by_itself(server, flux_cold, micro):
    there = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    server.fail(f"cdn.*{T5}", "cut")
    result = flux_cold("models", "download", "dev", **there)
    assert result.returncode == 0 and set(files(Path(result.stdout.strip()))) == set(files(micro))
    assert (
        all(line.startswith("flux: ") for line in result.stderr.splitlines())
        and TOKEN not in result.stderr
    )
    assert_failed(flux_cold("models", "download", "-q", "schnell", **there), ExitCode.WEIGHTS)
    assert "HF_HUB_OFFLINE" in assert_failed(
        flux_cold("models", "download", "schnell"), ExitCode.WEIGHTS
    )


@pytest.mark.serial
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_stops_a_download_and_leaves_no_partial_file(server):
    server.fail(f"cdn.*{T5}", "stall", 99)
    there = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fluxcli", "models", "download", "dev"]
    process = subprocess.Popen(
        command, env=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not list(paths.hub_cache_folder().rglob("*.incomplete")) or not server.asked(
        f"GET .*cdn.*{T5}"
    ):
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)
    ours = next(paths.hub_cache_folder().rglob("*.incomplete"))
    others = ours.with_name("f00d.incomplete")  # which another process is writing
    others.write_bytes(b"half")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert others.read_bytes() == b"half"
    others.unlink()
    assert (
        process.returncode == -signal.SIGINT
        and stdout == ""
        and "Traceback" not in stderr + "error"
    )
    assert not list(paths.hub_cache_folder().rglob("*.incomplete"))
