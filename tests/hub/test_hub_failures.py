"""A hub that is busy, drops, stalls and lies."""

import errno
import os
import sys

import pytest

from fluxcli.errors import ExitCode
from fluxcli.models import find as models
from fluxcli.models import hub
from quant.checkpoint import inspect
from tests.support.hub import DEV, T5, error_of, snapshot, weights_asked
from tests.support.hub_server import PAGE
from tests.support.invariant import files


@pytest.mark.parametrize("where", ["GET /api/models/.*/tree", f"HEAD .*{T5}", f"GET .*cdn.*{T5}"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_that_passes_is_waited_for(status, where, server, run):
    server.fail(where, status, 2, Retry_After="0")
    result = run("download", "dev")
    assert result.returncode == 0 and len(server.asked(where)) > 2 and inspect(snapshot())


@pytest.mark.parametrize(
    "headers", [{"Retry_After": "0"}, {"RateLimit": '"api";r=0;t=0'}, {"Retry_After": "x"}, {}]
)
def test_a_hub_that_stays_busy_is_given_up(headers, server, run):
    server.fail("HEAD .*vae/config", 429, 99, **headers)
    assert "HTTP 429" in error_of(run("download", "dev"), ExitCode.WEIGHTS)
    assert 4 < len(server.asked("HEAD .*vae/config")) < 20 and not weights_asked(server)


def test_a_hub_that_is_down_is_given_up(server, run):
    server.fail("cdn", 500, 99)
    assert "HTTP 500" in error_of(run("download", "dev"), ExitCode.WEIGHTS)
    with pytest.raises(Exception, match="incomplete"):
        models.locate(DEV)
    assert not list(models.get_repository(DEV).rglob("*.incomplete"))


def test_a_download_goes_on_after_a_dropped_connection(server, run):
    server.fail(f"cdn.*{T5}", "reset", 2)
    result = run("download", "dev")
    assert (
        result.returncode == 0
        and result.stderr.count(f"goes on with {T5}") == 2
        and inspect(snapshot())
    )
    assert "connection dropped" in result.stderr


def test_a_connection_that_always_drops_is_given_up(server, run):
    server.fail("cdn", "reset", 99)
    result = run("download", "dev")
    assert (
        "out of reach" in error_of(result, ExitCode.WEIGHTS)
        and result.stderr.count("goes on with") == 4
    )


def test_a_download_goes_on_after_an_error_of_xet(server, run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Data processing error: CAS service error : Request failed")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    result = run("download", "dev")
    assert (
        "out of reach" in error_of(result, ExitCode.WEIGHTS)
        and result.stderr.count("goes on with") == 4
    )


def test_bytes_are_counted_once_also_where_a_file_starts_again(server, micro):
    server.fail(f"cdn.*{T5}", "reset", 1)
    seen: list[tuple[int, int, str]] = []
    hub.download(
        DEV, lambda _: None, lambda done, total, detail: seen.append((done, total, detail))
    )
    size = sum(map(len, files(micro).values()))
    assert max(done for done, _, _ in seen) == seen[-1][0] == {total for _, total, _ in seen}.pop()
    assert abs(seen[-1][0] - size) < 200  # JSON differs


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_file_that_ends_early_or_stalls_is_taken_up_by_the_library_while_the_process_lives(
    kind, server, run
):
    server.fail(f"cdn.*{T5}", kind)
    assert run("download", "dev").returncode == 0 and inspect(snapshot())
    assert len(server.asked(f"GET .*cdn.*{T5}")) == 2


@pytest.mark.parametrize(
    "name, value",
    [
        ("SSL_CERT_FILE", "/nonexistent/cacert.pem"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("ALL_PROXY", "socks://127.0.0.1:9/"),
        ("HTTPS_PROXY", "http://[::1"),
    ],
)
def test_a_variable_that_bars_the_way_is_named(name, value, server, run, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "socksio", None)
    code = ExitCode.DEVICE if value.startswith("socks5") else ExitCode.WEIGHTS
    for command in ("download", "verify"):
        if command == "verify":
            snapshot().mkdir(parents=True)
            (snapshot() / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        result = run(command, "dev", "-q")
        assert name in error_of(result, code) and name in result.stderr.splitlines()[-1]
    assert not server.requests


# --- what is not what was published


@pytest.mark.parametrize("kind, why", [("swap", "web page"), ("page", "size")])
def test_a_web_page_instead_of_weights_is_named_and_not_kept(kind, why, server, run):
    server.fail(f"cdn.*{T5}", kind, 99)
    stderr = error_of(run("download", "dev"), ExitCode.INPUT_FILE)
    assert T5 in stderr and why in stderr and len(server.asked(f"GET .*cdn.*{T5}")) == 1
    assert not (snapshot() / T5).exists() and not (snapshot() / T5).is_symlink()
    assert not any(
        path.read_bytes().startswith(PAGE[:9])
        for path in (models.get_repository(DEV) / "blobs").iterdir()
    )


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


@pytest.mark.parametrize(
    "number, why", [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")]
)
def test_a_cache_that_cannot_be_written_is_exit_6(number, why, server, run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", fail)
    assert why in error_of(run("download", "dev"), ExitCode.OUTPUT)


def test_a_bug_stays_a_bug(server, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", lambda *_, **__: {}["sha"])
    assert "bug" in error_of(run("download", "dev"), ExitCode.BUG)
