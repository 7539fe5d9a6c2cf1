"""Single weight files as people download them: which components one holds, in which dialect.

BFL's own, ComfyUI's (fp8 as it is, scaled in the old or the new layout, all-in-one), GGUF, Forge's
bitsandbytes NF4; text encoders and VAEs by themselves. With a folder for what they lack they make a
checkpoint. Stdlib only.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint import (
    COMPONENTS,
    TEXT_ENCODERS,
    Checkpoint,
    Component,
    inspect,
    inspect_component,
)
from quant.config import CLASSES, check_config, read_config, read_json
from quant.dialects import (
    T5_GGUF,
    T5_SHARED,
    T5_TIED,
    from_bfl,
    from_ldm,
    guess_kind,
    is_bfl,
    rename_weights,
)
from quant.errors import CheckpointError, ForeignFile
from quant.header import Header, read_whole_header
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight, group_weights

FOREIGN = "not a FLUX.1 model in one file"
# The component by the beginning of a tensor's name; of several that fit, the first counts.
PREFIXES = {
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "vae.": "vae",
    "first_stage_model.": "vae",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.t5xxl.": "text_encoder_2",
}
# How some name of a component without prefix begins, in the dialects that are read.
MARKS = {
    "text_encoder": ("text_model.encoder.layers.0.",),
    "text_encoder_2": ("encoder.block.0.layer.0.", "enc.blk.0."),
    "vae": ("decoder.mid.block_1.", "decoder.mid_block."),
}
# Scales of activations, markers of a layout, and what FLUX.1 does not use of CLIP.
UNUSED = re.compile(
    r"(.*\.)?(scaled_fp8|input_scale|scale_input|comfy_quant|logit_scale|spiece_model|"
    r"text_projection(\.weight)?|position_ids)"
)
OLD_SCALE = ".scale_weight"
SCALE = ".weight_scale"
SCALED_ENDS = (SCALE, OLD_SCALE, "scaled_fp8", "comfy_quant")


def inspect_file(path: Path) -> dict[str, Component]:
    """The components in a weight file, by name; encoders and VAE have no config.

    Raises `ForeignFile` for a file that holds none of FLUX.1's, `CheckpointError` for a damaged
    one.
    """
    header = read_whole_header(path)
    parts = _split_into_components(path, header.tensors)
    found = {}
    for name in COMPONENTS:
        if name in parts:
            component = _make_component(name, path, header=header, stored=parts[name])
            if len(parts) > 1:
                component = replace(component, dialect=f"all-in-one, {component.dialect}")
            found[name] = component
    return found


def inspect_transformer(path: Path) -> Component:
    """The transformer in a weight file; raises `CheckpointError` where there is none."""
    found = inspect_file(path)
    _require_transformer(found, path)
    return found["transformer"]


def _require_transformer(found: Collection[str], path: Path) -> None:
    if "transformer" not in found:
        why = f"it has {' and '.join(found)}"
        raise CheckpointError("no transformer in this file", path, why=why)


def _split_into_components(
    path: Path, tensors: Mapping[str, TensorInfo]
) -> dict[str, dict[str, Piece]]:
    """The tensors of each component by their names without prefix; raises `ForeignFile`."""
    parts: dict[str, dict[str, Piece]] = {}
    for name, info in tensors.items():
        component, rest = _split_prefix(name)
        parts.setdefault(component, {})[rest] = Piece(path, info)
    # Markers of a layout alone are no component.
    parts = {
        component: pieces
        for component, pieces in parts.items()
        if not all(UNUSED.fullmatch(name) for name in pieces)
    }
    rest_of_file = parts.pop("", {})
    if rest_of_file:
        component = _recognize_component(rest_of_file)
        if not component or component in parts:
            raise ForeignFile(FOREIGN, path, why=guess_kind(tensors))
        parts[component] = rest_of_file
    if "transformer" in parts and not is_bfl(parts["transformer"]):
        raise ForeignFile(FOREIGN, path, why=guess_kind(tensors))
    return parts


def _split_prefix(name: str) -> tuple[str, str]:
    """The component that a name's prefix says, "" for none, and the name without the prefix."""
    for prefix, component in PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return "", name


def _recognize_component(names: Collection[str]) -> str:
    """The component with such names, "" for none."""
    if is_bfl(names):
        return "transformer"
    for component, marks in MARKS.items():
        if any(name.startswith(marks) for name in names):
            return component
    return ""


def _make_component(
    name: str, path: Path, *, header: Header, stored: Mapping[str, Piece]
) -> Component:
    """A component by its tensors, its weights by diffusers' names; raises `CheckpointError`."""
    pieces = {
        stored_name.replace(OLD_SCALE, SCALE): piece
        for stored_name, piece in stored.items()
        if not UNUSED.fullmatch(stored_name)
    }
    is_scaled = _has_scales(header, stored)
    weights = group_weights(pieces, unscaled=not is_scaled)
    config: dict[str, Any] = {}
    if name == "transformer":
        if "kontext" in path.name.lower():
            why = (
                "its name says Kontext, which edits a given picture; "
                "by its weights it cannot be told from dev"
            )
            hint = "rename it if it is none"
            raise CheckpointError("another kind of FLUX model", path, why=why, hint=hint)
        weights, config = from_bfl(weights)
        config = check_config(name, path, config)
    elif name == "text_encoder_2":
        weights = _read_t5(weights)
    elif name == "vae":
        weights = from_ldm(weights)
    component = Component(name, path, config=config, weights=weights)
    dialect = _describe_dialect(component, header=header, stored=stored, is_scaled=is_scaled)
    return replace(component, dialect=dialect)


def _has_scales(header: Header, stored: Mapping[str, Piece]) -> bool:
    """Whether a component's fp8 weights are scaled, by the names of its tensors or by metadata."""
    if any(name.endswith(SCALED_ENDS) for name in stored):
        return True
    layers = {piece.info.name.removesuffix(".weight") for piece in stored.values()}
    return not layers.isdisjoint(_read_scaled_layers(header))


def _read_scaled_layers(header: Header) -> set[str]:
    """The layers that ComfyUI calls scaled in a header, beside or in place of `comfy_quant`."""
    try:
        return set(json.loads(header.metadata["_quantization_metadata"])["layers"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return set()


def _read_t5(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """T5's weights by diffusers' names; some files have the shared embedding a second time."""
    found = rename_weights(weights, T5_GGUF)
    if T5_SHARED in found:
        found.pop(T5_TIED, None)
    return found


def _describe_dialect(
    component: Component, *, header: Header, stored: Mapping[str, Piece], is_scaled: bool
) -> str:
    """Who wrote a component in which form, for people."""
    if component.precision == "nf4":
        return "bitsandbytes nf4 (Forge)"
    if component.precision == "int8":
        return "int8 rows"
    if component.precision == "fp8":
        return _describe_fp8(stored, is_scaled=is_scaled)
    if header.is_gguf:
        return "GGUF"
    if component.name in ("transformer", "vae"):
        return "BFL"
    return "Hugging Face"


def _describe_fp8(stored: Mapping[str, Piece], *, is_scaled: bool) -> str:
    if any(name.endswith(OLD_SCALE) for name in stored):
        return "ComfyUI scaled fp8, old layout"
    scales = [piece for name, piece in stored.items() if name.endswith(SCALE)]
    if any(piece.shape[:1] > (1,) for piece in scales):
        return "fp8 rows"
    if is_scaled:
        return "ComfyUI scaled fp8"
    return "fp8 without scales"


def assemble_checkpoint(
    model: Path,
    base: Callable[[list[str]], Path],
    *,
    text_encoders: Sequence[Path] = (),
    vae: Path | None = None,
) -> Checkpoint:
    """The checkpoint of a model folder or file.

    What a file lacks is in the folder that `base` gives for the names of the components it lacks.
    Text encoders and VAE, of files or folders, take the place of the model's own. Raises
    `CheckpointError`, and whatever `base` raises.
    """
    replacements: dict[str, Component] = {}
    for path in text_encoders:
        replacements |= _inspect_parts(path, TEXT_ENCODERS)
    if vae:
        replacements |= _inspect_parts(vae, ("vae",))
    if model.is_dir():
        found = inspect(model).components | replacements
        folder = model
    else:
        found = inspect_file(model) | replacements
        _require_transformer(found, model)
        folder = base([name for name in COMPONENTS if name not in found])
    components = {}
    for name in COMPONENTS:
        component = found.get(name) or inspect_component(name, folder / name)
        if not component.config:
            config = read_config(name, folder / name / "config.json")
            component = replace(component, config=config)
        components[name] = component
    scheduler = read_config("scheduler", folder / "scheduler" / "scheduler_config.json")
    return Checkpoint(folder, components, scheduler)


def _inspect_parts(path: Path, wanted: Sequence[str]) -> dict[str, Component]:
    """Those of the wanted components that a file, a model folder or the folder of one holds."""
    if path.is_dir():
        folders = {name: path / name for name in wanted if (path / name).is_dir()}
        if not folders:
            folders = {name_component(path): path}
        found = {name: inspect_component(name, folder) for name, folder in folders.items()}
    else:
        found = inspect_file(path)
    kept = {name: component for name, component in found.items() if name in wanted}
    if not kept:
        why = f"it holds {' and '.join(found)}"
        raise CheckpointError(f"no {' or '.join(wanted)} there", path, why=why)
    return kept


def name_component(folder: Path) -> str:
    """Which component a folder holds, by its config.json; raises `CheckpointError`."""
    config = read_json(folder / "config.json", "neither a model folder nor a part of one")
    class_name = config.get("_class_name")
    architectures = config.get("architectures")
    for name in COMPONENTS:
        known = CLASSES[name]
        if class_name in (known, [known]) or architectures in (known, [known]):
            return name
    why = f"it names {class_name or architectures!r:.60}"
    raise CheckpointError("not a part of FLUX.1", folder, why=why)
