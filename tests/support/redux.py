"""Files of Redux with as many bytes as their headers say, all of them 0."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from quant.expected import list_shapes

SMALL = {
    "image_encoder": {
        "architectures": ["SiglipVisionModel"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 58,
        "patch_size": 14,
    },
    "image_embedder": {
        "_class_name": "ReduxImageEncoder",
        "redux_dim": 32,
        "txt_in_features": 128,  # of the bundled model
    },
}
FILES = {
    "image_encoder": "model.safetensors",
    "image_embedder": "diffusion_pytorch_model.safetensors",
}


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a file of these tensors in bfloat16 whose values take no room on the disk."""
    entries = {}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + at)


def write_redux(folder: Path) -> Path:
    """Write a small Redux for the bundled model in the published layout."""
    (folder / "feature_extractor").mkdir(parents=True)
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    index = {"_class_name": "FluxPriorReduxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, config in SMALL.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        write_sparse(folder / name / FILES[name], list_shapes(name, config))
    return folder
