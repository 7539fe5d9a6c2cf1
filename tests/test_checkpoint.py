"""What is at this path? Model folders as published, and every way in which a folder is none."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.checkpoint import COMPONENTS, inspect
from quant.errors import CheckpointError
from quant.header import Header

CLASSES = {
    "text_encoder": {"architectures": ["CLIPTextModel"]},
    "text_encoder_2": {"architectures": ["T5EncoderModel"]},
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "guidance_embeds": True,
        "in_channels": 64,
    },
    "vae": {"_class_name": "AutoencoderKL"},
}
BF16 = 2


def weights(*names: str, numel: int = 4) -> bytes:
    header, at = {}, 0
    for name in names:
        header[name] = {"dtype": "BF16", "shape": [numel], "data_offsets": [at, at + BF16 * numel]}
        at += BF16 * numel
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model folder: one file per component, two shards for the transformer."""
    root = tmp_path / "model"
    for name, config in CLASSES.items():
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config))
        file = "diffusion_pytorch_model" if name == "vae" else "model"
        (root / name / f"{file}.safetensors").write_bytes(weights("a", "b"))
    (root / "transformer" / "model.safetensors").unlink()
    shards = {"a": "d-1-of-2.safetensors", "b": "d-2-of-2.safetensors"}
    for tensor, shard in shards.items():
        (root / "transformer" / shard).write_bytes(weights(tensor))
    index = root / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text("{}")
    (root / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return root


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect(folder)
    assert "\n" not in str(caught.value)
    return f"{caught.value} | {caught.value.hint}"


def test_a_folder_is_its_components_and_their_tensors(folder):
    checkpoint = inspect(folder)
    assert tuple(checkpoint.components) == COMPONENTS and checkpoint.scheduler["shift"] == 3.0
    for name, component in checkpoint.components.items():
        assert set(component.weights) == {"a", "b"}
        assert (component.numel, component.nbytes) == (8, 16) and component.folder == folder / name
    assert (
        checkpoint.components["transformer"].weights["b"].pieces[""].file.name
        == "d-2-of-2.safetensors"
    )


def test_the_bundled_model_is_a_model(tiny_folder):
    checkpoint = inspect(tiny_folder)
    assert checkpoint.takes_guidance and len(checkpoint.fingerprint) == 16
    stored = sum(component.nbytes for component in checkpoint.components.values())
    on_disk = sum(path.stat().st_size for path in tiny_folder.rglob("*.safetensors"))
    assert 0 < on_disk - stored < 200_000
    assert sum(path.stat().st_size for path in tiny_folder.rglob("*") if path.is_file()) <= 12e6


@pytest.mark.parametrize("value, takes", [(True, True), (False, False)])
def test_guidance_is_what_the_config_says(value, takes, folder):
    edit(folder / "transformer" / "config.json", guidance_embeds=value)
    assert inspect(folder).takes_guidance is takes


@pytest.mark.parametrize(
    "change",
    [
        lambda root: edit(root / "transformer" / "config.json", guidance_embeds=False),
        lambda root: (root / "tokenizer" / "vocab.json").write_text('{"a": 1}'),
        lambda root: edit(root / "scheduler" / "scheduler_config.json", shift=1.0),
        lambda root: (root / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
            weights("a", "b")[:-1] + b"\1"
        ),
        lambda root: (root / "text_encoder" / "model.safetensors").write_bytes(weights("a", "c")),
    ],
)
def test_the_fingerprint_follows_configs_and_weights_not_the_place(change, folder, tmp_path):
    before = inspect(folder).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert inspect(moved).fingerprint == before
    change(moved)
    assert inspect(moved).fingerprint != before


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda root: edit(root / name, **changes)


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(data)


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "text_encoder/model.safetensors"
DEFECTS = {
    "no index": (_unlink("model_index.json"), "not a FLUX model folder"),
    "another pipeline": (
        _edit("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline",
    ),
    "no scheduler": (_unlink("scheduler/scheduler_config.json"), "no scheduler"),
    "no config": (_unlink("vae/config.json"), "no vae"),
    "no JSON": (_write("vae/config.json", b"{nope"), "not valid JSON"),
    "bad UTF-8": (_write("vae/config.json", b'{"a": "\xff"}'), "not valid JSON"),
    "a list": (_write("vae/config.json", b"[]"), "no JSON object"),
    "deep": (_write("vae/config.json", b"[" * 200_000), "not valid JSON"),
    "huge": (lambda root: os.truncate(root / "vae" / "config.json", 33 << 20), "too large"),
    "wrong class": (_edit("vae/config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "wrong encoder": (_edit("text_encoder/config.json", architectures=["BertModel"]), "BertModel"),
    "10^9 layers": (_edit("transformer/config.json", num_layers=10**9), "num_layers"),
    "negative layers": (
        _edit("transformer/config.json", num_single_layers=-1),
        "num_single_layers",
    ),
    "a number of 400 digits": (
        _edit("vae/config.json", latent_channels=10**400),
        "latent_channels",
    ),
    "not finite": (_edit("vae/config.json", scaling_factor=float("nan")), "scaling_factor"),
    "no tokenizer": (lambda root: (root / "tokenizer").rename(root / "away"), "no tokenizer"),
    "other channels": (_edit("transformer/config.json", in_channels=96), "96 channels"),
    "no weights": (_unlink(WEIGHTS), "no weights"),
    "empty weights": (_write(WEIGHTS, b""), "0 bytes"),
    "missing shard": (_unlink("transformer/d-2-of-2.safetensors"), "d-2-of-2.safetensors"),
    "a tensor twice": (_write("transformer/d-2-of-2.safetensors", weights("a", "b")), "two shards"),
    "no map": (_write(INDEX, b"{}"), "weight_map"),
    "a map of numbers": (_edit(INDEX, weight_map={"a": 3}), "weight_map"),
    "a list as map": (_edit(INDEX, weight_map=["a"]), "weight_map"),
    "an empty map": (_edit(INDEX, weight_map={}), "weight_map"),
}


@pytest.mark.parametrize("damage, word", DEFECTS.values(), ids=DEFECTS)
def test_what_is_no_model_is_named(damage, word, folder):
    damage(folder)
    message = refusal(folder)
    assert word in message and str(folder) in message


@pytest.mark.parametrize("architectures", [{"a": 1}, 3, [], None])
def test_architectures_that_name_nothing_are_no_crash(architectures, folder):
    edit(folder / "text_encoder" / "config.json", architectures=architectures)
    assert inspect(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "x.bin",
        "x.pt",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused_unopened(shard, folder, monkeypatch):
    edit(folder / INDEX, weight_map={"a": shard})
    opened = []

    def note(path: Path) -> Header:
        opened.append(path)
        return Header({}, metadata={}, is_gguf=False)

    monkeypatch.setattr("quant.checkpoint.read_whole_header", note)
    assert "unsafe shard index" in refusal(folder)
    assert all("transformer" not in str(path) for path in opened)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickles_are_no_weights_and_never_a_fallback(name, folder):
    (folder / WEIGHTS).rename(folder / "text_encoder" / name)
    assert name in refusal(folder)
    (folder / WEIGHTS).write_bytes(b"broken")
    assert "not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("part", ["model_index.json", "vae", "vae/config.json", WEIGHTS])
def test_a_folder_in_the_place_of_a_file_or_a_file_in_that_of_a_folder(part, folder):
    (folder / part).rename(folder / "away")
    (folder / part).write_bytes(b"") if part == "vae" else (folder / part).mkdir()
    refusal(folder)


def test_a_shard_that_is_a_link_to_elsewhere_is_refused_but_for_the_hubs_own(folder, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "c"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    shard = snapshot / "transformer" / "d-1-of-2.safetensors"
    for place in (tmp_path, tmp_path / "models--x" / "blobs"):
        place.mkdir(exist_ok=True)
        real = shard.resolve().rename(place / "weights")
        shard.unlink(missing_ok=True)
        shard.symlink_to(real)
        if place == tmp_path:
            with pytest.raises(CheckpointError, match="link to elsewhere"):
                inspect(snapshot)
    assert set(inspect(snapshot).components["transformer"].weights) == {"a", "b"}
