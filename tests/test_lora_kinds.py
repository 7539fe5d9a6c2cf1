"""DoRA, LoKr, LoHa and whole differences: pictures of a model merged by hand, and packed layers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from benchmarks.counting import CARD, Counter
from fluxcli.engine.engine import Engine
from fluxcli.engine.lora_hooks import attach
from fluxcli.models.loras import describe, find_path
from quant import lora
from quant.checkpoint import Checkpoint, inspect
from quant.errors import CheckpointError
from quant.linear import QuantizedLinear
from quant.merging import merge_source
from quant.spec import ROTATED, QuantSpec
from tests.support.helpers import BAKED, draw, engine_of, tiny
from tests.test_placement import WAYS, forward, inputs, place

MOVES = 5  # of 255: what a picture differs at least with an adapter that acts
SPAN = "transformer_blocks.0.attn.to_out.0"
BFL_SPAN = "double_blocks.0.img_attn.proj"
SINGLE = "single_transformer_blocks.1.proj_out"
BFL_SINGLE = "single_blocks.1.linear2"
MODULATION = "norm_out.linear"
BFL_MODULATION = "final_layer.adaLN_modulation.1"
QKV = [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
BFL_QKV = "double_blocks.0.img_attn.qkv"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """An adapter, and the model's tensors as they are with it at scale 1, by the names of these."""

    tensors: Tensors
    merged: Tensors


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return engine_of(checkpoint)


@pytest.fixture(scope="module")
def weights(tiny_folder: Path) -> Tensors:
    """The tensors of the transformer in float32."""
    (path,) = (tiny_folder / "transformer").glob("*.safetensors")
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def numbers(*shape: int, size: float = 1.0) -> torch.Tensor:
    """Random ones that are the same for a shape."""
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=made) * size


def low_rank(weight: torch.Tensor, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    return numbers(rank, k, size=k**-0.5), numbers(n, rank, size=6)


def flat(name: str) -> str:
    return name.replace(".", "_")


def dora(weight: torch.Tensor, magnitude: torch.Tensor, dim: int) -> torch.Tensor:
    return magnitude * weight / weight.norm(dim=dim, keepdim=True)


# --- the kinds, each with what it makes of the weights


def comfy_extracted(w: Tensors) -> Made:
    tensors, merged = {}, {}
    for ours, bfl in ((SPAN, BFL_SPAN), (SINGLE, BFL_SINGLE)):
        a, b = low_rank(w[f"{ours}.weight"])
        bias = numbers(len(b))
        name = f"diffusion_model.{bfl}"
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors |= {f"{name}.diff_b": bias, f"{name}.alpha": torch.tensor(2.0)}
        merged[f"{ours}.weight"] = w[f"{ours}.weight"] + b @ a / 2
        merged[f"{ours}.bias"] = w[f"{ours}.bias"] + bias  # not times alpha / r
    return Made(tensors, merged)


def whole_differences(w: Tensors) -> Made:
    """Of matrices, of norms, of the swapped modulation, and of q, k and v in one."""
    tensors, merged = {}, {}
    norm = "transformer_blocks.0.attn.norm_q"
    for ours, bfl in ((SPAN, BFL_SPAN), (norm, "double_blocks.0.img_attn.norm.query_norm")):
        diff = numbers(*w[f"{ours}.weight"].shape)
        tensors[f"diffusion_model.{bfl}.diff"] = diff
        merged[f"{ours}.weight"] = w[f"{ours}.weight"] + diff
    diff = numbers(384, 128)
    tensors[f"diffusion_model.{BFL_QKV}.diff"] = diff
    for layer, rows in zip(QKV, diff.chunk(3), strict=True):
        merged[f"{layer}.weight"] = w[f"{layer}.weight"] + rows
    diff = numbers(256, 128, size=0.1)
    bias = numbers(256, size=0.3)
    tensors[f"diffusion_model.{BFL_MODULATION}.diff"] = diff
    tensors[f"diffusion_model.{BFL_MODULATION}.diff_b"] = bias
    for leaf, more in (("weight", diff), ("bias", bias)):
        name = f"{MODULATION}.{leaf}"
        merged[name] = w[name] + torch.cat(more.chunk(2)[::-1])
    return Made(tensors, merged)


def biases_alone(w: Tensors) -> Made:
    bias = numbers(128, size=12)
    tensors = {f"lora_unet_{flat(BFL_SINGLE)}.diff_b": bias}
    return Made(tensors, {f"{SINGLE}.bias": w[f"{SINGLE}.bias"] + bias})


def lokr_whole(w: Tensors) -> Made:
    """SimpleTuner's names, with the alpha by which LyCORIS says that nothing is a product."""
    tensors, merged = {}, {}
    for layer in (SPAN, SINGLE):
        n, k = w[f"{layer}.weight"].shape
        w1, w2 = numbers(4, 8, size=0.5), numbers(n // 4, k // 8)
        name = f"lycoris_{flat(layer)}"
        tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}
        tensors[f"{name}.alpha"] = torch.tensor(1e10)
        merged[f"{layer}.weight"] = w[f"{layer}.weight"] + torch.kron(w1, w2)
    return Made(tensors, merged)


def lokr_factored(w: Tensors) -> Made:
    """ai-toolkit's names; over q, k and v; both factors are products."""
    tensors, merged = {}, {}
    w1, a, b = numbers(8, 4), numbers(16, 2), numbers(2, 32)
    name = f"diffusion_model.{BFL_SPAN}"
    tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    merged[f"{SPAN}.weight"] = w[f"{SPAN}.weight"] + torch.kron(w1, a @ b) / 2
    c, d, e, f = numbers(6, 2), numbers(2, 4), numbers(64, 3, size=0.5), numbers(3, 32)
    name = f"lora_unet_{flat(BFL_QKV)}"
    tensors |= {f"{name}.lokr_w1_a": c, f"{name}.lokr_w1_b": d}
    tensors |= {f"{name}.lokr_w2_a": e, f"{name}.lokr_w2_b": f, f"{name}.alpha": torch.tensor(1.5)}
    for layer, rows in zip(QKV, (torch.kron(c @ d, e @ f) / 2).chunk(3), strict=True):
        merged[f"{layer}.weight"] = w[f"{layer}.weight"] + rows
    return Made(tensors, merged)


def loha(w: Tensors) -> Made:
    tensors, merged = {}, {}
    names = {SPAN: f"lycoris_{flat(SPAN)}", SINGLE: f"lora_transformer_{flat(SINGLE)}"}
    for layer, name in names.items():
        n, k = w[f"{layer}.weight"].shape
        a, b, c, d = numbers(n, 3), numbers(3, k, size=0.5), numbers(n, 4), numbers(4, k, size=0.5)
        for end, value in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (a, b, c, d), strict=True):
            tensors[f"{name}.hada_{end}"] = value
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
        merged[f"{layer}.weight"] = w[f"{layer}.weight"] + 2 * (a @ b) * (c @ d)
    return Made(tensors, merged)


def dora_of_rows(w: Tensors, ends: tuple[str, str] = ("lora_magnitude_vector", "")) -> Made:
    """peft's names, on q and v of a fused layer and on a single block's output."""
    tensors, merged = {}, {}
    for layer in (QKV[0], QKV[2], SINGLE):
        a, b = low_rank(w[f"{layer}.weight"])
        magnitude = w[f"{layer}.weight"].norm(dim=1) * (4 + 0.5 * numbers(len(b)))
        name = f"transformer.{layer}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        tensors[f"{name}.{ends[0]}{ends[1]}"] = magnitude
        merged[f"{layer}.weight"] = dora(w[f"{layer}.weight"] + b @ a, magnitude[:, None], 1)
    return Made(tensors, merged)


def dora_with_weight(w: Tensors) -> Made:
    return dora_of_rows(w, ("lora_magnitude_vector", ".weight"))


def dora_scale(w: Tensors) -> Made:
    """kohya's and LyCORIS' names: norms of rows (N, 1), over q, k and v, and of a LoKr."""
    tensors, merged = {}, {}
    whole = torch.cat([w[f"{layer}.weight"] for layer in QKV])
    a, b = low_rank(whole)
    magnitude = whole.norm(dim=1, keepdim=True) * 5
    name = f"lora_unet_{flat(BFL_QKV)}"
    tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    tensors |= {f"{name}.dora_scale": magnitude, f"{name}.alpha": torch.tensor(2.0)}
    for layer, rows in zip(QKV, dora(whole + b @ a / 2, magnitude, 1).chunk(3), strict=True):
        merged[f"{layer}.weight"] = rows
    weight = w[f"{SINGLE}.weight"]
    w1, w2 = numbers(4, 8, size=0.5), numbers(weight.shape[0] // 4, weight.shape[1] // 8)
    name = f"lycoris_{flat(SINGLE)}"
    magnitude = weight.norm(dim=1, keepdim=True) * 4
    tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.dora_scale": magnitude}
    merged[f"{SINGLE}.weight"] = dora(weight + torch.kron(w1, w2), magnitude, 1)
    return Made(tensors, merged)


def dora_of_columns(w: Tensors) -> Made:
    """OneTrainer's: norms of columns (1, K), of layers, a part of a fused one, a modulation."""
    tensors, merged = {}, {}
    for layer in (SPAN, QKV[1], SINGLE, "transformer_blocks.1.norm1.linear"):
        weight = w[f"{layer}.weight"]
        a, b = low_rank(weight)
        magnitude = weight.norm(dim=0, keepdim=True) * (1.2 + 0.1 * numbers(1, weight.shape[1]))
        name = f"transformer.{layer}"
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors |= {f"{name}.dora_scale": magnitude, f"{name}.alpha": torch.tensor(1.0)}
        merged[f"{layer}.weight"] = dora(weight + b @ a / 4, magnitude, 0)
    return Made(tensors, merged)


KINDS: dict[str, Callable[[Tensors], Made]] = {
    made.__name__: made
    for made in (
        comfy_extracted,
        whole_differences,
        biases_alone,
        lokr_whole,
        lokr_factored,
        loha,
        dora_of_rows,
        dora_with_weight,
        dora_scale,
        dora_of_columns,
    )
}


def write(tensors: Tensors, path: Path, **metadata: str) -> Path:
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata or None)
    return path


def draw_merged(merged: Tensors, tiny_folder: Path, folder: Path) -> np.ndarray:
    """The picture of the model with other tensors in its transformer."""
    model = Path(shutil.copytree(tiny_folder, folder / "model"))
    (path,) = (model / "transformer").glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    save_file({k: v.contiguous() for k, v in (tensors | merged).items()}, path)
    return draw(engine_of(inspect(model)), tiny())[1]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# --- against a model that is merged by hand


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_a_model_merged_by_hand(kind, engine, weights, tiny_folder, tmp_path):
    made = KINDS[kind](weights)
    path = write(made.tensors, tmp_path / "x.safetensors")
    _, pixels = draw(engine, tiny(lora=(str(path),)))
    assert apart(pixels, draw_merged(made.merged, tiny_folder, tmp_path)) <= 1
    assert apart(pixels, draw(engine, tiny())[1]) > MOVES


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_merges_what_acts_at_run_time(kind, checkpoint, weights, tmp_path):
    made = KINDS[kind](weights)
    path = write(made.tensors, tmp_path / "x.safetensors")
    adapter = lora.read_adapter(path, checkpoint.components)
    changed = set()
    for name, before in weights.items():
        after = merge_source(adapter, "transformer", name=name, values=before)
        if not torch.equal(after, before):
            changed.add(name)
        assert torch.allclose(after, made.merged.get(name, before), atol=1e-4), name
    assert changed == set(made.merged)


@pytest.mark.parametrize("scale", [0.6, -0.5])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"dora_of_rows", "dora_with_weight"}))
def test_a_scale_is_that_of_the_whole_difference(kind, scale, checkpoint, weights, tmp_path):
    """As ComfyUI has it; but peft's DoRA is scaled within the norms."""
    made = KINDS[kind](weights)
    adapter = lora.read_adapter(
        write(made.tensors, tmp_path / "x.safetensors"), checkpoint.components, scale=scale
    )
    for name, whole in made.merged.items():
        found = merge_source(adapter, "transformer", name=name, values=weights[name])
        assert torch.allclose(found, weights[name].lerp(whole, scale), atol=1e-4), name


@pytest.mark.parametrize("to", [None, *BAKED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_gives_its_own_output_and_the_product(
    kind, to, checkpoint, weights, tmp_path
):
    """packed(x) + x dW^T, with the norms of a DoRA those of the dequantized weight."""
    made = KINDS[kind](weights)
    adapter = lora.read_adapter(
        write(made.tensors, tmp_path / "x.safetensors"), checkpoint.components
    )
    spec = QuantSpec(to, **BAKED[to]) if to else None
    model = place(checkpoint.components["transformer"], (), dtype=torch.float32, spec=spec)
    names = {name for part in adapter.parts for name in part.layers if name in model.places}
    modules = {model.places[name].layer for name in names}
    for layer in modules:
        module = model.module.get_submodule(layer)
        if not hasattr(module, "in_features"):
            continue
        x = torch.randn(1, 7, module.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            alone = module(x)
            before = {name: t.clone() for name, t in module.state_dict().items()}
            packed = read_weight(module)
            handles = attach(
                model.module,
                [adapter],
                "transformer",
                places=model.places,
                dtype=torch.float32,
                device="cpu",
            )
            found = [module(x) for _ in range(2)]
            for handle in handles:
                handle.remove()
            assert torch.equal(found[0], found[1])
            assert torch.equal(module(x), alone)
            expected = expect(layer, packed=packed, alone=alone, x=x, model=model, adapter=adapter)
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        # The layer's own rounding of activations is scaled by a DoRA, too.
        tolerance = 0.05 if kind.startswith("dora") and to in ("fp8", *ROTATED) else 1e-4
        assert torch.allclose(found[0], expected, atol=tolerance * float(expected.abs().max()))
        assert not torch.allclose(found[0], alone, atol=1e-2)


def read_weight(module: torch.nn.Module) -> torch.Tensor:
    """The values (N, K) of a layer, packed or not."""
    if isinstance(module, QuantizedLinear):
        return module.dequantize(torch.float32)
    return module.weight.float()


def expect(layer, *, packed, alone, x, model, adapter) -> torch.Tensor:
    """What a layer gives with the merged weight, from the packed one's own output."""
    weight = packed.clone()
    bias = torch.zeros(len(packed))
    for name, where in model.places.items():
        if where.layer != layer:
            continue
        for part in adapter.parts:
            if name in part.layers:
                rows = sum(stop - start for start, stop in part.layers[name])
                here = slice(where.first_row, where.first_row + rows)
                weight[here] = merge_source(
                    adapter, "transformer", name=f"{name}.weight", values=packed[here]
                )
                bias[here] = merge_source(
                    adapter, "transformer", name=f"{name}.bias", values=torch.zeros(rows)
                )
    return alone + functional.linear(x, weight - packed) + bias


# --- wherever the blocks are, and within the planned memory


@pytest.mark.parametrize("way", ["two", "all from their file"])
@pytest.mark.parametrize("kind", ["whole_differences", "lokr_factored", "dora_scale"])
def test_a_placement_gives_the_resident_result(kind, way, checkpoint, weights, tmp_path):
    path = write(KINDS[kind](weights).tensors, tmp_path / "x.safetensors")
    adapter = lora.read_adapter(path, checkpoint.components)
    component = checkpoint.components["transformer"]
    given = inputs(torch.float32)
    found = []
    for blocks, arena in ((), False), WAYS[way]:
        model = place(component, blocks, arena=arena, dtype=torch.float32)
        attach(
            model.module,
            [adapter],
            "transformer",
            places=model.places,
            dtype=torch.float32,
            device="cpu",
        )
        found += [forward(model, given) for _ in range(2)]
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_holds_no_more_than_is_planned(kind, checkpoint, weights, tmp_path):
    path = write(KINDS[kind](weights).tensors, tmp_path / "x.safetensors")
    adapter = lora.read_adapter(path, checkpoint.components)
    counter = Counter()
    with torch.no_grad(), counter:
        given, model = inputs(), place(checkpoint.components["transformer"], ())
        forward(model, given)
        before_bytes = counter.live[True]
        peak_bytes = counter.peaks.pop("")
        handles = attach(
            model.module,
            [adapter],
            "transformer",
            places=model.places,
            dtype=torch.float32,
            device=CARD,
        )
        forward(model, given)
        held_bytes = counter.live[True] - before_bytes
        more_bytes = counter.peaks[""] - peak_bytes
        del handles
    planned_bytes = adapter.numel("transformer") * 4
    small_bytes = 1 << 16  # biases that are scaled, and the low product of a LoRA
    assert held_bytes <= planned_bytes + small_bytes
    assert more_bytes <= planned_bytes + small_bytes


# --- DoRA as peft computes it


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_dora_at_any_scale_is_pefts(scale, checkpoint, weights, tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    made = dora_of_rows(weights)
    weight, bias = weights[f"{SINGLE}.weight"], weights[f"{SINGLE}.bias"]
    base = torch.nn.Sequential(torch.nn.Linear(*reversed(weight.shape)))
    base[0].weight.data, base[0].bias.data = weight.clone(), bias.clone()
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True))
    (layer,) = [m for m in peft.modules() if isinstance(m, BaseTunerLayer)]
    name = f"transformer.{SINGLE}"
    layer.lora_A["default"].weight.data = made.tensors[f"{name}.lora_A.weight"].clone()
    layer.lora_B["default"].weight.data = made.tensors[f"{name}.lora_B.weight"].clone()
    magnitude = made.tensors[f"{name}.lora_magnitude_vector"].clone()
    layer.lora_magnitude_vector["default"].weight.data = magnitude
    layer.set_scale("default", scale)
    adapter = lora.read_adapter(
        write(made.tensors, tmp_path / "x.safetensors"), checkpoint.components, scale=scale
    )
    model = place(checkpoint.components["transformer"], (), dtype=torch.float32)
    attach(
        model.module,
        [adapter],
        "transformer",
        places=model.places,
        dtype=torch.float32,
        device="cpu",
    )
    x = numbers(1, 5, weight.shape[1])
    with torch.no_grad():
        expected = peft(x)
        assert torch.allclose(model.module.get_submodule(SINGLE)(x), expected, atol=1e-4)


def test_two_doras_and_a_lora_on_one_layer_add_what_each_does_alone(checkpoint, weights, tmp_path):
    adapters = [
        lora.read_adapter(
            write(made(weights).tensors, tmp_path / f"{made.__name__}.safetensors"),
            checkpoint.components,
            scale=scale,
        )
        for made, scale in ((comfy_extracted, 0.5), (dora_of_rows, 1.0), (dora_of_columns, 0.7))
    ]
    model = place(checkpoint.components["transformer"], (), dtype=torch.float32)
    layer = model.module.get_submodule(SINGLE)
    x = numbers(1, 5, layer.in_features)

    def run(acting: list[lora.Adapter]) -> torch.Tensor:
        handles = attach(
            model.module,
            acting,
            "transformer",
            places=model.places,
            dtype=torch.float32,
            device="cpu",
        )
        with torch.no_grad():
            found = layer(x)
        for handle in handles:
            handle.remove()
        return found

    plain = run([])
    added = sum(run([adapter]) - plain for adapter in adapters)
    assert torch.allclose(run(adapters), plain + added, atol=1e-4)


# --- names, alpha, folders


PREFIXES = {
    "transformer.base_model.model.": SPAN,
    "base_model.model.transformer.": SPAN,
    "base_model.model.": SPAN,
    "lora_transformer.": SPAN,
    "lycoris_": flat(SPAN),
    "lycoris_transformer_": flat(SPAN),
    "lora_transformer_": flat(SPAN),
    "lora_unet_": flat(BFL_SPAN),
    "model.diffusion_model.": BFL_SPAN,
    "": SPAN,
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_the_transformer(prefix, checkpoint, weights, tmp_path):
    a, b = low_rank(weights[f"{SPAN}.weight"])
    name = f"{prefix}{PREFIXES[prefix]}"
    path = write(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "x.safetensors"
    )
    (part,) = lora.read_adapter(path, checkpoint.components).parts
    assert (part.component, list(part.layers)) == ("transformer", [SPAN])


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_te1.text_model.",
        "lora_te1_text_model_",
        "lora_te_text_model_",
        "text_encoder.text_model.",
        "text_encoder.base_model.model.text_model.",
        "text_encoders.clip_l.transformer.text_model.",
        "clip_l.transformer.text_model.",
    ],
)
def test_prefixes_of_clip(prefix, checkpoint, tmp_path):
    layer = "encoder.layers.0.self_attn.q_proj"
    width = checkpoint.components["text_encoder"].weights[f"text_model.{layer}.weight"].shape[0]
    name = prefix + (flat(layer) if prefix.endswith("_") else layer)
    tensors = {f"{name}.lora_down.weight": torch.ones(2, width)}
    tensors[f"{name}.lora_up.weight"] = torch.ones(width, 2)
    (part,) = lora.read_adapter(
        write(tensors, tmp_path / "x.safetensors"), checkpoint.components
    ).parts
    assert (part.component, list(part.layers)) == ("text_encoder", [layer])


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["to_out.0"]}


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (CONFIG, 4.0),
        (CONFIG | {"use_rslora": True}, 8.0),
        (CONFIG | {"alpha_pattern": {"attn.to_out.0": 2}}, 0.5),
        (CONFIG | {"r": 8, "rank_pattern": {"attn.to_out.0": 4}}, 4.0),
    ],
    ids=["alpha", "rslora", "alpha_pattern", "rank_pattern"],
)
def test_alpha_is_read_from_the_configuration_beside_the_file(
    config, factor, checkpoint, weights, tmp_path
):
    a, b = low_rank(weights[f"{SPAN}.weight"])
    name = f"base_model.model.{SPAN}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    path = write(tensors, tmp_path / "adapter_model.safetensors")
    without = lora.read_adapter(path, checkpoint.components)
    assert without.parts[0].factor == 1.0 and "nothing says its alpha" in without.notices[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = lora.read_adapter(path, checkpoint.components)
    assert adapter.parts[0].factor == factor and not adapter.notices
    # The file's own alpha counts more.
    own = write(tensors | {f"{name}.alpha": torch.tensor(4.0)}, path)
    assert lora.read_adapter(own, checkpoint.components).parts[0].factor == 1.0


def test_a_configuration_of_other_ranks_is_not_used_and_said(checkpoint, weights, tmp_path):
    a, b = low_rank(weights[f"{SPAN}.weight"])
    tensors = {f"transformer.{SPAN}.lora_A.weight": a, f"transformer.{SPAN}.lora_B.weight": b}
    path = write(tensors, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 64}))
    adapter = lora.read_adapter(path, checkpoint.components)
    assert adapter.parts[0].factor == 1.0 and "other ranks" in adapter.notices[0]
    assert "other ranks" in describe(path)["problems"][0]


@pytest.mark.parametrize("text", ["{", "[1]", '{"lora_alpha": "x"}', "\xff"])
def test_a_damaged_configuration_is_an_error(text, checkpoint, weights, tmp_path):
    a, b = low_rank(weights[f"{SPAN}.weight"])
    tensors = {f"transformer.{SPAN}.lora_A.weight": a, f"transformer.{SPAN}.lora_B.weight": b}
    path = write(tensors, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        lora.read_adapter(path, checkpoint.components)


def test_a_folder_stands_for_the_only_adapter_in_it(weights, tmp_path):
    a, b = low_rank(weights[f"{SPAN}.weight"])
    tensors = {f"transformer.{SPAN}.lora_A.weight": a, f"transformer.{SPAN}.lora_B.weight": b}
    path = write(tensors, tmp_path / "x.safetensors")
    assert find_path(str(tmp_path)) == path
    write({"weight": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    assert find_path(str(tmp_path)) == path
    write(tensors, tmp_path / "y.safetensors")
    assert find_path(str(tmp_path)) is None


OTHER_MODELS = {
    "SDXL": "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    "Stable Diffusion or SDXL": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "Stable Diffusion 3": "diffusion_model.joint_blocks.0.x_block.attn.qkv",
    "FLUX.2": "diffusion_model.single_stream_modulation.lin",
    "Chroma": "lora_unet_distilled_guidance_layer_layers_0_in_layer",
    "HunyuanVideo": "transformer.double_blocks.0.img_attn_qkv",
    "Qwen-Image": "transformer.transformer_blocks.0.img_mlp.net.0.proj",
    "Z-Image": "diffusion_model.layers.0.attention.to_q",
    "Wan": "diffusion_model.blocks.0.self_attn.q",
    "HiDream": "diffusion_model.double_stream_blocks.0.block.attn1.to_q",
    "LTX-Video": "diffusion_model.transformer_blocks.0.attn1.to_q",
    "a language model": "base_model.model.model.layers.0.self_attn.q_proj",
}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_adapters_of_other_models_are_named(model, checkpoint, tmp_path):
    name = OTHER_MODELS[model]
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 128)}
    tensors |= {f"{name}.lora_B.weight": torch.ones(128, 4)}
    # Layers that both have do not make it one of FLUX.1.
    tensors |= {f"transformer.{SPAN}.lora_A.weight": torch.ones(4, 128)}
    tensors |= {f"transformer.{SPAN}.lora_B.weight": torch.ones(128, 4)}
    path = write(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"not a LoRA for FLUX.1.* is of {model}"):
        lora.read_adapter(path, checkpoint.components)
    assert model in describe(path)["problems"][0]


def test_a_scale_beyond_float32_is_an_error_before_anything_is_drawn(checkpoint, weights, tmp_path):
    made = comfy_extracted(weights)
    path = write(made.tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="beyond float32"):
        lora.read_adapter(path, checkpoint.components, scale=1e39)
