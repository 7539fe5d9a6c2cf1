"""The two parts that Redux reads a picture with: SigLIP and the embedder of its hidden states.

They lie in the published folder's layout (image_encoder/, image_embedder/), in a folder of their
own, or each in one file, as ComfyUI's users have them. Works from headers alone. Stdlib only.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from quant.checkpoint import Component, inspect_component, split_unused
from quant.config import DOWNLOAD_AGAIN, complete, is_class_of, read_json
from quant.dialects import guess_kind
from quant.errors import CheckpointError
from quant.expected import check_tensors
from quant.header import read_whole_header
from quant.weights import Piece, group_weights

REDUX_PARTS = ("image_encoder", "image_embedder")
NO_REDUX = "no part of Redux"
# Of the published parts: a file does not say its config (google/siglip-so400m-patch14-384 and
# black-forest-labs/FLUX.1-Redux-dev, config.json of both).
PUBLISHED_CONFIGS: dict[str, dict[str, object]] = {
    "image_encoder": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "image_embedder": {"redux_dim": 1152, "txt_in_features": 4096},
}
# A tensor that only this part has, in a file of it.
MARKS = {
    "image_encoder": (
        "vision_model.embeddings.position_embedding.weight",
        "embeddings.position_embedding.weight",
    ),
    "image_embedder": ("redux_up.weight",),
}


def inspect_redux(paths: Iterable[Path]) -> dict[str, Component]:
    """The parts of Redux at these paths by name, each with the tensors that its config needs.

    A path is of a folder with both parts, of a part's own folder, or of a file; where two have the
    same part, the first counts. Raises `CheckpointError`.
    """
    found: dict[str, Component] = {}
    for path in paths:
        read = _inspect_folder(path) if path.is_dir() else {}
        if not path.is_dir():
            part = _inspect_file(path)
            read = {part.name: part}
        for name, part in read.items():
            check_tensors(name, part.folder, config=part.config, weights=part.weights)
            found.setdefault(name, part)
    return found


def check_redux(parts: Mapping[str, Component], transformer: Component) -> None:
    """Raise `CheckpointError` unless both parts are there, and fit together and the transformer."""
    for name in REDUX_PARTS:
        if name not in parts:
            folder = next(iter(parts.values())).folder
            raise CheckpointError(f"no {name}", folder, hint=DOWNLOAD_AGAIN)
    text_width = complete("transformer", transformer.config)["joint_attention_dim"]
    folder = parts["image_embedder"].folder
    encoder = complete("image_encoder", parts["image_encoder"].config)
    embedder = complete("image_embedder", parts["image_embedder"].config)
    given = encoder["hidden_size"]
    taken = embedder["redux_dim"]
    if given != taken:
        why = f"it takes {taken} values, image_encoder gives {given}"
        raise CheckpointError("image_embedder of another model", folder, why=why)
    made = embedder["txt_in_features"]
    if made != text_width:
        why = f"it gives {made} values, the transformer takes {text_width}"
        raise CheckpointError("image_embedder of another model", folder, why=why)


def is_whole_redux(folder: Path) -> bool:
    """Whether a folder has both parts, as that of an interrupted download has not."""
    with contextlib.suppress(CheckpointError):
        return len(_inspect_folder(folder)) == len(REDUX_PARTS)
    return False


def count_tokens(image_encoder: Component) -> int:
    """How many tokens a picture becomes: one for each patch."""
    config = complete("image_encoder", image_encoder.config)
    patches: int = config["image_size"] // config["patch_size"]
    return patches**2


def _inspect_folder(folder: Path) -> dict[str, Component]:
    folders = {
        name: folder / name
        for name in REDUX_PARTS
        if os.path.lexists(folder / name / "config.json")
    }
    if not folders:
        folders = {_name_part(folder): folder}
    return {name: inspect_component(name, where) for name, where in folders.items()}


def _name_part(folder: Path) -> str:
    """Which part a folder holds by its config.json; raises `CheckpointError`."""
    config = read_json(folder / "config.json", NO_REDUX)
    found = config.get("_class_name") or config.get("architectures")
    if isinstance(found, list) and found:
        found = found[0]
    for name in REDUX_PARTS:
        if is_class_of(name, found):
            return name
    raise CheckpointError(
        NO_REDUX, folder, why=f"it names {str(found)[:60]!r}", hint=DOWNLOAD_AGAIN
    )


def _inspect_file(path: Path) -> Component:
    """The part in one weight file, with the published config; raises `CheckpointError`."""
    header = read_whole_header(path)
    for name, marks in MARKS.items():
        if any(mark in header.tensors for mark in marks):
            stored = {each: Piece(path, info) for each, info in header.tensors.items()}
            used, unused = split_unused(name, stored)
            return Component(
                name,
                path,
                config=dict(PUBLISHED_CONFIGS[name]),
                weights=group_weights(used, markers=None),
                unused=unused,
            )
    why = guess_kind(header.tensors, header.metadata)
    raise CheckpointError(NO_REDUX, path, why=why, hint=DOWNLOAD_AGAIN)
