"""Seconds to quantize bfloat16 weights to NF4 on the CPU: `quant.nf4` against bitsandbytes, in
pairs.

    python -m benchmarks.nf4_cpu [PAIRS]

Prints a table and one JSON line: median nanoseconds per weight, the median of bitsandbytes' time
over ours pair by pair, and the relative errors. Run it from the repository's root; it uses all
threads that torch does.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from quant import nf4

SHAPES = [(3072, 64), (3072, 3072), (12288, 3072)]
OURS = {"absmax": False, "searched": True}  # whether scales are searched for


def time_call(work: Callable[[], object]) -> float:
    """Wall seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def relative_error(weight: torch.Tensor, *, search: bool) -> float:
    """The norm of what is lost over that of the weight."""
    restored = nf4.dequantize(nf4.quantize(weight, search=search), weight.shape, torch.float32)
    return round(float((restored - weight.float()).norm() / weight.float().norm()), 5)


def measure(shape: tuple[int, int], pairs: int) -> dict:
    """Times and errors for one weight of normal numbers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    def stock() -> object:
        return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")

    ways = {
        "bitsandbytes": stock,
        "absmax": lambda: nf4.quantize(weight, search=False),
        "searched": lambda: nf4.quantize(weight, search=True),
    }
    for work in ways.values():
        work()  # the first call of each is slower
    rounds = [{name: time_call(work) for name, work in ways.items()} for _ in range(pairs)]
    result: dict = {"shape": list(shape)}
    for name in ways:
        median = statistics.median(taken[name] for taken in rounds)
        result[f"{name}_ns"] = round(median * 1e9 / weight.numel(), 2)
    for name, search in OURS.items():
        ratios = [taken["bitsandbytes"] / taken[name] for taken in rounds]
        result[f"{name}_speed"] = round(statistics.median(ratios), 2)
        result[f"{name}_error"] = relative_error(weight, search=search)
    return result


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    results = [measure(shape, pairs) for shape in SHAPES]
    print(f"{'ns per weight':<16}{'bitsandbytes':>14}{'absmax':>24}{'searched':>24}")
    for found in results:
        line = f"{'x'.join(map(str, found['shape'])):<16}{found['bitsandbytes_ns']:>14.1f}"
        for name in OURS:
            more = f"({found[f'{name}_speed']:.1f}x, {found[f'{name}_error']:.4f})"
            line += f"{found[f'{name}_ns']:.1f} {more}".rjust(24)
        print(line)
    print(json.dumps({"pairs": pairs, "threads": torch.get_num_threads(), "weights": results}))


if __name__ == "__main__":
    main()
