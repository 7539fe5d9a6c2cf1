"""Loading a transformer in nf4: a baked folder by our loader, against the stock way of loading 16 bit and packing it.

    python -m benchmarks.load BAKED_FOLDER MODEL_FOLDER

diffusers refuses bitsandbytes without a GPU, so its way is done by hand: `from_pretrained` in bfloat16, then
bitsandbytes' own quantize_4bit over the same layers. Each way is a process of its own, with the files out of the page
cache; RssAnon and VmRSS are the peaks. A way is ended when it passes --limit GiB of anonymous memory. One JSON line.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bake import forget, peaks
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
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], subfolder="transformer", torch_dtype=torch.bfloat16)
packed = {}
for name, parameter in model.named_parameters():
    if QuantSpec("nf4").scheme("transformer", name, tuple(parameter.shape)):
        packed[name] = quantize_4bit(parameter.data, compress_statistics=True, quant_type="nf4")
        parameter.requires_grad_(False).data = parameter.data[:0]
"""


def run(code: str, folder: Path, limit: int) -> dict:
    """Seconds and peaks of one way, from the start of its process to its end."""
    forget(inspect(folder).components["transformer"].files)
    started, most = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
    process, ended = subprocess.Popen([sys.executable, "-c", code, str(folder)]), "done"
    while process.poll() is None:
        for name, value in peaks(process.pid).items():
            most[name] = max(most[name], value)
        if most["RssAnon"] > limit:
            process.kill()
            ended = "killed at the limit"
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "ended": ended} | {k: round(v / 2**30, 2) for k, v in most.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("baked", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=float, default=19.0)
    options = parser.parse_args()
    limit = int(options.limit * 2**30)
    results = {"baked": run(OURS, options.baked, limit)}
    print(results, flush=True)
    results["from_pretrained + quantize"] = run(STOCK, options.model, limit)
    print(results["from_pretrained + quantize"])
    print(json.dumps({"benchmark": "load", "results": results}))


if __name__ == "__main__":
    main()
