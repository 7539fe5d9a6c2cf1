"""Single weight files as people download them: which components of FLUX.1 one holds, and in which dialect.

BFL's own, ComfyUI's (fp8 as it is, scaled in the old or the new layout, all-in-one), GGUF, Forge's bitsandbytes NF4;
text encoders and VAEs by themselves. With a folder for what they lack they make a checkpoint. Stdlib only.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from quant.checkpoint import COMPONENTS, Checkpoint, Component, inspect, inspect_component
from quant.config import CLASSES, read_config, read_json
from quant.dialects import T5_GGUF, from_bfl, from_ldm, guess_kind, is_bfl, rename_weights
from quant.errors import CheckpointError, ForeignFile
from quant.header import is_gguf, read_header, read_metadata
from quant.weights import Piece, group_weights

FOREIGN = "not a FLUX.1 model in one file"
PREFIXES = {
    "model.diffusion_model.": "transformer", "diffusion_model.": "transformer", "vae.": "vae",
    "first_stage_model.": "vae", "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.t5xxl.transformer.": "text_encoder_2", "text_encoders.clip_l.": "text_encoder",
    "text_encoders.t5xxl.": "text_encoder_2",
}  # fmt: skip
MARKS = {  # what a component's names contain, in the dialects that are read
    "text_encoder": ("text_model.encoder.layers.0.",), "text_encoder_2": ("encoder.block.0.layer.0.", "enc.blk.0."),
    "vae": ("decoder.mid.block_1.", "decoder.mid_block."),
}  # fmt: skip
# Scales of activations, markers of a layout, and what FLUX.1 does not use of CLIP.
UNUSED = re.compile(r"(.*\.)?(scaled_fp8|input_scale|scale_input|comfy_quant|logit_scale|spiece_model|"
                    r"text_projection(\.weight)?|position_ids)")  # fmt: skip
T5_SHARED, T5_TIED = "shared.weight", "encoder.embed_tokens.weight"
OLD_SCALE, SCALE = ".scale_weight", ".weight_scale"


def inspect_file(path: Path) -> dict[str, Component]:
    """The components in a weight file, encoders and VAE without config; raises `CheckpointError` for another kind."""
    header, parts = read_header(path), {}
    for name, info in header.items():
        prefix = next((start for start in PREFIXES if name.startswith(start)), "")
        parts.setdefault(PREFIXES.get(prefix, ""), {})[name.removeprefix(prefix)] = Piece(path, info)
    parts = {name: part for name, part in parts.items() if not all(map(UNUSED.fullmatch, part))}
    rest = parts.pop("", {})
    if rest:
        found = "transformer" if is_bfl(rest) else next((n for n, marks in MARKS.items() if _has(rest, marks)), "")
        if not found or found in parts:
            raise ForeignFile(FOREIGN, path, why=guess_kind(header))
        parts[found] = rest
    if "transformer" in parts and not is_bfl(parts["transformer"]):
        raise ForeignFile(FOREIGN, path, why=guess_kind(header))
    whole = "all-in-one, " if len(parts) > 1 else ""
    return {name: _component(name, path, parts[name], whole) for name in COMPONENTS if name in parts}


def inspect_transformer(path: Path) -> Component:
    """The transformer in a weight file; raises `CheckpointError` where there is none."""
    return _transformer_of(inspect_file(path), path)


def _transformer_of(found: Mapping[str, Component], path: Path) -> Component:
    if "transformer" not in found:
        raise CheckpointError("no transformer in this file", path, why=f"it has {' and '.join(found)}")
    return found["transformer"]


def _has(names: Mapping[str, object], marks: Sequence[str]) -> bool:
    return any(name.startswith(mark) for name in names for mark in marks)


def _component(name: str, path: Path, stored: Mapping[str, Piece], whole: str) -> Component:
    pieces = {n.replace(OLD_SCALE, SCALE): piece for n, piece in stored.items() if not UNUSED.fullmatch(n)}
    scaled = any(n.endswith((SCALE, "scaled_fp8", "comfy_quant")) for n in (*pieces, *stored))
    scaled = scaled or not _scaled_layers(path).isdisjoint(p.info.name.removesuffix(".weight") for p in stored.values())
    weights, config = group_weights(pieces, raw=not scaled), {}
    if name == "transformer" and "kontext" in path.name.lower():
        why = "its name says Kontext, which edits a given picture; by its weights it cannot be told from dev"
        raise CheckpointError("another kind of FLUX model", path, why=why, hint="rename it if it is none")
    if name == "transformer":
        weights, config = from_bfl(weights)
        config = read_config(name, path, config)
    elif name == "text_encoder_2":
        weights = rename_weights(weights, T5_GGUF)
        if T5_SHARED in weights:  # the same once more, in some files
            weights.pop(T5_TIED, None)
    elif name == "vae":
        weights = from_ldm(weights)
    found = Component(name, path, config, weights)
    kinds = {"nf4": "bitsandbytes nf4 (Forge)", "fp8": _fp8(stored, scaled), "int8": "int8 rows"}
    plain = "GGUF" if is_gguf(path) else "BFL" if name in ("transformer", "vae") else "Hugging Face"
    return replace(found, dialect=whole + kinds.get(found.precision, plain))


def _scaled_layers(path: Path) -> set[str]:
    """The layers that a file's header calls scaled, as ComfyUI writes it beside or in place of `comfy_quant`."""
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        return set(json.loads(read_metadata(path)["_quantization_metadata"])["layers"])
    return set()


def _fp8(stored: Mapping[str, Piece], scaled: bool) -> str:
    if any(name.endswith(OLD_SCALE) for name in stored):
        return "ComfyUI scaled fp8, old layout"
    rows = any(piece.shape[:1] > (1,) for name, piece in stored.items() if name.endswith(SCALE))
    return "fp8 rows" if rows else "ComfyUI scaled fp8" if scaled else "fp8 without scales"


def assemble_checkpoint(
    model: Path, base: Callable[[list[str]], Path], *, text_encoders: Sequence[Path] = (), vae: Path | None = None
) -> Checkpoint:
    """The checkpoint of a model folder or file; what a file lacks is in the folder that `base` gives for these names.

    Encoders and VAE of files or folders take the place of the model's own. Raises `CheckpointError`.
    """
    others = {n: part for path in text_encoders for n, part in _parts(path, ("text_encoder", "text_encoder_2")).items()}
    others |= _parts(vae, ("vae",)) if vae else {}
    whole = inspect(model) if model.is_dir() else None
    found = (whole.components if whole else inspect_file(model)) | others
    _transformer_of(found, model)
    folder = model if whole else base([name for name in COMPONENTS if name not in found])
    for name in COMPONENTS:
        if name not in found:
            found[name] = inspect_component(name, folder / name)
        elif not found[name].config:
            found[name] = replace(found[name], config=read_config(name, folder / name / "config.json"))
    scheduler = read_config("scheduler", folder / "scheduler" / "scheduler_config.json")
    return Checkpoint(folder, {name: found[name] for name in COMPONENTS}, scheduler)


def _parts(path: Path, wanted: Sequence[str]) -> dict[str, Component]:
    """Those of the wanted components that a file, a model folder or the folder of one holds."""
    if path.is_dir():
        folders = {name: path / name for name in wanted if (path / name).is_dir()}
        folders = folders or {name_component(path): path}
        found = {name: inspect_component(name, folder) for name, folder in folders.items()}
    else:
        found = inspect_file(path)
    if not (kept := {name: part for name, part in found.items() if name in wanted}):
        raise CheckpointError(f"no {' or '.join(wanted)} there", path, why=f"it holds {' and '.join(found)}")
    return kept


def name_component(folder: Path) -> str:
    """Which component a folder holds, by its config.json; raises `CheckpointError`."""
    config = read_json(folder / "config.json", "neither a model folder nor a part of one")
    named = [config.get("_class_name"), config.get("architectures")]
    found = [name for name in COMPONENTS if CLASSES[name] in named or [CLASSES[name]] in named]
    if not found:
        raise CheckpointError("not a part of FLUX.1", folder, why=f"it names {named[0] or named[1]!r:.60}")
    return found[0]
