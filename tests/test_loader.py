"""Loading is strict: every key, every shape, no layer left random; dialects are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.engine.streaming import load_component
from quant.checkpoint import COMPONENTS, KEEP_FILE, inspect
from quant.config import CLASSES
from quant.errors import CheckpointError
from quant.spec import QuantSpec
from tests.support.helpers import BAKED


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def weights(folder: Path) -> Path:
    return next(path for path in folder.glob("*.safetensors") if path.name != KEEP_FILE)


def rewrite(folder: Path, change) -> None:
    state = load_file(weights(folder))
    change(state)
    save_file(state, weights(folder), metadata={"format": "pt"})


def load(folder: Path, name: str) -> torch.nn.Module:
    return load_component(
        inspect(folder).components[name], dtype=torch.float32, device="cpu"
    ).module


@pytest.mark.parametrize("name", COMPONENTS)
def test_everything_is_loaded_in_the_dtype_asked_for(tiny_folder, name):
    module = load(tiny_folder, name)
    tensors = [*module.parameters(), *module.buffers()]
    assert not [t for t in tensors if t.is_meta]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in module.parameters())
    assert CLASSES[name] in [kind.__name__ for kind in type(module).__mro__]


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
        assert "intruder" in str(caught.value) or key.removeprefix("text_model.") in str(
            caught.value
        )
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
        renamed = {
            k.removeprefix(prefix) if k.startswith(prefix) else prefix + k: v
            for k, v in state.items()
        }
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


def test_packed_components_hold_layers_of_their_scheme(baked):
    from quant.linear import FP8Linear, NF4Linear, QuantizedLinear, RotatedLinear

    for to, kind in (("nf4", NF4Linear), ("fp8", FP8Linear), ("int8", RotatedLinear)):
        module = load(baked(to, **BAKED[to]), "transformer")
        packed = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
        assert {type(layer) for layer in packed} == {kind}
        # of 12 and 5, of which q, k, v (and the MLP) are one
        assert len(packed) == 2 * (12 - 4) + 5 * (5 - 3)
        assert (
            {p.dtype for p in module.parameters()}
            == {torch.float32}
            == {layer.bias.dtype for layer in packed}
        )
        assert not any(p.requires_grad for p in module.parameters())
        assert not [t for t in [*module.parameters(), *module.buffers()] if t.is_meta]
        encoder = load(baked(to, **BAKED[to]), "text_encoder_2")
        layers = [layer for layer in encoder.modules() if isinstance(layer, QuantizedLinear)]
        assert len(layers) == (14 if to == "int8" else 12)
        # Outliers: in 8 bit where they are rotated alone.
        multiplying = [layer for layer in layers if getattr(layer, "arithmetic", False)]
        assert len(multiplying) == (14 if to == "int8" else 0)


def test_what_is_skipped_stays_meta_packed_or_not(baked):
    from quant.spec import is_modulation

    for folder in (baked("fp8", **BAKED["fp8"]), baked("fp8", **BAKED["fp8"], modulation="fp8")):
        component = inspect(folder).components["transformer"]
        module = load_component(
            component, dtype=torch.float32, device="cpu", skip=is_modulation
        ).module
        meta = {name for name, tensor in module.named_parameters() if tensor.is_meta}
        assert meta == {name for name in component.weights if is_modulation(name)}


def put(value: float, at: int = 3):
    """A change of one value of a tensor, of one byte where it is float8."""
    return lambda t: (
        (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t)
        .view(-1)[at : at + 1]
        .fill_(value)
    )


NAN, INF = float("nan"), float("inf")
FAULTS = {
    "a NaN in a 16-bit tensor": ("fp8", "norm_out.linear.bias", put(NAN)),
    "an Inf in a scale": ("fp8", "transformer_blocks.0.attn.to_q.weight_scale", put(INF)),
    "a scale of 0": ("int8", "transformer_blocks.1.ff.net.2.weight_scale", put(0)),
    "a negative scale": ("int8", "transformer_blocks.1.ff.net.2.weight_scale", put(-0.1)),
    "a NaN byte": ("fp8", "single_transformer_blocks.0.proj_mlp.weight", put(0x7F)),
    "a NaN byte with sign": ("fp8", "transformer_blocks.0.ff.net.2.weight", put(0xFF)),
    "an Inf in a scale of scales": (
        "nf4",
        "single_transformer_blocks.2.proj_out.weight.nested_absmax",
        put(INF, 0),
    ),
    "a NaN in a level": ("nf4", "transformer_blocks.0.attn.to_k.weight.nested_quant_map", put(NAN)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_packed_weights_that_are_not_finite_are_refused_by_name(baked, tmp_path, fault):
    to, name, damage = FAULTS[fault]
    folder = shutil.copytree(baked(to, **BAKED[to]), tmp_path / "model")
    load(folder, "transformer")
    rewrite(folder / "transformer", lambda state: damage(state[name]))
    with pytest.raises(CheckpointError) as caught:
        load(folder, "transformer")
    assert name.partition(".weight")[0] in str(caught.value)


@pytest.mark.parametrize("to", ["nf4", "fp8", "int8"])
def test_a_source_that_is_not_finite_is_not_packed_while_loading(model, to):
    name = "transformer_blocks.1.attn.add_v_proj.weight"
    rewrite(model / "transformer", lambda state: state[name][3, 4].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=name):
        load_component(
            inspect(model).components["transformer"],
            dtype=torch.float32,
            device="cpu",
            spec=QuantSpec(to, scales="absmax" if to == "nf4" else "search"),
        )


def test_packs_that_are_not_whole_or_of_another_size_are_refused(baked, tmp_path):
    name = "transformer_blocks.0.attn.to_q.weight"
    for to, change in (
        ("nf4", lambda state: state.pop(f"{name}.absmax")),
        (
            "nf4",
            lambda state: state.update({f"{name}.absmax": state[f"{name}.absmax"][:-1].clone()}),
        ),
        ("fp8", lambda state: state.pop(f"{name}_scale")),
        ("fp8", lambda state: state.update({f"{name}_scale": torch.ones(3)})),
        ("int8", lambda state: state.pop(name)),
        ("int8", lambda state: state.update({name: state[name][:, :64].clone()})),
    ):
        source = baked(to, **BAKED[to])
        folder = shutil.copytree(source, tmp_path / "model")
        rewrite(folder / "transformer", change)
        with pytest.raises(CheckpointError, match=name):
            load(folder, "transformer")
        shutil.rmtree(folder)
