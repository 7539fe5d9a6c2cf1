"""Names of every trainer against diffusers' own conversion, and what is no LoRA of FLUX.1."""

import contextlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import data, lists, sampled_from, tuples
from safetensors.torch import save_file

from fluxcli.events import Notice
from fluxcli.models.loras import describe
from fluxcli.models.shapes import read_known_shapes
from quant import lora
from quant.checkpoint import Checkpoint, inspect
from quant.codecs import Reader
from quant.errors import CheckpointError
from tests import published
from tests.support.helpers import draw, engine_of, tiny
from tests.support.loras import low_rank

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMATS = {
    "kohya": "kohya",
    "kohya_te1": "kohya",
    "xlabs": "XLabs",
    "bfl_control": "BFL control",
    "peft": "diffusers/peft",
    "peft_bfl": "diffusers/peft",
    "turbo_alpha": "diffusers/peft",
    "hyper_8step": "diffusers/peft",
}


@pytest.fixture(scope="module")
def dev() -> Checkpoint:
    return read_known_shapes("black-forest-labs/FLUX.1-dev")


def as_published(name: str, *, rank: int = 2, img_in: int = 64) -> dict[str, torch.Tensor]:
    """The file's tensors with random values, at a rank that a test can afford."""
    made, found = torch.Generator().manual_seed(0), {}
    for key, (_, shape) in published.tensors(f"lora_{name}").items():
        size = shape
        if "lora_" in key and key.endswith(".weight"):
            columns = img_in if key == "img_in.lora_A.weight" else shape[1]
            size = (
                (rank, columns)
                if any(down in key for down in ("lora_A", "down"))
                else (shape[0], rank)
            )
        found[key] = torch.rand(size, generator=made) + (0.5 if key.endswith("alpha") else -0.5)
    return found


def effects(adapter: lora.Adapter) -> dict[str, torch.Tensor]:
    """What each layer adds for one input, or the weight a norm gets, by its name in diffusers."""
    found, reader = {}, Reader()
    for part in adapter.parts:
        tensors = {
            kind: tensor.float() for kind, tensor in reader.read_checked(part.stored).items()
        }
        for layer, ranges in part.layers.items():
            key = f"{part.component}.{layer}"
            if part.rank:
                rows = [row for start, stop in ranges for row in range(start, stop)]
                down, up = tensors[lora.DOWN], tensors[lora.UP][rows]
                found[key] = part.factor * (up @ (down @ ramp(down.shape[1])))
                if lora.BIAS in tensors:
                    found[key] += part.factor * tensors[lora.BIAS][rows]
            elif lora.NORM in tensors:
                found[key] = tensors[lora.NORM]
    return found


def ramp(size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, size)


def effects_by_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    # Names that it converts with other endings only.
    if any(key.startswith("diffusion_model.") for key in tensors):
        tensors = {
            key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v
            for key, v in tensors.items()
        }
    converted, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(tensors), return_alphas=True)
    assert not alphas
    named = {
        re.sub(r"\.to_(\w+)_lora\.", r".\1_proj.lora.", key): value
        for key, value in converted.items()
    }
    named = {
        re.sub(r"\.lora(_linear_layer)?\.(down|up)\.", r".lora_\2.", key): value
        for key, value in named.items()
    }
    named = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value
        for key, value in named.items()
    }
    found = {}
    for key, value in named.items():
        layer = key.partition(".lora_")[0].replace("text_model.", "")
        if key.endswith(".lora_A.weight"):
            bias = named.get(key.replace("lora_A.weight", "lora_B.bias"), 0)
            found[layer] = (
                named[key.replace("lora_A", "lora_B")] @ (value @ ramp(value.shape[1])) + bias
            )
        elif "lora" not in key:
            found[key.removesuffix(".weight")] = value
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_published_names_mean_what_they_mean_to_diffusers(name, dev, tmp_path):
    tensors = as_published(name)
    adapter = read(tensors, dev, tmp_path)
    assert adapter.format == FORMATS[name] and not adapter.unmatched
    ours, theirs = effects(adapter), effects_by_diffusers(tensors)
    assert set(ours) == set(theirs) and len(ours) > 50
    # diffusers swaps the halves of A as well, so that A and B do not belong together.
    if name == "bfl_control":
        a, b = (tensors[f"final_layer.adaLN_modulation.1.lora_{x}.weight"] for x in "AB")
        bias = tensors["final_layer.adaLN_modulation.1.lora_B.bias"]
        theirs["transformer.norm_out.linear"] = torch.cat(
            (b @ (a @ ramp(a.shape[1])) + bias).chunk(2)[::-1]
        )
    for key, expected in theirs.items():
        assert torch.allclose(ours[key], expected, rtol=1e-4, atol=1e-4), key
        assert expected.abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_bfls_control_lora_takes_the_channels_of_a_control_picture(dev, tmp_path):
    tensors = as_published("bfl_control", img_in=128)
    path = tmp_path / "control.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    adapter = lora.read_adapter(path, dev.components, channels=128)
    assert adapter.input_channels == 128 and not adapter.unmatched
    layer = "transformer.x_embedder"
    expected = effects_by_diffusers(tensors)[layer]
    assert torch.allclose(effects(adapter)[layer], expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.01
    # Without a control picture its own channels are missing.
    with pytest.raises(CheckpointError, match=r"needs a control image.*128"):
        lora.read_adapter(path, dev.components)


def read(
    tensors: dict[str, torch.Tensor], model: Checkpoint, folder: Path, **metadata: str
) -> lora.Adapter:
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        folder / "x.safetensors",
        metadata or None,
    )
    return lora.read_adapter(folder / "x.safetensors", model.components)


# sd-scripts' names of what train_double_block_indices and in_dims leave out by default
KOHYA_ENDS = {
    "img_in": ("x_embedder", 64, 3072),
    "txt_in": ("context_embedder", 4096, 3072),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1", 256, 3072),
    "vector_in_out_layer": ("time_text_embed.text_embedder.linear_2", 3072, 3072),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1", 256, 3072),
    "final_layer_linear": ("proj_out", 3072, 64),
    "final_layer_adaLN_modulation_1": ("norm_out.linear", 3072, 6144),
}


def test_kohyas_other_layers_count_too(dev, tmp_path):
    """diffusers leaves these without their prefix, and FluxPipeline then drops them unsaid."""
    tensors, expected = {}, {}
    for n, (name, (ours, k, rows)) in enumerate(KOHYA_ENDS.items()):
        (a, b), alpha = low_rank({"x": (rows, k)}, seed=n)["x"], torch.tensor(2.0)
        each = {"lora_down.weight": a, "lora_up.weight": b, "alpha": alpha}
        tensors |= {f"lora_unet_{name}.{leaf}": value for leaf, value in each.items()}
        effect = 0.5 * b @ (a @ ramp(k))
        expected[f"transformer.{ours}"] = (
            torch.cat(effect.chunk(2)[::-1]) if "adaLN" in name else effect
        )
    found = effects(read(tensors, dev, tmp_path))
    assert set(found) == set(expected)
    assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in expected)


@pytest.mark.parametrize(
    "prefix", ["lora_te3_", "lora_te2_", "text_encoder_2.", "text_encoders.t5xxl.transformer."]
)
def test_t5_is_found_by_every_prefix(prefix, dev, tmp_path):
    layer = "encoder.block.3.layer.1.DenseReluDense.wi_0"
    name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
    (a, b) = low_rank({"x": (10240, 4096)})["x"]
    adapter = read({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, dev, tmp_path)
    assert [(part.component, *part.layers) for part in adapter.parts] == [("text_encoder_2", layer)]


def test_what_a_file_has_in_two_spellings_is_added_once(dev, tmp_path):
    """github.com/huggingface/diffusers: sharp_detailed_foot.safetensors"""
    (a, b) = low_rank({"x": (3072, 3072)})["x"]
    names = (
        "transformer.transformer_blocks.0.attn.to_out.0",
        "lora_unet_double_blocks_0_img_attn_proj",
    )
    tensors = {
        f"{name}.lora_{way}.weight": value
        for name in names
        for way, value in (("down", a), ("up", b))
    }
    adapter = read({key: value.clone() for key, value in tensors.items()}, dev, tmp_path)
    assert len(adapter.parts) == 1


# --- the same adapter in every spelling makes the same picture


def spellings(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """One adapter of a double block's and a single block's layers, by trainer."""
    d = 128
    fused = {
        "double_blocks.0.img_attn.qkv": (3 * d, d),
        "double_blocks.0.txt_attn.qkv": (3 * d, d),
        "double_blocks.1.img_attn.proj": (d, d),
        "double_blocks.1.txt_attn.proj": (d, d),
        "single_blocks.2.linear2": (d, 5 * d),
    }
    pairs = low_rank(fused, size=6)
    xlabs = dict(
        zip(
            fused,
            (
                "0.processor.qkv_lora1",
                "0.processor.qkv_lora2",
                "1.processor.proj_lora1",
                "1.processor.proj_lora2",
                "2.processor.proj_lora",
            ),
            strict=True,
        )
    )
    found: dict[str, dict] = {name: {} for name in ("kohya", "XLabs", "BFL", "peft")}
    names = {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.1.img_attn.proj": ["transformer_blocks.1.attn.to_out.0"],
        "double_blocks.1.txt_attn.proj": ["transformer_blocks.1.attn.to_add_out"],
        "single_blocks.2.linear2": ["single_transformer_blocks.2.proj_out"],
    }
    for bfl, (a, b) in pairs.items():
        flat = f"lora_unet_{bfl.replace('.', '_')}"
        found["kohya"] |= {
            f"{flat}.lora_down.weight": a,
            f"{flat}.lora_up.weight": b * 4,
            f"{flat}.alpha": torch.tensor(1.0),
        }
        kind = f"{bfl.partition('.')[0]}.{xlabs[bfl]}"
        found["XLabs"] |= {f"{kind}.down.weight": a, f"{kind}.up.weight": b}
        found["BFL"] |= {f"{bfl}.lora_A.weight": a, f"{bfl}.lora_B.weight": b}
        for layer, rows in zip(names[bfl], b.chunk(len(names[bfl])), strict=True):
            found["peft"] |= {
                f"transformer.{layer}.lora_A.weight": a.clone(),
                f"transformer.{layer}.lora_B.weight": rows,
            }
    return found


def test_every_spelling_makes_the_same_picture(tiny_folder, tmp_path):
    checkpoint = inspect(tiny_folder)
    engine, pictures = engine_of(checkpoint), {}
    _, plain = draw(engine, tiny())
    for name, tensors in spellings(checkpoint).items():
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            tmp_path / f"{name}.safetensors",
        )
        _, pictures[name] = draw(engine, tiny(lora=(str(tmp_path / f"{name}.safetensors"),)))
        assert np.abs(pictures[name].astype(int) - plain).max() > 10
        assert np.abs(pictures[name].astype(int) - pictures["kohya"]).max() <= 1


# --- what is none


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl", "of SDXL"),
        ("flux2", "another model.*6144 is that of FLUX.2"),
        ("bfl_control", "needs a control image.*128"),
    ],
)
def test_published_files_of_other_kinds_are_refused_and_named(name, words, dev, tmp_path):
    tensors = {
        key: torch.zeros(shape)
        for key, (_, shape) in published.tensors(f"lora_{name}").items()
        if name != "bfl_control" or "blocks" not in key or ".0." in key
    }
    with pytest.raises(CheckpointError, match=words):
        read(tensors, dev, tmp_path)


def pair(name: str, n: int = 128, k: int = 128, rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, k),
        f"{name}.lora_B.weight": torch.ones(n, rank),
    }


GOOD = "transformer.transformer_blocks.0.attn.to_out.0"
REFUSED = {
    "FLUX.2": (
        pair(GOOD) | pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
        "FLUX.2",
    ),
    "klein": (
        pair("diffusion_model.single_blocks.0.linear1", n=1152),
        "another model.*1152.*width",
    ),
    "SD3": (pair("transformer.joint_blocks.0.attn.to_q"), "Stable Diffusion 3"),
    "SD": (pair("unet.down_blocks.0.attentions.0.to_q"), "Stable Diffusion"),
    "half a LoKr": ({f"{GOOD}.lokr_w1": torch.ones(4, 4)}, "not a whole LoRA"),
    "LoKr of another width": (
        {f"{GOOD}.lokr_w1": torch.ones(4, 4), f"{GOOD}.lokr_w2": torch.ones(32, 33)},
        "another model.*lokr_w2 .32, 33",
    ),
    "LoKr by tucker": ({f"{GOOD}.lokr_t2": torch.ones(4, 4, 1, 1)}, "another kind.*lokr_t2"),
    "LoHa by tucker": ({f"{GOOD}.hada_t1": torch.ones(4, 4, 1, 1)}, "another kind.*hada_t1"),
    "half a LoHa": ({f"{GOOD}.hada_w1_a": torch.ones(128, 2)}, "not a whole LoRA"),
    "a magnitude alone": ({f"{GOOD}.dora_scale": torch.ones(128)}, "not a whole LoRA"),
    "strange": (
        pair("some.layer"),
        "not a LoRA for FLUX.1.*first keys are some.layer.lora_A.weight",
    ),
    "weights": ({f"{GOOD}.weight": torch.ones(128, 128)}, "not a LoRA for FLUX.1"),
    "norms alone": (
        {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(32)},
        "not a LoRA",
    ),
    "another width": (pair(GOOD, n=3072, k=3072), "another model.*3072.*width"),
    "half": ({f"{GOOD}.lora_A.weight": torch.ones(4, 128)}, "not a whole LoRA.*lora_A"),
    "a bias alone": ({f"{GOOD}.lora_B.bias": torch.ones(128)}, "not a whole LoRA"),
    "an alpha alone": ({f"{GOOD}.alpha": torch.ones(())}, "not a LoRA"),
    "other ranks": (pair(GOOD, rank=4) | {f"{GOOD}.lora_B.weight": torch.ones(128, 5)}, "another"),
    "NaN alpha": (pair(GOOD) | {f"{GOOD}.alpha": torch.tensor(float("nan"))}, "not finite.*alpha"),
    "many alphas": (pair(GOOD) | {f"{GOOD}.alpha": torch.ones(3)}, "no number"),
    "no rank": (pair(GOOD, rank=0), "not a LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_for_this_model_is_refused(case, tiny_folder, tmp_path):
    tensors, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        read(tensors, inspect(tiny_folder), tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"transformer.lora_alpha": "x"},
        {"transformer.lora_alpha": 1, "transformer.alpha_pattern": 3},
        [1],
        {"transformer.lora_alpha": {}},
        {"transformer.lora_alpha": float("inf")},
        {
            "transformer.lora_alpha": 1,
            "transformer.alpha_pattern": {"to_out.0": None, "proj": "y", "0": []},
        },
    ],
    ids=str,
)
def test_hostile_metadata_is_an_error_of_the_file(said, tiny_folder, tmp_path):
    with pytest.raises(CheckpointError):
        read(pair(GOOD), inspect(tiny_folder), tmp_path, lora_adapter_metadata=json.dumps(said))


@pytest.fixture(scope="module")
def components(tiny_folder):
    return inspect(tiny_folder).components


def read_any_header(components, draw_from):
    """Any shapes, endings and layers: only `CheckpointError`, from the file's name to its use."""
    block = "transformer.transformer_blocks.0.attn"
    layers = [
        f"{block}.to_q",
        f"{block}.norm_q",
        "x_embedder",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "no",
        ".",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    ]
    ends = [
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
        "weight",
        "scale",
        "diff_b",
        "down.weight",
        "",
    ]
    sizes = lists(sampled_from([0, 1, 4, 32, 96, 128, 384]), max_size=3)
    keys = draw_from.draw(
        lists(tuples(sampled_from(layers), sampled_from(ends), sizes), min_size=1, max_size=8)
    )
    tensors = {f"{layer}.{end}": torch.ones(shape) for layer, end, shape in keys}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(CheckpointError):
        save_file(tensors, Path(folder) / "x.safetensors")
        describe(Path(folder) / "x.safetensors")
        effects(lora.read_adapter(Path(folder) / "x.safetensors", components))


@settings(max_examples=100, deadline=None)
@given(data())
def test_no_header_does_more_than_raise_an_error_of_the_file(components, draw_from):
    read_any_header(components, draw_from)


@pytest.mark.exhaustive
@settings(max_examples=1000, deadline=None)
@given(data())
def test_no_header_of_a_thousand_does(components, draw_from):
    read_any_header(components, draw_from)


def test_patterns_of_the_metadata_are_no_regular_expressions(tiny_folder, tmp_path):
    said = {
        "transformer.lora_alpha": 4,
        "transformer.alpha_pattern": {"(a+)+$" + "a" * 5000: 1, "to_out.0": 8},
    }
    adapter = read(
        pair(GOOD), inspect(tiny_folder), tmp_path, lora_adapter_metadata=json.dumps(said)
    )
    assert adapter.parts[0].factor == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_before_anything_is_computed(
    value, tiny_folder, tmp_path
):
    tensors = pair(GOOD)
    tensors[f"{GOOD}.lora_B.weight"][5, 1] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite.*lora_B"):
        draw(engine_of(inspect(tiny_folder)), tiny(lora=(str(tmp_path / "x.safetensors"),)))


def test_layers_without_a_place_are_counted_and_said(tiny_folder, tmp_path):
    tensors = (
        pair(GOOD)
        | pair("transformer.transformer_blocks.7.attn.to_q")
        | {"lora_unet_x.diff_b": torch.ones(3)}
    )
    save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = inspect(tiny_folder)
    events, _ = draw(engine_of(checkpoint), tiny(lora=(str(tmp_path / "x.safetensors"),)))
    (said,) = [
        event.message
        for event in events
        if isinstance(event, Notice) and "x.safetensors" in event.message
    ]
    assert "2 of 3 layers" in said and "transformer_blocks.7.attn.to_q" in said
