"""Fault rows of `flux models`: the way to the hub, addresses, manifests, what lies in the cache."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.faults.case import Case, fault

DEV = "black-forest-labs/FLUX.1-dev"
NOWHERE = "http://127.0.0.1:9"  # where nobody listens
ONLINE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": NOWHERE}


# --- the way to the hub


def download(case: Case, name: str = "dev", environment: Mapping[str, str] | None = None) -> None:
    case.flux("models", "download", name, environment=environment)


WAYS = {
    "cert-absent": ("SSL_CERT_FILE", "/nonexistent/cacert.pem"),
    "cert-folder": ("SSL_CERT_FILE", "/"),
    "cert-text": ("SSL_CERT_FILE", __file__),
    "cert-nul-like": ("SSL_CERT_FILE", "x" * 5000),
    "certs-absent": ("SSL_CERT_DIR", "/nonexistent/certificates"),
    "socks5": ("ALL_PROXY", "socks5://127.0.0.1:9"),
    "socks5h": ("https_proxy", "socks5h://127.0.0.1:9"),
    "socks": ("ALL_PROXY", "socks://127.0.0.1:9/"),
    "socks4": ("HTTPS_PROXY", "socks4://127.0.0.1:9"),
    "ftp": ("HTTP_PROXY", "ftp://127.0.0.1:9"),
    "port": ("HTTPS_PROXY", "http://127.0.0.1:port"),
    "host": ("HTTPS_PROXY", "http://"),
    "bracket": ("HTTPS_PROXY", "http://[::1"),
    "space": ("HTTPS_PROXY", "http://my proxy:1"),
    "secret": ("ALL_PROXY", "quic://user:secret@host:1"),
}
for name, (variable, value) in WAYS.items():
    fault(f"hub-way-{name}", f"{variable}={value[:40]}", codes=[3, 8], says=variable)(
        partial(download, environment={variable: value})
    )


# --- addresses


ADDRESSES = {
    "civitai": "https://civitai.com/api/download/models/123",
    "github": "https://github.com/ORG/NAME/x.safetensors",
    "owner": "https://huggingface.co/ORG",
    "data": "https://huggingface.co/datasets/ORG/NAME",
    "look-alike": "https://huggingface.co.example.com/ORG/NAME",
    "bucket": "s3://bucket/x.safetensors",
    "up": "https://huggingface.co/ORG/NAME/resolve/main/../../x.safetensors",
    "up-encoded": "https://huggingface.co/ORG/NAME/resolve/main/%2e%2e/x.safetensors",
    "nul": "https://huggingface.co/ORG/NAME/resolve/main/%00x.safetensors",
    "pickle": "https://huggingface.co/ORG/NAME/resolve/main/x.ckpt",
}
for name, address in ADDRESSES.items():
    fault(f"hub-address-{name}", f"models download {address}", codes=[2])(
        partial(download, name=address)
    )


@fault("hub-address", "an address of the hub, offline", codes=[3], says="ORG/NAME:x.safetensors")
def address_offline(case: Case) -> None:
    download(case, "https://huggingface.co/ORG/NAME/resolve/main/x.safetensors")


@fault("hub-address-model", "-m an address", codes=[3], says="download ORG/NAME:x.safetensors")
def address_model(case: Case) -> None:
    case.draw("-m", "https://huggingface.co/ORG/NAME/blob/main/x.safetensors?download=true")


@fault("hub-address-lora", "--lora an address", codes=[3], says="download ORG/NAME@v2:x.safe")
def address_lora(case: Case) -> None:
    case.draw("--lora", "https://huggingface.co/ORG/NAME/blob/v2/x.safetensors:0.5")


@fault("hub-address-vae", "--vae an address", codes=[3], says="download ORG/NAME:ae.safetensors")
def address_vae(case: Case) -> None:
    case.draw("--vae", "https://huggingface.co/ORG/NAME/resolve/main/ae.safetensors")


@fault("hub-address-lora-civitai", "--lora of another site", codes=[2], says="civitai.com")
def address_lora_civitai(case: Case) -> None:
    case.draw("--lora", "https://civitai.com/api/download/models/123")


@fault("hub-gated", "a model that is not here", codes=[3], says="download dev (34 GB, gated")
def gated(case: Case) -> None:
    case.flux("generate", "a fox")


# --- manifests of bakes


def put_bake(case: Case) -> Path:
    """A folder of the user's models that looks like a bake."""
    folder = case.home / "XDG_DATA_HOME" / "flux" / "models" / "mine"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "flux-manifest.json").write_text('{"bytes": {}}')
    return folder


NAMES = ("../../../../outside.json", "/etc/passwd", "a\\..\\b", "\0", ".", "", "vae/../../x")
for number, name in enumerate(NAMES):

    @fault(
        f"verify-name-{number}", f"a manifest names {name!r}", codes=[4], says="out of the folder"
    )
    def verify_name(case: Case, name: str = name) -> None:
        (put_bake(case) / "flux-manifest.json").write_text(json.dumps({"bytes": {name: 4}}))
        case.flux("models", "verify", "mine")


MANIFESTS = {
    "empty": "",
    "list": "[]",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep-bytes": '{"bytes": ' + '{"a": ' * 50_000 + "1" + "}" * 50_000 + "}",
    "bytes-list": '{"bytes": ["a"]}',
    "size-text": '{"bytes": {"vae/config.json": "2"}}',
    "size-huge": '{"bytes": {"vae/config.json": ' + "9" * 4000 + "}}",
    "long-name": '{"bytes": {"' + "x" * 5000 + '": 1}}',
    "control": '{"bytes": {"\\u001b[31mx": 1}}',
    "many": json.dumps({"bytes": {f"{n}.json": n for n in range(50_000)}}),
}
for name, text in MANIFESTS.items():

    @fault(f"verify-manifest-{name}", f"a manifest is {name}", codes=[4])
    def verify_manifest(case: Case, text: str = text) -> None:
        (put_bake(case) / "flux-manifest.json").write_text(text)
        case.flux("models", "verify", "mine")


@fault("verify-link", "a file of a bake is a link out of it", codes=[4], says="out of the folder")
def verify_link(case: Case) -> None:
    folder = put_bake(case)
    (folder / "vae" / "x.safetensors").symlink_to("/etc/passwd")
    case.flux("models", "verify", "mine")


@fault("verify-fifo", "a file of a bake is a FIFO", codes=[4], says="regular")
def verify_fifo(case: Case) -> None:
    os.mkfifo(put_bake(case) / "vae" / "x.safetensors")
    case.flux("models", "verify", "mine")


@fault("remove-foreign", "models remove of a folder that is no bake", codes=[6], says="not make")
def remove_foreign(case: Case) -> None:
    folder = put_bake(case)
    case.flux("models", "remove", "mine", "--yes")
    assert (folder / "vae" / "config.json").exists()


@fault("remove-link", "models remove of a link", codes=[0])
def remove_link(case: Case) -> None:
    folder = put_bake(case)
    theirs = folder.rename(case.folder / "theirs")
    folder.symlink_to(theirs)
    case.flux("models", "remove", "mine", "--yes")


@fault("model-is-preset", "-m of a preset's name", codes=[0])
def model_is_preset(case: Case) -> None:
    case.draw("-p", "tiny", "-m", "tiny", "-o", "x.png")
