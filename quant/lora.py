"""Adapters: what a file adds to which layers of FLUX.1, read from its header.

A weight W (N, K) grows by scale x dW, and a bias by scale x db. dW is, with factor = alpha / r:

- LoRA: factor x B A with A (r, K), B (N, r), and db is factor x b (Hu et al. 2021, "LoRA")
- LoKr: factor x kron(W1, W2), each whole or a product (Yeh et al. 2023, "LyCORIS")
- LoHa: factor x (W1a W1b) * (W2a W2b), element by element (Hyeon-Woo et al. 2021, "FedPara")
- a difference of whole numbers, as ComfyUI extracts it: `diff` for W, `diff_b` for b

With a magnitude m (DoRA, Liu et al. 2024) the weight becomes m (W + dW) / |W + dW|, the norms taken
of each row or each column. `quant.lora_names` knows the names, `quant.deltas` the arithmetic.

diffusers' converters are not used: they take 2 s to import, know one width of the model, and drop
layers that they do not know; tests compare with them. Knows nothing of torch. Stdlib only.
"""

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from quant.checkpoint import Component
from quant.dialects import BLOCK_KEY, SWAPPED, map_bfl_layers
from quant.errors import CheckpointError
from quant.header import file_identity, read_numbers, read_whole_header
from quant.lora_alpha import DAMAGED_HINT, AlphaSource, read_alpha_source
from quant.lora_names import (
    ALPHA,
    BIAS,
    DIFF,
    DIFF_B,
    DORA_SCALE,
    DOWN,
    LOHA,
    LOKR,
    MAGNITUDE,
    NORM,
    OTHER_KINDS,
    PREFIXES,
    UP,
    WIDTHS,
    XLABS,
    find_other_model,
    flatten,
    group_by_layer,
    name_format,
    split_prefix,
)
from quant.spec import is_modulation
from quant.tensor_info import TensorInfo
from quant.weights import FLOATS, Piece, RowRanges, Weight

# Shapes of weights, by the names of their layers.
Shapes = dict[str, tuple[int, ...]]

READABLE_DTYPES = (*FLOATS, "F8_E4M3", "F8_E5M2")
MAX_FLOAT32 = 3.4028234e38
WIDTH_HINT = "use it with -m and the model that it was made for"
# What the tensors of a layer may be beside alpha: one of these sets of the weight's, some of the
# others'.
OF_WEIGHT = (*LOKR, *LOHA, DOWN, UP, DIFF)
OF_LAYER = (*OF_WEIGHT, BIAS, DIFF_B, MAGNITUDE, DORA_SCALE)
# The weights of a model that an adapter can change: all but embeddings. The group is the layer.
LAYER = re.compile(
    r"(?:text_model\.)?(.+)"
    r"(?<!_embedding)(?<!embed_tokens)(?<!shared)(?<!attention_bias)\.weight"
)
INPUT_LAYER = "x_embedder"  # of the transformer
# Values that are computed at a time where a difference is not kept whole, and how many numbers of
# the compute dtype the temporary tensors of each take at most.
CHUNK = 1 << 20
CHUNK_TENSORS = 8
# Rows of activations that a Kronecker product takes at a time.
KRONECKER_ROWS = 512


@dataclass(frozen=True)
class Part:
    """What one layer of an adapter's file does to the layers of the model that it is for.

    They have the same input; q, k and v are such. `layers` has their names in the module, each with
    the rows of dW that are its own, in its order. `stored` has the tensors by what they are (`DOWN`
    and so on): those of one kind of dW, of db, a magnitude; or `NORM` alone.
    """

    component: str
    layers: dict[str, RowRanges]
    shape: tuple[int, ...]  # (N, K) of dW, (N,) of a norm's
    rank: int  # 0 where nothing is a product
    factor: float  # alpha / r
    stored: Weight

    @property
    def modulates(self) -> bool:
        """Whether it changes a layer that only makes adaLN modulation."""
        layer = next(iter(self.layers))
        return self.component == "transformer" and is_modulation(f"{layer}.weight")

    @property
    def is_read_again(self) -> bool:
        """Whether dW is a whole matrix in the file, which is read anew for every product."""
        return DIFF in self.stored.pieces and len(self.shape) == 2

    @property
    def held_numel(self) -> int:
        """How many values stay in memory while the component computes."""
        sizes = {kind: math.prod(piece.shape) for kind, piece in self.stored.pieces.items()}
        if self.is_read_again:
            del sizes[DIFF]
        if MAGNITUDE in sizes or DORA_SCALE in sizes:
            sizes["gains"] = 3 * sum(self.shape)
        return sum(sizes.values())

    @property
    def passing_numel(self) -> int:
        """How many values are in memory while this part is computed, at most, beside those."""
        kinds = self.stored.pieces.keys()
        numel = 0
        if kinds & set(LOKR):
            numel = 3 * KRONECKER_ROWS * max(self.shape)
        if self.is_read_again or kinds & {*LOHA, MAGNITUDE, DORA_SCALE}:
            row_numel = self.shape[-1]
            numel += CHUNK_TENSORS * min(math.prod(self.shape), max(CHUNK, row_numel))
        return numel


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
    notices: tuple[str, ...] = field(compare=False)  # what was taken for granted, for people
    about: dict[str, str] = field(compare=False)  # the metadata of the file's header

    @property
    def input_channels(self) -> int:
        """How many channels of the transformer's input it is for; 0 where it does not look at them.

        BFL's control adapters take more than the model: a control picture's beside the latents'.
        """
        for part in self.active_parts("transformer"):
            if INPUT_LAYER in part.layers:
                return part.shape[-1]
        return 0

    def active_parts(self, component: str) -> list[Part]:
        """The parts that change a component: none at scale 0."""
        if self.scale == 0:
            return []
        return [part for part in self.parts if part.component == component]

    def find_parts(self, component: str, name: str) -> list[Part]:
        """The parts that change the layer of a tensor (`name`) of a component."""
        layer, _ = split_name(name)
        return [part for part in self.active_parts(component) if layer in part.layers]

    def numel(self, component: str) -> int:
        """How many values of the adapter are in memory at most while a component computes.

        Those of modulation layers are not: modulation is computed before the steps.
        """
        parts = [part for part in self.active_parts(component) if not part.modulates]
        held = sum(part.held_numel for part in parts)
        return held + max((part.passing_numel for part in parts), default=0)


def split_name(name: str) -> tuple[str, str]:
    """A tensor's layer, by the name that it has in its module, and what it is there ("weight")."""
    layer, _, leaf = name.removeprefix("text_model.").rpartition(".")
    return layer, leaf


@dataclass(frozen=True)
class _FileLayer:
    """One layer of an adapter's file, and the layers of the model that it changes.

    `targets` has these layers with the shapes of their weights, in the order in which the rows of
    dW belong to them. `tensors` has what `Part.stored` has.
    """

    name: str
    component: str
    targets: Shapes
    tensors: dict[str, TensorInfo]
    alpha: TensorInfo | None

    @property
    def rows(self) -> int:
        """N of dW (N, K): the rows of all targets together."""
        return sum(shape[0] for shape in self.targets.values())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(K,) of a linear layer, () of a norm."""
        return next(iter(self.targets.values()))[1:]

    @property
    def rank(self) -> int:
        """r of the products that make dW; 0 where there is none."""
        # Of two products in a LoKr, the second one's counts.
        for kind in (DOWN, "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
            if kind in self.tensors and self.tensors[kind].shape:
                return self.tensors[kind].shape[0]
        return 0


def read_adapter(
    path: Path,
    components: Mapping[str, Component],
    *,
    scale: float = 1.0,
    fits: bool = True,
    channels: int = 0,
) -> Adapter:
    """The adapter in a file, for a model of these components.

    With `fits` off its shapes are not compared with the model's. `channels` is how many the
    transformer is given, where a control picture makes them more than its own. Raises
    `CheckpointError` for a file that is no adapter, one for another model, and kinds that are not
    supported.
    """
    header = read_whole_header(path)
    _refuse_others(path, header.tensors)
    layers, unmatched = _match_layers(header.tensors, components)
    layers = [_widen(layer, channels) for layer in layers]
    source = read_alpha_source(path, header, ranks={layer.rank for layer in layers} - {0})
    numbers = read_numbers(path, [layer.alpha for layer in layers if layer.alpha])
    parts = []
    for layer in layers:
        _check_tensors(path, layer)
        if fits:
            _check_shapes(path, layer)
        alpha = numbers[layer.alpha.name] if layer.alpha else None
        factor = _compute_factor(path, layer, alpha=alpha, source=source)
        if not abs(scale * factor) <= MAX_FLOAT32:
            why = f"{scale:g} x {factor:g} is beyond float32"
            raise CheckpointError(
                "an impossible scale of an adapter", path, why=why, hint="--lora FILE:0.8"
            )
        parts.append(_make_part(path, layer, factor=factor))
    if not any(part.stored.nbytes and NORM not in part.stored.pieces for part in parts):
        why = f"its first keys are {', '.join(list(header.tensors)[:3])}"
        hint = "flux inspect says what a file is"
        raise CheckpointError("not a LoRA for FLUX.1", path, why=why, hint=hint)
    return Adapter(
        identity=compute_identity(path),
        scale=scale,
        path=path,
        format=name_format(header.tensors),
        parts=tuple(parts),
        unmatched=tuple(unmatched),
        notices=source.notices,
        about=header.metadata,
    )


def compute_identity(path: Path) -> str:
    """The identity that an adapter in this file has; raises `OSError`."""
    return hashlib.sha256(file_identity(path)).hexdigest()[:16]


def _refuse_others(path: Path, names: Collection[str]) -> None:
    """Raise `CheckpointError` for names that no adapter for FLUX.1 has that is read here."""
    name, model = find_other_model(names)
    if model:
        why = f"{name[:80]} is of {model}"
        hint = "use it with that model, here choose one for FLUX.1"
        raise CheckpointError("not a LoRA for FLUX.1", path, why=why, hint=hint)
    for name in names:
        if OTHER_KINDS.search(name):
            why = f"{name[:80]} is of a kind that is not read"
            hint = "choose a LoRA, DoRA, LoKr or LoHa"
            raise CheckpointError("an adapter of another kind", path, why=why, hint=hint)


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
    for name, group in group_by_layer(tensors).items():
        # An alpha without matrices says nothing.
        if group.keys() == {ALPHA}:
            continue
        component, rest = split_prefix(name)
        targets = known.get((component, flatten(rest)), {})
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
    """A layer of the file from its tensors; None where they are not those of an adapter."""
    tensors = {kind: info for kind, info in group.items() if kind != ALPHA}
    is_norm = len(next(iter(targets.values()))) == 1
    if is_norm and tensors.keys() == {NORM}:
        # Only the transformer's norms have nothing but a weight.
        if ".norm_" not in next(iter(targets)):
            return None
        return _FileLayer(name, component, targets=targets, tensors=tensors, alpha=None)
    allowed = {DIFF, DIFF_B} if is_norm else set(OF_LAYER)
    if tensors.keys() <= allowed:
        alpha = group.get(ALPHA)
        return _FileLayer(name, component, targets=targets, tensors=tensors, alpha=alpha)
    return None


def _name_model_layers(components: Mapping[str, Component]) -> dict[tuple[str, str], Shapes]:
    """What a layer of a file can mean: by component and flattened name, the model's layers.

    The names are diffusers', which mean one layer each, and BFL's and XLabs', which may mean
    several: q, k and v.
    """
    known: dict[tuple[str, str], Shapes] = {}
    for component in PREFIXES:
        if component in components:
            for layer, shape in _layer_shapes(components[component]).items():
                known[component, flatten(layer)] = {layer: shape}
    transformer = components["transformer"]
    shapes = _layer_shapes(transformer)
    for bfl, layers in map_bfl_layers(transformer.config).items():
        targets = {layer: shapes[layer] for layer in layers if layer in shapes}
        known["transformer", flatten(bfl)] = targets
        block = BLOCK_KEY.match(bfl)
        if block and bfl[block.end() :] in XLABS:
            xlabs = block[0] + XLABS[bfl[block.end() :]]
            # XLabs leaves a single block's MLP alone, which comes after q, k and v.
            first_three = list(targets)[:3]
            known["transformer", flatten(xlabs)] = {layer: shapes[layer] for layer in first_three}
    return known


def _layer_shapes(component: Component) -> Shapes:
    """The layers of a component that an adapter can change, with the shapes of their weights."""
    shapes = {}
    for name, weight in component.weights.items():
        match = LAYER.fullmatch(name)
        if match:
            shapes[match[1]] = weight.shape
    return shapes


def _widen(layer: _FileLayer, channels: int) -> _FileLayer:
    """The layer for an input of so many channels, if that is what it was made for.

    The weight then has columns of zeros behind its own, as BFL's `optionally_expand_state_dict`
    and diffusers' loader say.
    """
    down = layer.tensors.get(DOWN)
    if not down or not _takes_more_channels(layer, down) or down.shape[1] != channels:
        return layer
    if layer.tensors.keys() & {MAGNITUDE, DORA_SCALE}:
        return layer  # whose norms are those of a weight that is not here
    (rows, _) = layer.targets[INPUT_LAYER]
    return replace(layer, targets={INPUT_LAYER: (rows, channels)})


def _check_tensors(path: Path, layer: _FileLayer) -> None:
    """Raise `CheckpointError` for half an adapter, and for tensors that hold no floats."""
    kinds = layer.tensors.keys()
    of_weight = [kind for kind in OF_WEIGHT if kind in kinds]
    is_whole = (
        not of_weight
        or of_weight in ([DOWN, UP], [DIFF], list(LOHA))
        or (_has_factor(kinds, "lokr_w1") and _has_factor(kinds, "lokr_w2"))
    )
    is_alone = not of_weight and not kinds & {NORM, DIFF_B}
    is_mixed = bool(kinds & set(LOKR)) and bool(set(of_weight) - set(LOKR))
    if not is_whole or is_alone or is_mixed:
        why = f"{layer.name[:80]} has only {', '.join(kinds)}"
        raise CheckpointError("not a whole LoRA", path, why=why, hint=DAMAGED_HINT)
    for info in layer.tensors.values():
        if info.dtype not in READABLE_DTYPES:
            why = f"{info.name[:80]} is {info.dtype}"
            raise CheckpointError("damaged adapter", path, why=why, hint=DAMAGED_HINT)


def _has_factor(kinds: Collection[str], name: str) -> bool:
    """Whether these have one factor of a LoKr: whole, or both of its own factors."""
    factors = [f"{name}_a" in kinds, f"{name}_b" in kinds]
    if name in kinds:
        return not any(factors)
    return all(factors)


def _check_shapes(path: Path, layer: _FileLayer) -> None:
    """Raise `CheckpointError` for an adapter of another width, or one for more input channels."""
    down = layer.tensors.get(DOWN)
    if down and _takes_more_channels(layer, down):
        channels = math.prod(layer.input_shape)
        why = f"it takes {down.shape[1]} channels, a picture alone has {channels}"
        raise CheckpointError(
            "an adapter that needs a control image",
            path,
            why=why,
            hint="flux generate ... --control canny:photo.jpg",
        )
    rows = layer.rows
    columns = math.prod(layer.input_shape)
    whole = (rows, *layer.input_shape)
    wanted: dict[str, tuple[tuple[int, ...], ...]] = {
        NORM: (whole,),
        DIFF: (whole,),
        DIFF_B: ((rows,),),
        BIAS: ((rows,),),
        DOWN: ((layer.rank, columns),),
        UP: ((rows, layer.rank),),
        "hada_w1_a": ((rows, layer.rank),),
        "hada_w2_b": ((_count_columns(layer, "hada_w2_a"), columns),),
        "hada_w1_b": ((layer.rank, columns),),
        "hada_w2_a": ((rows, _count_columns(layer, "hada_w2_a")),),
        MAGNITUDE: ((rows,), (rows, 1), (1, columns)),
        DORA_SCALE: ((rows,), (rows, 1), (1, columns)),
    }
    for kind, info in layer.tensors.items():
        if kind in wanted and info.shape not in wanted[kind]:
            has = f"{layer.name[:80]} has {kind} {list(info.shape)}"
            why = f"{has}, the width of this model needs {list(wanted[kind][0])}"
            if kind == DOWN and info.shape and info.shape[-1] in WIDTHS:
                why += f"; {info.shape[-1]} is that of {WIDTHS[info.shape[-1]]}"
            raise CheckpointError("an adapter for another model", path, why=why, hint=WIDTH_HINT)
    if layer.tensors.keys() & set(LOKR):
        _check_kronecker(path, layer)


def _count_columns(layer: _FileLayer, kind: str) -> int:
    """The last size of a tensor's shape, 0 where it has none."""
    info = layer.tensors.get(kind)
    return info.shape[-1] if info and info.shape else 0


def _check_kronecker(path: Path, layer: _FileLayer) -> None:
    """Raise `CheckpointError` unless W1 and W2 are matrices whose Kronecker product is (N, K)."""
    rows = 1
    columns = 1
    are_matrices = all(len(info.shape) == 2 for info in layer.tensors.values() if _is_lokr(info))
    if are_matrices:
        for name in ("lokr_w1", "lokr_w2"):
            first = layer.tensors.get(name) or layer.tensors[f"{name}_a"]
            last = layer.tensors.get(name) or layer.tensors[f"{name}_b"]
            if first is not last and first.shape[1] != last.shape[0]:
                are_matrices = False
            rows *= first.shape[0]
            columns *= last.shape[1]
    wanted = (layer.rows, math.prod(layer.input_shape))
    if not are_matrices or (rows, columns) != wanted:
        shapes = [f"{kind} {list(info.shape)}" for kind, info in layer.tensors.items()]
        has = f"{layer.name[:80]} has {', '.join(shapes)}"
        why = f"{has}, the width of this model needs {list(wanted)}"
        raise CheckpointError("an adapter for another model", path, why=why, hint=WIDTH_HINT)


def _is_lokr(info: TensorInfo) -> bool:
    return "lokr_" in info.name


def _takes_more_channels(layer: _FileLayer, down: TensorInfo) -> bool:
    """Whether A is for latents with more channels than a picture has, as for a control image."""
    if INPUT_LAYER not in layer.targets or len(down.shape) != 2:
        return False
    return down.shape[1] > math.prod(layer.input_shape)


def _compute_factor(
    path: Path, layer: _FileLayer, *, alpha: float | None, source: AlphaSource
) -> float:
    """alpha / r, with which the layer was trained; 1 where no alpha is known or nothing a product.

    `alpha` is that of the layer's own tensor; without one, peft's configuration may have it. With
    rsLoRA the factor is alpha / sqrt(r) (Kalajdzievski 2023). Raises `CheckpointError` for an alpha
    that is no finite number.
    """
    if not layer.rank:
        return 1.0
    rank: float = layer.rank
    names = (layer.name, *layer.targets)
    if alpha is None:
        alpha = source.find_alpha(layer.component, names)
        if source.uses_rslora(layer.component):
            rank = math.sqrt(rank)
    if alpha is None:
        return 1.0
    if not math.isfinite(alpha):
        why = f"the alpha of {next(iter(layer.targets))}"
        raise CheckpointError("weights that are not finite", path, why=why, hint=DAMAGED_HINT)
    return alpha / rank


def _make_part(path: Path, layer: _FileLayer, *, factor: float) -> Part:
    """What a layer of the file does, with the rows of dW that each layer of the model gets."""
    ranges: dict[str, RowRanges] = {}
    first = 0
    for name, shape in layer.targets.items():
        ranges[name] = ((first, first + shape[0]),)
        first += shape[0]
    # In BFL's spelling, the rows of this layer's output are in another order than in diffusers.
    if flatten(layer.name).endswith(flatten(SWAPPED)):
        half = layer.rows // 2
        ranges = dict.fromkeys(ranges, ((half, layer.rows), (0, half)))
    pieces = {kind: Piece(path, info) for kind, info in layer.tensors.items()}
    # For errors, which put the suffixes of the pieces behind this name.
    stored = Weight(f"{layer.name}.", (), scheme="", pieces=pieces)
    return Part(
        layer.component,
        ranges,
        shape=(layer.rows, *layer.input_shape),
        rank=layer.rank,
        factor=factor,
        stored=stored,
    )
