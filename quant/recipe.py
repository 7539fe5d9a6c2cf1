"""What a quantized checkpoint will consist of: every file, tensor and byte, before any is written.

Knows the layouts of results: a folder as diffusers has it, or one file with BFL's names, as BFL or
as ComfyUI has it. Works from headers alone; `quant.bake` carries a recipe out. Sizes are in bytes.
Stdlib only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

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
from quant.expected import check_shapes
from quant.files import check_room
from quant.header_json import MARKERS
from quant.lora import Adapter
from quant.lora_names import BIAS, DIFF_B
from quant.markers import FP8_FORMAT
from quant.placing import DESCRIPTION, FOLDER_LAYOUT
from quant.spec import ROTATED, SCHEMES, QuantSpec, describe_marker, lay_out
from quant.tensor_info import TensorInfo
from quant.weights import Weight
from quant.writer import SafetensorsWriter

LAYOUTS = (FOLDER_LAYOUT, "bfl", "comfy")
# The schemes that each layout of one file is written in.
FILE_SCHEMES = {"bfl": ("fp8",), "comfy": (*ROTATED, "fp8")}
# Of free disk, beside what is written.
MARGIN_BYTES = 64 << 20
# What two CPU cores and their disk copied, in GB/s (benchmarks/bake.py, 2026-11-23).
COPY_GB_S = 0.37
NAMED_KEYS = 5  # of an adapter, in an error
# Files of a folder that are copied from the source where nothing changes the component.
COPIED = (".json", ".safetensors", ".txt", ".model", ".md")
# The layers in which programs that load with bitsandbytes shall expect no quantized weights. They
# match these as parts of dotted names and as the last parts of names.
SKIPPED_IN_T5 = ["wo"]
SKIPPED_EMBEDDERS = ["x_embedder", "context_embedder", "time_text_embed", "norm_out"]
SKIPPED_IN_CONTROLNET = [
    "controlnet_blocks",
    "controlnet_single_blocks",
    "controlnet_x_embedder",
    "controlnet_mode_embedder",
    "input_hint_block",
]
SKIPPED_MODULATION = ["norm1", "norm1_context", "norm"]
# The transformer's last layer cannot be listed: "proj_out" would also mean that of every single
# block.
LAST_LAYER = "proj_out.weight"
# What a config.json says of NF4 to those who read the weights by bitsandbytes.
BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result: the rows of its sources, one below the other, in a scheme.

    Quantized, it is several in the file (`stored`).
    """

    file: str  # relative to the destination; "" is the destination itself
    name: str
    scheme: str  # "" where it stays in 16 bit
    sources: tuple[Weight, ...]
    swaps_halves: bool = False  # the two halves of the rows change places
    has_one_scale: bool = False  # fp8 with one scale for all rows instead of one for each

    @property
    def component(self) -> str:
        """The component that it is of: a result in one file is a transformer.

        A ControlNet's folder has its file at the top.
        """
        folder, slash, _ = self.file.partition("/")
        if slash:
            return folder
        return "controlnet" if self.file else "transformer"

    @property
    def is_original(self) -> bool:
        """Whether flux reads it in place of a quantized tensor of the same name."""
        return self.file.endswith(KEEP_FILE)

    @property
    def info(self) -> TensorInfo:
        """The tensor before it is quantized."""
        first = self.sources[0].info
        shape = first.shape
        if shape:
            rows = sum(source.shape[0] for source in self.sources)
            shape = (rows, *shape[1:])
        return replace(first, name=self.name, shape=shape)

    @property
    def marker(self) -> dict[str, object]:
        """What ComfyUI is told of the scheme in which it is quantized."""
        if self.scheme in ROTATED:
            return describe_marker(self.scheme, self.info.shape[1])
        return {"format": FP8_FORMAT}

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that the file will have for it."""
        stored = lay_out(self.scheme, self.info)
        if self.has_one_scale:
            weight, scale = stored
            return weight, replace(scale, shape=())
        return stored


@dataclass(frozen=True)
class Recipe:
    """All that a bake makes: tensors in weight files, texts to write and files to copy.

    `texts` has contents and `copies` files of the source, by path relative to the destination.
    """

    spec: QuantSpec
    layout: str  # one of LAYOUTS
    tensors: tuple[OutputTensor, ...]
    texts: dict[str, str]
    copies: dict[str, Path]
    adapters: tuple[Adapter, ...] = ()  # that are merged into the sources

    def make_writers(self, folder: Path) -> dict[str, SafetensorsWriter]:
        """Return a writer for every weight file below `folder`, by relative path.

        None of them has opened its file yet.
        """
        infos: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors:
            infos.setdefault(tensor.file, []).extend(tensor.stored)
        metadata = self._make_metadata()
        return {
            file: SafetensorsWriter(folder / file, stored, metadata)
            for file, stored in infos.items()
        }

    def _make_metadata(self) -> dict[str, str]:
        """The texts in each weight file's header; ComfyUI reads from them how layers are packed."""
        spec = json.dumps(self.spec.to_json(), sort_keys=True)
        metadata = {"format": "pt", DESCRIPTION: spec}
        if self.layout == "comfy":
            layers = {
                tensor.name.removesuffix(".weight"): tensor.marker
                for tensor in self.tensors
                if tensor.scheme
            }
            described = {"format_version": "1.0", "layers": layers}
            metadata[MARKERS] = json.dumps(described)
        return metadata

    @property
    def copied_bytes(self) -> int:
        """Bytes of the files that are copied."""
        return sum(path.stat().st_size for path in self.copies.values())

    @cached_property
    def changed_bytes(self) -> int:
        """Bytes, in the source, of the quantized tensors that each adapter changes, summed."""
        total_bytes = 0
        for tensor in self.tensors:
            names = [source.name for source in tensor.sources]
            for adapter in self.adapters:
                changes = any(adapter.find_parts(tensor.component, name) for name in names)
                if tensor.scheme and changes:
                    total_bytes += tensor.info.nbytes
        return total_bytes

    @cached_property
    def bake_s(self) -> float:
        """Seconds that a bake takes on two CPU cores: the source's bytes by their speeds."""
        total_s = self.copied_bytes / (COPY_GB_S * 1e9)
        for tensor in self.tensors:
            gb_s = SCHEMES[tensor.scheme].bake_gb_s if tensor.scheme else COPY_GB_S
            total_s += tensor.info.nbytes / (gb_s * 1e9)
        return total_s + self.changed_bytes / (SCHEMES[self.spec.to].bake_gb_s * 1e9)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every weight file that will be written."""
        return {file: writer.nbytes for file, writer in self.make_writers(Path()).items()}


def make_recipe(
    source: Checkpoint, spec: QuantSpec, *, adapters: tuple[Adapter, ...] = ()
) -> Recipe:
    """The recipe of a diffusers folder, into which adapters may be merged.

    A component that nothing changes is copied as it is. Raises `CheckpointError` for a source that
    is quantized already and for an adapter that it has no tensors for, `SpecError` for a pattern of
    `keep` without a match.
    """
    for component in source.components.values():
        check_shapes(
            component.name, component.folder, config=component.config, weights=component.weights
        )
    _refuse_lost_biases(adapters, source.components)
    spec.check_keep(name for part in source.components.values() for name in part.weights)
    schemes = {
        "transformer": spec.to,
        "text_encoder_2": spec.text_encoder,
        "text_encoder": "keep",
    }
    tensors: list[OutputTensor] = []
    texts = {}
    for name, to in schemes.items():
        has_adapters = any(adapter.numel(name) for adapter in adapters)
        if to == "keep" and not has_adapters:
            continue
        component = source.components[name]
        transformer_file, encoder_file = PLAIN_FILES
        plain_file = transformer_file if name == "transformer" else encoder_file
        file_name = PACKED_FILES.get(to, plain_file)
        outputs = _quantize_component(component, spec, file=f"{name}/{file_name}")
        if to == "nf4" and name == "transformer":
            outputs = _quantize_last_layer(component, outputs)
        tensors += outputs
        texts[f"{name}/config.json"] = _make_config(component, spec, to=to)
    copies = _find_copies(source.folder, made_configs=texts)
    return Recipe(
        spec, FOLDER_LAYOUT, tuple(tensors), texts=texts, copies=copies, adapters=adapters
    )


def _refuse_lost_biases(adapters: tuple[Adapter, ...], components: Mapping[str, Component]) -> None:
    """Raise `CheckpointError` where an adapter changes the bias of a layer that has none.

    At run time it is added to the layer's output. A checkpoint has no tensor that could hold it.
    """
    for adapter in adapters:
        lost = []
        for name, component in components.items():
            for part in adapter.active_parts(name):
                if all(f"{layer}.bias" in component.weights for layer in part.layers):
                    continue
                for kind in (BIAS, DIFF_B):
                    if kind in part.stored.pieces:
                        lost.append(part.stored.pieces[kind].info.name)
        if lost:
            more = f" and {len(lost) - NAMED_KEYS} more" if len(lost) > NAMED_KEYS else ""
            named = ", ".join(key[:100] for key in lost[:NAMED_KEYS])
            why = f"{named}{more} would be lost: these layers have no bias in the model"
            hint = "leave it out here, and give it to flux generate by --lora"
            raise CheckpointError("cannot merge an adapter", adapter.path, why=why, hint=hint)


def _quantize_component(component: Component, spec: QuantSpec, *, file: str) -> list[OutputTensor]:
    """A component's tensors for one file, one for each weight, by the names that they have."""
    outputs = []
    for weight in component.weights.values():
        scheme = _choose_scheme(component, spec, weight)
        outputs.append(OutputTensor(file, weight.name, scheme=scheme, sources=(weight,)))
    return outputs


def _quantize_last_layer(transformer: Component, tensors: list[OutputTensor]) -> list[OutputTensor]:
    """Return the tensors with the last layer quantized, too, and its original in `KEEP_FILE`.

    Programs that load with bitsandbytes expect it in NF4 (see `LAST_LAYER`); flux takes the
    original.
    """
    last = transformer.weights.get(LAST_LAYER)
    if last is None:
        why = f"{LAST_LAYER} is missing"
        raise CheckpointError("not a whole transformer", transformer.folder, why=why)
    quantized = OutputTensor(tensors[0].file, last.name, scheme="nf4", sources=(last,))
    original = OutputTensor(f"transformer/{KEEP_FILE}", last.name, scheme="", sources=(last,))
    replaced = [quantized if tensor.name == last.name else tensor for tensor in tensors]
    return [*replaced, original]


def _find_copies(folder: Path, *, made_configs: Mapping[str, str]) -> dict[str, Path]:
    """The files of the source that the result has as they are, by their path in the folder."""
    found = []
    for name in (*COMPONENTS, *TOKENIZERS, "scheduler"):
        if f"{name}/config.json" not in made_configs:
            files = sorted((folder / name).iterdir())
            found += [path for path in files if path.suffix in COPIED]
    for path in folder.iterdir():
        if path.name.startswith(("model_index.json", "LICENSE")):
            found.append(path)
    return {str(path.relative_to(folder)): path for path in found if path.is_file()}


def make_file_recipe(
    transformer: Component, spec: QuantSpec, *, kind: str, adapters: tuple[Adapter, ...] = ()
) -> Recipe:
    """The recipe of one file with BFL's names, in a scheme of `FILE_SCHEMES`.

    `kind` is "bfl", fp8 with a scale for each row, or "comfy", the layouts of ComfyUI: fp8 with a
    scale for each matrix, and the rotated schemes with a marker for each. Raises `SpecError` for
    another scheme, and `CheckpointError` for a source that is quantized already or no whole
    transformer of FLUX.1, and for an adapter that it has no tensors for.
    """
    _refuse_lost_biases(adapters, {"transformer": transformer})
    if spec.to not in FILE_SCHEMES[kind]:
        why = f"that layout is {' or '.join(FILE_SCHEMES[kind])}"
        which = f"--layout {kind} --to {spec.to}"
        hint = f"--to {FILE_SCHEMES[kind][0]}"
        raise SpecError("impossible choice", which, why=why, hint=hint)
    weights = transformer.weights
    check_shapes("transformer", transformer.folder, config=transformer.config, weights=weights)
    spec.check_keep(weights)
    tensors = []
    for layer, ours in map_bfl_layers(transformer.config).items():
        for leaf in ("weight", "bias"):
            sources = _find_sources(transformer, ours, layer=layer, leaf=leaf)
            if not sources:
                continue
            schemes = {_choose_scheme(transformer, spec, source) for source in sources}
            # Where one of the sources is kept in 16 bit, all are.
            scheme = "" if "" in schemes else spec.to
            tensor = OutputTensor(
                file="",
                name=bfl_name(layer, leaf),
                scheme=scheme,
                sources=sources,
                swaps_halves=layer == SWAPPED,
                has_one_scale=kind == "comfy" and scheme == "fp8",
            )
            tensors.append(tensor)
    placed = sum(len(tensor.sources) for tensor in tensors)
    if placed != len(weights):
        why = f"{len(weights)} tensors, of which {placed} have a place in that layout"
        raise CheckpointError("not a FLUX.1 transformer", transformer.folder, why=why)
    return Recipe(spec, kind, tuple(tensors), texts={}, copies={}, adapters=adapters)


def make_controlnet_recipe(controlnet: Component, spec: QuantSpec) -> Recipe:
    """The recipe of a ControlNet's folder in diffusers' layout, from a folder or a file.

    Raises `CheckpointError` for a source that is quantized already, `SpecError` for a pattern of
    `keep` without a match.
    """
    spec.check_keep(controlnet.weights)
    file_name = PACKED_FILES.get(spec.to, PLAIN_FILES[0])
    tensors = _quantize_component(controlnet, spec, file=file_name)
    copies = {}
    if controlnet.folder.is_dir():
        for path in controlnet.folder.iterdir():
            if path.name.startswith("LICENSE") and path.is_file():
                copies[path.name] = path
    texts = {"config.json": _make_config(controlnet, spec, to=spec.to)}
    return Recipe(spec, FOLDER_LAYOUT, tuple(tensors), texts=texts, copies=copies)


def _find_sources(
    transformer: Component, parts: tuple[str, ...], *, layer: str, leaf: str
) -> tuple[Weight, ...]:
    """The "weight" or "bias" (`leaf`) of the layers that BFL's `layer` consists of; () for none.

    Raises `CheckpointError` where only some of them are there, or they differ in dtype.
    """
    names = [f"{part}.{leaf}" for part in parts]
    found = tuple(transformer.weights[name] for name in names if name in transformer.weights)
    dtypes = {weight.info.dtype for weight in found}
    if found and (len(found) < len(names) or len(dtypes) > 1):
        why = f"{layer}.{leaf} is not all there, or of several dtypes"
        raise CheckpointError("not a whole transformer", transformer.folder, why=why)
    return found


def check_disk(recipe: Recipe, target: Path) -> None:
    """Raise `WriteError` where what the recipe makes has no room at `target`.

    Copies count in full: which file systems share blocks is known only when they are made.
    """
    need_bytes = sum(recipe.sizes.values()) + recipe.copied_bytes + MARGIN_BYTES
    check_room(target.parent, need_bytes, hint="another DST, or --modulation nf4")


def _choose_scheme(component: Component, spec: QuantSpec, weight: Weight) -> str:
    """The scheme that a weight of the source gets, "" where it stays in 16 bit.

    Raises `CheckpointError` where it is quantized already.
    """
    if weight.scheme:
        why = f"{weight.name} is {weight.scheme}"
        hint = "quantize the 16-bit model that it was made from"
        raise CheckpointError("quantized already", component.folder, why=why, hint=hint)
    return spec.choose_scheme(component.name, weight.name, weight.shape)


def _make_config(component: Component, spec: QuantSpec, *, to: str) -> str:
    """config.json of a quantized component.

    With NF4 it tells programs that load with bitsandbytes what is quantized, and how.
    """
    config: dict[str, Any] = dict(component.config)
    if to == "nf4":
        config["quantization_config"] = BITSANDBYTES | {
            "llm_int8_skip_modules": _list_skipped_layers(component, spec)
        }
    return json.dumps(config, indent=2) + "\n"


def _list_skipped_layers(component: Component, spec: QuantSpec) -> list[str]:
    """The layers that bitsandbytes must expect in 16 bit, those of `keep` among them."""
    if component.name == "text_encoder_2":
        skipped = list(SKIPPED_IN_T5)
    else:
        skipped = list(SKIPPED_EMBEDDERS)
        if component.name == "controlnet":
            skipped += SKIPPED_IN_CONTROLNET
        if spec.modulation == "keep":
            skipped += SKIPPED_MODULATION
    without_exceptions = replace(spec, keep=())
    for name, weight in component.weights.items():
        is_quantizable = without_exceptions.choose_scheme(component.name, name, weight.shape)
        if is_quantizable and spec.is_kept(name):
            skipped.append(name.rpartition(".")[0])
    return skipped
