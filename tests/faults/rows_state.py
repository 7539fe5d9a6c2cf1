"""Fault rows of state: files in the user's folders and the hub's cache, and where those are."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.case import PROMPT, Case, fault
from tests.faults.rows_text import MAKERS, make_fifo

# What must never end a run, each below the user's cache folder.
CACHES = ("margin.json", "embeddings", "locks")
BAD_SETTINGS = {
    "fifo": MAKERS["fifo"],
    "socket": MAKERS["socket"],
    "folder": MAKERS["folder"],
    "loop": MAKERS["loop"],
    "dangling": MAKERS["dangling"],
    "binary": MAKERS["binary"],
    "deep": lambda path: path.write_text("a = " + "[" * 100_000),
    "dotted": lambda path: path.write_text(".".join("a" * 100_000) + " = 1"),
    "number": lambda path: path.write_text("steps = " + "9" * 100_000),
    "hexadecimal": lambda path: path.write_text("steps = 0x" + "f" * 100_000),
    "hexadecimal-list": lambda path: path.write_text(f"lora = [0b{'1' * 100_000}]"),
    "large": lambda path: path.write_text("# x\n" * (50 << 18)),
    "toml": lambda path: path.write_text("steps = = 4\n"),
}


def cache_of(case: Case) -> Path:
    path = case.home / "XDG_CACHE_HOME" / "flux"
    path.mkdir(parents=True, exist_ok=True)
    return path


def draw_cached(case: Case, **options: Any) -> None:
    """Draw with the prompt cache, which the other rows do without."""
    size = ("--size", "64", "--steps", "1", "--text-tokens", "24", "--seed", "1")
    case.flux("generate", PROMPT, "-p", "tiny", *size, "-n", "1", "-o", "drawn/", **options)


for kind, make in BAD_SETTINGS.items():

    @fault(f"state-config-{kind}", f"config.toml is {kind}", codes=[2], says="config.toml")
    def bad_config(case: Case, make: Callable = make) -> None:
        make(case.config / "config.toml")
        case.draw()

    @fault(f"state-preset-{kind}", f"a preset's file is {kind}", codes=[2], says="x.toml")
    def bad_preset(case: Case, make: Callable = make) -> None:
        (case.config / "presets").mkdir()
        make(case.config / "presets" / "x.toml")
        assert case.flux("presets").code == 0
        case.draw("-p", "x")


for kind, make in MAKERS.items():
    for name in CACHES:

        @fault(f"state-{name}-{kind}", f"{name} in the cache folder is {kind}", codes=[0])
        def bad_state(case: Case, make: Callable = make, name: str = name) -> None:
            make(cache_of(case) / name)
            draw_cached(case)

    @fault(f"state-entry-{kind}", f"an entry of the prompt cache is {kind}", codes=[0])
    def bad_entry(case: Case, make: Callable = make) -> None:
        draw_cached(case)
        (entry,) = (cache_of(case) / "embeddings").glob("*.safetensors")
        entry.unlink()
        make(entry)
        draw_cached(case)

    @fault(f"state-manifest-{kind}", f"a stray manifest is {kind}", codes=[0])
    def bad_manifest(case: Case, make: Callable = make) -> None:
        folder = case.home / "XDG_DATA_HOME/flux/models/x"
        folder.mkdir(parents=True)
        make(folder / "flux-manifest.json")
        case.draw()

    @fault(f"state-list-{kind}", f"models list: a stray manifest is {kind}", codes=[0])
    def listed(case: Case, make: Callable = make) -> None:
        folder = case.home / "XDG_DATA_HOME/flux/models/x"
        folder.mkdir(parents=True)
        make(folder / "flux-manifest.json")
        case.flux("models", "list")

    @fault(f"state-ref-{kind}", f"refs/main of the hub's cache is {kind}", codes=[3])
    def bad_ref(case: Case, make: Callable = make) -> None:
        repository = case.home / "XDG_CACHE_HOME/huggingface/hub/models--a--b"
        (repository / "refs").mkdir(parents=True)
        (repository / "snapshots/c0ffee").mkdir(parents=True)
        make(repository / "refs" / "main")
        case.draw("-m", "a/b", environment={"HF_HOME": ""})


@fault("state-hub-remove", "models remove: a FIFO in the hub's cache", codes=[4], says="FIFO")
def fifo_beside(case: Case) -> None:
    cache = case.home / "XDG_CACHE_HOME/huggingface/hub"
    for name in ("a--flux", "c--d"):
        folder = cache / f"models--{name}/snapshots/c0ffee"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("x")
        (cache / f"models--{name}/refs").mkdir()
    os.mkfifo(cache / "models--c--d/refs/main")
    case.flux("models", "remove", "a/flux", "--yes", environment={"HF_HOME": ""})


for name in ("../../../work/kept", "/etc/passwd", "a\0b", "..\\x", "", "a" * 5000):

    @fault(f"state-names-{name[:12]!r}", f"a manifest names {name[:12]!r}", codes=[4])
    def named(case: Case, name: str = name) -> None:
        case.write("kept", "kept")
        folder = case.home / "XDG_DATA_HOME/flux/models/x"
        folder.parent.mkdir(parents=True)
        case.model().rename(folder)
        manifest = {"model": "a/b", "recipe": {"to": "nf4"}, "bytes": {name: 4}}
        (folder / "flux-manifest.json").write_text(json.dumps(manifest))
        case.flux("models", "verify", "x")


for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HOME"):

    @fault(f"state-relative-{variable}", f"{variable} is relative", codes=[0])
    def relative(case: Case, variable: str = variable) -> None:
        case.write("here/flux/config.toml", "steps = = 1")
        case.write("here/.config/flux/config.toml", "steps = = 1")
        draw_cached(case, environment={variable: "here"})


@fault("state-no-home", "HOME and every XDG variable are empty", codes=[0])
def no_home(case: Case) -> None:
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    case.draw(environment=dict.fromkeys(names, ""))


@fault("state-log-fifo", "the worker's log is a FIFO", codes=[6], says="worker.log")
def fifo_log(case: Case) -> None:
    make_fifo(cache_of(case) / "worker.log")
    case.flux("worker", "start", environment={"FLUX_WORKER": "auto"})


@fault("state-blob-fifo", "weights in the hub's cache are a FIFO", codes=[3, 4])
def fifo_blob(case: Case) -> None:
    repository = case.home / "XDG_CACHE_HOME/huggingface/hub/models--a--b"
    folder = repository / "snapshots" / "c0ffee"
    folder.parent.mkdir(parents=True)
    case.model().rename(folder)
    (repository / "blobs").mkdir()
    os.mkfifo(repository / "blobs" / "x")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to("../../../blobs/x")
    case.draw("-m", "a/b", environment={"HF_HOME": ""})
