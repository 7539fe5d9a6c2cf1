"""What is at this path? Components of a model folder in the published diffusers layout, from headers alone.

Knows the folder layout and shard indexes; reads no data but pages for the fingerprint. Stdlib only; sizes in bytes.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from quant.config import read_config, read_json
from quant.errors import CheckpointError
from quant.header import file_identity, read_header
from quant.spec import FAMILIES, SCHEMES
from quant.weights import SCB, Piece, Weight, group_weights

TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
COMPONENTS = (*TEXT_ENCODERS, "transformer", "vae")
AGAIN = "download the model again"
PLAIN_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Never under a plain name: from_pretrained would load these without their scales and draw noise.
PACKED_FILES = {name: row.file_name for name, row in SCHEMES.items() if row.file_name}
KEEP_FILE, MANIFEST = "flux-keep.safetensors", "flux-manifest.json"


@dataclass(frozen=True)
class Component:
    """One model part: where it is, its parsed config.json, and its weights by their names in diffusers' layout."""

    name: str
    folder: Path
    config: dict
    weights: dict[str, Weight]
    dialect: str = "diffusers"  # of the files, for people

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights.values())

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def files(self) -> list[Path]:
        return sorted({piece.file for weight in self.weights.values() for piece in weight.pieces.values()})

    @cached_property
    def precision(self) -> str:
        """The family of schemes of most packed parameters, "" where nothing is packed."""
        counts = Counter(dict.fromkeys(FAMILIES.values(), 0))
        for weight in self.weights.values():
            counts[FAMILIES.get(weight.scheme, "")] += weight.numel * bool(weight.scheme)
        return max(counts, key=counts.__getitem__) if any(counts.values()) else ""


@dataclass(frozen=True)
class Checkpoint:
    """A complete model folder."""

    folder: Path
    components: dict[str, Component]
    scheduler: dict

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.components.values())

    @property
    def takes_guidance(self) -> bool:
        return self.components["transformer"].config["guidance_embeds"]

    @property
    def fingerprint(self) -> str:
        """16 hex digits for configs, tokenizers and weights: of each weight file its size and 64 sampled pages."""
        return self._identities[0]

    @property
    def text_encoder_fingerprint(self) -> str:
        """As `fingerprint`, of tokenizers and text encoders alone."""
        return self._identities[1]

    @cached_property
    def _identities(self) -> tuple[str, str]:
        """Both in one pass: the pages may come from a slow disk."""
        whole, encoders = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode()), hashlib.sha256()
        for name, component in self.components.items():
            for part in (json.dumps(component.config, sort_keys=True).encode(), *map(file_identity, component.files)):
                whole.update(part)
                if name in TEXT_ENCODERS:
                    encoders.update(part)
        for path in sorted(path for name in TOKENIZERS for path in (self.folder / name).glob("*")):
            part = path.name.encode() + file_identity(path)
            whole.update(part)
            encoders.update(part)
        return whole.hexdigest()[:16], encoders.hexdigest()[:16]


def inspect(folder: Path) -> Checkpoint:
    """Return what a diffusers folder holds; raises `CheckpointError` naming the first part that is not usable."""
    index = read_json(folder / "model_index.json", "not a FLUX model folder")
    if index.get("_class_name") != "FluxPipeline":
        why = f"its model_index.json names {str(index.get('_class_name'))[:60]!r}, not FluxPipeline"
        raise CheckpointError("not a FLUX.1 model", folder, why=why)
    components = {name: inspect_component(name, folder / name) for name in COMPONENTS}
    if missing := [name for name in TOKENIZERS if not (folder / name).is_dir()]:
        raise CheckpointError(f"no {missing[0]} in the model folder", folder, hint=AGAIN)
    return Checkpoint(folder, components, read_config("scheduler", folder / "scheduler" / "scheduler_config.json"))


def is_complete(folder: Path, components: Collection[str] = COMPONENTS) -> bool:
    """Whether a model folder has every file by name (an interrupted download has not), weights of `components` only."""
    files = [f"{name}/config.json" for name in COMPONENTS] + ["model_index.json", "scheduler/scheduler_config.json"]
    there = all((folder / name).is_file() for name in files) and all((folder / name).is_dir() for name in TOKENIZERS)
    try:
        return there and all(_weight_files(folder / name) for name in components)
    except CheckpointError:
        return False


def inspect_component(name: str, folder: Path) -> Component:
    """Return one part of a model folder; raises `CheckpointError`."""
    config = read_config(name, folder / "config.json")
    weights = group_weights(_pieces(_weight_files(folder)))
    if (kept := folder / KEEP_FILE).is_file():  # 16-bit originals of what bitsandbytes' skip list could not spare
        originals = group_weights(_pieces([kept]))
        if odd := [n for n, w in originals.items() if n not in weights or weights[n].shape != w.shape]:
            raise CheckpointError("originals of other weights", kept, why=odd[0])
        weights |= originals
    found = Component(name, folder, config, weights)
    names = [piece.info.name for weight in weights.values() if weight.scheme for piece in weight.pieces.values()]
    bnb = found.precision == "nf4" or any(each.endswith(SCB) for each in names)
    by = "bitsandbytes" if bnb else "optimum-quanto" if any(each.endswith("._data") for each in names) else "flux"
    return replace(found, dialect=f"diffusers, {found.precision} by {by}") if names else found


def _pieces(files: list[Path]) -> dict[str, Piece]:
    pieces = {}
    for path in files:
        header = read_header(path)
        if twice := sorted(set(header) & set(pieces)):
            raise CheckpointError("a tensor stands in two shards", path, why=twice[0][:60])
        pieces |= {name: Piece(path, info) for name, info in header.items()}
    return pieces


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: those of its shard index, or its only file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        found = [folder / name for name in (*PLAIN_FILES, *PACKED_FILES.values())]
        if path := next((p for p in found if p.exists()), None):
            return [path]
        pickles = [p.name for suffix in ("*.bin", "*.pt", "*.ckpt") for p in folder.glob(suffix)]
        why = f"only pickles are there ({pickles[0]})" if pickles else "no .safetensors file is there"
        raise CheckpointError("no weights", folder, why=why)
    index, root = indexes[0], folder.resolve()
    weight_map = read_json(index, "unreadable shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError("corrupt shard index", index, why="weight_map is no map of names")
    shards, hub = sorted(set(weight_map.values())), root.parent.parent.parent
    for shard in shards:
        if len(PurePosixPath(shard).parts) != 1 or "\\" in shard or ".." in shard or not shard.endswith(".safetensors"):
            raise CheckpointError("unsafe shard index", index, why=f"it names {shard[:60]!r}")
        if not os.path.exists(folder / shard):
            raise CheckpointError("missing shard", folder / shard[:100], hint=AGAIN)
        real = (folder / shard).resolve()
        blobs = (real.parent == hub / "blobs", real.parent.parent == hub.parent / "blobs")  # the hub's cache
        if not (real.is_relative_to(root) or any(blobs)):
            raise CheckpointError("unsafe shard index", index, why=f"{shard[:60]} is a link to elsewhere")
    return [folder / shard for shard in shards]
