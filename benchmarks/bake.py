"""Quantizing a model folder: seconds, GB/s and memory of `flux quantize`, against two other ways.

    python -m benchmarks.bake MODEL_FOLDER SCRATCH_FOLDER [--only copy;fp8;...]

The others are bitsandbytes' loop and plain copying. Only the transformer is quantized
(--text-encoder keep). Source pages leave the page cache before every run. RssAnon and VmRSS are the
peaks of the quantizing process, read from /proc 20 times a second. Prints a table and a JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import forget, to_gib, watch
from quant.checkpoint import Component, inspect
from quant.codecs import Reader
from quant.spec import QuantSpec

CHUNK_BYTES = 16 << 20
BAKES = {
    "fp8": ["--to", "fp8"],
    "fp8, not verified": ["--to", "fp8", "--no-verify"],
    "int8": ["--to", "int8"],
    "w6a8": ["--to", "w6a8"],
    "w4a8": ["--to", "w4a8"],
    "nf4 absmax": ["--to", "nf4", "--scales", "absmax"],
    "nf4 search": ["--to", "nf4"],
    "nf4 search, not verified": ["--to", "nf4", "--no-verify"],
}
USUAL = ("copy", "fp8", "int8", "nf4 absmax", "nf4 search", "bitsandbytes")


def time_copy(part: Component, target: Path) -> dict:
    """Seconds of reading every file and writing as many bytes as fp8 takes, in one loop."""
    spec = QuantSpec("fp8")
    saved_bytes = 0
    for weight in part.weights.values():
        if spec.choose_scheme("transformer", weight.name, weight.shape):
            saved_bytes += weight.nbytes // 2
    share = (part.nbytes - saved_bytes) / sum(path.stat().st_size for path in part.files)
    forget(part.files)
    started = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in part.files:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    out.write(chunk[: int(len(chunk) * share)])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return {"seconds": seconds}


def time_bake(folder: Path, target: Path, *, options: Sequence[str], files: Sequence[Path]) -> dict:
    """Seconds, bytes and peaks of one `flux quantize` process."""
    forget(files)
    command = [sys.executable, "-m", "fluxcli", "quantize", str(folder), str(target)]
    command += ["--text-encoder", "keep", *options, "--json", "-q"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peaks = watch(process)
    seconds = time.perf_counter() - started
    result = json.loads(process.communicate()[0])
    shutil.rmtree(target)
    return {"seconds": seconds, "bytes": result["total_bytes"], **to_gib(peaks)}


def time_bitsandbytes(part: Component) -> dict:
    """Seconds of bitsandbytes' quantize_4bit over the weights that flux quantizes, and reading."""
    from bitsandbytes.functional import quantize_4bit

    forget(part.files)
    spec = QuantSpec("nf4")
    started = time.perf_counter()
    reader = Reader()
    for weight in part.weights.values():
        if spec.choose_scheme("transformer", weight.name, weight.shape):
            quantize_4bit(reader.read(weight)[""], compress_statistics=True, quant_type="nf4")
    return {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", default=";".join(USUAL))
    options = parser.parse_args()
    part = inspect(options.folder).components["transformer"]
    results = {}
    for name in options.only.split(";"):
        print(f"{name:16} ...", file=sys.stderr, flush=True)
        if name == "copy":
            found = time_copy(part, options.scratch / "copy")
        elif name == "bitsandbytes":
            found = time_bitsandbytes(part)
        else:
            target = options.scratch / "baked"
            found = time_bake(options.folder, target, options=BAKES[name], files=part.files)
        found["GB/s"] = round(part.nbytes / 1e9 / found["seconds"], 3)
        found["seconds"] = round(found["seconds"], 1)
        results[name] = found
        print(f"{name:16} {found}", flush=True)
    summary = {"benchmark": "bake", "source_bytes": part.nbytes, "cores": os.cpu_count()}
    print(json.dumps(summary | {"results": results}))


if __name__ == "__main__":
    main()
