"""Seconds to encode bfloat16 weights as NF4 on the CPU: `quant.nf4` against bitsandbytes, in pairs.

    python -m benchmarks.nf4_cpu [PAIRS]

Prints a table and one JSON line: median nanoseconds per weight, the median of bitsandbytes' time over ours pair by
pair, and the relative errors. Run it from the repository's root; it uses all threads that torch does.
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


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def relative_error(weight: torch.Tensor, *, search: bool) -> float:
    decoded = nf4.dequantize(nf4.quantize(weight, search=search), weight.shape, torch.float32)
    return round(float((decoded - weight.float()).norm() / weight.float().norm()), 5)


def measured(shape: tuple[int, int], pairs: int) -> dict:
    """Times and errors for one normal weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ways = {
        "bitsandbytes": lambda: bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"),
        "absmax": lambda: nf4.quantize(weight, search=False),
        "searched": lambda: nf4.quantize(weight, search=True),
    }
    for work in ways.values():
        work()
    rounds = [{name: seconds(work) for name, work in ways.items()} for _ in range(pairs)]
    result: dict = {"shape": list(shape)}
    result |= {f"{n}_ns": round(statistics.median(r[n] for r in rounds) * 1e9 / weight.numel(), 2) for n in ways}
    for name, search in (("absmax", False), ("searched", True)):
        result[f"{name}_speed"] = round(statistics.median(r["bitsandbytes"] / r[name] for r in rounds), 2)
        result[f"{name}_error"] = relative_error(weight, search=search)
    return result


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    results = [measured(shape, pairs) for shape in SHAPES]
    print(f"{'ns per weight':<16}{'bitsandbytes':>14}{'absmax':>24}{'searched':>24}")
    for r in results:
        cells = [f"{r[f'{n}_ns']:.1f} ({r[f'{n}_speed']:.1f}x, {r[f'{n}_error']:.4f})" for n in ("absmax", "searched")]
        print(f"{'x'.join(map(str, r['shape'])):<16}{r['bitsandbytes_ns']:>14.1f}{cells[0]:>24}{cells[1]:>24}")
    print(json.dumps({"pairs": pairs, "threads": torch.get_num_threads(), "weights": results}))


if __name__ == "__main__":
    main()
