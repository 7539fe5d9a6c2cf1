"""`flux models` against a hub on this machine that refuses, drops, stalls and lies; never the network."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http
from safetensors.torch import save

from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.models import find as models
from fluxcli.models import hub
from quant.checkpoint import MANIFEST, inspect
from tests.support.helpers import ROOT
from tests.support.hub_server import COMMIT, PAGE, HubServer
from tests.support.invariant import assert_failed, call, files

DEV = "black-forest-labs/FLUX.1-dev"
TOKEN = "hf_secretsecretsecretsecretsecret"
T5 = "text_encoder_2/model.safetensors"
EVIL = b"raise SystemExit('code of a model was run')"
REFUSED = {
    "flux1-dev.safetensors": b"the same once more", "README.md": b"x", ".gitattributes": b"", "dev_grid.jpg": b"x",
    "pipeline.py": EVIL, "transformer/model.py": EVIL, "tokenizer/tokenization.py": EVIL, "vae/x.pt": b"PK",
    "text_encoder/pytorch_model.bin": b"PK", "transformer/diffusion_pytorch_model.fp16.safetensors": b"half",
    "safety_checker/model.safetensors": b"x", "vae/deeper/config.json": b"{}",
}  # fmt: skip
LORA = save({"transformer.x_embedder.lora_A.weight": torch.ones(2, 4)})
USAGE = namedtuple("usage", "total used free")


@pytest.fixture(scope="session")
def published(micro: Path) -> dict[str, bytes]:
    """The files of a small FLUX model as the hub has them, with what flux leaves there."""
    found = files(micro)
    index = json.loads(found["model_index.json"]) | {"transformer": ["pipeline", "Evil"]}
    config = json.loads(found["transformer/config.json"]) | {"auto_map": {"AutoModel": "model.Evil"}}
    changed = {"model_index.json": json.dumps(index).encode(), "transformer/config.json": json.dumps(config).encode()}
    return found | changed | REFUSED


@pytest.fixture
def server(
    published: dict[str, bytes], micro: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HubServer]:
    """The hub, which this process uses; no pauses between tries."""
    header = (micro / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    lora = {"a.safetensors": header, "b.gguf": b"GGUF", "c.bin": b"PK", "page.safetensors": PAGE,
            "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}  # fmt: skip
    with HubServer(**{DEV: dict(published), "x/flux-lora": lora, "x/flux-other": {"README.md": b""}}) as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.setattr(hub, "PAUSES_S", (0, 0, 0, 0))
        monkeypatch.setattr(hub, "LONGEST_PAUSE_S", 0.2)
        yield running
    set_client_factory(_http.default_client_factory)


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., CompletedProcess]:
    return partial(call, capsys, "models")


def error_of(result: CompletedProcess, code: int) -> str:
    """The error and hint of a command that failed as it must; notices before them are checked for their form."""
    lines = result.stderr.splitlines(keepends=True)
    notices = [line for line in lines if line.startswith("flux: ") and not line.startswith("flux: error")]
    assert result.stdout == "" and TOKEN not in result.stderr and "127.0.0.1" not in result.stderr
    rest = "".join(line for line in lines if line not in notices)
    return assert_failed(CompletedProcess(result.args, result.returncode, result.stdout, rest), code)


def snapshot(model: str = DEV) -> Path:
    return models.repository(model) / "snapshots" / COMMIT


def weights_asked(server: HubServer) -> list[str]:
    return server.asked("GET .*safetensors")


# --- what is downloaded


def test_a_download_is_one_commit_checked_and_only_the_files_that_are_used(server, run, micro):
    result = run("download", "dev")
    assert (result.returncode, result.stdout) == (0, f"{snapshot()}\n")
    assert set(files(snapshot())) == set(files(micro))
    assert {line.split("/resolve/")[1].split("/")[0] for line in server.asked("/resolve/")} == {COMMIT}
    licence, plan, *weights = result.stderr.splitlines()
    assert "non-commercial" in licence and f"{DEV}@{COMMIT[:12]}: {len(files(micro))} files" in plan
    assert "GB to download" in plan and "GB free" in plan and len(weights) == 4 and "\x1b" not in result.stderr
    assert models.locate(DEV) == snapshot() and (models.repository(DEV) / "refs" / "main").read_text() == COMMIT


def test_no_code_of_a_model_is_fetched_and_none_of_its_own_classes_is_loaded(server, run):
    assert run("download", "dev").returncode == 0
    assert not list(models.repository(DEV).rglob("*.py")) and not server.asked(r"\.(py|bin|pt)$")
    assert inspect(snapshot()).components["transformer"].weights


def test_a_second_download_asks_once_and_writes_nothing(server, run):
    run("download", "dev", "-q")
    kept = {path: path.lstat().st_mtime_ns for path in models.hub_cache().rglob("*")}
    for folder in (path for path in kept if path.is_dir()):
        folder.chmod(0o555)
    server.requests.clear()
    result = run("download", "dev", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{snapshot()}\n", "")
    assert server.asked(".") == [f"GET /api/models/{DEV}/revision/main"]
    assert kept == {path: path.lstat().st_mtime_ns for path in models.hub_cache().rglob("*")}
    assert models.locate(DEV) == snapshot()


def test_a_new_commit_takes_only_what_has_changed(server, run):
    run("download", "dev", "-q")
    old, server.commit = snapshot(), "f" * 40
    server.repositories[DEV]["scheduler/scheduler_config.json"] += b"\n"
    server.requests.clear()
    result = run("download", "dev")
    new = old.with_name("f" * 40)
    assert result.stdout == f"{new}\n" and models.locate(DEV) == new and set(files(new)) == set(files(old))
    assert [line.rpartition("/")[2] for line in server.asked("GET .*/(resolve|cdn)/")] == ["scheduler_config.json"]
    server.commit = COMMIT
    assert run("download", "dev", "--revision", COMMIT).stdout == f"{old}\n" and models.locate(DEV) == new


@pytest.mark.parametrize("only", ["tokenizers", "vae", "transformer, tokenizer"])
def test_parts_come_with_the_small_files_of_all(only, server, run):
    assert run("download", "dev", "--only", only).returncode == 0
    got, small = set(files(snapshot())), {"model_index.json", "scheduler/scheduler_config.json"}
    assert got >= small | {f"{part}/config.json" for part in hub.COMPONENTS}
    weights = {name.partition("/")[0] for name in got if name.endswith(".safetensors")}
    assert weights == {"tokenizers": set(), "vae": {"vae"}, "transformer, tokenizer": {"transformer"}}[only]
    assert any(name.startswith("tokenizer_2/") for name in got) == (only == "tokenizers")


def test_one_file_of_any_repository(server, run):
    result = run("download", "x/flux-lora:a.safetensors", "-q")
    assert result.stdout == f"{snapshot('x/flux-lora') / 'a.safetensors'}\n" and len(weights_asked(server)) == 1
    assert Path(run("download", "x/flux-lora:b.gguf", "-q").stdout.strip()).read_bytes() == b"GGUF"
    assert models.locate("x/flux-lora:a.safetensors") == Path(result.stdout.strip())


def test_a_file_that_was_downloaded_is_found_whatever_its_name(server, run):
    name = "x/flux-lora:Ink + line (v1, [fp8]).safetensors"
    server.repositories["x/flux-lora"][name.partition(":")[2]] = server.repositories["x/flux-lora"]["a.safetensors"]
    result = run("download", name, "-q")
    assert result.returncode == 0 and models.locate(name) == Path(result.stdout.strip())


def test_one_file_in_a_mirror(server, run, tmp_path, monkeypatch):
    result = run("download", "x/flux-lora:a.safetensors", "--mirror", str(tmp_path))
    assert result.stdout == f"{tmp_path / 'x/flux-lora/a.safetensors'}\n"
    monkeypatch.setenv("FLUX_MIRROR", str(tmp_path))
    assert models.locate("x/flux-lora:a.safetensors") == Path(result.stdout.strip())


def test_a_mirror_is_plain_files_that_another_machine_finds(server, run, micro, tmp_path, monkeypatch):
    share = tmp_path / "share"
    for _ in range(2):
        result = run("download", "dev", "--mirror", str(share))
        assert result.stdout == f"{share / DEV}\n" and not models.repository(DEV).exists()
    assert len(weights_asked(server)) == 4
    plain = {name: data for name, data in files(share / DEV).items() if not name.startswith(".cache")}
    assert set(plain) == set(files(micro)) and not any(path.is_symlink() for path in share.rglob("*"))
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


# --- what is refused before the first byte


def test_gated_is_explained_step_by_step(server, run, monkeypatch):
    server.fail("/resolve/", 401, 99, X_Error_Code="GatedRepo")
    stderr = error_of(run("download", "dev"), ExitCode.WEIGHTS)
    steps = [
        "1. accept",
        f"huggingface.co/{DEV}",
        "2. make a read token",
        "3. hf auth login",
        "4. flux models download",
    ]
    assert "gated" in stderr and "nobody is logged in" in stderr
    assert [stderr.index(step) for step in steps] == sorted(stderr.index(step) for step in steps)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.fail("/resolve/", 403, 99, X_Error_Code="GatedRepo")
    assert "no access" in error_of(run("download", "dev"), ExitCode.WEIGHTS)
    assert not weights_asked(server) and any(TOKEN in token for _, _, token in server.requests)


def test_the_token_goes_to_the_hub_and_not_to_another_host(server, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = run("download", "dev")
    assert result.returncode == 0 and TOKEN not in result.stdout + result.stderr
    tokens = {(path.split("/")[1], token) for _, path, token in server.requests if "agent-harnesses" not in path}
    assert tokens == {("cdn", ""), ("api", f"Bearer {TOKEN}"), (DEV.partition("/")[0], f"Bearer {TOKEN}")}


REFUSALS = {
    "no repository": (["x/none"], 3, ["no such model", "huggingface.co/x/none", "hf auth login"]),
    "no revision": (["dev", "--revision", "v9"], 3, ["no such revision"]),
    "no file": (["x/flux-lora:d.safetensors"], 3, ["d.safetensors", "one of a.safetensors, b.gguf, page.safetensors"]),
    "no model folder": (["x/flux-lora"], 3, ["model_index.json", "x/flux-lora:FILE"]),
    "nothing usable": (["x/flux-other"], 3, ["model_index.json"]),
    "a pickle": (["x/flux-lora:c.bin"], 2, ["nothing to download"]),
    "no id": (["dave"], 2, ["ORG/NAME"]),
    "parts of a file": (["x/flux-lora:a.safetensors", "--only", "vae"], 2, ["--only"]),
    "parts of what comes with flux": (["tiny", "--only", "vae"], 2, ["--only"]),
    "no part": (["dev", "--only", "unet"], 2, ["unet", "tokenizers"]),
}


@pytest.mark.parametrize("arguments, code, words", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_downloaded_says_why_at_once(arguments, code, words, server, run):
    stderr = error_of(run("download", *arguments), code)
    assert all(word in stderr for word in words) and not server.asked("/(resolve|cdn)/")


@pytest.mark.parametrize(
    "model", ["a/b/c", "../x/y", "a/..", "-x/y", "a b/c", "", "https://huggingface.co/a/b", "a/b:", "a/b:../x.gguf"]
)
def test_what_is_no_hub_id_is_no_request(model, server, run):
    error_of(run("download", "--", model), ExitCode.USAGE)
    assert not server.requests


def test_a_model_that_lacks_a_part_is_refused_before_the_first_byte(server, run):
    del server.repositories[DEV][T5]
    assert "no usable file in text_encoder_2/" in error_of(run("download", "dev"), ExitCode.WEIGHTS)
    assert not server.asked("/resolve/")


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(server, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**6, 0, 10**4))
    stderr = error_of(run("download", "dev"), ExitCode.OUTPUT)
    assert (
        "needs 0.00 GB, 0.00 GB are free" in stderr
        and "HF_HOME" in stderr
        and not server.asked("GET .*/(resolve|cdn)/")
    )


def test_offline_opens_no_socket_and_says_what_is_here(server, run, monkeypatch):
    run("download", "dev", "-q")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("opened a socket"))
    for name in ("dev", "schnell", "x/flux-lora:a.safetensors"):
        stderr = error_of(run("download", name), ExitCode.WEIGHTS)
        assert "HF_HUB_OFFLINE" in stderr and f"{DEV} (complete)" in stderr and "bundled/tiny (complete)" in stderr
    assert run("verify", "dev").returncode == run("list").returncode == run("remove", "dev", "--yes").returncode == 0


def test_no_network_is_said_at_once_with_what_is_here(server, run):
    run("download", "dev", "-q")
    server.__exit__()
    started = time.perf_counter()
    stderr = error_of(run("download", "schnell"), ExitCode.WEIGHTS)
    assert "out of reach" in stderr and f"{DEV} (complete)" in stderr and time.perf_counter() - started < 5


# --- what may pass


@pytest.mark.parametrize("where", ["GET /api/models", f"HEAD .*{T5}", f"GET .*cdn.*{T5}"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_that_passes_is_waited_for(status, where, server, run):
    server.fail(where, status, 2, Retry_After="0")
    result = run("download", "dev")
    tries = 1 if "HEAD" in where else 2  # the library asks again at once
    assert result.returncode == 0 and result.stderr.count(f"HTTP {status}: ") == tries and inspect(snapshot())


@pytest.mark.parametrize(
    "headers", [{"Retry_After": "86400"}, {"RateLimit": '"api";r=0;t=86400'}, {"Retry_After": "x"}, {}]
)
def test_a_hub_that_stays_busy_is_given_up_soon_whatever_it_asks_for(headers, server, run):
    server.fail("HEAD .*vae/config", 429, 99, **headers)
    started = time.perf_counter()
    result = run("download", "dev")
    assert "HTTP 429" in error_of(result, ExitCode.WEIGHTS) and result.stderr.count("asks again") == 4
    assert time.perf_counter() - started < 5 and not weights_asked(server)


def test_a_hub_that_is_down_is_given_up(server, run):
    server.fail("cdn", 500, 99)
    assert "HTTP 500" in error_of(run("download", "dev"), ExitCode.WEIGHTS)
    with pytest.raises(Exception, match="incomplete"):
        models.locate(DEV)
    assert not list(models.repository(DEV).rglob("*.incomplete"))


def test_a_dropped_connection_starts_the_file_again(server, run):
    server.fail(f"cdn.*{T5}", "reset", 2)
    result = run("download", "dev")
    assert result.returncode == 0 and result.stderr.count(f"starts this file again: {T5}") == 2 and inspect(snapshot())
    assert "connection dropped" in result.stderr


def test_a_connection_that_always_drops_is_given_up(server, run):
    server.fail("cdn", "reset", 99)
    result = run("download", "dev")
    assert "out of reach" in error_of(result, ExitCode.WEIGHTS) and result.stderr.count("starts this file again") == 4


def test_an_error_of_xet_starts_the_file_again(server, run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Data processing error: CAS service error : Request failed")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    result = run("download", "dev")
    assert "out of reach" in error_of(result, ExitCode.WEIGHTS) and result.stderr.count("starts this file again") == 4


def test_bytes_are_counted_once_also_where_a_file_starts_again(server, micro):
    server.fail(f"cdn.*{T5}", "reset", 1)
    seen: list[tuple[int, int, str]] = []
    hub.download(DEV, lambda _: None, lambda done, total, detail: seen.append((done, total, detail)))
    size = sum(map(len, files(micro).values()))
    assert max(done for done, _, _ in seen) == seen[-1][0] == {total for _, total, _ in seen}.pop()
    assert abs(seen[-1][0] - size) < 200 and len({detail for _, _, detail in seen}) == len(files(micro))  # JSON differs


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_file_that_ends_early_or_stalls_is_taken_up_by_the_library_while_the_process_lives(kind, server, run):
    server.fail(f"cdn.*{T5}", kind)
    assert run("download", "dev").returncode == 0 and inspect(snapshot())
    assert len(server.asked(f"GET .*cdn.*{T5}")) == 2


# --- what is not what was published


@pytest.mark.parametrize("kind, why", [("swap", "web page"), ("page", "size")])
def test_a_web_page_instead_of_weights_is_fetched_once_more(kind, why, server, run):
    server.fail(f"cdn.*{T5}", kind)
    result = run("download", "dev")
    assert result.returncode == 0 and why in result.stderr and "starts this file again" in result.stderr
    assert inspect(snapshot())


@pytest.mark.parametrize("kind, why", [("swap", "web page"), ("page", "size")])
def test_a_web_page_that_stays_is_named_and_not_kept(kind, why, server, run):
    server.fail(f"cdn.*{T5}", kind, 99)
    stderr = error_of(run("download", "dev"), ExitCode.INPUT_FILE)
    assert T5 in stderr and why in stderr and len(server.asked(f"GET .*cdn.*{T5}")) == 2
    assert not (snapshot() / T5).exists() and not (snapshot() / T5).is_symlink()
    assert not any(path.read_bytes().startswith(PAGE[:9]) for path in (models.repository(DEV) / "blobs").iterdir())


def test_weights_whose_checksum_differs_are_named(server, run):
    server.fail(f"cdn.*{T5}", "rot", 99)
    stderr = error_of(run("download", "dev"), ExitCode.INPUT_FILE)
    assert T5 in stderr and "sha256" in stderr and not (snapshot() / T5).is_symlink()


@pytest.mark.parametrize("name, why", [("page", "web page"), ("pointer", "git-lfs pointer")])
def test_a_page_or_pointer_that_was_uploaded_as_weights_is_named(name, why, server, run):
    stderr = error_of(run("download", f"x/flux-lora:{name}.safetensors"), ExitCode.INPUT_FILE)
    assert f"{name}.safetensors" in stderr and why in stderr
    assert not (snapshot("x/flux-lora") / f"{name}.safetensors").exists()


@pytest.mark.parametrize("where", ["/api/models", "HEAD"])
def test_a_proxy_that_answers_with_its_own_page_is_no_hub(where, server, run):
    if where == "HEAD":
        server.fail("HEAD", 200, 99)
    else:
        server.fail(where, "page", 99)
    assert "proxy" in error_of(run("download", "dev"), ExitCode.WEIGHTS)


@pytest.mark.parametrize("number, why", [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")])
def test_a_cache_that_cannot_be_written_is_exit_6(number, why, server, run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", fail)
    assert why in error_of(run("download", "dev"), ExitCode.OUTPUT)


def test_a_bug_stays_a_bug(server, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: {}["sha"])
    assert "bug" in error_of(run("download", "dev"), ExitCode.BUG)


# --- list, verify, remove


def test_the_list_says_what_is_here_and_how_much_of_it(server, run, baked, tmp_path):
    run("download", "dev", "--only", "tokenizers", "-q")
    run("download", "x/flux-lora:a.safetensors", "-q")
    (models.hub_cache() / "models--google--t5" / "snapshots" / COMMIT).mkdir(parents=True)
    models.baked_folder().mkdir(parents=True)
    (models.baked_folder() / "tiny-nf4").symlink_to(baked("nf4", modulation="nf4"))
    (models.baked_folder() / "x.tmp-1-00000000").symlink_to(baked("nf4", modulation="nf4"))
    rows = json.loads(run("list", "--json").stdout)
    assert [(row["name"], row["kind"], row["state"]) for row in rows] == [
        ("tiny-nf4", "baked", "complete"), ("bundled/tiny", "bundled", "complete"),
        (DEV, "hub", "partial"), ("x/flux-lora", "hub", "files"),
    ]  # fmt: skip
    assert rows[2]["commit"] == COMMIT and rows[2]["path"] == str(snapshot()) and rows[3]["bytes"] > 50
    text = run("list").stdout
    assert len(text.splitlines()) == 4 and COMMIT[:12] in text and "GB" in text


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
    store = models.hub_cache() / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert run("verify", "dev").returncode == 0
    store.write_bytes(store.read_bytes()[:-1])
    assert T5 in error_of(run("verify", "dev"), ExitCode.INPUT_FILE)


def test_a_sharded_model_whose_blobs_are_in_the_librarys_shared_store_is_usable(server, run):
    part = "vae/diffusion_pytorch_model"
    weights = server.repositories[DEV].pop(f"{part}.safetensors")
    names = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")]).keys() - {"__metadata__"}
    index = {"weight_map": dict.fromkeys(names, "x-00001-of-00001.safetensors")}
    server.repositories[DEV] |= {"vae/x-00001-of-00001.safetensors": weights,
                                 f"{part}.safetensors.index.json": json.dumps(index).encode()}  # fmt: skip
    assert run("download", "dev", "-q").returncode == 0 and inspect(snapshot())
    blob = (snapshot() / "vae/x-00001-of-00001.safetensors").resolve()
    store = models.hub_cache() / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert inspect(models.locate(DEV))


def test_verify_knows_sizes_and_headers_of_what_quantize_made(baked, run, tmp_path):
    folder = models.baked_folder() / "tiny-nf4"
    shutil.copytree(baked("nf4", modulation="nf4"), folder)
    assert all("no checksum is known" in run("verify", name).stdout for name in ("tiny-nf4", "tiny"))
    name = max(json.loads((folder / MANIFEST).read_text())["bytes"])
    (folder / name).unlink()
    assert name in error_of(run("verify", "tiny-nf4"), ExitCode.INPUT_FILE)
    assert run("remove", "tiny-nf4", "--yes").returncode == 0 and not folder.exists()


@pytest.mark.parametrize("command", ["verify", "remove"])
@pytest.mark.parametrize("name", ["dev", "nothing", "../x", "", "bundled/none"])
def test_what_is_not_here_can_neither_be_verified_nor_removed(command, name, run):
    assert "flux models list" in error_of(run(command, name), ExitCode.WEIGHTS)


@pytest.mark.parametrize("answer, gone", [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False), ("", False)])
def test_remove_asks_on_a_terminal(answer, gone, server, run, monkeypatch):
    run("download", "dev", "-q")
    terminal = type("Terminal", (), {"isatty": lambda _: True, "readline": lambda _: answer})()
    monkeypatch.setattr(console.sys, "stdin", terminal)
    result = run("remove", "dev")
    assert result.returncode == 0 and str(snapshot()) in result.stderr and "GB" in result.stderr
    assert "[y/N]" in result.stderr and snapshot().exists() == models.repository(DEV).exists() == (not gone)


def test_remove_never_guesses_and_leaves_the_bundled_model(server, run, tiny_folder):
    run("download", "dev", "-q")
    assert "flux models remove dev --yes" in run("remove", "dev").stderr and snapshot().exists()
    assert run("remove", "dev").returncode == ExitCode.USAGE
    assert "comes with flux" in error_of(run("remove", "tiny", "--yes"), ExitCode.USAGE) and tiny_folder.exists()


def test_verify_does_not_pass_a_model_that_is_not_whole(server, run, tmp_path, monkeypatch):
    run("download", "dev", "-q")
    (snapshot() / T5).unlink()
    stderr = error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert "weights of text_encoder_2 are missing" in stderr and f"flux models download {DEV}" in stderr
    (snapshot() / "vae/config.json").unlink()
    assert "configs or tokenizers" in error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert run("download", "dev", "--only", "vae", "--mirror", str(tmp_path), "-q").returncode == 0
    assert run("remove", "dev", "--yes").returncode == 0
    monkeypatch.setenv("FLUX_MIRROR", str(tmp_path))
    stderr = error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert f"--mirror {tmp_path}" in stderr and "by checksum" in stderr


def test_a_repository_without_flux_in_its_name_is_verified_and_removed_and_listed_with_a_lora(server, run):
    server.repositories |= {"x/hyper": {"a.safetensors": LORA}, "x/encoder": server.repositories["x/flux-lora"]}
    for name in ("x/hyper", "x/encoder"):
        assert run("download", f"{name}:a.safetensors", "-q").returncode == 0
    rows = [row["name"] for row in json.loads(run("list", "--json").stdout)]
    assert "x/hyper" in rows and "x/encoder" not in rows
    for name in ("x/hyper", "x/encoder"):
        assert "1 files, 1 by checksum" in run("verify", name).stdout
        assert run("remove", name, "--yes").returncode == 0 and not models.repository(name).exists()


def test_an_exact_name_goes_before_the_model_of_a_preset(server, run, baked):
    run("download", "dev", "-q")
    folder = shutil.copytree(baked("nf4", modulation="nf4"), models.baked_folder() / "dev")
    assert run("remove", "dev", "--yes").returncode == 0 and not folder.exists() and snapshot().exists()
    assert run("remove", "dev", "--yes").returncode == 0 and not snapshot().exists()


# --- as a process


def test_the_command_by_itself(server, flux, micro):
    there = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    server.fail(f"cdn.*{T5}", "cut")
    result = flux("models", "download", "dev", **there)
    assert result.returncode == 0 and set(files(Path(result.stdout.strip()))) == set(files(micro))
    assert all(line.startswith("flux: ") for line in result.stderr.splitlines()) and TOKEN not in result.stderr
    assert_failed(flux("models", "download", "-q", "schnell", **there), ExitCode.WEIGHTS)
    assert "HF_HUB_OFFLINE" in assert_failed(flux("models", "download", "schnell"), ExitCode.WEIGHTS)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_stops_a_download_and_leaves_no_partial_file(server):
    server.fail(f"cdn.*{T5}", "stall", 99)
    there = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fluxcli", "models", "download", "dev"]
    process = subprocess.Popen(command, env=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(models.hub_cache().rglob("*.incomplete")) or not server.asked(f"GET .*cdn.*{T5}"):
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and stdout == "" and "Traceback" not in stderr + "error"
    assert not list(models.hub_cache().rglob("*.incomplete"))
