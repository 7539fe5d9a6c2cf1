"""A hub on this machine with a small model, and `flux models` in this process."""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from time import sleep

import pytest
from huggingface_hub import constants

from fluxcli.models import hub
from tests.support.hub import DEV, REFUSED
from tests.support.hub_server import PAGE, HubServer
from tests.support.invariant import call, files


@pytest.fixture(scope="session")
def published(micro: Path) -> dict[str, bytes]:
    """The files of a small FLUX model as the hub has them, with what flux leaves there."""
    found = files(micro)
    index = json.loads(found["model_index.json"]) | {"transformer": ["pipeline", "Evil"]}
    config = json.loads(found["transformer/config.json"]) | {
        "auto_map": {"AutoModel": "model.Evil"}
    }
    changed = {
        "model_index.json": json.dumps(index).encode(),
        "transformer/config.json": json.dumps(config).encode(),
    }
    return found | changed | REFUSED


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def server(
    published: dict[str, bytes], micro: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HubServer]:
    """The hub, which this process uses; no pauses between tries."""
    header = (micro / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    lora = {
        "a.safetensors": header,
        "b.gguf": b"GGUF",
        "c.bin": b"PK",
        "page.safetensors": PAGE,
        "pointer.safetensors": POINTER,
    }
    with HubServer(
        **{DEV: dict(published), "x/flux-lora": lora, "x/flux-other": {"README.md": b""}}
    ) as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.setattr(hub, "PAUSES_S", (0, 0, 0, 0))
        # the library's pauses
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
        yield running


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., CompletedProcess]:
    return partial(call, capsys, "models")
