"""What quantization formats cost in error and in time, on weights and activations of known kinds.

    python -m benchmarks.formats [--seed 1] [--rows 1024] [--repeats 5] [--out FILE]

Three tables, and one JSON line: the relative error of a weight (rows, 3072), that of a layer's
output with its activations quantized as the format's layers do it, and GB/s of 16-bit weights that
quantizing takes in one thread and in two. "kitchen" is comfy-kitchen's eager quantizer. What is
timed takes turns, and a ratio is the median of those of neighbours, so that other work on the
machine hurts it little; the GB/s are the best of all turns.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from comfy_kitchen.backends.eager import quantization as kitchen_int8
from comfy_kitchen.backends.eager import w4a8_int8 as kitchen_groups
from torch import Tensor

from quant import codecs, nf4, rotated
from quant.spec import (
    CHANNEL_SCALE,
    GROUP_SCALE,
    LEVELS,
    ROTATED,
    ROW_SCALE,
    SCHEMES,
    find_rotation,
)
from quant.tensor_info import TensorInfo
from quant.weights import Piece
from tests.support.weights import (
    ACTIVATIONS,
    WEIGHTS,
    make_activation,
    make_weight,
    relative_error,
)

COLUMNS = 3072
TIMED_ROWS = 512
WHERE = Piece(Path("none"), TensorInfo("a.weight", "F32", (1, 1)))
GGUF_TYPES = ("Q4_0", "Q5_0", "Q8_0")


def round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (N, K) and a scale (N, 1) for each row, without rotation."""
    scale = values.abs().amax(1, keepdim=True) / 127
    return (values / scale).round().clamp(-127, 127).char(), scale


def round_rows_to_fp8(values: Tensor) -> Tensor:
    scale = values.abs().amax(1, keepdim=True) / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def quantize_by_kitchen(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    rotation = find_rotation(weight.shape[1])
    if scheme == "int8":
        codes, scale = kitchen_int8.quantize_int8_convrot_weight(weight, rotation)
        return {"": codes, ROW_SCALE: scale}
    codes, group, channel, _, levels = kitchen_groups.quantize_w4a8_int8_weight(
        weight, bits=SCHEMES[scheme].bits, convrot_groupsize=rotation
    )
    stored = {"": codes, GROUP_SCALE: group, CHANNEL_SCALE: channel}
    return stored if levels is None else stored | {LEVELS: levels}


def store(weight: Tensor, scheme: str, *, by_kitchen: bool) -> dict[str, Tensor]:
    if by_kitchen:
        return quantize_by_kitchen(weight, scheme)
    return rotated.quantize(weight, scheme)


def decode(weight: Tensor, form: str) -> Tensor:
    """The float32 values that a weight becomes in a form, by its name in the table."""
    scheme, _, maker = form.partition(" ")
    if scheme == "nf4":
        stored = nf4.quantize(weight, search=maker == "searched")
        return nf4.dequantize(stored, tuple(weight.shape), torch.float32)
    if scheme in GGUF_TYPES:
        kind = gguf.GGMLQuantizationType[scheme]
        packed = gguf.quants.quantize(weight.numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind))
    if scheme == "fp8":
        stored = codecs.quantize(weight, "fp8", name="a.weight", where=WHERE).stored
        return codecs.dequantize(stored, "fp8", tuple(weight.shape), torch.float32)
    if maker == "not rotated":
        codes, scale = round_rows(weight)
        return codes.float() * scale
    stored = store(weight, scheme, by_kitchen=maker == "kitchen")
    rotation = find_rotation(weight.shape[1])
    return rotated.dequantize(stored, scheme, rotation=rotation, dtype=torch.float32)


def multiply_int8(activation: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """An activation, in int8 row by row, times levels (N, K) with the scales (N) of their rows."""
    codes, row_scale = round_rows(activation)
    return torch._int_mm(codes, levels.t()).float() * row_scale * scale.view(1, -1)


def multiply(activation: Tensor, weight: Tensor, form: str) -> Tensor:
    """The output of a layer in a form, by its name in the table."""
    scheme, _, maker = form.partition(" ")
    if maker == "not rotated":
        return multiply_int8(activation, *round_rows(weight))
    if scheme in ROTATED:
        stored = store(weight, scheme, by_kitchen=maker == "kitchen")
        turned = rotated.rotate(activation, find_rotation(weight.shape[1]))
        scale = stored[ROW_SCALE if scheme == "int8" else CHANNEL_SCALE]
        return multiply_int8(turned, rotated.decode_levels(stored, scheme), scale)
    if maker == "row, A fp8":
        return round_rows_to_fp8(activation) @ decode(weight, "fp8 row").t()
    return activation @ decode(weight, form.removesuffix(", A 16 bit")).t()


PAIRS = tuple(f"{scheme} {maker}" for scheme in ROTATED for maker in ("ours", "kitchen"))
WEIGHT_FORMS = ("nf4 absmax", "nf4 searched", *GGUF_TYPES, "fp8 row", "int8 not rotated", *PAIRS)
OUTPUT_FORMS = ("nf4 searched, A 16 bit", "fp8 row, A 16 bit", "fp8 row, A fp8")
OUTPUT_FORMS += ("int8 not rotated", *PAIRS)


def measure_weights(seed: int, rows: int) -> dict[str, dict[str, float]]:
    """Relative errors by form and kind of weight."""
    errors: dict[str, dict[str, float]] = {form: {} for form in WEIGHT_FORMS}
    for kind in WEIGHTS:
        weight = make_weight(kind, rows, COLUMNS, seed=seed)
        for form in WEIGHT_FORMS:
            errors[form][kind] = round(relative_error(decode(weight, form), weight), 5)
    return errors


def measure_outputs(seed: int, rows: int) -> dict[str, dict[str, float]]:
    """Relative errors of a layer's output by form and kind of activation."""
    errors: dict[str, dict[str, float]] = {form: {} for form in OUTPUT_FORMS}
    weight = make_weight("student-t6", rows, COLUMNS, seed=seed)
    for kind in ACTIVATIONS:
        activation = make_activation(kind, rows, COLUMNS, seed=seed + 1)
        right = activation @ weight.t()
        for form in OUTPUT_FORMS:
            found = multiply(activation, weight, form)
            errors[form][kind] = round(relative_error(found, right), 5)
    return errors


def measure_speed(seed: int, *, threads: int, repeats: int) -> dict[str, object]:
    """GB/s of quantizing by form, and the ratios that matter."""
    weight = make_weight("gauss", TIMED_ROWS, COLUMNS, seed=seed).bfloat16()

    def quantize(scheme: str) -> None:
        codecs.quantize(weight, scheme, name="a.weight", where=WHERE)

    ways: dict[str, Callable[[], object]] = {
        scheme: lambda scheme=scheme: quantize(scheme) for scheme in ("fp8", *ROTATED)
    }
    ways |= {
        f"{scheme} kitchen": lambda scheme=scheme: quantize_by_kitchen(weight, scheme)
        for scheme in ROTATED
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for turn in range(repeats + 1):  # the first is not counted
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                if turn:
                    taken_s[name].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)

    def compare(name: str, other: str) -> float:
        pairs = zip(taken_s[name], taken_s[other], strict=True)
        return round(statistics.median(theirs / ours for ours, theirs in pairs), 2)

    return {
        "GB/s": {name: round(weight.nbytes / 1e9 / min(s), 3) for name, s in taken_s.items()},
        "int8 to fp8": compare("int8", "fp8"),
        "w6a8 to kitchen's": compare("w6a8", "w6a8 kitchen"),
        "w4a8 to kitchen's": compare("w4a8", "w4a8 kitchen"),
    }


def print_table(title: str, errors: dict[str, dict[str, float]], kinds: tuple[str, ...]) -> None:
    print(f"\n{title:24}" + "".join(f"{kind:>17}" for kind in kinds))
    for form, row in errors.items():
        print(f"{form:24}" + "".join(f"{row[kind]:17.5f}" for kind in kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    weights = measure_weights(options.seed, options.rows)
    print_table("weight error", weights, WEIGHTS)
    outputs = measure_outputs(options.seed, options.rows // 2)
    print_table("output error", outputs, ACTIVATIONS)
    speeds = {}
    for threads in (1, 2):
        found = measure_speed(options.seed, threads=threads, repeats=options.repeats)
        speeds[f"{threads} threads"] = found
        print(f"\nthreads {threads}: {found}")
    result = {
        "benchmark": "formats",
        "seed": options.seed,
        "rows": options.rows,
        "cores": os.cpu_count(),
        "weight_errors": weights,
        "output_errors": outputs,
        "speeds": speeds,
    }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
