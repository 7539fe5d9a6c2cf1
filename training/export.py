"""The tiny model's shape, and its published folder: FLUX.1 [dev]'s layout, stock classes.

`build` makes the four modules, random, in float32; `write` saves a folder of bfloat16 safetensors that
`FluxPipeline.from_pretrained` opens; `publish` replaces the files of a folder one by one, so that a reader always
finds a usable model. Knows nothing about training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 1.15,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 96,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "sample_size": 128,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "force_upcast": True,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
CLIP = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_dim": 96,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
T5 = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NOTE = """# flux tiny

A miniature with the architecture and folder layout of FLUX.1 [dev]. Its weights were trained from scratch by this
project on pictures that `training/data.py` renders; they contain nothing of any other model. Licence: Apache-2.0, as
the repository.
How it was made and what it scores: `training/README.md`.
"""


@dataclass
class Parts:
    """The four modules, named as in the published folder."""

    text_encoder: torch.nn.Module
    text_encoder_2: torch.nn.Module
    transformer: torch.nn.Module
    vae: torch.nn.Module


def vocabulary_sizes(tokenizers: Path) -> tuple[int, int]:
    """(CLIP, T5) vocabulary sizes of the tokenizers below `tokenizers`."""
    clip = json.loads((tokenizers / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    t5 = json.loads((tokenizers / "tokenizer_2/tokenizer.json").read_text(encoding="utf-8"))
    return len(clip), len(t5["model"]["vocab"])


def build(tokenizers: Path) -> Parts:
    """Random float32 modules of the final shape; the vocabulary sizes come from the tokenizers."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_size, t5_size = vocabulary_sizes(tokenizers)
    clip = CLIPTextConfig(
        vocab_size=clip_size, bos_token_id=clip_size - 2, eos_token_id=clip_size - 1, pad_token_id=clip_size - 1, **CLIP
    )
    return Parts(
        CLIPTextModel(clip),
        T5EncoderModel(T5Config(vocab_size=t5_size, **T5)),
        FluxTransformer2DModel(**TRANSFORMER),
        AutoencoderKL(**VAE),
    )


def write(parts: Parts, folder: Path, tokenizers: Path) -> None:
    """Saves a complete folder: bfloat16 weights, configs, copied tokenizers, model_index.json and a note."""
    import copy

    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, folder / name)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    for name, module in vars(parts).items():
        copy.deepcopy(module).to(memory_format=torch.contiguous_format).to(torch.bfloat16).save_pretrained(
            folder / name, safe_serialization=True
        )
    _prefix_clip(folder / "text_encoder/model.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("dtype", None)
        _write_json(path, {**config, "torch_dtype": "bfloat16"})
    for name in ("transformer", "vae"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        _write_json(path, config)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "README.md").write_text(NOTE, encoding="utf-8")


def publish(parts: Parts, folder: Path, tokenizers: Path) -> int:
    """Writes beside `folder`, then renames file by file into it; returns the bytes of the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".publish-", dir=folder.parent))
    try:
        write(parts, temporary, tokenizers)
        for source in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = folder / source.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(source, 0o644)
            os.replace(source, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _prefix_clip(path: Path) -> None:
    """Gives CLIP's tensors the published names (`text_model.` first), which transformers 5 reads but doesn't write."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file(
        {k if k.startswith("text_model.") else "text_model." + k: v for k, v in tensors.items()}, path, {"format": "pt"}
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def collect(work: Path, weights: str) -> Parts:
    """The trained modules of a work folder; `weights` is transformer.pt (its average is taken) or student.pt."""
    import torch

    from training.transformer import load_parts

    parts = load_parts(work)
    state = torch.load(work / weights, weights_only=True)
    values = state.get("average", state["weights"])
    sizes = [p.numel() for p in parts.transformer.parameters()]
    with torch.no_grad():
        for parameter, value in zip(parts.transformer.parameters(), values.split(sizes), strict=True):
            parameter.copy_(value.view(parameter.shape))
    return parts


def main() -> None:
    """Reads the command line and publishes."""
    parser = argparse.ArgumentParser(description="write the published folder")
    parser.add_argument("work", type=Path, help="work folder of the training")
    parser.add_argument("folder", type=Path, help="where to publish, for instance presets/tiny")
    parser.add_argument("--weights", default="student.pt", help="student.pt (after distill) or transformer.pt")
    options = parser.parse_args()
    print(publish(collect(options.work, options.weights), options.folder, options.work), "bytes")


if __name__ == "__main__":
    main()
