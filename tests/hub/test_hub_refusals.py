"""What is refused before the first byte of a download, and why."""

import shutil
import socket
import time

import pytest
from huggingface_hub import close_session, constants

from fluxcli.errors import ExitCode
from tests.support.hub import DEV, T5, TOKEN, USAGE, error_of, weights_asked


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
    tokens = {
        (path.split("/")[1], token)
        for _, path, token in server.requests
        if "agent-harnesses" not in path
    }
    assert tokens == {
        ("cdn", ""),
        ("api", f"Bearer {TOKEN}"),
        (DEV.partition("/")[0], f"Bearer {TOKEN}"),
    }


REFUSALS = {
    "no repository": (["x/none"], 3, ["no such model", "huggingface.co/x/none", "hf auth login"]),
    "no revision": (["dev", "--revision", "v9"], 3, ["no such revision"]),
    "no file": (
        ["x/flux-lora:d.safetensors"],
        3,
        ["d.safetensors", "one of a.safetensors, b.gguf, page.safetensors"],
    ),
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
    "model",
    [
        "a/b/c",
        "../x/y",
        "a/..",
        "-x/y",
        "a b/c",
        "",
        "https://huggingface.co/a",
        "https://civitai.com/a/b",
        "a/b:",
        "a/b:../x.gguf",
    ],
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
        assert (
            "HF_HUB_OFFLINE" in stderr
            and f"{DEV} (complete)" in stderr
            and "bundled/tiny (complete)" in stderr
        )
    assert "HF_HUB_OFFLINE" in error_of(run("verify", "dev"), ExitCode.WEIGHTS)
    assert (
        run("verify", "tiny").returncode
        == run("list").returncode
        == run("remove", "dev", "--yes").returncode
        == 0
    )


def test_no_network_is_said_at_once_with_what_is_here(server, run):
    run("download", "dev", "-q")
    server.__exit__()
    close_session()
    started = time.perf_counter()
    stderr = error_of(run("download", "schnell"), ExitCode.WEIGHTS)
    assert (
        "out of reach" in stderr
        and f"{DEV} (complete)" in stderr
        and time.perf_counter() - started < 5
    )
