"""What is at this path? Components of a model folder in the published diffusers layout, from headers alone.

Knows the folder layout, shard indexes and key dialects; reads no tensor data but the sampled pages of the
fingerprint. Stdlib only. Sizes are in bytes.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from quant.config import read_config, read_json, read_scheduler
from quant.errors import CheckpointError
from quant.header import TensorInfo, file_identity, read_header

COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2")
AGAIN = "download the model again"
CONDITION_KEYS = re.compile(
    r"(?:.*\.)?(?:norm1|norm1_context|norm|norm_out)\.linear\.(?:weight|bias)|time_text_embed\..*"
)


@dataclass(frozen=True)
class Component:
    """One model part: its folder, parsed config.json, and tensors (with the file that holds each)."""

    name: str
    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    files: dict[str, Path]  # tensor name -> file

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A complete model folder."""

    folder: Path
    components: dict[str, Component]
    scheduler: dict

    @property
    def takes_guidance(self) -> bool:
        return self.components["transformer"].config["guidance_embeds"]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits for configs, tokenizers and weights: of each weight file its size and 64 sampled pages."""
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode())
        for component in self.components.values():
            digest.update(json.dumps(component.config, sort_keys=True).encode())
            for path in sorted(set(component.files.values())):
                digest.update(file_identity(path))
        for path in sorted(path for name in TOKENIZERS for path in (self.folder / name).glob("*")):
            digest.update(path.name.encode() + file_identity(path))
        return digest.hexdigest()[:16]


def is_modulation(name: str) -> bool:
    """Whether a transformer key only makes adaLN modulation: no forward over the picture reads it."""
    return CONDITION_KEYS.fullmatch(name) is not None


def inspect(folder: Path) -> Checkpoint:
    """Return what a diffusers folder holds; raises `CheckpointError` naming the first part that is not usable."""
    index = read_json(folder / "model_index.json", "not a FLUX model folder")
    if index.get("_class_name") != "FluxPipeline":
        why = f"its model_index.json names {str(index.get('_class_name'))[:60]!r}, not FluxPipeline"
        raise CheckpointError("not a FLUX.1 model", which=folder, why=why)
    components = {name: _component(name, folder / name) for name in COMPONENTS}
    for name in TOKENIZERS:
        if not (folder / name).is_dir():
            raise CheckpointError(f"no {name} in the model folder", which=folder, hint=AGAIN)
    return Checkpoint(folder, components, read_scheduler(folder / "scheduler"))


def is_complete(folder: Path) -> bool:
    """Whether every file that a model folder needs is there, by name alone (an interrupted download is not)."""
    names = [f"{name}/config.json" for name in COMPONENTS] + ["model_index.json", "scheduler/scheduler_config.json"]
    if not all((folder / name).is_file() for name in names) or not all((folder / n).is_dir() for n in TOKENIZERS):
        return False
    try:
        return all(_weight_files(folder / name) for name in COMPONENTS)
    except CheckpointError:
        return False


def _component(name: str, folder: Path) -> Component:
    config = read_config(name, folder)
    tensors, files = {}, {}
    for path in _weight_files(folder):
        header = read_header(path)
        if twice := sorted(set(header) & set(tensors)):
            raise CheckpointError("a tensor stands in two shards", which=path, why=twice[0])
        tensors.update(header)
        files.update(dict.fromkeys(header, path))
    return Component(name, folder, config, tensors, files)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: those of its shard index, or its only file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        found = [folder / n for n in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
        if path := next((p for p in found if p.exists()), None):
            return [path]
        pickles = [p.name for suffix in ("*.bin", "*.pt", "*.ckpt") for p in folder.glob(suffix)]
        why = f"only pickles are there ({pickles[0]})" if pickles else "no .safetensors file is there"
        raise CheckpointError("no weights", which=folder, why=why)
    weight_map = read_json(indexes[0], "unreadable shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError("corrupt shard index", which=indexes[0], why="weight_map is no map of names")
    paths = []
    for shard in sorted(set(weight_map.values())):
        pure = PurePosixPath(shard)
        if len(pure.parts) != 1 or "\\" in shard or ".." in shard or not shard.endswith(".safetensors"):
            raise CheckpointError("unsafe shard index", which=indexes[0], why=f"it names {shard[:60]!r}")
        if not (folder / shard).exists():
            raise CheckpointError("missing shard", which=folder / shard, hint=AGAIN)
        paths.append(folder / shard)
    return paths
