"""Addresses of the hub are names; what is wrong with the way to it is said by its variable."""

from pathlib import Path

import pytest

from fluxcli.errors import ExitCode, UsageError, WeightsUnavailable, exit_code_of
from fluxcli.models import find, loras
from fluxcli.models.address import read_address
from fluxcli.models.network import check_network, describe_network
from fluxcli.paths import hub_cache_folder
from fluxcli.request.settings import LoraRef
from quant.errors import ExplainedError, MissingLibrary

READ = {
    "https://huggingface.co/ORG/NAME": "ORG/NAME",
    "https://huggingface.co/ORG/NAME/": "ORG/NAME",
    "http://www.huggingface.co/ORG/NAME/tree/main": "ORG/NAME",
    "https://hf.co/ORG/NAME/tree/v1.0/deep/folder": "ORG/NAME@v1.0",
    "https://huggingface.co/ORG/NAME/commit/c0ffee": "ORG/NAME@c0ffee",
    "huggingface.co/ORG/NAME": "ORG/NAME",
    "hf.co/ORG/NAME/resolve/main/x.gguf": "ORG/NAME:x.gguf",
    "https://huggingface.co/ORG/NAME/resolve/main/x.safetensors": "ORG/NAME:x.safetensors",
    "https://huggingface.co/ORG/NAME/resolve/main/x.safetensors?download=true": (
        "ORG/NAME:x.safetensors"
    ),
    "HTTPS://HuggingFace.co/ORG/NAME/blob/main/deep/x.safetensors#L1": (
        "ORG/NAME:deep/x.safetensors"
    ),
    "https://huggingface.co/ORG/NAME/raw/v2/x.safetensors": "ORG/NAME@v2:x.safetensors",
    "https://huggingface.co/ORG/NAME/resolve/refs%2Fpr%2F1/a%20b.safetensors": (
        "ORG/NAME@refs/pr/1:a b.safetensors"
    ),
    "hf:ORG/NAME": "ORG/NAME",
    "hf:ORG/NAME:deep/x.safetensors": "ORG/NAME:deep/x.safetensors",
    "hf://ORG/NAME/deep/x.safetensors": "ORG/NAME:deep/x.safetensors",
    "hf://ORG/NAME@v2/x.safetensors": "ORG/NAME@v2:x.safetensors",
    "huggingface:ORG/NAME": "ORG/NAME",
    " https://huggingface.co/ORG/NAME ": "ORG/NAME",
    "ORG/NAME": "ORG/NAME",
    "ORG/NAME:x.safetensors": "ORG/NAME:x.safetensors",
    "folder/huggingface.co/x": "folder/huggingface.co/x",
    "bundled/tiny": "bundled/tiny",
    "": "",
}


@pytest.mark.parametrize("text", READ)
def test_an_address_is_the_name_that_it_means(text):
    assert read_address(text) == READ[text]


@pytest.mark.parametrize(
    "text",
    [
        "https://civitai.com/api/download/models/123",
        "https://civitai.com/models/1/x?modelVersionId=2",
        "https://github.com/ORG/NAME",
        "https://huggingface.co.example.com/ORG/NAME",
        "s3://bucket/x.safetensors",
        "file:///x.safetensors",
        "https://",
        "https://huggingface.co/ORG",
        "https://huggingface.co",
        "https://huggingface.co/datasets/ORG/NAME",
        "https://huggingface.co/spaces/ORG/NAME",
    ],
)
def test_other_addresses_are_refused_by_name(text):
    with pytest.raises(UsageError) as caught:
        read_address(text)
    assert caught.value.hint


def put(commit: str, file: str, **refs: str) -> Path:
    """A file in the hub's cache, and the revisions that mean its commit."""
    repository = hub_cache_folder() / "models--ORG--NAME"
    path = repository / "snapshots" / commit / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    for name in refs:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return path


def test_models_and_adapters_are_found_by_their_address():
    new = put("a" * 40, "x.safetensors", main="")
    old = put("b" * 40, "x.safetensors", v1="")
    for locate in (find.locate, loras.locate):
        site = "https://huggingface.co/ORG/NAME"
        assert locate(f"{site}/resolve/main/x.safetensors") == new
        assert locate(f"{site}/blob/v1/x.safetensors?download=true") == old
        assert locate(f"{site}/blob/{'b' * 40}/x.safetensors") == old
        with pytest.raises(WeightsUnavailable) as caught:
            locate(f"{site}/blob/v2/x.safetensors")
        assert caught.value.hint.startswith("flux models download ORG/NAME@v2:x.safetensors")
    refs = [LoraRef.parse("https://huggingface.co/ORG/NAME/resolve/main/y.safetensors:0.5")]
    assert loras.make_absolute(refs) == (LoraRef("ORG/NAME:y.safetensors", 0.5),)


def test_what_is_not_here_says_how_to_get_it_and_what_that_takes():
    with pytest.raises(WeightsUnavailable) as caught:
        find.locate("https://huggingface.co/black-forest-labs/FLUX.1-dev")
    hint = caught.value.hint
    assert "flux models download dev (34 GB, gated: first accept the licence at hugg" in hint
    assert "hf auth login" in hint and "-p tiny" in hint


# --- the way to the hub


WRONG: dict[str, tuple[dict[str, str], str, type[ExplainedError]]] = {
    "no such file": ({"SSL_CERT_FILE": "/none.pem"}, "SSL_CERT_FILE", WeightsUnavailable),
    "a folder": ({"SSL_CERT_FILE": "/"}, "SSL_CERT_FILE", WeightsUnavailable),
    "no certificates": ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE", WeightsUnavailable),
    "no such folder": ({"SSL_CERT_DIR": "/none/at/all"}, "SSL_CERT_DIR", WeightsUnavailable),
    "socks5": ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY", MissingLibrary),
    "socks5h": ({"https_proxy": "socks5h://127.0.0.1:9"}, "https_proxy", MissingLibrary),
    "socks": ({"ALL_PROXY": "socks://127.0.0.1:9/"}, "ALL_PROXY", WeightsUnavailable),
    "socks4": ({"HTTP_PROXY": "socks4://127.0.0.1:9/"}, "HTTP_PROXY", WeightsUnavailable),
    "ftp": ({"HTTPS_PROXY": "ftp://proxy:21"}, "HTTPS_PROXY", WeightsUnavailable),
    "port": ({"HTTPS_PROXY": "http://proxy:port"}, "HTTPS_PROXY", WeightsUnavailable),
    "no host": ({"HTTPS_PROXY": "http://"}, "HTTPS_PROXY", WeightsUnavailable),
    "bracket": ({"HTTPS_PROXY": "http://[::1"}, "HTTPS_PROXY", WeightsUnavailable),
    "words": ({"HTTPS_PROXY": "my proxy"}, "HTTPS_PROXY", WeightsUnavailable),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_variable_that_bars_the_way_is_named_and_its_value_is_not(case, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    variables, name, kind = WRONG[case]
    with pytest.raises(kind) as caught:
        check_network(variables)
    assert caught.value.which == name and name in caught.value.hint
    assert variables[name] not in str(caught.value)
    assert exit_code_of(caught.value) in (ExitCode.WEIGHTS, ExitCode.DEVICE)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HTTPS_PROXY": "http://user:secret@proxy.example.com:3128", "NO_PROXY": "localhost"},
        {"https_proxy": "proxy:3128", "ALL_PROXY": ""},
        {"ALL_PROXY": "socks://x:1", "NO_PROXY": "*"},
        {"REQUESTS_CA_BUNDLE": "/none"},  # not read by the library
    ],
)
def test_a_way_that_may_be_good_is_tried(variables):
    check_network(variables)


def test_socks_with_its_library_is_tried(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "socksio", object())
    check_network({"ALL_PROXY": "socks5://127.0.0.1:9"})


def test_what_is_set_is_named_where_the_hub_is_out_of_reach():
    variables = {"REQUESTS_CA_BUNDLE": "/none", "HTTPS_PROXY": "http://user:secret@x:1"}
    said = describe_network(variables)
    assert "REQUESTS_CA_BUNDLE (there is no such file)" in said and "HTTPS_PROXY" in said
    assert "secret" not in said and describe_network({}) == ""
