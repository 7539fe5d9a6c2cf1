"""How far a quantized T5's embedding is from that of the 16-bit one, where its activations have
outliers.

    python -m benchmarks.t5_error [--scenario written|embedded|none] [--seed 0] [--out FILE]

A T5 encoder of the published widths, made block after block from seeds (a block in float32 takes
0.8 GB), its weights as transformers initializes them. In a scenario with outliers six channels of
the stream between the blocks are 150 to 300 times the others, and eight of the wide layer 100
times: "embedded" has them in the token embeddings alone, with the same sign everywhere, "written"
has every block write them. All is computed in float32 but for "bf16", the floor.

Relative errors, L2: of the embedding in total and over its other channels (those that are no
outliers); of each layer on the activations of the 16-bit model, in total and over what the other
input channels contribute. A total error hides the latter: an outlier's contribution is that of
many others. A channel of an input is an outlier if its RMS is 20 times the median channel's.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Block

from quant import codecs
from quant.linear import QuantizedLinear, make_linear
from quant.spec import QUANTIZABLE, find_rotation
from quant.tensor_info import TensorInfo
from quant.weights import Piece

D_MODEL = 4096
D_FF = 10240
HEADS = 64
D_KV = 64
BUCKETS = 32
EPSILON = 1e-6
ATTENTION = "layer.0.SelfAttention"
MLP = "layer.1.DenseReluDense"
# The layers of a block: the shape, and the standard deviation of transformers' initialization.
LAYERS = {
    f"{ATTENTION}.q": ((HEADS * D_KV, D_MODEL), (D_MODEL * D_KV) ** -0.5),
    f"{ATTENTION}.k": ((HEADS * D_KV, D_MODEL), D_MODEL**-0.5),
    f"{ATTENTION}.v": ((HEADS * D_KV, D_MODEL), D_MODEL**-0.5),
    f"{ATTENTION}.o": ((D_MODEL, HEADS * D_KV), (HEADS * D_KV) ** -0.5),
    f"{MLP}.wi_0": ((D_FF, D_MODEL), D_MODEL**-0.5),
    f"{MLP}.wi_1": ((D_FF, D_MODEL), D_MODEL**-0.5),
    f"{MLP}.wo": ((D_MODEL, D_FF), D_FF**-0.5),
}
# Outlier channels of the stream, how many times the others they are; two in one group of 256.
CHANNELS = (133, 911, 1502, 2229, 2230, 3600)
STRENGTHS = (150.0, 300.0, 200.0, 250.0, 180.0, 300.0)
# Outlier channels of the wide layer: rows of wi_0 and wi_1, each so many times the others.
WIDE_CHANNELS = (77, 1203, 2048, 4999, 5003, 7777, 9001, 10001)
WIDE_STRENGTH = 10.0
SCENARIOS = ("written", "embedded", "none")
OUTLIER = 20.0  # times the median channel's RMS
SEEDS = 1000  # of torch for each seed of the command line
MEASURED = 6  # each layer of every sixth block is measured


@dataclass(frozen=True)
class Variant:
    """How T5's layers are stored and multiplied."""

    scheme: str
    is_rotated: bool = False
    multiplies: bool = False  # int8 activations; else they stay 16 bit ("A16")


BF16 = "bf16"
VARIANTS = {
    "fp8 A16": Variant("fp8"),  # `--text-encoder fp8`, whose `wo` stays 16 bit
    "int8 rotated A16": Variant("int8", is_rotated=True),
    "int8 rotated W8A8": Variant("int8", is_rotated=True, multiplies=True),
    "int8 A16": Variant("int8"),
    "int8 W8A8": Variant("int8", multiplies=True),
}


class Wide(nn.Module):
    """A layer of the 16-bit model, which keeps its input and output."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.input = weight.new_empty(0)
        self.output = weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        self.output = functional.linear(x, self.weight)
        return self.output


def make_states(scenario: str, tokens: int, *, seed: int) -> Tensor:
    """Token embeddings (1, T, D_MODEL) in bfloat16's values."""
    generator = torch.Generator().manual_seed(1 + SEEDS * seed)
    states = torch.randn(1, tokens, D_MODEL, generator=generator)
    if scenario == "embedded":
        signs = torch.randn(len(CHANNELS), generator=generator).sign()
        spread = torch.randn(1, tokens, len(CHANNELS), generator=generator)
        states[..., CHANNELS] = signs * torch.tensor(STRENGTHS) * (1 + 0.1 * spread)
    elif scenario == "written":
        states[..., CHANNELS] *= torch.tensor(STRENGTHS)
    return states.bfloat16().float()


def make_weights(scenario: str, block: int, *, seed: int) -> dict[str, Tensor]:
    """The weights of a block's layers in bfloat16's values."""
    generator = torch.Generator().manual_seed(100 + block + SEEDS * seed)
    weights = {}
    for name, (shape, deviation) in LAYERS.items():
        weight = torch.randn(shape, generator=generator).mul_(deviation)
        if scenario != "none" and name.startswith(f"{MLP}.wi"):
            weight[WIDE_CHANNELS, :] *= WIDE_STRENGTH
        if scenario == "written" and name in (f"{ATTENTION}.o", f"{MLP}.wo"):
            weight[CHANNELS, :] *= torch.tensor(STRENGTHS)[:, None]
        weights[name] = weight.bfloat16().float()
    return weights


def make_block(config: T5Config, index: int) -> Any:
    """A block without weights for its layers; norms have ones, as initialized."""
    with torch.device("meta"):
        block = T5Block(config, has_relative_attention_bias=index == 0, layer_idx=index)
    for layer in block.layer:
        layer.layer_norm.weight = nn.Parameter(torch.ones(D_MODEL), requires_grad=False)
    if index == 0:
        generator = torch.Generator().manual_seed(99)
        bias = torch.randn(BUCKETS, HEADS, generator=generator).mul_(D_MODEL**-0.5)
        embedding = block.layer[0].SelfAttention.relative_attention_bias
        embedding.weight = nn.Parameter(bias, requires_grad=False)
    return block.eval()


def quantize(name: str, weight: Tensor, variant: Variant) -> dict[str, Tensor]:
    """The stored tensors of a weight by suffix; none where the scheme leaves it in 16 bit.

    Unrotated int8 is what ComfyUI's files without ConvRot have: a scale for each row.
    """
    full = f"encoder.block.0.{name}.weight"
    if variant.scheme == "fp8" and not QUANTIZABLE["text_encoder_2"].fullmatch(full):
        return {}
    if variant.scheme == "int8" and not variant.is_rotated:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {"": (weight / scale).round_().char(), "_scale": scale}
    where = Piece(Path(), TensorInfo(full, "F32", tuple(weight.shape)))
    return codecs.quantize(weight, variant.scheme, name=full, where=where).stored


def make_layer(weight: Tensor, stored: dict[str, Tensor], variant: Variant) -> nn.Module:
    """A layer over the stored tensors; over the weight itself where there are none."""
    if not stored:
        return Wide(weight)
    return make_linear(
        variant.scheme,
        [stored],
        shapes=[tuple(weight.shape)],
        bias=None,
        arithmetic=variant.multiplies,
        rotation=find_rotation(weight.shape[1]) if variant.is_rotated else 0,
    )


def install(block: Any, layers: dict[str, nn.Module]) -> None:
    """Put layers into a block, by their names."""
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, layer)


def relative(found: Tensor, reference: Tensor, *, others: bool = False) -> float:
    """The relative error of states (1, T, D_MODEL), in total or over the other channels."""
    difference = found.float() - reference
    if others:
        is_other = torch.ones(D_MODEL, dtype=torch.bool)
        is_other[list(CHANNELS)] = False
        difference, reference = difference[..., is_other], reference[..., is_other]
    return round(float(difference.norm() / reference.norm()), 5)


def normalize(states: Tensor) -> Tensor:
    """T5's last norm, with a weight of ones."""
    wide = states.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)


class Encoders:
    """The same encoder in every variant, each with the states that came out of its last block."""

    def __init__(self, scenario: str, *, depth: int, tokens: int, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.config = T5Config(
            d_model=D_MODEL,
            d_ff=D_FF,
            d_kv=D_KV,
            num_heads=HEADS,
            num_layers=depth,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        self.config._attn_implementation = "eager"
        states = make_states(scenario, tokens, seed=seed)
        self.reference = states
        self.states = dict.fromkeys(VARIANTS, states) | {BF16: states.bfloat16()}
        self.biases: dict[str, Tensor] = {}  # of positions: the first block makes them for all

    def run_block(self, index: int) -> dict[str, Any]:
        """Let the states of every variant pass through the next block; what was found there."""
        weights = make_weights(self.scenario, index, seed=self.seed)
        block = make_block(self.config, index)
        wide = {name: Wide(weight) for name, weight in weights.items()}
        install(block, wide)
        self.reference = self._pass(block, self.reference, "reference")
        layers: dict[str, dict[str, Any]] = {}
        if index % MEASURED == 0:
            layers = {name: describe_input(layer) for name, layer in wide.items()}
        stored: dict[str, dict[str, Tensor]] = {}
        last = Variant("")
        for variant_name, variant in VARIANTS.items():
            if replace(variant, multiplies=last.multiplies) != last:
                stored = {name: quantize(name, w, variant) for name, w in weights.items()}
            last = variant
            made = {name: make_layer(w, stored[name], variant) for name, w in weights.items()}
            install(block, made)
            self.states[variant_name] = self._pass(block, self.states[variant_name], variant_name)
            for name in layers:
                layers[name][variant_name] = measure_layer(made[name], wide[name])
        install(block, {name: Wide(weight.bfloat16()) for name, weight in weights.items()})
        self.states[BF16] = self._pass(block.bfloat16(), self.states[BF16], BF16)
        return {"block": index, "stream": self.compare(self.states), "layers": layers}

    def compare(self, states: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """The errors of states, by variant."""
        return {
            name: {
                "total": relative(values, self.reference),
                "others": relative(values, self.reference, others=True),
            }
            for name, values in states.items()
        }

    def finish(self) -> dict[str, dict[str, float]]:
        """The errors of the embeddings, by variant."""
        self.reference = normalize(self.reference)
        return self.compare({name: normalize(states) for name, states in self.states.items()})

    def _pass(self, block: Any, states: Tensor, name: str) -> Tensor:
        bias = self.biases.get(name)
        states, self.biases[name] = block(states, position_bias=bias)[:2]
        return states


def describe_input(layer: Wide) -> dict[str, Any]:
    """How many channels of a layer's input are outliers, and how much more they contribute."""
    rms = layer.input.pow(2).mean((0, 1)).sqrt()
    is_other = rms < OUTLIER * rms.median()
    others = functional.linear(layer.input[..., is_other], layer.weight[:, is_other])
    return {
        "outliers": int((~is_other).sum()),
        "largest over median": round(float(rms.max() / rms.median()), 1),
        "total over others": round(float(layer.output.norm() / others.norm()), 3),
    }


def measure_layer(layer: nn.Module, wide: Wide) -> float:
    """The relative error of a layer's output, on the input that the 16-bit model has."""
    if not isinstance(layer, QuantizedLinear):
        return 0.0
    return round(float((layer(wide.input) - wide.output).norm() / wide.output.norm()), 5)


@torch.inference_mode()
def measure(scenario: str, *, depth: int, tokens: int, seed: int) -> dict[str, Any]:
    """All errors of a scenario."""
    encoders = Encoders(scenario, depth=depth, tokens=tokens, seed=seed)
    blocks = []
    for index in range(depth):
        started_s = time.perf_counter()
        blocks.append(encoders.run_block(index))
        seconds = time.perf_counter() - started_s
        print(f"{scenario}, block {index}: {seconds:.0f} s", flush=True)
    return {"tokens": tokens, "seed": seed, "final": encoders.finish(), "blocks": blocks}


def tabulate(found: dict[str, Any]) -> list[str]:
    """For each variant the errors of the embedding, and the largest one of a layer."""
    lines = []
    for name, errors in found["final"].items():
        cells = [f"{name:20} embedding {errors['total']:.4f}, others {errors['others']:.4f}"]
        if name in VARIANTS:
            pairs = [
                (layer[name], layer[name] * layer["total over others"])
                for block in found["blocks"]
                for layer in block["layers"].values()
            ]
            total = max(pair[0] for pair in pairs)
            others = max(pair[1] for pair in pairs)
            cells += [f"worst layer {total:.4f}, over the others' contribution {others:.3f}"]
        lines.append("  ".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "t5_error", "scenarios": {}}
    for scenario in options.scenario or SCENARIOS:
        measured = measure(scenario, depth=options.depth, tokens=options.tokens, seed=options.seed)
        found["scenarios"][scenario] = measured
        print(scenario, *tabulate(measured), sep="\n", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
