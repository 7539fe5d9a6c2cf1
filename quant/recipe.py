"""What a quantized checkpoint will consist of: every file, tensor and byte, before anything is read or written.

Knows the layouts: a diffusers folder, or one file with BFL's names or ComfyUI's scaled fp8. Stdlib only.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from quant.checkpoint import (
    COMPONENTS,
    KEEP_FILE,
    PACKED_FILES,
    PLAIN_FILES,
    TOKENIZERS,
    Checkpoint,
    Component,
)
from quant.dialects import SWAPPED, bfl_name, map_bfl_layers
from quant.errors import CheckpointError, SpecError
from quant.files import check_room, nearest
from quant.lora import Adapter
from quant.spec import QuantSpec, layout
from quant.tensor_info import TensorInfo
from quant.weights import Weight
from quant.writer import SafetensorsWriter

MARGIN_BYTES = 64 << 20  # of free disk, beside what is written
LAYOUTS = ("diffusers", "bfl", "comfy")
COPIED = (".json", ".safetensors", ".txt", ".model", ".md")
# diffusers matches these as parts of dotted names and as leaf names: "proj_out" here would spare every single block's.
EMBEDDERS = ["x_embedder", "context_embedder", "time_text_embed", "norm_out"]
MODULATION = ["norm1", "norm1_context", "norm"]
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result, in `file` (relative; "" is the destination itself), from the rows of its sources."""

    file: str
    name: str
    scheme: str
    sources: tuple[Weight, ...]
    swap: bool = False  # the halves of the rows change places
    scalar: bool = False  # fp8 with one scale for all rows

    @property
    def info(self) -> TensorInfo:
        """The tensor before it is packed."""
        first = self.sources[0].info
        shape = first.shape and (sum(source.shape[0] for source in self.sources), *first.shape[1:])
        return replace(first, name=self.name, shape=shape)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        stored = layout(self.scheme, self.info)
        return (stored[0], replace(stored[1], shape=())) if self.scalar else stored


@dataclass(frozen=True)
class Recipe:
    """A whole bake: output tensors, texts to write and files to link, both by relative path."""

    spec: QuantSpec
    layout: str
    tensors: tuple[OutputTensor, ...]
    texts: dict[str, str]
    links: dict[str, Path]
    adapters: tuple[Adapter, ...] = ()  # that are merged into the sources

    def writers(self, folder: Path) -> dict[str, SafetensorsWriter]:
        """A writer for every weight file below `folder`; nothing is written yet."""
        tensors: dict[str, list[TensorInfo]] = {}
        for job in self.tensors:
            tensors.setdefault(job.file, []).extend(job.stored)
        metadata = {"format": "pt", "flux_quant": json.dumps(self.spec.to_json(), sort_keys=True)}
        if self.layout == "comfy":
            layers = {
                job.name.removesuffix(".weight"): {"format": "float8_e4m3fn"}
                for job in self.tensors
                if job.scheme
            }
            metadata["_quantization_metadata"] = json.dumps(
                {"format_version": "1.0", "layers": layers}
            )
        return {
            file: SafetensorsWriter(folder / file, infos, metadata)
            for file, infos in tensors.items()
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every weight file that will be written."""
        return {file: writer.nbytes for file, writer in self.writers(Path()).items()}


def make_recipe(
    source: Checkpoint, spec: QuantSpec, *, adapters: tuple[Adapter, ...] = ()
) -> Recipe:
    """The recipe of a diffusers folder; raises `CheckpointError` for a source that is quantized already."""
    spec.check_keep(name for part in source.components.values() for name in part.weights)
    jobs, texts = [], {}
    wishes = [
        ("transformer", spec.to, PLAIN_FILES[0]),
        ("text_encoder_2", spec.text_encoder, PLAIN_FILES[1]),
    ]
    for name, to, plain in (*wishes, ("text_encoder", "keep", PLAIN_FILES[1])):
        if to == "keep" and not any(adapter.numel(name) for adapter in adapters):
            continue
        part, file = source.components[name], f"{name}/{PACKED_FILES.get(to, plain)}"
        jobs += [
            OutputTensor(file, weight.name, _scheme(part, spec, weight), (weight,))
            for weight in part.weights.values()
        ]
        texts[f"{name}/config.json"] = _config(part, spec, to)
        if (
            to == "nf4" and name == "transformer"
        ):  # the skip list cannot spare the last layer: its original is beside
            if (last := part.weights.get("proj_out.weight")) is None:
                raise CheckpointError(
                    "not a whole transformer", part.folder, why="proj_out.weight is missing"
                )
            jobs = [replace(job, scheme="nf4") if job.name == last.name else job for job in jobs]
            jobs.append(OutputTensor(f"transformer/{KEEP_FILE}", last.name, "", (last,)))
    folders = [
        name
        for name in (*COMPONENTS, *TOKENIZERS, "scheduler")
        if f"{name}/config.json" not in texts
    ]
    kept = [
        path
        for name in folders
        for path in sorted((source.folder / name).iterdir())
        if path.suffix in COPIED
    ]
    kept += [
        path
        for path in source.folder.iterdir()
        if path.name.startswith(("model_index.json", "LICENSE"))
    ]
    links = {str(path.relative_to(source.folder)): path for path in kept if path.is_file()}
    return Recipe(spec, "diffusers", tuple(jobs), texts, links, adapters)


def make_file_recipe(
    transformer: Component, spec: QuantSpec, *, kind: str, adapters: tuple[Adapter, ...] = ()
) -> Recipe:
    """The recipe of one file with BFL's names (`kind` bfl) or ComfyUI's scaled fp8 (comfy)."""
    if spec.to != "fp8":
        raise SpecError(
            "impossible choice", f"--layout {kind} --to {spec.to}", why="that layout is fp8"
        )
    weights, jobs = transformer.weights, []
    spec.check_keep(weights)
    for layer, ours in map_bfl_layers(transformer.config).items():
        for leaf in ("weight", "bias"):
            sources = tuple(
                weights[f"{part}.{leaf}"] for part in ours if f"{part}.{leaf}" in weights
            )
            if not sources:
                continue
            if len(sources) < len(ours) or len({source.info.dtype for source in sources}) > 1:
                why = f"{layer}.{leaf} is not all there, or of several dtypes"
                raise CheckpointError("not a whole transformer", transformer.folder, why=why)
            scheme = min(
                _scheme(transformer, spec, source) for source in sources
            )  # "" where one part is kept
            scalar = kind == "comfy" and scheme != ""
            jobs.append(
                OutputTensor("", bfl_name(layer, leaf), scheme, sources, layer == SWAPPED, scalar)
            )
    if (read := sum(len(job.sources) for job in jobs)) != len(weights):
        why = f"{len(weights)} tensors, of which {read} have a place in that layout"
        raise CheckpointError("not a FLUX.1 transformer", transformer.folder, why=why)
    return Recipe(spec, kind, tuple(jobs), {}, {}, adapters)


def check_disk(recipe: Recipe, target: Path) -> None:
    """Raise `WriteError` where what the recipe makes has no room at `target`.

    Files that are linked count where they lie on another disk: there they become copies.
    """
    disk = nearest(target.parent).stat().st_dev
    need_bytes = sum(recipe.sizes.values()) + MARGIN_BYTES
    for path in recipe.links.values():
        status = path.stat()
        if status.st_dev != disk:
            need_bytes += status.st_size
    check_room(target.parent, need_bytes, hint="another DST, or --modulation nf4")


def _scheme(part: Component, spec: QuantSpec, weight: Weight) -> str:
    if weight.scheme:
        why, hint = (
            f"{weight.name} is {weight.scheme}",
            "quantize the 16-bit model that it was made from",
        )
        raise CheckpointError("quantized already", part.folder, why=why, hint=hint)
    return spec.scheme(part.name, weight.name, weight.shape)


def _config(part: Component, spec: QuantSpec, to: str) -> str:
    """config.json of a packed component; nf4 says in it what bitsandbytes' readers need."""
    config = dict(part.config)
    if to == "nf4":
        packed = [
            n
            for n, w in part.weights.items()
            if replace(spec, keep=()).scheme(part.name, n, w.shape)
        ]
        kept = [
            name.rpartition(".")[0] for name in packed if spec.is_kept(name)
        ]  # never the top-level proj_out
        skipped = (
            ["wo"]
            if part.name == "text_encoder_2"
            else EMBEDDERS + MODULATION * (spec.modulation == "keep")
        )
        config["quantization_config"] = BITSANDBYTES | {"llm_int8_skip_modules": skipped + kept}
    return json.dumps(config, indent=2) + "\n"
