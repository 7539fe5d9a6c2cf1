"""Files as ComfyUI, BFL and the tools around them write them.

comfy-kitchen and diffusers pack the weights.

Every exporter takes tensors by name and a path, and returns what the library that packed them reads
back: float32 by name. Knows nothing of `quant`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from diffusers.quantizers.bfl import utils as bfl
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Export = Callable[[Tensors, Path], Tensors]
INT8, GROUPED = "int8_tensorwise", "asym_w4a8_int8"


def find_group(columns: int) -> int:
    """The largest power of 4 up to 256 that divides."""
    return max(group for group in (4, 16, 64, 256) if columns % group == 0)


class Packed:
    """A matrix that comfy-kitchen packed: tensors by suffix, and what the layout says of it."""

    def __init__(self, layout: type, weight: torch.Tensor, described: dict, **options) -> None:
        self.layout, self.described = layout, described
        self.data, self.params = layout.quantize(weight, **options)

    @property
    def stored(self) -> Tensors:
        return self.layout.state_dict_tensors(self.data, self.params)

    def read(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.layout.dequantize(self.data, replace(self.params, orig_dtype=dtype))


def pack(weight: torch.Tensor, kind: str, **options) -> Packed:
    """Pack a matrix.

    `kind` is "int8 tensor", "int8 rows", "int8 convrot", "w4a8", "w6a8", "nvfp4" or "mxfp8".
    """
    if kind in ("nvfp4", "mxfp8"):
        layout = TensorCoreNVFP4Layout if kind == "nvfp4" else TensorCoreMXFP8Layout
        return Packed(layout, weight, {"format": kind})
    group = options.pop("convrot_groupsize", find_group(weight.shape[1]))
    if kind == "int8 convrot":
        said = {"format": INT8, "convrot": True, "convrot_groupsize": group}
        options = {"per_channel": True, "convrot": True, "convrot_groupsize": group}
        return Packed(TensorWiseINT8Layout, weight, said, **options)
    if kind.startswith("int8"):
        return Packed(
            TensorWiseINT8Layout, weight, {"format": INT8}, per_channel=kind == "int8 rows"
        )
    options = {"bits": 6 if kind == "w6a8" else 4, "group_size": 16} | options
    said = {"format": GROUPED, "group_size": options["group_size"], "convrot": True}
    said["convrot_groupsize"] = group
    return Packed(AsymW4A8Int8Layout, weight, said, convrot_groupsize=group, **options)


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2


def comfy(
    kind: str,
    *,
    marks: tuple[str, ...] = ("tensors", "metadata"),
    prefix: str = "",
    change: Callable[[str, Tensors, dict], None] | None = None,
    packs: Callable[[str, torch.Tensor], bool] = is_packed,
    choose: Callable[[str], dict] = lambda name: {},
) -> Export:
    """Every matrix packed; `marks` says where the markers are.

    `change` may alter a layer's stored tensors (by suffix) and its marker, `choose` gives options
    of `pack` by name. Names in the file, but for those in the values, begin with `prefix`.
    """

    def export(tensors: Tensors, path: Path) -> Tensors:
        stored, values, layers = {}, {}, {}
        for name, tensor in tensors.items():
            if not packs(name, tensor):
                stored[prefix + name], values[name] = tensor, tensor.float()
                continue
            packed = pack(tensor, kind, **choose(name))
            parts, said = dict(packed.stored), dict(packed.described)
            if change:
                change(name, parts, said)
            layer = prefix + name.removesuffix(".weight")
            stored |= {f"{layer}.weight{suffix}": part for suffix, part in parts.items()}
            values[name], layers[layer] = packed.read(), said
            if "tensors" in marks:
                stored[f"{layer}.comfy_quant"] = marker(said)
        save_file(
            {name: tensor.contiguous() for name, tensor in stored.items()},
            path,
            metadata(layers) if "metadata" in marks else None,
        )
        return values

    return export


def marker(said: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def metadata(layers: dict) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def bfl_nvfp4(tensors: Tensors, path: Path) -> Tensors:
    """BFL's own nvfp4 (diffusers' BFLQuantizationConfig)."""
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if not is_packed(name, tensor):
            stored[name], values[name] = tensor, tensor.float()
            continue
        codes, scale, overall = bfl.quantize_nvfp4(tensor)
        stored |= {name: codes, f"{name}_scale": scale, f"{name}_scale_2": overall}
        stored[f"{name.removesuffix('.weight')}.input_scale"] = torch.tensor(0.01)
        values[name] = bfl.dequantize_nvfp4(codes, scale, overall)
    save_file(stored, path)
    return values


DIALECTS: dict[str, tuple[Export, str, str]] = {
    "comfy int8 tensor": (comfy("int8 tensor"), "safetensors", "ComfyUI int8"),
    "comfy int8 rows": (comfy("int8 rows", marks=("tensors",)), "safetensors", "ComfyUI int8"),
    "comfy int8 convrot": (
        comfy("int8 convrot", prefix="model.diffusion_model."),
        "safetensors",
        "ComfyUI int8 ConvRot",
    ),
    "comfy w4a8": (comfy("w4a8", marks=("tensors",)), "safetensors", "ComfyUI w4a8 ConvRot"),
    "comfy w6a8": (comfy("w6a8", marks=("metadata",)), "safetensors", "ComfyUI w6a8 ConvRot"),
    "comfy nvfp4": (comfy("nvfp4"), "safetensors", "nvfp4 (ComfyUI)"),
    "comfy mxfp8": (comfy("mxfp8"), "safetensors", "mxfp8"),
    "bfl nvfp4": (bfl_nvfp4, "safetensors", "nvfp4 (BFL)"),
}
