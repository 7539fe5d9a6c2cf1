"""Adapters: what a LoRA file adds to which layers of FLUX.1, read from its header.

A layer's output grows by scale x factor x (B (A x) + b) with A (r, K), B (N, r), b (N) (Hu et al.
2021, "LoRA"). Read are the names of kohya's sd-scripts and OneTrainer, peft and diffusers, XLabs,
and BFL's control adapters, with ComfyUI's prefixes. They are those of diffusers' layers or of BFL's
(`quant.dialects.map_bfl_layers`), written with dots or with underscores.

diffusers' converters are not used: they take 2 s to import, know one width of the model, and drop
layers that they do not know; tests compare with them. Knows nothing of torch. Stdlib only.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.checkpoint import Component
from quant.dialects import BLOCK_KEY, SWAPPED, map_bfl_layers
from quant.errors import CheckpointError
from quant.header import file_identity, read_numbers, read_whole_header
from quant.spec import is_modulation
from quant.tensor_info import TensorInfo
from quant.weights import FLOATS, Piece, Weight

# Shapes of weights, by the names of their layers.
Shapes = dict[str, tuple[int, ...]]

# What an adapter's tensors are to their layer: A, B and b, and the number that `factor` is from.
DOWN = "lora_A.weight"
UP = "lora_B.weight"
BIAS = "lora_B.bias"
ALPHA = "alpha"
# A weight that takes the place of a norm's; BFL calls it a scale.
NORM = "weight"
BFL_NORM = "scale"
NO_ALPHA = "its alpha is no number"
READABLE_DTYPES = (*FLOATS, "F8_E4M3", "F8_E5M2")

# The name of a tensor of a LoRA: its layer, which of the two matrices, and whether its weight or
# its bias.
KEY = re.compile(
    r"(.+?)\.(?:lora\.|lora_linear_layer\.)?(?:lora_)?(A|B|down|up)(?:\.default)?\.(weight|bias)"
)
# How the names of a component's layers begin; the transformer's may have no prefix, so it is last.
PREFIXES = {
    "text_encoder": re.compile(
        r"(?:text_encoder\.|lora_te1?_|text_encoders\.clip_l\.transformer\.)(?:text_model[._])?"
    ),
    "text_encoder_2": re.compile(
        r"text_encoder_2\.|lora_te[23]_|text_encoders\.t5xxl\.transformer\."
    ),
    "transformer": re.compile(
        r"(?:base_model\.model\.)?"
        r"(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|)"
    ),
}
# XLabs' names for BFL's layers of a block.
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "linear1": "processor.qkv_lora",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}
# The weights of a model that an adapter can change: all but embeddings. The group is the layer.
LAYER = re.compile(
    r"(?:text_model\.)?(.+)"
    r"(?<!_embedding)(?<!embed_tokens)(?<!shared)(?<!attention_bias)\.weight"
)
# The format of a file, by a part of one of its names; of several that fit, the first counts.
FORMATS = {"query_norm.scale": "BFL control", ".processor.": "XLabs", "lora_down": "kohya"}
OTHER_KINDS = re.compile(
    r"dora_scale|lora_magnitude_vector|lokr_|hada_|oft_|lora_mid|(?:lora_A|lora_down)\.bias"
)
# Names that no LoRA for FLUX.1 has, and what they belong to.
FLUX_2 = re.compile("_stream_modulation|to_qkv_mlp_proj|ff.linear_in")
STABLE_DIFFUSION = re.compile("te2_text_model|input_blocks|down_blocks|output_blocks")
NOT_FLUX_1 = (
    (OTHER_KINDS, "of a DoRA or LyCORIS"),
    (FLUX_2, "of FLUX.2"),
    (STABLE_DIFFUSION, "of Stable Diffusion or SDXL"),
    (re.compile("joint_blocks"), "of Stable Diffusion 3"),
)


@dataclass(frozen=True)
class Part:
    """What one layer of an adapter's file does to the layers of the model that it is for.

    They have the same input, so A is the same for all; q, k and v are such. `layers` has their
    names in the module, each with the first row of B that is its own and the row after its last.
    `stored` has the pieces A, B and perhaps a bias by `DOWN`, `UP`, `BIAS`; or `NORM` alone.
    """

    component: str
    layers: dict[str, tuple[int, int]]
    rank: int  # 0 of a norm
    factor: float  # alpha / r
    stored: Weight

    @property
    def modulates(self) -> bool:
        """Whether it changes a layer that only makes adaLN modulation."""
        layer = next(iter(self.layers))
        return self.component == "transformer" and is_modulation(f"{layer}.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter at a scale.

    Two are equal if their files' contents and their scales are, wherever the files are.
    """

    identity: str  # 16 hex digits of the file's size and sampled pages
    scale: float
    path: Path = field(compare=False)
    format: str = field(compare=False)
    parts: tuple[Part, ...] = field(compare=False)
    unmatched: tuple[str, ...] = field(compare=False)  # layers of the file that no model layer has
    about: dict[str, str] = field(compare=False)  # the metadata of the file's header

    def active_parts(self, component: str) -> list[Part]:
        """The parts that change a component: none at scale 0."""
        if self.scale == 0:
            return []
        return [part for part in self.parts if part.component == component]

    def numel(self, component: str) -> int:
        """How many values of the adapter are in memory while a component computes.

        Those of modulation layers are not: modulation is computed before the steps.
        """
        total = 0
        for part in self.active_parts(component):
            if not part.modulates:
                total += sum(math.prod(piece.shape) for piece in part.stored.pieces.values())
        return total


@dataclass(frozen=True)
class _FileLayer:
    """One layer of an adapter's file, and the layers of the model that it changes.

    `targets` has these layers with the shapes of their weights, in the order in which the rows of B
    belong to them. `tensors` has `DOWN`, `UP` and perhaps `BIAS`, or `NORM` alone.
    """

    name: str
    component: str
    targets: Shapes
    tensors: dict[str, TensorInfo]
    alpha: TensorInfo | None

    @property
    def rows(self) -> int:
        """N of B (N, r): the rows of all targets together."""
        return sum(shape[0] for shape in self.targets.values())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(K,) of a linear layer, () of a norm."""
        return next(iter(self.targets.values()))[1:]

    @property
    def rank(self) -> int:
        """r of A (r, K); 0 of a norm."""
        if NORM in self.tensors or not self.tensors[DOWN].shape:
            return 0
        return self.tensors[DOWN].shape[0]


def is_lora(names: Collection[str]) -> bool:
    """Whether these are the keys of an adapter, of whatever kind and model."""
    return any(_is_lora_key(name) for name in names)


def _is_lora_key(name: str) -> bool:
    """Whether a tensor's name is that of an adapter's."""
    if OTHER_KINDS.search(name):
        return True
    return "lora" in name and KEY.fullmatch(name) is not None


def read_adapter(
    path: Path, components: Mapping[str, Component], *, scale: float = 1.0, fits: bool = True
) -> Adapter:
    """The adapter in a file, for a model of these components.

    With `fits` off its shapes are not compared with the model's. Raises `CheckpointError` for a
    file that is no adapter, one for another model, and kinds that are not supported.
    """
    header = read_whole_header(path)
    _refuse_other_models(path, header.tensors)
    layers, unmatched = _match_layers(header.tensors, components)
    peft_config = _read_peft_config(path, header.metadata)
    alphas = read_numbers(path, [layer.alpha for layer in layers if layer.alpha])
    parts = []
    for layer in layers:
        _check_tensors(path, layer)
        if fits:
            _check_shapes(path, layer)
        alpha = alphas[layer.alpha.name] if layer.alpha else None
        factor = _compute_factor(path, layer, alpha=alpha, peft_config=peft_config)
        parts.append(_make_part(path, layer, factor=factor))
    if not any(part.rank for part in parts):
        why = f"its first keys are {', '.join(list(header.tensors)[:3])}"
        raise CheckpointError("not a LoRA for FLUX.1", path, why=why)
    return Adapter(
        identity=hashlib.sha256(file_identity(path)).hexdigest()[:16],
        scale=scale,
        path=path,
        format=_name_format(header.tensors),
        parts=tuple(parts),
        unmatched=tuple(unmatched),
        about=header.metadata,
    )


def _refuse_other_models(path: Path, names: Collection[str]) -> None:
    """Raise `CheckpointError` for names that no LoRA for FLUX.1 has."""
    for pattern, what in NOT_FLUX_1:
        for name in names:
            if pattern.search(name):
                why = f"{name[:80]} is {what}"
                raise CheckpointError("not a LoRA for FLUX.1", path, why=why)


def _name_format(names: Collection[str]) -> str:
    """The format of an adapter with tensors of these names, for people."""
    for mark, name_of_format in FORMATS.items():
        if any(mark in name for name in names):
            return name_of_format
    return "diffusers/peft"


def _read_peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration as diffusers writes it, its values by "COMPONENT.KEY".

    It is {} where the metadata has none, or no JSON. Raises `CheckpointError` for other JSON.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        raise CheckpointError("damaged adapter", path, why=NO_ALPHA)
    return config


def _match_layers(
    tensors: Mapping[str, TensorInfo], components: Mapping[str, Component]
) -> tuple[list[_FileLayer], list[str]]:
    """The layers of a file that change the model, and the names of those that it does not have.

    A layer that changes nothing which the layers before it have not is left out of both: some files
    have everything in two spellings.
    """
    known = _name_model_layers(components)
    layers = []
    unmatched = []
    taken: set[str] = set()
    for name, group in _group_by_layer(tensors).items():
        # An alpha without matrices says nothing.
        if group.keys() == {ALPHA}:
            continue
        component, rest = _split_prefix(name)
        targets = known.get((component, _flatten(rest)), {})
        layer = None
        if targets:
            layer = _make_layer(name, component, targets=targets, group=group)
        if layer is None:
            unmatched.append(name)
            continue
        if not targets.keys() <= taken:
            layers.append(layer)
        taken |= targets.keys()
    return layers, unmatched


def _make_layer(
    name: str, component: str, *, targets: Shapes, group: Mapping[str, TensorInfo]
) -> _FileLayer | None:
    """A layer of the file from its tensors, None where they are those of no LoRA and no norm."""
    tensors = {kind: info for kind, info in group.items() if kind != ALPHA}
    alpha = group.get(ALPHA)
    norm = _find_norm(tensors, targets)
    if norm:
        return _FileLayer(name, component, targets=targets, tensors={NORM: norm}, alpha=None)
    if tensors.keys() <= {DOWN, UP, BIAS}:
        return _FileLayer(name, component, targets=targets, tensors=tensors, alpha=alpha)
    return None


def _find_norm(tensors: Mapping[str, TensorInfo], targets: Shapes) -> TensorInfo | None:
    """The new weight of a norm, None where the layer is no norm or has other tensors."""
    if len(tensors) > 1 or ".norm_" not in next(iter(targets)):
        return None
    return tensors.get(NORM) or tensors.get(BFL_NORM)


def _group_by_layer(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each layer of the file, by what they are.

    That is `DOWN`, `UP` or `BIAS` for those of a LoRA, and the end of their names for others, as
    `ALPHA`. Layers in kohya's spelling come last: where a file has a layer in two spellings, the
    other counts.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = KEY.fullmatch(name)
        if match:
            layer = match[1]
            matrix = "A" if match[2] in ("A", "down") else "B"
            kind = f"lora_{matrix}.{match[3]}"
        else:
            layer, _, kind = name.rpartition(".")
        found.setdefault(layer, {})[kind] = info
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("lora_unet_")))


def _split_prefix(layer: str) -> tuple[str, str]:
    """The component that a layer's name in the file belongs to, and its name without the prefix."""
    for component, prefix in PREFIXES.items():
        match = prefix.match(layer)
        if match:
            return component, layer[match.end() :]
    raise AssertionError("the transformer's prefix may be empty")


def _name_model_layers(components: Mapping[str, Component]) -> dict[tuple[str, str], Shapes]:
    """What a layer of a file can mean: by component and flattened name, the model's layers.

    The names are diffusers', which mean one layer each, and BFL's and XLabs', which may mean
    several: q, k and v.
    """
    known: dict[tuple[str, str], Shapes] = {}
    for component in PREFIXES:
        if component in components:
            for layer, shape in _layer_shapes(components[component]).items():
                known[component, _flatten(layer)] = {layer: shape}
    transformer = components["transformer"]
    shapes = _layer_shapes(transformer)
    for bfl, layers in map_bfl_layers(transformer.config).items():
        targets = {layer: shapes[layer] for layer in layers if layer in shapes}
        known["transformer", _flatten(bfl)] = targets
        block = BLOCK_KEY.match(bfl)
        if block and bfl[block.end() :] in XLABS:
            xlabs = block[0] + XLABS[bfl[block.end() :]]
            # XLabs leaves a single block's MLP alone, which comes after q, k and v.
            first_three = list(targets)[:3]
            known["transformer", _flatten(xlabs)] = {layer: shapes[layer] for layer in first_three}
    return known


def _layer_shapes(component: Component) -> Shapes:
    """The layers of a component that an adapter can change, with the shapes of their weights."""
    shapes = {}
    for name, weight in component.weights.items():
        match = LAYER.fullmatch(name)
        if match:
            shapes[match[1]] = weight.shape
    return shapes


def _flatten(name: str) -> str:
    """A layer's name with underscores for dots, as kohya writes it."""
    return name.replace(".", "_")


def _check_tensors(path: Path, layer: _FileLayer) -> None:
    """Raise `CheckpointError` for half a LoRA, and for tensors that hold no floats."""
    if NORM not in layer.tensors and not {DOWN, UP} <= layer.tensors.keys():
        why = f"{layer.name[:80]} has only {next(iter(layer.tensors))}"
        raise CheckpointError("not a whole LoRA", path, why=why)
    for info in layer.tensors.values():
        if info.dtype not in READABLE_DTYPES:
            why = f"{info.name[:80]} is {info.dtype}"
            raise CheckpointError("damaged adapter", path, why=why)


def _check_shapes(path: Path, layer: _FileLayer) -> None:
    """Raise `CheckpointError` for an adapter of another width, or one for more input channels."""
    wanted = {
        NORM: next(iter(layer.targets.values())),
        DOWN: (layer.rank, *layer.input_shape),
        UP: (layer.rows, layer.rank),
        BIAS: (layer.rows,),
    }
    for kind, info in layer.tensors.items():
        if kind == DOWN and _takes_more_channels(layer, info):
            channels = math.prod(layer.input_shape)
            why = f"it takes {info.shape[1]} channels, a picture alone has {channels}"
            raise CheckpointError("an adapter that needs a control image", path, why=why)
        if info.shape != wanted[kind]:
            has = f"{layer.name[:80]} has {kind} {list(info.shape)}"
            why = f"{has}, the width of this model needs {list(wanted[kind])}"
            raise CheckpointError("an adapter for another model", path, why=why)


def _takes_more_channels(layer: _FileLayer, down: TensorInfo) -> bool:
    """Whether A is for latents with more channels than a picture has, as for a control image."""
    if "x_embedder" not in layer.targets or len(down.shape) != 2:
        return False
    return down.shape[1] > math.prod(layer.input_shape)


def _compute_factor(
    path: Path, layer: _FileLayer, *, alpha: float | None, peft_config: Mapping[str, Any]
) -> float:
    """alpha / r, with which the layer was trained; 1 where the file says no alpha, and for a norm.

    `alpha` is that of the layer's own tensor; without one, peft's configuration may have it. With
    rsLoRA the factor is alpha / sqrt(r) (Kalajdzievski 2023). Raises `CheckpointError` for an alpha
    that is no finite number.
    """
    if NORM in layer.tensors:
        return 1.0
    try:
        if alpha is None:
            alpha = _find_alpha(peft_config, layer)
        if alpha is None:
            return 1.0
        if peft_config.get(f"{layer.component}.use_rslora"):
            factor = float(alpha) / math.sqrt(layer.rank)
        else:
            factor = float(alpha) / layer.rank
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError("damaged adapter", path, why=NO_ALPHA) from error
    if not math.isfinite(factor):
        why = f"the alpha of {next(iter(layer.targets))}"
        raise CheckpointError("weights that are not finite", path, why=why)
    return factor


def _find_alpha(peft_config: Mapping[str, Any], layer: _FileLayer) -> Any:
    """The alpha of a layer by peft's configuration, unchecked; None where it says nothing.

    Raises `TypeError` where the alphas by names are no object.
    """
    patterns = peft_config.get(f"{layer.component}.alpha_pattern", {})
    if not isinstance(patterns, dict):
        raise TypeError("alpha_pattern is no object")
    # peft takes the patterns for regular expressions, but trainers write ends of names.
    for pattern, alpha in patterns.items():
        end = f".{pattern.lstrip('^')}"
        if alpha is not None and any(f".{target}".endswith(end) for target in layer.targets):
            return alpha
    return peft_config.get(f"{layer.component}.lora_alpha")


def _make_part(path: Path, layer: _FileLayer, *, factor: float) -> Part:
    """What a layer of the file does, with the rows of B that each layer of the model gets."""
    rows = {}
    first = 0
    for name, shape in layer.targets.items():
        rows[name] = (first, first + shape[0])
        first += shape[0]
    pieces = {kind: Piece(path, info) for kind, info in layer.tensors.items()}
    # In BFL's spelling, the rows of this layer's output are in another order than in diffusers.
    if _flatten(layer.name).endswith(_flatten(SWAPPED)):
        half = layer.rows // 2
        for kind in pieces.keys() & {UP, BIAS}:
            swapped = ((half, layer.rows), (0, half))
            pieces[kind] = Piece(path, layer.tensors[kind], swapped)
    # For errors, which put the suffixes of the pieces behind this name.
    stored = Weight(f"{layer.name}.", (), scheme="", pieces=pieces)
    return Part(layer.component, rows, rank=layer.rank, factor=factor, stored=stored)
