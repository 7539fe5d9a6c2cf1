"""Single weight files as people download them: which components one holds, in which dialect.

Read are BFL's own files (in nvfp4, too), ComfyUI's (fp8 without scales, with scales in the old or
the new layout; int8, w6a8, w4a8, nvfp4 and mxfp8; all-in-one), GGUF, Forge's bitsandbytes NF4, and
text encoders and VAEs by themselves. Together with a model folder, which has what a file lacks,
they make a checkpoint. Stdlib only.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint import (
    COMPONENTS,
    MARKED_FILES,
    SHARD,
    TEXT_ENCODERS,
    TOKENIZERS,
    Checkpoint,
    Component,
    check_tokenizer,
    inspect,
    inspect_component,
    name_folder,
    split_unused,
)
from quant.config import check_config, is_class_of, name_class, read_config, read_json
from quant.dialects import (
    T5_GGUF,
    T5_SHARED,
    T5_TIED,
    find_foreign_text_encoder,
    find_foreign_transformer,
    from_bfl,
    from_ldm,
    guess_kind,
    infer_diffusers_config,
    is_bfl,
    is_diffusers,
    rename_weights,
)
from quant.errors import CheckpointError, ForeignFile
from quant.header import Header, read_whole_header
from quant.header_json import MARKERS as METADATA
from quant.kinds import find_title
from quant.markers import READABLE, UNREAD, add_layers, read_layers
from quant.spec import FLOAT4, MARKER, MXFP8, ROTATED
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
# A component whose names have no prefix is known by one that begins like this.
MARKS = {
    "text_encoder": ("text_model.encoder.layers.0.",),
    "text_encoder_2": ("encoder.block.0.layer.0.", "enc.blk.0."),
    "vae": ("decoder.mid.block_1.", "decoder.mid_block."),
}
# Tensors that are not read: scales of activations, and a layout's mark of the whole file.
UNREAD_TENSORS = re.compile(
    r"comfy_quant|(.*\.)?(scaled_fp8|input_scale|scale_input|logit_scale|spiece_model|"
    r"text_projection(\.weight)?|position_ids)"
)
# How ComfyUI's scales of weights are called in its two layouts; they get the new one's names.
OLD_SCALE_END = ".scale_weight"
SCALE_END = ".weight_scale"
SCALED_ENDS = (SCALE_END, "scaled_fp8", "comfy_quant")


def inspect_file(path: Path) -> dict[str, Component]:
    """The components in a weight file, by name.

    Only the transformer has a config, which its tensors imply; those of the others are empty.
    Raises `ForeignFile` for a file that holds none of FLUX.1's, `CheckpointError` for a damaged
    one.
    """
    header = read_whole_header(path)
    parts = _split_into_components(path, header)
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
    """Raise `CheckpointError` unless the names of a file's components have the transformer."""
    if "transformer" not in found:
        why = f"it has {' and '.join(found)}"
        raise CheckpointError("no transformer in this file", path, why=why)


def _split_into_components(path: Path, header: Header) -> dict[str, dict[str, Piece]]:
    """The tensors of each component in a file, by their names without prefix.

    Raises `ForeignFile` where they are none of FLUX.1's.
    """
    tensors = header.tensors
    parts: dict[str, dict[str, Piece]] = {}
    for name, info in tensors.items():
        component, short_name = _split_prefix(name)
        short_name = short_name.replace(OLD_SCALE_END, SCALE_END)
        pieces = parts.setdefault(component, {})
        if short_name in pieces and not UNREAD_TENSORS.fullmatch(short_name):
            why = f"{pieces[short_name].info.name[:80]} and {name[:80]}"
            raise CheckpointError("a tensor under two names", path, why=why)
        pieces[short_name] = Piece(path, info)
    for component, pieces in list(parts.items()):
        # Such tensors alone are no component; the mark of a file often stands without prefix.
        read = [name for name in pieces if not UNREAD_TENSORS.fullmatch(name)]
        if not read:
            del parts[component]
        elif all(name.endswith(MARKER) for name in read):
            why = f"{pieces[read[0]].info.name[:80]} has no weight with that prefix"
            raise CheckpointError(UNREAD, path, why=why, hint=READABLE)
    without_prefix = parts.pop("", {})
    if without_prefix:
        component = _recognize_component(without_prefix)
        if not component or component in parts:
            raise ForeignFile(FOREIGN, path, why=guess_kind(tensors, header.metadata))
        parts[component] = without_prefix
    transformer = parts.get("transformer")
    if transformer:
        kind = find_foreign_transformer(tensors, header.metadata)
        if kind or not (is_bfl(transformer) or is_diffusers(transformer)):
            raise ForeignFile(FOREIGN, path, why=kind or guess_kind(tensors))
    return parts


def _split_prefix(name: str) -> tuple[str, str]:
    """The component that a name's prefix says, "" for none, and the name without the prefix."""
    for prefix, component in PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return "", name


def _recognize_component(names: Collection[str]) -> str:
    """Which component has tensors of such names, without a prefix; "" for none."""
    if is_bfl(names) or is_diffusers(names):
        return "transformer"
    for component, marks in MARKS.items():
        if any(name.startswith(marks) for name in names):
            return component
    return ""


def _make_component(
    name: str, path: Path, *, header: Header, stored: Mapping[str, Piece]
) -> Component:
    """The component `name`, from its tensors in a file by their names without prefix.

    Raises `CheckpointError`.
    """
    used, unused = split_unused(name, stored)
    kind = find_foreign_text_encoder(name, {key: piece.shape for key, piece in used.items()})
    if kind:
        raise ForeignFile(FOREIGN, path, why=kind)
    is_scaled, weights = group_stored(name, path, header=header, stored=used)
    config: dict[str, Any] = {}
    if name == "transformer":
        if is_bfl(stored):
            weights, config = from_bfl(weights)
        else:
            config = infer_diffusers_config(weights)
        config = check_config(name, path, config)
    elif name == "text_encoder_2":
        weights = _read_t5(weights)
    elif name == "vae":
        weights = from_ldm(weights)
    title = find_title(header.metadata)
    component = Component(name, path, config=config, weights=weights, unused=unused, title=title)
    dialect = _describe_dialect(component, header=header, stored=stored, is_scaled=is_scaled)
    return replace(component, dialect=dialect)


def group_stored(
    name: str, path: Path, *, header: Header, stored: Mapping[str, Piece]
) -> tuple[bool, dict[str, Weight]]:
    """A component's weights from its tensors in a file, and whether its fp8 weights have scales."""
    pieces = {
        stored_name: piece
        for stored_name, piece in stored.items()
        if not UNREAD_TENSORS.fullmatch(stored_name)
    }
    markers = _find_markers(name, path, header)
    is_scaled = _has_scales(stored, markers or {})
    return is_scaled, group_weights(pieces, unscaled=not is_scaled, markers=markers)


def _find_markers(name: str, path: Path, header: Header) -> dict[str, object] | None:
    """The markers of a component's layers in the header's metadata, None for a file without any.

    Some name the layers with the prefix that they have in the file, some without.
    """
    has_tensors = any(stored.endswith(MARKER) for stored in header.tensors)
    is_marked = has_tensors or METADATA in header.metadata or path.name in MARKED_FILES
    if not is_marked:
        return None
    markers: dict[str, object] = {}
    for layer, described in read_layers(header.metadata).items():
        component, short_name = _split_prefix(layer)
        if component in ("", name):
            markers = add_layers(markers, {short_name: described}, file=path)
    return markers


def _has_scales(stored: Mapping[str, Piece], markers: Mapping[str, object]) -> bool:
    """Whether a component's fp8 weights have scales, by the names of its tensors and layers."""
    if any(name.endswith(SCALED_ENDS) for name in stored):
        return True
    return any(f"{layer}.weight" in stored for layer in markers)


def _read_t5(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """T5's weights by diffusers' names; some files have the shared embedding a second time."""
    found = rename_weights(weights, T5_GGUF)
    if T5_SHARED in found:
        found.pop(T5_TIED, None)
    return found


def _describe_dialect(
    component: Component, *, header: Header, stored: Mapping[str, Piece], is_scaled: bool
) -> str:
    """Who wrote a component of a file, and in which form, for people."""
    if component.precision == "gguf" or header.is_gguf:
        return "GGUF"
    if component.precision:
        return _describe_packed(component, header=header, stored=stored, is_scaled=is_scaled)
    if component.name == "vae" or is_bfl(stored):
        return "BFL"
    return "diffusers" if component.name == "transformer" else "Hugging Face"


def _describe_packed(
    component: Component, *, header: Header, stored: Mapping[str, Piece], is_scaled: bool
) -> str:
    """Who quantized a component of a file, and to what."""
    forms = {weight.scheme for weight in component.weights.values()}
    words = {
        "nf4": "bitsandbytes nf4 (Forge)",
        FLOAT4: "nvfp4 (ComfyUI)" if FLOAT4 in forms else "nvfp4 (BFL)",
        MXFP8: MXFP8,
    }
    if component.precision in ROTATED:
        is_marked = METADATA in header.metadata or any(name.endswith(MARKER) for name in stored)
        return _describe_int8(component, is_marked=is_marked)
    if component.precision == "fp8":
        return _describe_fp8(stored, is_scaled=is_scaled)
    return words[component.precision]


def _describe_int8(component: Component, *, is_marked: bool) -> str:
    """Who wrote a component in int8, w6a8 or w4a8: the former files of flux have no markers."""
    if any(weight.rotation for weight in component.weights.values()):
        return f"ComfyUI {component.precision} ConvRot"
    return "ComfyUI int8" if is_marked else "int8 rows"


def _describe_fp8(stored: Mapping[str, Piece], *, is_scaled: bool) -> str:
    """Who wrote a component in fp8: flux has a scale for each row, ComfyUI one for the matrix."""
    if any(piece.info.name.endswith(OLD_SCALE_END) for piece in stored.values()):
        return "ComfyUI scaled fp8, old layout"
    scales = [piece for name, piece in stored.items() if name.endswith(SCALE_END)]
    if any(piece.shape and piece.shape[0] > 1 for piece in scales):
        return "fp8 rows"
    if is_scaled:
        return "ComfyUI scaled fp8"
    return "fp8 without scales"


def assemble_checkpoint(
    model: Path,
    find_base: Callable[[list[str]], Path],
    *,
    text_encoders: Sequence[Path] = (),
    vae: Path | None = None,
) -> Checkpoint:
    """The checkpoint of a model folder, of a transformer's folder, or of a file.

    For the last two, `find_base` is called with the names of the components that neither it nor
    the other arguments have, and returns the model folder that has those, the tokenizers and all
    configs. Text encoders and VAE, each a file or folder, take the place of the model's own. Raises
    `CheckpointError`, and whatever `find_base` raises.
    """
    replacements: dict[str, Component] = {}
    for path in text_encoders:
        replacements |= _inspect_parts(path, TEXT_ENCODERS)
    if vae:
        replacements |= _inspect_parts(vae, ("vae",))
    folder = model
    pipeline = ""
    kind = ""
    if (model / "model_index.json").is_file():
        whole = inspect(model)
        pipeline = whole.pipeline
        kind = whole.said_kind
        found = whole.components | replacements
    else:
        found = _inspect_model_part(model) | replacements
        _require_transformer(found, model)
        folder = find_base([name for name in COMPONENTS if name not in found])
        for name in TOKENIZERS:
            check_tokenizer(folder / name)
    components = {}
    for name in COMPONENTS:
        component = found.get(name) or inspect_component(name, folder / name)
        if not component.config:
            config = read_config(name, folder / name / "config.json")
            component = replace(component, config=config)
        components[name] = component
    scheduler = read_config("scheduler", folder / "scheduler" / "scheduler_config.json")
    return Checkpoint(folder, components, scheduler, pipeline=pipeline, said_kind=kind)


def _inspect_model_part(path: Path) -> dict[str, Component]:
    """The components in a file, or in a folder that is no whole model; raises `CheckpointError`."""
    if path.is_dir():
        return _inspect_parts(path, COMPONENTS)
    if SHARD.fullmatch(path.name):
        why = "its name says that it is one of several files"
        hint = f"-m {path.parent}"
        raise CheckpointError("a part of a transformer", path, why=why, hint=hint)
    return inspect_file(path)


def _inspect_parts(path: Path, wanted: Sequence[str]) -> dict[str, Component]:
    """Those of the wanted components that are at a path; raises `CheckpointError` for none.

    The path is of a weight file, of a model folder, or of a component's own folder.
    """
    if path.is_dir():
        folders = {
            name: path / name for name in wanted if os.path.lexists(path / name / "config.json")
        }
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
    if not os.path.lexists(folder / "config.json"):
        why = name_folder(folder)
        raise CheckpointError("neither a model folder nor a part of one", folder, why=why)
    config = read_json(folder / "config.json", "neither a model folder nor a part of one")
    found = config.get("_class_name") or config.get("architectures")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    for name in COMPONENTS:
        if is_class_of(name, found):
            return name
    why = f"it names {found!r:.60}"
    kind = name_class(found)
    if kind:
        why += f"; it is {kind}"
    raise CheckpointError("not a part of FLUX.1", folder, why=why)
