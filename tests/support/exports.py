"""Weight files in every dialect that is read: published headers at full size, and real weights.

They are made by the formats' own libraries (safetensors, gguf, bitsandbytes) and by tables taken
from the published lists; this module knows nothing of quant/dialects.py. An exporter takes BFL
tensors and a path, and returns what the file's own library reads back: float32 by BFL name.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType

import bitsandbytes
import gguf
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

from quant.bake import bake
from quant.checkpoint import inspect
from quant.recipe import make_file_recipe
from quant.spec import QuantSpec
from tests import published
from tests.support import comfy

Tensors = dict[str, torch.Tensor]
Export = Callable[[Tensors, Path], Tensors]

BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4}
STATE = ".quant_state.bitsandbytes__nf4"
COMFY = (
    "model.diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.",
    "vae.",
)
# llama.cpp's names and Hugging Face's, from published/gguf_t5_q8_0.json and
# published/t5xxl_fp16.json
OURS_OF_T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
T5_NAMES = {ours: theirs for theirs, ours in OURS_OF_T5.items()}


# --- published headers


def blank(name: str, path: Path, *changes: str) -> Path:
    """A sparse file with the header of published/NAME.json and as many bytes as it says.

    All are 0 but the quant states and ComfyUI's markers.

    `changes` name lists whose tensors and metadata take the place of the first one's.
    """
    tensors, metadata = published.tensors(name), published.metadata(name)
    for other in changes:
        tensors, metadata = tensors | published.tensors(other), metadata | published.metadata(other)
    if name.startswith("gguf"):
        return _blank_gguf(tensors, metadata, path)
    entries: dict = {"__metadata__": metadata} if metadata else {}
    at, texts = 0, []
    for full, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * math.prod(shape)
        entries[full] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        if full.endswith(STATE):
            weight = full.removesuffix(STATE)
            nested = f"{weight}.nested_absmax" in tensors
            texts.append((at, _state(weight, size, nested=nested)))
        elif full.endswith(".comfy_quant"):
            texts.append((at, b'{"format": "float8_e4m3fn"}'.ljust(size)))
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start, content in texts:
            file.seek(8 + len(text) + start)
            file.write(content)
    os.truncate(path, 8 + len(text) + at)
    return path


def _state(weight: str, size: int, *, nested: bool) -> bytes:
    """What bitsandbytes writes of a published weight, by the shape that BFL's own file gives it."""
    _, shape = published.tensors("bfl_dev")[weight.removeprefix(COMFY[0])]
    state: dict = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": 0.01234567890123456,
        }
    text = json.dumps(state).encode()
    if len(text) != size:
        raise ValueError(f"the state of {weight} has {len(text)} bytes, the published one {size}")
    return text


def _blank_gguf(tensors: Mapping[str, tuple[str, tuple]], metadata: dict, path: Path) -> Path:
    writer = _writer(path, metadata)
    # With a tokenizer of the published size, about a megabyte.
    if metadata["general.architecture"] == "t5encoder":
        writer.add_token_list([f"piece number {n}" for n in range(32128)])
        writer.add_token_scores([-float(n) for n in range(32128)])
        writer.add_token_types([1] * 32128)
    for name, (dtype, shape) in tensors.items():
        kind = GGMLQuantizationType[dtype]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    padded = sum(GGUFWriter.ggml_pad(info.nbytes, 32) for info in writer.tensors[0].values())
    header = GGUFWriter.ggml_pad(writer.fout[0].tell(), 32)
    writer.close()
    os.truncate(path, header + padded)
    return path


def _writer(path: Path, metadata: dict) -> GGUFWriter:
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(
                key, value
            )
    return writer


# --- the bundled model in other names


def bfl_tensors(folder: Path, path: Path) -> Tensors:
    """A folder's transformer by BFL's names.

    tests/test_dialects.py holds this export against BFL's modules.
    """
    recipe = make_file_recipe(
        inspect(folder).components["transformer"], QuantSpec("fp8", keep=("*",)), kind="bfl"
    )
    for _ in bake(recipe, path, origin={}):
        pass
    return load_file(path)


def to_diffusers(tensors: Tensors) -> Tensors:
    """BFL tensors by diffusers' own converter.

    Its constant 3072 becomes the width that the tensors have.
    """
    real, width = convert_flux_transformer_checkpoint_to_diffusers, len(tensors["img_in.weight"])
    constants = tuple(width if value == 3072 else value for value in real.__code__.co_consts)
    convert = FunctionType(real.__code__.replace(co_consts=constants), real.__globals__)
    return {name: tensor.contiguous() for name, tensor in convert(dict(tensors)).items()}


def to_ldm(name: str, tensor: torch.Tensor, levels: int = 4) -> tuple[str, torch.Tensor]:
    """(name, tensor) of a VAE's tensor as published/ae.json has them, from diffusers'."""
    if "attentions.0.to_" in name and name.endswith("weight"):
        tensor = tensor[:, :, None, None]
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, theirs in (
        ("down_blocks", "down"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_", ""),
        ("resnets", "block"),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_norm_out", "norm_out"),
    ):
        name = name.replace(ours, theirs)
    return name, tensor


def to_llama(name: str) -> str:
    """llama.cpp's name of a T5 tensor."""
    if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name):
        return f"enc.blk.{match[1]}.{T5_NAMES[match[2]]}.weight"
    return f"{T5_NAMES[name.removesuffix('.weight')]}.weight"


def part_of(folder: Path, name: str) -> Tensors:
    """The tensors of one part of a model folder, by the names of its file."""
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


def all_in_one(folder: Path, transformer: Tensors, path: Path) -> None:
    """A checkpoint as ComfyUI and Forge have it: all parts under prefixes, the VAE in LDM names."""
    clip, t5, vae = (part_of(folder, name) for name in ("text_encoder", "text_encoder_2", "vae"))
    width = clip["text_model.final_layer_norm.weight"].shape[0]
    clip["text_projection.weight"] = torch.eye(width, dtype=torch.bfloat16)
    vae = dict(to_ldm(name, tensor) for name, tensor in vae.items())
    parts = zip(COMFY, (transformer, clip, t5, vae), strict=True)
    tensors = {
        prefix + name: tensor.contiguous()
        for prefix, part in parts
        for name, tensor in part.items()
    }
    tensors |= {
        f"text_encoders.{name}.logit_scale": torch.tensor(4.6052) for name in ("clip_l", "t5xxl")
    }
    save_file(tensors, path)


# --- dialects of a transformer, and of any tensors by name


def plain(dtype: torch.dtype) -> Export:
    """Every tensor cast: BFL's own layout, and ComfyUI's fp8 without scales."""

    def export(tensors: Tensors, path: Path) -> Tensors:
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(stored, path)
        return {name: tensor.float() for name, tensor in stored.items()}

    return export


def scaled(*, old: bool) -> Export:
    """ComfyUI's fp8 with a scale for each matrix, in the old layout (early 2025) or in today's."""
    names = ("scale_weight", "scale_input") if old else ("weight_scale", "input_scale")

    def export(tensors: Tensors, path: Path) -> Tensors:
        stored: Tensors = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)} if old else {}
        values, layers = {}, {}
        for name, tensor in tensors.items():
            layer, _, leaf = name.rpartition(".")
            if leaf != "weight" or tensor.dim() != 2:
                stored[name] = tensor
                values[name] = tensor.float()
                continue
            scale = tensor.float().abs().amax() / 448
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored |= {f"{layer}.{names[0]}": scale, f"{layer}.{names[1]}": torch.tensor(1.0)}
            values[name] = stored[name].float() * scale
            layers[layer] = {"format": "float8_e4m3fn"}
            if not old:
                stored[f"{layer}.comfy_quant"] = torch.tensor(
                    list(json.dumps(layers[layer]).encode()), dtype=torch.uint8
                )
        known = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        save_file(stored, path, None if old else known)
        return values

    return export


def in_gguf(
    kind: str, rest: str = "F32", architecture: str = "flux", rename: Callable = str
) -> Export:
    """GGUF: matrices that `kind` can hold in its blocks, others in F16, the rest in `rest`."""

    def export(tensors: Tensors, path: Path) -> Tensors:
        writer, values = (
            _writer(
                path, {"general.architecture": architecture, "general.quantization_version": 2}
            ),
            {},
        )
        for seed, (name, tensor) in enumerate(tensors.items()):
            packs = (
                tensor.dim() == 2
                and tensor.shape[1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0
            )
            chosen = GGMLQuantizationType[kind if packs else "F16" if tensor.dim() == 2 else rest]
            array = tensor.float().numpy()
            if chosen.name.endswith("_K"):
                data = random_blocks(chosen, array.size, seed).reshape(len(array), -1)
            else:
                data = gguf.quantize(array, chosen)
            writer.add_tensor(rename(name), data, raw_dtype=chosen)
            values[name] = torch.from_numpy(gguf.dequantize(data, chosen).copy()).view(tensor.shape)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return values

    return export


def random_blocks(kind: GGMLQuantizationType, count: int, seed: int) -> np.ndarray:
    """Blocks of a K-quant or an IQ4 with any bits, but float16 scales of sane size.

    Returns (blocks, bytes a block) as uint8. The gguf package makes none itself.
    """
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count // size, nbytes), dtype=np.uint8)
    scales = {
        "Q2_K": (-4, None),
        "Q3_K": (-2, None),
        "Q4_K": (0, 4),
        "Q5_K": (0, 4),
        "Q6_K": (-2, None),
        "IQ4_NL": (0, 2),
        "IQ4_XS": (0, 2),
    }[kind.name]
    places = blocks[:, slice(*scales)]
    places[:] = (
        generator.uniform(1e-5, 1e-4, (len(blocks), places.shape[1] // 2))
        .astype("<f2")
        .view(np.uint8)
    )
    return blocks


def in_nf4(*, nested: bool) -> Export:
    """Forge's NF4: every matrix by bitsandbytes' own functions.

    Its second version has scales in float32: not `nested`.
    """

    def export(tensors: Tensors, path: Path) -> Tensors:
        stored, values = {}, {}
        for name, tensor in tensors.items():
            if tensor.dim() != 2:
                stored[name] = tensor.float() if "norm" in name else tensor
                values[name] = tensor.float()
                continue
            functional = bitsandbytes.functional
            codes, state = functional.quantize_4bit(
                tensor, compress_statistics=nested, quant_type="nf4"
            )
            stored[name] = codes
            stored |= {
                f"{name}.{key}": each.contiguous()
                for key, each in state.as_dict(packed=True).items()
            }
            # In one row of float32: its AVX-512 kernel takes wrong scales where blocks cross rows.
            state.dtype, state.shape = torch.float32, torch.Size([1, tensor.numel()])
            values[name] = functional.dequantize_4bit(codes, state).view(tensor.shape)
        save_file({COMFY[0] + name: tensor for name, tensor in stored.items()}, path)
        return values

    return export


# The exporter, the file's suffix, what the dialect is called.
DIALECTS: dict[str, tuple[Export, str, str]] = {
    "bfl bf16": (plain(torch.bfloat16), "safetensors", "BFL"),
    "bfl f32": (plain(torch.float32), "safetensors", "BFL"),
    "comfy fp8": (plain(torch.float8_e4m3fn), "safetensors", "fp8 without scales"),
    "comfy fp8 e5m2": (plain(torch.float8_e5m2), "safetensors", "BFL"),
    "comfy scaled old": (scaled(old=True), "safetensors", "ComfyUI scaled fp8, old layout"),
    "comfy scaled": (scaled(old=False), "safetensors", "ComfyUI scaled fp8"),
    **{
        f"gguf {kind}": (in_gguf(kind), "gguf", "GGUF")
        for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
    },
    "gguf BF16": (in_gguf("BF16", "BF16"), "gguf", "GGUF"),
    "gguf F16": (in_gguf("F16", "F16"), "gguf", "GGUF"),
    "nf4 v1": (in_nf4(nested=True), "safetensors", "bitsandbytes nf4 (Forge)"),
    "nf4 v2": (in_nf4(nested=False), "safetensors", "bitsandbytes nf4 (Forge)"),
    **comfy.DIALECTS,
}


def int8_folder(folder: Path, target: Path) -> tuple[Path, Tensors]:
    """A copy whose transformer's linear layers are bitsandbytes' int8 ones.

    Returns the folder and its dequantized matrices.
    """
    module = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float16
    )
    for name, layer in [
        each for each in module.named_modules() if isinstance(each[1], torch.nn.Linear)
    ]:
        eight = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False
        )
        eight.weight = bitsandbytes.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
        eight.bias = layer.bias
        module.set_submodule(name, eight.to("cpu"))
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(folder / "vae", target / "vae", dirs_exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, target / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (target / "transformer" / "config.json").write_text(json.dumps(config))
    dequantize = bitsandbytes.functional.int8_vectorwise_dequant
    return target, {
        name: dequantize(state[name], state[f"{name.removesuffix('weight')}SCB"])
        for name, tensor in state.items()
        if tensor.dtype == torch.int8
    }
