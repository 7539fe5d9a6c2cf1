"""`flux models download` against a hub on this machine; never the network."""

import json
from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.errors import ExitCode
from fluxcli.models import controls, hub
from fluxcli.models import find as models
from fluxcli.models.redux import PUBLISHED_REDUX
from quant.checkpoint import inspect
from tests.support.hub import DEV, EVIL, LORA, error_of, snapshot, weights_asked
from tests.support.hub_server import COMMIT
from tests.support.invariant import files
from tests.support.redux import write_redux


def test_a_download_is_one_commit_checked_and_only_the_files_that_are_used(server, run, micro):
    result = run("download", "dev")
    assert (result.returncode, result.stdout) == (0, f"{snapshot()}\n")
    assert set(files(snapshot())) == set(files(micro))
    assert {line.split("/resolve/")[1].split("/")[0] for line in server.asked("/resolve/")} == {
        COMMIT
    }
    licence, plan, *weights = result.stderr.splitlines()
    assert "non-commercial" in licence and f"{DEV}@{COMMIT[:12]}: {len(files(micro))} files" in plan
    assert (
        "GB to download" in plan
        and "GB free" in plan
        and len(weights) == 4
        and "\x1b" not in result.stderr
    )
    assert (
        models.locate(DEV) == snapshot()
        and (models.get_repository(DEV) / "refs" / "main").read_text() == COMMIT
    )


def test_no_code_of_a_model_is_fetched_and_none_of_its_own_classes_is_loaded(server, run):
    assert run("download", "dev").returncode == 0
    assert not list(models.get_repository(DEV).rglob("*.py")) and not server.asked(
        r"\.(py|bin|pt)$"
    )
    assert inspect(snapshot()).components["transformer"].weights


def test_a_second_download_asks_once_and_writes_nothing(server, run):
    run("download", "dev", "-q")
    kept = {path: path.lstat().st_mtime_ns for path in paths.hub_cache_folder().rglob("*")}
    for folder in (path for path in kept if path.is_dir()):
        folder.chmod(0o555)
    server.requests.clear()
    result = run("download", "dev", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{snapshot()}\n", "")
    assert server.asked(".") == [f"GET /api/models/{DEV}/revision/main"]
    assert kept == {path: path.lstat().st_mtime_ns for path in paths.hub_cache_folder().rglob("*")}
    assert models.locate(DEV) == snapshot()


def test_a_new_commit_takes_only_what_has_changed(server, run):
    run("download", "dev", "-q")
    old, server.commit = snapshot(), "f" * 40
    server.repositories[DEV]["scheduler/scheduler_config.json"] += b"\n"
    server.requests.clear()
    result = run("download", "dev")
    new = old.with_name("f" * 40)
    assert (
        result.stdout == f"{new}\n"
        and models.locate(DEV) == new
        and set(files(new)) == set(files(old))
    )
    assert [line.rpartition("/")[2] for line in server.asked("GET .*/(resolve|cdn)/")] == [
        "scheduler_config.json"
    ]
    server.commit = COMMIT
    assert (
        run("download", "dev", "--revision", COMMIT).stdout == f"{old}\n"
        and models.locate(DEV) == new
    )


@pytest.mark.parametrize("only", ["tokenizers", "vae", "transformer, tokenizer"])
def test_parts_come_with_the_small_files_of_all(only, server, run):
    assert run("download", "dev", "--only", only).returncode == 0
    got, small = set(files(snapshot())), {"model_index.json", "scheduler/scheduler_config.json"}
    assert got >= small | {f"{part}/config.json" for part in hub.COMPONENTS}
    weights = {name.partition("/")[0] for name in got if name.endswith(".safetensors")}
    assert (
        weights
        == {"tokenizers": set(), "vae": {"vae"}, "transformer, tokenizer": {"transformer"}}[only]
    )
    assert any(name.startswith("tokenizer_2/") for name in got) == (only == "tokenizers")


def test_one_file_of_any_repository(server, run):
    result = run("download", "x/flux-lora:a.safetensors", "-q")
    assert (
        result.stdout == f"{snapshot('x/flux-lora') / 'a.safetensors'}\n"
        and len(weights_asked(server)) == 1
    )
    assert Path(run("download", "x/flux-lora:b.gguf", "-q").stdout.strip()).read_bytes() == b"GGUF"
    assert models.locate("x/flux-lora:a.safetensors") == Path(result.stdout.strip())


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/x/flux-lora/resolve/main/a.safetensors?download=true",
        "https://huggingface.co/x/flux-lora/blob/main/a.safetensors",
        "hf.co/x/flux-lora/raw/main/a.safetensors",
        "hf:x/flux-lora:a.safetensors",
        f"https://huggingface.co/x/flux-lora/resolve/{COMMIT}/a.safetensors",
        f"x/flux-lora@{COMMIT}:a.safetensors",
    ],
)
def test_an_address_of_the_hub_is_downloaded_and_found(address, server, run):
    result = run("download", address, "-q")
    assert result.stdout == f"{snapshot('x/flux-lora') / 'a.safetensors'}\n"
    assert models.locate(address) == Path(result.stdout.strip())


def test_a_revision_of_an_address_that_is_not_there_is_said(server, run):
    address = "https://huggingface.co/x/flux-lora/resolve/v9/a.safetensors"
    assert "no such revision" in error_of(run("download", address), ExitCode.WEIGHTS)


def test_a_file_that_was_downloaded_is_found_whatever_its_name(server, run):
    name = "x/flux-lora:Ink + line (v1, [fp8]).safetensors"
    server.repositories["x/flux-lora"][name.partition(":")[2]] = server.repositories["x/flux-lora"][
        "a.safetensors"
    ]
    result = run("download", name, "-q")
    assert result.returncode == 0 and models.locate(name) == Path(result.stdout.strip())


def test_one_file_in_a_mirror(server, run, tmp_path, monkeypatch):
    result = run("download", "x/flux-lora:a.safetensors", "--mirror", str(tmp_path))
    assert result.stdout == f"{tmp_path / 'x/flux-lora/a.safetensors'}\n"
    monkeypatch.setenv("FLUX_MIRROR", str(tmp_path))
    assert models.locate("x/flux-lora:a.safetensors") == Path(result.stdout.strip())


def test_a_mirror_is_plain_files_that_another_machine_finds(
    server, run, micro, tmp_path, monkeypatch
):
    share = tmp_path / "share"
    for _ in range(2):
        result = run("download", "dev", "--mirror", str(share))
        assert result.stdout == f"{share / DEV}\n" and not models.get_repository(DEV).exists()
    assert len(weights_asked(server)) == 4
    plain = {
        name: data for name, data in files(share / DEV).items() if not name.startswith(".cache")
    }
    assert set(plain) == set(files(micro)) and not any(
        path.is_symlink() for path in share.rglob("*")
    )
    monkeypatch.setenv("FLUX_MIRROR", str(share))
    assert models.locate(DEV) == share / DEV
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert (rows[DEV]["kind"], rows[DEV]["state"]) == ("mirror", "complete")
    assert f"{len(plain)} files, {len(plain)} by checksum" in run("verify", "dev").stdout
    (share / DEV / "vae/config.json").write_text("{}")
    assert "vae/config.json: its sha1" in error_of(run("verify", "dev"), ExitCode.INPUT_FILE)
    assert "mirror" in error_of(run("remove", "dev", "--yes"), ExitCode.USAGE)


def test_a_mirror_takes_what_the_cache_has(server, run, tmp_path):
    run("download", "dev", "-q")
    server.requests.clear()
    assert run("download", "dev", "--mirror", str(tmp_path)).returncode == 0
    assert not weights_asked(server) and inspect(tmp_path / DEV)


CONTROL = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"


def test_a_kind_of_control_is_downloaded_by_its_name(server, run):
    server.repositories[CONTROL] = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors": LORA,
        "diffusion_pytorch_model.fp16.safetensors": LORA,
        "controlnet_flux.py": EVIL,
        "conds/canny.png": b"x",
    }
    result = run("download", "canny")
    assert (result.returncode, result.stdout) == (0, f"{snapshot(CONTROL)}\n")
    assert set(files(snapshot(CONTROL))) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert controls.locate("canny") == controls.locate(CONTROL) == snapshot(CONTROL)
    verified = run("verify", "canny")
    assert verified.returncode == 0 and verified.stdout.startswith(f"{CONTROL} {COMMIT[:12]}")
    assert "one network" in error_of(run("download", "pose", "--only", "vae"), ExitCode.USAGE)


def test_redux_is_downloaded_by_its_presets_name(server, run, tmp_path):
    """Its two parts and no more; then it is found, and listed as whole."""
    published = files(write_redux(tmp_path / "redux"))
    server.repositories[PUBLISHED_REDUX] = published | {
        "flux1-redux-dev.safetensors": b"the same once more",
        "text_encoder/model.safetensors": b"x",
    }
    result = run("download", "redux")
    folder = snapshot(PUBLISHED_REDUX)
    assert (result.returncode, result.stdout) == (0, f"{folder}\n")
    assert set(files(folder)) == set(published)
    rows = json.loads(run("list", "--json").stdout)
    assert [row["state"] for row in rows if row["name"] == PUBLISHED_REDUX] == ["complete"]
    assert run("verify", "redux").returncode == 0
    assert run("remove", "redux", "--yes").returncode == 0


def test_redux_without_one_of_its_parts_is_not_downloaded(server, run, tmp_path):
    published = files(write_redux(tmp_path / "redux"))
    del published["image_encoder/model.safetensors"]
    server.repositories[PUBLISHED_REDUX] = published
    stderr = error_of(run("download", "redux", "-q"), ExitCode.WEIGHTS)
    assert "no usable file in image_encoder/" in stderr


def test_kontext_is_downloaded_by_its_presets_name(server, run, published):
    server.repositories["black-forest-labs/FLUX.1-Kontext-dev"] = dict(published)
    result = run("download", "kontext")
    assert result.stdout == f"{snapshot('black-forest-labs/FLUX.1-Kontext-dev')}\n"
