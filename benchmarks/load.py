"""Loading a transformer in nf4: a baked folder by our loader, against the stock way.

    python -m benchmarks.load BAKED_FOLDER MODEL_FOLDER

The stock way loads 16 bit and quantizes it. diffusers refuses bitsandbytes without a GPU, so that
is done by hand: `from_pretrained` in bfloat16, then bitsandbytes' own quantize_4bit over the same
layers. Each way is a process of its own, with the files out of the page cache; RssAnon and VmRSS
are the peaks. A way is ended when it passes --limit GiB of anonymous memory. One JSON line.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.processes import forget, to_gib, watch
from quant.checkpoint import inspect

OURS = """
import sys, torch
from pathlib import Path
from fluxcli.engine.streaming import load_component
from quant.checkpoint import inspect
from quant.spec import is_modulation
part = inspect(Path(sys.argv[1])).components["transformer"]
load_component(part, dtype=torch.bfloat16, device="cpu", skip=is_modulation)
"""
STOCK = """
import sys, torch
from diffusers import FluxTransformer2DModel
from bitsandbytes.functional import quantize_4bit
from quant.spec import QuantSpec
options = {"subfolder": "transformer", "torch_dtype": torch.bfloat16}
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], **options)
quantized = {}
for name, parameter in model.named_parameters():
    if QuantSpec("nf4").choose_scheme("transformer", name, tuple(parameter.shape)):
        quantized[name] = quantize_4bit(
            parameter.data, compress_statistics=True, quant_type="nf4"
        )
        parameter.requires_grad_(False).data = parameter.data[:0]
"""


def run(code: str, folder: Path, *, limit_bytes: int) -> dict:
    """Seconds and peaks of one way, from the start of its process to its end."""
    forget(inspect(folder).components["transformer"].files)
    ended = "done"

    def kill_beyond_limit(sample: dict[str, int]) -> None:
        nonlocal ended
        if sample.get("RssAnon", 0) > limit_bytes:
            process.kill()
            ended = "killed at the limit"

    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    peaks = watch(process, kill_beyond_limit)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "ended": ended} | to_gib(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("baked", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=float, default=19.0, help="GiB")
    options = parser.parse_args()
    limit_bytes = int(options.limit * 2**30)
    results = {"baked": run(OURS, options.baked, limit_bytes=limit_bytes)}
    print(results, flush=True)
    stock = "from_pretrained + quantize"
    results[stock] = run(STOCK, options.model, limit_bytes=limit_bytes)
    print(results[stock])
    print(json.dumps({"benchmark": "load", "results": results}))


if __name__ == "__main__":
    main()
