"""Writes the published folder: FLUX.1 [dev]'s layout, stock classes, bfloat16.

`write` saves a folder of safetensors that `FluxPipeline.from_pretrained` opens; `publish` replaces
the files of a folder one by one, so that a reader always finds a usable model. Trains nothing.

    python -m training.export WORK presets/tiny
"""

import argparse
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from training.shape import SCHEDULER, Parts
from training.transformer import load_parts

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

A miniature with the architecture and folder layout of FLUX.1 [dev]. Its weights were trained from
scratch by this project on pictures that `training/data.py` renders; they contain nothing of any
other model. Licence: Apache-2.0, as the repository.
How it was made and what it scores: `training/README.md`.
"""


def publish(parts: Parts, folder: Path, *, tokenizers: Path) -> int:
    """Write beside `folder`, then rename file by file into it; returns the bytes of the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".publish-", dir=folder.parent))
    try:
        write(parts, temporary, tokenizers=tokenizers)
        for source in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = folder / source.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(source, 0o644)
            os.replace(source, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(parts: Parts, folder: Path, *, tokenizers: Path) -> None:
    """Save a complete folder: bfloat16 weights, configs, copied tokenizers, model_index.json, a
    note.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, folder / name)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    for name, module in vars(parts).items():
        stored = copy.deepcopy(module).to(memory_format=torch.contiguous_format).to(torch.bfloat16)
        stored.save_pretrained(folder / name, safe_serialization=True)
    _prefix_clip(folder / "text_encoder/model.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        config = _read_json(folder / name / "config.json")
        config.pop("dtype", None)
        config["torch_dtype"] = "bfloat16"
        _write_json(folder / name / "config.json", config)
    for name in ("transformer", "vae"):
        config = _read_json(folder / name / "config.json")
        config.pop("_name_or_path", None)
        _write_json(folder / name / "config.json", config)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "README.md").write_text(NOTE, encoding="utf-8")


def _prefix_clip(path: Path) -> None:
    """Give CLIP's tensors the published names: `text_model.` first.

    transformers 5 reads names with and without it, but writes them without.
    """
    prefix = "text_model."
    tensors = load_file(path)
    renamed = {prefix + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(renamed, path, {"format": "pt"})


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def collect(work: Path, weights: str) -> Parts:
    """The trained modules of a work folder.

    `weights` is the file of the transformer: transformer.pt (its average is taken) or student.pt.
    """
    parts = load_parts(work)
    state = torch.load(work / weights, weights_only=True)
    values = state.get("average", state["weights"])
    sizes = [parameter.numel() for parameter in parts.transformer.parameters()]
    with torch.no_grad():
        pairs = zip(parts.transformer.parameters(), values.split(sizes), strict=True)
        for parameter, value in pairs:
            parameter.copy_(value.view(parameter.shape))
    return parts


def main() -> None:
    """Read the command line and publish."""
    parser = argparse.ArgumentParser(description="write the published folder")
    parser.add_argument("work", type=Path, help="work folder of the training")
    parser.add_argument("folder", type=Path, help="where to publish, for instance presets/tiny")
    student = "student.pt (after distill) or transformer.pt"
    parser.add_argument("--weights", default="student.pt", help=student)
    options = parser.parse_args()
    parts = collect(options.work, options.weights)
    print(publish(parts, options.folder, tokenizers=options.work), "bytes")


if __name__ == "__main__":
    main()
