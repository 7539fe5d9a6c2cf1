"""A model that bakes in no time, and a hook on every call that writes; for tests of `bake`."""

import builtins
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quant.bake import Progress, bake
from quant.checkpoint import MANIFEST, inspect
from quant.placing import STALE_S, remove_remains
from quant.recipe import Recipe, make_file_recipe, make_recipe
from quant.spec import QuantSpec
from tests.support.invariant import Fault, files

if TYPE_CHECKING:
    import torch

ORIGIN = {"model": "a test", "flux": "0"}
# What is baked to each layout, where a test asks for nothing else.
USUAL = {
    "diffusers": QuantSpec("nf4", "nf4", scales="absmax"),
    "bfl": QuantSpec("fp8"),
    "comfy": QuantSpec("w4a8"),
}
CALLS = ("fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir")
ATTENTION = "transformer_blocks.0.attn"
MICRO = {
    "transformer": (
        "x_embedder.weight",
        "x_embedder.bias",
        "proj_out.weight",
        "transformer_blocks.0.norm1.linear.weight",
        *(f"{ATTENTION}.to_{part}.{leaf}" for part in "qkv" for leaf in ("weight", "bias")),
    ),
    "text_encoder_2": (
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.final_layer_norm.weight",
    ),
    "text_encoder": ("text_model.final_layer_norm.bias",),
    "vae": ("decoder.conv_out.bias",),
}


def bake_all(recipe: Recipe, target: Path, **options: object) -> list[Progress]:
    """Bake as `flux quantize --force` does."""
    remove_remains(target)
    return list(bake(recipe, target, origin=ORIGIN, force=True, **options))


def put_old(target: Path, kind: str) -> dict[str, bytes]:
    """Put an old checkpoint of ours, cut down to one file and its manifest, at the target."""
    manifest: dict[str, object] = {"format": 1, "recipe": {}, "layout": kind}
    if kind == "diffusers":
        weights, described = target / "transformer" / "x.safetensors", target / MANIFEST
        manifest["files"] = {"transformer/x.safetensors": 3}
        old = b"old"
    else:
        weights, described = target, Path(f"{target}.json")
        header = {
            "__metadata__": {"flux_quant": "{}"},
            "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        }
        text = json.dumps(header).encode()
        old = len(text).to_bytes(8, "little") + text + b"o"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(old)
    described.write_text(json.dumps(manifest))
    return content(target)


def age(folder: Path, seconds: float = STALE_S + 60) -> None:
    """Let everything in a folder, and the folder, be written so long ago."""
    then_s = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then_s, then_s))


def make_micro(tiny: Path, folder: Path) -> Path:
    """The bundled model cut down to a few tensors."""
    from safetensors.torch import load_file, save_file

    for path in (*tiny.rglob("*config.json"), *tiny.glob("tokenizer*/*")):
        (folder / path.relative_to(tiny)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(tiny)).write_bytes(path.read_bytes())
    (folder / "model_index.json").write_bytes((tiny / "model_index.json").read_bytes())
    for part, names in MICRO.items():
        (path,) = (tiny / part).glob("*.safetensors")
        tensors = load_file(path)
        save_file({name: tensors[name] for name in names}, folder / part / path.name)
    return folder


def recipe_of(folder: Path, kind: str = "diffusers", spec: QuantSpec | None = None) -> Recipe:
    checkpoint = inspect(folder)
    spec = spec or USUAL[kind]
    if kind == "diffusers":
        return make_recipe(checkpoint, spec)
    return make_file_recipe(checkpoint.components["transformer"], spec, kind=kind)


def change(folder: Path, name: str, values: "torch.Tensor") -> None:
    """Give a tensor of the model, wherever it is, other values."""
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: values}, path)


def content(target: Path) -> dict[str, bytes]:
    """The files of a checkpoint, without the manifest's seconds."""
    beside = [path for path in (target, Path(f"{target}.json")) if path.is_file()]
    found = files(target) if target.is_dir() else {path.name: path.read_bytes() for path in beside}
    for name in (MANIFEST, f"{target.name}.json"):
        if name in found:
            found[name] = json.dumps(json.loads(found[name]) | {"seconds": 0}).encode()
    return found


class Hook(Fault):
    """A fault for bakes, which open their files by `open` and read while they write."""

    def install(self, set_attribute: Callable[[object, str, object], None] = setattr) -> "Hook":
        for name in CALLS:
            set_attribute(os, name, self._hooked(name, getattr(os, name)))
        opened = self._open(open)
        set_attribute(io, "open", opened)
        set_attribute(builtins, "open", opened)
        return self

    def _open(self, real: Callable) -> Callable:
        def hooked(file: object, mode: str = "r", *arguments: object, **options: object) -> object:
            if not set(mode) & set("wxa+"):
                return real(file, mode, *arguments, **options)
            self._tick("open")
            opened = real(file, mode, *arguments, **options)
            return _File(opened, self._tick, is_raw=isinstance(opened, io.RawIOBase))

        return hooked


class _File:
    """A file whose writes stop half way.

    Unbuffered ones return what they wrote, all others write two halves.
    """

    def __init__(self, file: object, tick: Callable[[str], None], *, is_raw: bool) -> None:
        self._file, self._tick, self._is_raw = file, tick, is_raw

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def write(self, data: object) -> int:
        self._tick("write")
        if self._is_raw:
            return self._file.write(data[: max(1, len(data) // 2)] if len(data) > 64 else data)
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._tick("write")
        return self._file.write(data[len(data) // 2 :])
