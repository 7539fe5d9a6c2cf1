"""Loading is strict: every key, every shape, no layer left random; the dialects of published folders are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.loader import load_component
from quant.checkpoint import COMPONENTS, inspect
from quant.config import CLASSES
from quant.errors import CheckpointError


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rewrite(folder: Path, change) -> None:
    state = load_file(weights(folder))
    change(state)
    save_file(state, weights(folder), metadata={"format": "pt"})


def load(folder: Path, name: str) -> torch.nn.Module:
    return load_component(inspect(folder).components[name], dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", COMPONENTS)
def test_everything_is_loaded_in_the_dtype_asked_for(tiny_folder, name):
    module = load(tiny_folder, name)
    tensors = [*module.parameters(), *module.buffers()]
    assert not [t for t in tensors if t.is_meta]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in module.parameters())
    assert type(module).__name__ == CLASSES[name]


@pytest.mark.parametrize("name", COMPONENTS)
def test_missing_extra_and_misshapen_tensors_are_named(model, name):
    key = sorted(load_file(weights(model / name)))[-1]
    for change, word in (
        (lambda state: state.update(intruder=torch.zeros(2)), "unknown"),
        (lambda state: state.update({key: torch.zeros(1, 2, 3)}), "misshapen"),
        (lambda state: state.pop(key), "missing"),
    ):
        shutil.copy(weights(model / name), model / "kept")
        rewrite(model / name, change)
        with pytest.raises(CheckpointError, match=word) as caught:
            load(model, name)
        assert "intruder" in str(caught.value) or key.removeprefix("text_model.") in str(caught.value)
        shutil.copy(model / "kept", weights(model / name))


def test_three_names_and_the_count_of_many_missing(model):
    def drop(state):
        for key in sorted(state)[:9]:
            del state[key]

    rewrite(model / "transformer", drop)
    with pytest.raises(CheckpointError, match=r"9 missing tensors: .*, .*, .* \.\.\."):
        load(model, "transformer")


def test_clip_with_and_without_the_old_prefix_and_position_ids(model):
    expected = load(model, "text_encoder").state_dict()

    def other_dialect(state):
        prefix = "text_model."
        renamed = {k.removeprefix(prefix) if k.startswith(prefix) else prefix + k: v for k, v in state.items()}
        state.clear()
        state.update(renamed)
        state[
            next(k for k in state if k.endswith("token_embedding.weight")).replace(
                "token_embedding.weight", "position_ids"
            )
        ] = torch.arange(77)[None]

    rewrite(model / "text_encoder", other_dialect)
    found = load(model, "text_encoder").state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("stored", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_embedding_is_tied_under_either_name(model, stored):
    def rename(state):
        names = [k for k in ("shared.weight", "encoder.embed_tokens.weight") if k in state]
        tensor = next(state.pop(k) for k in names)
        state[stored] = tensor

    rewrite(model / "text_encoder_2", rename)
    module = load(model, "text_encoder_2")
    assert module.encoder.embed_tokens.weight is module.shared.weight
    original = load_file(weights(model / "text_encoder_2"))[stored]
    assert torch.equal(module.shared.weight, original.float())


def test_a_sharded_component_is_read_through_its_index(model):
    expected = load(model, "transformer").state_dict()
    folder, state = model / "transformer", load_file(weights(model / "transformer"))
    weights(folder).unlink()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: state[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    found = load(model, "transformer").state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_config_of_another_shape_is_refused_before_it_builds(model):
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_layers": 10**9}))
    with pytest.raises(CheckpointError, match="num_layers"):
        load(model, "transformer")
    path.write_text(json.dumps(config | {"num_layers": config["num_layers"] + 1}))
    with pytest.raises(CheckpointError, match="missing"):
        load(model, "transformer")
    path.write_text(json.dumps(config | {"attention_head_dim": "x"}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(model, "transformer")
