"""A model that bakes in no time, and a hook on every call that writes: what several tests of `bake` share."""

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path

from quant.bake import Progress, bake
from quant.recipe import Recipe

ORIGIN = {"model": "a test", "flux": "0"}
CALLS = ("fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir")
MICRO = {
    "transformer": ("x_embedder.weight", "x_embedder.bias", "proj_out.weight",
                    "transformer_blocks.0.norm1.linear.weight",
                    *(f"transformer_blocks.0.attn.to_{part}.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))),
    "text_encoder_2": ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
    "text_encoder": ("text_model.final_layer_norm.bias",),
    "vae": ("decoder.conv_out.bias",),
}  # fmt: skip


def bake_all(recipe: Recipe, target: Path, **options: object) -> list[Progress]:
    return list(bake(recipe, target, origin=ORIGIN, **options))


def make_micro(tiny: Path, folder: Path) -> Path:
    """The bundled model cut down to a few tensors."""
    from safetensors.torch import load_file, save_file

    for path in tiny.rglob("*config.json"):
        (folder / path.relative_to(tiny)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(tiny)).write_bytes(path.read_bytes())
    (folder / "model_index.json").write_bytes((tiny / "model_index.json").read_bytes())
    for part, names in MICRO.items():
        (path,) = (tiny / part).glob("*.safetensors")
        tensors = load_file(path)
        save_file({name: tensors[name] for name in names}, folder / part / path.name)
    return folder


class Hook:
    """Counts every call that changes the disk, and does `what` before the k-th (from 1)."""

    def __init__(self, k: int, what: Callable[[str], None]) -> None:
        self.k, self.what, self.names = k, what, []

    def tick(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.k:
            self.what(name)

    def install(self, set_attribute: Callable[[object, str, object], None] = setattr) -> "Hook":
        for name in CALLS:
            set_attribute(os, name, self._hooked(name, getattr(os, name)))
        opened = self._open(open)
        set_attribute(io, "open", opened)
        set_attribute(builtins, "open", opened)
        return self

    def _hooked(self, name: str, real: Callable) -> Callable:
        def hooked(*arguments: object, **options: object) -> object:
            self.tick(name)
            return real(*arguments, **options)

        return hooked

    def _open(self, real: Callable) -> Callable:
        def hooked(file: object, mode: str = "r", *arguments: object, **options: object) -> object:
            if not set(mode) & set("wxa+"):
                return real(file, mode, *arguments, **options)
            self.tick("open")
            return _File(real(file, mode, *arguments, **options), self.tick)

        return hooked


class _File:
    """A file whose writes stop half way: binary ones return what they wrote, text is written in two halves."""

    def __init__(self, file: object, tick: Callable[[str], None]) -> None:
        self._file, self._tick = file, tick

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def write(self, data: object) -> int:
        self._tick("write")
        if not isinstance(data, str):
            return self._file.write(data[: max(1, len(data) // 2)] if len(data) > 64 else data)
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._tick("write")
        return self._file.write(data[len(data) // 2 :])
