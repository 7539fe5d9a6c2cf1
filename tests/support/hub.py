"""What tests of `flux models` share: names on the hub, errors, what was asked of the server."""

from collections import namedtuple
from pathlib import Path
from subprocess import CompletedProcess

import torch
from safetensors.torch import save

from fluxcli.models import find as models
from tests.support.hub_server import COMMIT, HubServer
from tests.support.invariant import assert_failed

DEV = "black-forest-labs/FLUX.1-dev"
TOKEN = "hf_secretsecretsecretsecretsecret"
T5 = "text_encoder_2/model.safetensors"
EVIL = b"raise SystemExit('code of a model was run')"
REFUSED = {
    "flux1-dev.safetensors": b"the same once more",
    "README.md": b"x",
    ".gitattributes": b"",
    "dev_grid.jpg": b"x",
    "pipeline.py": EVIL,
    "transformer/model.py": EVIL,
    "tokenizer/tokenization.py": EVIL,
    "vae/x.pt": b"PK",
    "text_encoder/pytorch_model.bin": b"PK",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"half",
    "safety_checker/model.safetensors": b"x",
    "vae/deeper/config.json": b"{}",
}
LORA = save({"transformer.x_embedder.lora_A.weight": torch.ones(2, 4)})
USAGE = namedtuple("usage", "total used free")


def error_of(result: CompletedProcess, code: int) -> str:
    """The error and hint of a command that failed as it must; notices before them are checked for
    their form.
    """
    lines = result.stderr.splitlines(keepends=True)
    notices = [
        line for line in lines if line.startswith("flux: ") and not line.startswith("flux: error")
    ]
    assert result.stdout == "" and TOKEN not in result.stderr and "127.0.0.1" not in result.stderr
    rest = "".join(line for line in lines if line not in notices)
    return assert_failed(
        CompletedProcess(result.args, result.returncode, result.stdout, rest), code
    )


def snapshot(model: str = DEV) -> Path:
    return models.get_repository(model) / "snapshots" / COMMIT


def weights_asked(server: HubServer) -> list[str]:
    return server.asked("GET .*safetensors")
