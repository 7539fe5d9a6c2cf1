"""What is in a LoRA file? The format, and what it adds to which layers of FLUX.1, by its header. Stdlib only.

A layer's output grows by scale x factor x (B (A x) + b) with A (r, K), B (N, r), b (N) (Hu et al. 2021, "LoRA"). Reads
the names of kohya's sd-scripts and OneTrainer, peft and diffusers, XLabs, and BFL's control adapters, with ComfyUI's
prefixes: dots or underscores, each means a layer of `quant.dialects.map_bfl_layers` or one of diffusers. diffusers'
converters take 2 s to import, know one width and lose what they do not know; tests compare with them.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from quant.checkpoint import Component
from quant.dialects import SWAPPED, map_bfl_layers
from quant.errors import CheckpointError
from quant.header import TensorInfo, file_identity, read_header, read_metadata, read_scalar
from quant.spec import is_modulation
from quant.weights import FLOATS, Piece, Weight

Shapes = dict[str, tuple[int, ...]]  # of weights, by the names of their layers
VALUES = (*FLOATS, "F8_E4M3", "F8_E5M2")
DOWN, UP, BIAS, NORM = "lora_A.weight", "lora_B.weight", "lora_B.bias", "weight"
KEY = re.compile(r"(.+?)\.(?:lora\.|lora_linear_layer\.)?(?:lora_)?(A|B|down|up)(?:\.default)?\.(weight|bias)")
PREFIXES = {
    "text_encoder": r"(?:text_encoder\.|lora_te1?_|text_encoders\.clip_l\.transformer\.)(?:text_model[._])?",
    "text_encoder_2": r"text_encoder_2\.|lora_te[23]_|text_encoders\.t5xxl\.transformer\.",
    "transformer": r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|)",
}
XLABS = {"img_attn.qkv": "processor.qkv_lora1", "txt_attn.qkv": "processor.qkv_lora2", "linear1": "processor.qkv_lora",
         "img_attn.proj": "processor.proj_lora1", "txt_attn.proj": "processor.proj_lora2",
         "linear2": "processor.proj_lora"}  # fmt: skip
LAYER = re.compile(r"(?:text_model\.)?(.+)(?<!_embedding)(?<!embed_tokens)(?<!shared)(?<!attention_bias)\.weight")
FORMATS = {"query_norm.scale": "BFL control", ".processor.": "XLabs", "lora_down": "kohya"}
KINDS = r"dora_scale|lora_magnitude_vector|lokr_|hada_|oft_|lora_mid|(?:lora_A|lora_down)\.bias"
OTHERS = {KINDS: "of a DoRA or LyCORIS", "_stream_modulation|to_qkv_mlp_proj|ff.linear_in": "of FLUX.2",
          "te2_text_model|input_blocks|down_blocks|output_blocks": "of Stable Diffusion or SDXL",
          "joint_blocks": "of Stable Diffusion 3"}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What is added to layers over the same input: `layers` are names in the module, with their rows of B.

    `stored` has the pieces A and B and perhaps a bias by `DOWN`, `UP`, `BIAS`; or `NORM`, another weight for a norm.
    """

    component: str
    layers: dict[str, tuple[int, int]]
    rank: int  # 0 of a norm
    factor: float  # alpha / r
    stored: Weight

    @property
    def modulates(self) -> bool:
        return self.component == "transformer" and is_modulation(f"{next(iter(self.layers))}.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter at a scale. Two are equal if they do the same, wherever their files are."""

    identity: str  # 16 hex digits of the file's size and sampled pages
    scale: float
    path: Path = field(compare=False)
    format: str = field(compare=False)
    parts: tuple[Part, ...] = field(compare=False)
    unmatched: tuple[str, ...] = field(compare=False)  # layers of the file that the model does not have
    about: dict[str, str] = field(compare=False)  # what the file says of itself

    def active_parts(self, component: str) -> Iterator[Part]:
        """The parts that change a component: none at scale 0."""
        return (part for part in self.parts if part.component == component and self.scale)

    def numel(self, component: str) -> int:
        """Numbers that are held while a component computes: not those of its modulation."""
        parts = [part for part in self.active_parts(component) if not part.modulates]
        return sum(math.prod(piece.shape) for part in parts for piece in part.stored.pieces.values())


def is_lora(names: Collection[str]) -> bool:
    """Whether these are the keys of an adapter, of whatever kind and model."""
    return any(re.search(KINDS, name) or (KEY.fullmatch(name) and "lora" in name) for name in names)


def read_adapter(path: Path, components: Mapping[str, Component], *, scale: float = 1.0, fits: bool = True) -> Adapter:
    """The adapter in a file, for a model of these components (`fits` off: whatever its width).

    Raises `CheckpointError` for a file that is none, one for another model, and kinds that are not supported.
    """
    infos = read_header(path)
    for what, name in ((what, name) for part, what in OTHERS.items() for name in infos if re.search(part, name)):
        raise CheckpointError("not a LoRA for FLUX.1", path, why=f"{name[:80]} is {what}")
    about, known, parts, unmatched, said, taken = read_metadata(path), _known(components), [], [], {}, set()
    with suppress(ValueError, RecursionError):
        said = json.loads(about.get("lora_adapter_metadata", "{}"))
    for layer, pieces in _grouped(infos).items():
        component, prefix = next(p for p in PREFIXES.items() if re.match(p[1], layer))
        ours = known.get((component, _flat(re.sub(f"^(?:{prefix})", "", layer))), {})
        kinds = set(pieces) - {"alpha"}
        norm = len(kinds) == 1 and kinds <= {"scale", NORM} and ".norm_" in next(iter(ours), "")
        if ours and kinds and (norm or kinds <= {DOWN, UP, BIAS}):
            if not set(ours) <= taken:  # some files have everything in two spellings
                parts.append(_part(path, component, ours, layer, pieces, said, fits))
            taken |= set(ours)
        elif kinds:
            unmatched.append(layer)
    if not any(part.rank for part in parts):
        raise CheckpointError("not a LoRA for FLUX.1", path, why=f"its first keys are {', '.join(list(infos)[:3])}")
    kind = next((kind for mark, kind in FORMATS.items() if any(mark in name for name in infos)), "diffusers/peft")
    identity = hashlib.sha256(file_identity(path)).hexdigest()[:16]
    return Adapter(identity, scale, path, kind, tuple(parts), tuple(unmatched), about)


def _grouped(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each layer by what they are: `DOWN`, `UP`, `BIAS`, "alpha", or the end of their names."""
    found = {}
    for name, info in infos.items():
        layer, _, leaf = name.rpartition(".")
        if match := KEY.fullmatch(name):
            layer, leaf = match[1], f"lora_{'A' if match[2] in ('A', 'down') else 'B'}.{match[3]}"
        found.setdefault(layer, {})[leaf] = info
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("lora_unet_")))


def _known(components: Mapping[str, Component]) -> dict[tuple[str, str], Shapes]:
    """The module's layers by component and a file's name for them, without dots."""
    found, shapes = {}, {}
    for component in (name for name in PREFIXES if name in components):
        weights = components[component].weights
        named = {match[1]: weight.shape for name, weight in weights.items() if (match := LAYER.fullmatch(name))}
        found |= {(component, _flat(layer)): {layer: shape} for layer, shape in named.items()}
        shapes |= named
    for bfl, layers in map_bfl_layers(components["transformer"].config).items():
        ours = {layer: shapes[layer] for layer in layers if layer in shapes}
        start, leaf = re.fullmatch(r"(\w+_blocks\.\d+\.|)(.+)", bfl).groups()
        found["transformer", _flat(bfl)] = ours
        if leaf in XLABS:  # which leaves a single block's MLP alone
            found["transformer", _flat(start + XLABS[leaf])] = dict(list(ours.items())[:3])
    return found


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _part(  # noqa: PLR0917
    path: Path, component: str, ours: Shapes, layer: str, pieces: dict[str, TensorInfo], said: dict, fits: bool
) -> Part:
    """What the tensors of one layer do; raises `CheckpointError` for half a LoRA, and shapes of another model."""
    alpha, rows, at = pieces.pop("alpha", None), {}, 0
    for name, shape in ours.items():
        rows[name] = (at, at + shape[0])
        at += shape[0]
    first = next(iter(ours.values()))
    if set(pieces) <= {"scale", NORM}:
        pieces, rank, factor = {NORM: next(iter(pieces.values()))}, 0, 1.0
    elif not {DOWN, UP} <= set(pieces):
        raise CheckpointError("not a whole LoRA", path, why=f"{layer[:80]} has only {next(iter(pieces))}")
    else:
        rank = max(pieces[DOWN].shape[:1], default=0)
        factor = _factor(path, component, rows, rank, alpha and read_scalar(path, alpha), said)
    wanted = {NORM: first, DOWN: (rank, *first[1:]), UP: (at, rank), BIAS: (at,)}
    if odd := next((info for info in pieces.values() if info.dtype not in VALUES), None):
        raise CheckpointError("damaged adapter", path, why=f"{odd.name[:80]} is {odd.dtype}")
    for kind, info in pieces.items() if fits else ():
        if "x_embedder" in ours and kind == DOWN and info.shape[1:] > first[1:]:
            why = f"it takes {info.shape[1]} channels, a picture alone has {first[1]}"
            raise CheckpointError("an adapter that needs a control image", path, why=why)
        if info.shape != wanted[kind]:
            why = f"{layer[:80]} has {kind} {list(info.shape)}, the width of this model needs {list(wanted[kind])}"
            raise CheckpointError("an adapter for another model", path, why=why)
    swapped = ((at // 2, at), (0, at // 2)) if _flat(layer).endswith(_flat(SWAPPED)) else ()
    cut = {kind: Piece(path, info, swapped if kind in (UP, BIAS) else ()) for kind, info in pieces.items()}
    return Part(component, rows, rank, factor, Weight(f"{layer}.", (), "", cut))


def _factor(  # noqa: PLR0917
    path: Path, component: str, layers: Collection[str], rank: int, alpha: float | None, said: dict
) -> float:
    """alpha / r as it was trained: by the file's own tensor, else by diffusers' metadata, else 1."""
    try:
        said = {key.removeprefix(f"{component}."): value for key, value in said.items() if key.startswith(component)}
        patterns = said.get("alpha_pattern", {}).items()  # peft takes regular expressions, trainers write names
        named = [n for p, n in patterns if any(f".{layer}".endswith(f".{p.lstrip('^')}") for layer in layers)]
        given = [number for number in (alpha, *named, said.get("lora_alpha")) if number is not None]
        factor = float(given[0]) / (math.sqrt(rank) if said.get("use_rslora") else rank) if given else 1.0
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError("damaged adapter", path, why="its alpha is no number") from error
    if not math.isfinite(factor):
        raise CheckpointError("weights that are not finite", path, why=f"the alpha of {next(iter(layers))}")
    return factor
