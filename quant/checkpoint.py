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

from quant.errors import CheckpointError
from quant.header import TensorInfo, file_identity, read_header

COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
}
MAX_LAYERS = 256  # a hostile config must not make us build 10^9 modules
FLUX_CHANNELS = 64
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
        return bool(self.components["transformer"].config.get("guidance_embeds", False))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that stand for configs and weights: headers' pages and 64 sampled pages of each file."""
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode())
        for component in self.components.values():
            digest.update(json.dumps(component.config, sort_keys=True).encode())
            for path in sorted(set(component.files.values())):
                digest.update(file_identity(path))
        return digest.hexdigest()[:16]


def is_modulation(name: str) -> bool:
    """Whether a transformer key only makes adaLN modulation: no forward over the picture reads it."""
    return CONDITION_KEYS.fullmatch(name) is not None


def inspect(folder: Path) -> Checkpoint:
    """Return what a diffusers folder holds; raises `CheckpointError` naming the first part that is not usable."""
    index = _read_json(folder / "model_index.json", "not a FLUX model folder")
    if index.get("_class_name") != "FluxPipeline":
        why = f"its model_index.json names {str(index.get('_class_name'))[:60]!r}, not FluxPipeline"
        raise CheckpointError("not a FLUX.1 model", which=folder, why=why)
    components = {name: _component(name, folder / name) for name in COMPONENTS}
    return Checkpoint(folder, components, _read_json(folder / "scheduler" / "scheduler_config.json", "no scheduler"))


def _component(name: str, folder: Path) -> Component:
    config = _read_json(folder / "config.json", f"no {name} in the model folder")
    _check_config(name, folder, config)
    tensors, files = {}, {}
    for path in _weight_files(folder):
        header = read_header(path)
        if twice := sorted(set(header) & set(tensors)):
            raise CheckpointError("a tensor stands in two shards", which=path, why=twice[0])
        tensors.update(header)
        files.update(dict.fromkeys(header, path))
    return Component(name, folder, config, tensors, files)


def _check_config(name: str, folder: Path, config: dict) -> None:
    named = config.get("architectures")
    found = config.get("_class_name") or (named[0] if isinstance(named, list) and named else None)
    if found not in (CLASSES[name], None):
        raise CheckpointError(f"wrong class of {name}", which=folder, why=f"{found!r} instead of {CLASSES[name]!r}")
    for key, value in config.items():
        if "layers" in key and isinstance(value, int) and not 0 <= value <= MAX_LAYERS:
            raise CheckpointError("impossible config.json", which=folder, why=f"{key} is {value}")
    if name == "transformer" and config.get("in_channels", FLUX_CHANNELS) != FLUX_CHANNELS:
        why = f"its transformer takes {config['in_channels']} channels (a Fill or control model), not {FLUX_CHANNELS}"
        raise CheckpointError("another kind of FLUX model", which=folder, why=why)


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
    weight_map = _read_json(indexes[0], "unreadable shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError("corrupt shard index", which=indexes[0], why="weight_map is no map of names")
    paths = []
    for shard in sorted(set(weight_map.values())):
        pure = PurePosixPath(shard)
        if len(pure.parts) != 1 or "\\" in shard or ".." in shard or not shard.endswith(".safetensors"):
            raise CheckpointError("unsafe shard index", which=indexes[0], why=f"it names {shard[:60]!r}")
        if not (folder / shard).exists():
            raise CheckpointError("missing shard", which=folder / shard, hint="download the model again")
        paths.append(folder / shard)
    return paths


def _read_json(path: Path, what: str) -> dict:
    try:
        if path.stat().st_size > 32 << 20:
            raise CheckpointError(what, which=path, why="the file is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(what, which=path, why=error.strerror or "not readable") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(what, which=path, why=f"not valid JSON: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(what, which=path, why="it is no JSON object")
    return value
