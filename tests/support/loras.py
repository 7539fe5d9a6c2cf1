"""Adapters with random numbers, for any layers of a model, in the names of any trainer."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from quant.checkpoint import Checkpoint
from tests.support.helpers import tiny

PREFIX = {"text_encoder": "text_model."}


def linear_layers(
    checkpoint: Checkpoint, component: str, pattern: str = ".*"
) -> dict[str, tuple[int, int]]:
    """The linear layers (shapes of their weights) of a component whose whole names match, by
    diffusers' names.
    """
    weights = checkpoint.components[component].weights
    found = {
        name.removesuffix(".weight"): weight.shape
        for name, weight in weights.items()
        if len(weight.shape) == 2
    }
    found = {name.removeprefix("text_model."): shape for name, shape in found.items()}
    return {
        name: shape
        for name, shape in found.items()
        if re.fullmatch(pattern, name) and not EMBEDDING.search(name)
    }


EMBEDDING = re.compile("embedding$|embed_tokens|shared|relative_attention_bias")


def low_rank(
    shapes: dict[str, tuple[int, int]], *, rank: int = 4, seed: int = 0, size: float = 1.0
) -> dict:
    """{layer: (A (r, K), B (N, r))}, whose products are about `size` times as large as a weight
    usually is.
    """
    made = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, k, generator=made) / k**0.5,
            torch.randn(n, rank, generator=made) * size / rank**0.5,
        )
        for name, (n, k) in shapes.items()
    }


def peft_tensors(component: str, pairs: dict) -> dict[str, torch.Tensor]:
    """As diffusers' save_lora_weights names them."""
    prefix = f"{component}.{PREFIX.get(component, '')}"
    return {
        f"{prefix}{layer}.lora_{x}.weight": tensor.contiguous()
        for layer, pair in pairs.items()
        for x, tensor in zip("AB", pair, strict=True)
    }


def write_lora(
    path: Path,
    checkpoint: Checkpoint,
    components: Iterable[str] = ("transformer",),
    pattern: str = ".*",
    **options: object,
) -> Path:
    """A diffusers/peft file for the layers of these components whose names match."""
    tensors = {}
    for component in components:
        tensors |= peft_tensors(
            component, low_rank(linear_layers(checkpoint, component, pattern), **options)
        )
    save_file(tensors, path)
    return path


def write_special(path: Path, checkpoint: Checkpoint) -> Path:
    """Biases of B, other norms and an alpha for each layer, as control adapters and some trainers
    have them.
    """
    made, name = torch.Generator().manual_seed(9), "transformer.transformer_blocks.{}.attn"
    pairs = low_rank(
        linear_layers(checkpoint, "transformer", r".*transformer_blocks.*attn\.(to|add)_.*"),
        seed=9,
        size=2,
    )
    tensors = peft_tensors("transformer", pairs)
    tensors |= {
        f"transformer.{layer}.lora_B.bias": torch.randn(len(b), generator=made)
        for layer, (_, b) in pairs.items()
    }
    tensors |= {f"transformer.{layer}.alpha": torch.tensor(7.0) for layer in pairs}
    for i in range(2):
        tensors |= {
            f"{name.format(i)}.{norm}.weight": torch.rand(32, generator=made) * 2
            for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        }
    save_file(tensors, path)
    return path


def write_described(path: Path, checkpoint: Checkpoint) -> Path:
    """Alphas in the metadata that diffusers' save_lora_weights writes."""
    pairs = low_rank(
        linear_layers(checkpoint, "transformer", r"single.*(to_[qkv]|proj_mlp|norm\.linear)"),
        seed=8,
        size=2,
    )
    said = {
        "r": 4,
        "lora_alpha": 12,
        "use_rslora": True,
        "target_modules": list(pairs),
        "bias": "none",
    }
    said["alpha_pattern"] = {
        "single_transformer_blocks.0.attn.to_k": 30,
        "^single_transformer_blocks.1.proj_mlp": 2,
    }
    said = {f"transformer.{key}": value for key, value in said.items()}
    save_file(
        peft_tensors("transformer", pairs),
        path,
        {"format": "pt", "lora_adapter_metadata": json.dumps(said)},
    )
    return path


def pipeline_pixels(folder: str, loras: list[tuple[str, float]]) -> np.ndarray:
    """FluxPipeline's picture of the usual request with these adapters, by peft."""
    from diffusers import FluxPipeline

    request, pipe = tiny(), FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = [f"adapter{n}" for n in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    (width, height), generator = (
        request.request.size,
        torch.Generator("cpu").manual_seed(request.request.seed),
    )
    picture = pipe(
        request.request.prompt,
        width=width,
        height=height,
        num_inference_steps=request.request.steps,
        generator=generator,
        guidance_scale=request.request.guidance,
        max_sequence_length=request.request.text_tokens,
    )
    return np.asarray(picture.images[0])


if (
    __name__ == "__main__"
):  # FOLDER, the .npz to write, adapters by picture: where nothing has hidden peft from diffusers
    model, out, asked = sys.argv[1:]
    np.savez(
        out, **{name: pipeline_pixels(model, loras) for name, loras in json.loads(asked).items()}
    )
