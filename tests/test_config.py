"""Hostile and foreign configs are exit 4 with file and key, never a bug or another picture."""

import json
import shutil
from pathlib import Path

import pytest

from fluxcli.engine.streaming import load_component
from fluxcli.errors import ExitCode
from quant.checkpoint import inspect
from quant.errors import CheckpointError
from tests.support.invariant import assert_failed, call

HOSTILE = [
    ("transformer/config.json", {"num_attention_heads": "4"}),
    ("transformer/config.json", {"num_attention_heads": 0}),
    ("transformer/config.json", {"in_channels": "64"}),
    ("transformer/config.json", {"guidance_embeds": "no"}),
    ("transformer/config.json", {"num_layers": 10**9}),
    ("transformer/config.json", {"num_single_layers": -1}),
    ("transformer/config.json", {"quantization_config": {"quant_method": "gptq"}}),
    ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}),
    ("vae/config.json", {"block_out_channels": []}),
    ("vae/config.json", {"block_out_channels": "x"}),
    ("vae/config.json", {"scaling_factor": 0}),
    ("vae/config.json", {"scaling_factor": "a"}),
    ("vae/config.json", {"shift_factor": float("nan")}),
    ("text_encoder/config.json", {"max_position_embeddings": 3 * 10**9}),
    ("text_encoder/config.json", {"architectures": ["BertModel"]}),
    ("text_encoder/config.json", {"num_hidden_layers": 2.5}),
    ("text_encoder_2/config.json", {"d_model": "x"}),
    ("text_encoder_2/config.json", {"architectures": ["UMT5EncoderModel"]}),
    ("transformer/config.json", {"axes_dims_rope": "x"}),
    ("transformer/config.json", {"axes_dims_rope": [4, 14.0, 14]}),
    ("vae/config.json", {"down_block_types": [1]}),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}),
    ("scheduler/scheduler_config.json", {"stochastic_sampling": True}),
    ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}),
    ("scheduler/scheduler_config.json", {"base_image_seq_len": 4096}),
    ("scheduler/scheduler_config.json", {"base_shift": None}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}),
]
UNBUILDABLE = [
    ("text_encoder", {"hidden_act": "zzz"}),
    ("text_encoder", {"hidden_size": 97}),
    ("vae", {"norm_num_groups": 7}),
]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change(path: Path, values: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("name", "values"), HOSTILE, ids=str)
def test_wild_values_are_refused_before_anything_is_built(model, capsys, name, values):
    change(model / name, values)
    with pytest.raises(CheckpointError):
        inspect(model)
    result = call(capsys, "generate", "x", "-p", "tiny", "-m", str(model))
    message = assert_failed(result, ExitCode.INPUT_FILE)
    assert "config" in message or "model" in message
    assert "this is a bug" not in message


@pytest.mark.parametrize(("name", "values"), UNBUILDABLE, ids=str)
def test_values_that_make_no_model_are_the_files_fault(model, name, values):
    import torch

    change(model / name / "config.json", values)
    with pytest.raises(CheckpointError, match="cannot build"):
        load_component(inspect(model).components[name], dtype=torch.float32, device="cpu")


def test_keys_that_are_absent_have_the_librarys_defaults(model):
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["in_channels"]
    path.write_text(json.dumps(config))
    assert inspect(model).components["transformer"].config["in_channels"] == 64


def test_the_fingerprint_sees_configs_weights_and_tokenizers(model):
    seen = {inspect(model).fingerprint}
    change(model / "scheduler" / "scheduler_config.json", {"max_shift": 1.2})
    seen.add(inspect(model).fingerprint)
    change(model / "vae" / "config.json", {"shift_factor": 0.5})
    seen.add(inspect(model).fingerprint)
    tokenizer = model / "tokenizer_2" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    seen.add(inspect(model).fingerprint)
    weights = next((model / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    seen.add(inspect(model).fingerprint)
    assert len(seen) == 5
