"""Quantizing a model folder: seconds, GB/s and memory of `flux quantize`, against bitsandbytes' loop and plain copying.

    python -m benchmarks.bake MODEL_FOLDER SCRATCH_FOLDER [--only copy;fp8;...]

Only the transformer is quantized (--text-encoder keep). Source pages leave the page cache before every run. RssAnon
and VmRSS are the peaks of the quantizing process, read from /proc 20 times a second. Prints a table and a JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from quant.checkpoint import inspect
from quant.codecs import Reader
from quant.spec import QuantSpec

CHUNK = 16 << 20
BAKES = {"fp8": ["--to", "fp8"], "int8": ["--to", "int8"], "nf4 absmax": ["--to", "nf4", "--scales", "absmax"]}
BAKES |= {"nf4 search": ["--to", "nf4"], "nf4 search, not verified": ["--to", "nf4", "--no-verify"]}
BAKES |= {"fp8, not verified": ["--to", "fp8", "--no-verify"]}


def forget(files: list[Path]) -> None:
    """Take the files out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(files: list[Path], count: int, target: Path) -> dict:
    """Seconds of reading every file and writing `count` bytes, one after the other in one loop, and fsync."""
    forget(files)
    started, left = time.perf_counter(), count
    share = count / sum(path.stat().st_size for path in files)
    with target.open("wb", buffering=0) as out:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    left -= out.write(chunk[: int(len(chunk) * share)])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return {"seconds": round(seconds, 1)}


def peaks(pid: int) -> dict[str, int]:
    """Bytes of anonymous and of all resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS") if name in lines}


def bake(folder: Path, target: Path, arguments: list[str], files: list[Path]) -> dict:
    """One `flux quantize` process."""
    forget(files)
    command = [sys.executable, "-m", "fluxcli", "quantize", str(folder), str(target), "--text-encoder", "keep"]
    started, most = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
    process = subprocess.Popen([*command, *arguments, "--json", "-q"], stdout=subprocess.PIPE)
    while process.poll() is None:
        for name, value in peaks(process.pid).items():
            most[name] = max(most[name], value)
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    result = json.loads(process.stdout.read())
    shutil.rmtree(target)
    gib = {name: round(value / 2**30, 2) for name, value in most.items()}
    return {"seconds": round(seconds, 1), "bytes": result["total_bytes"], **gib}


def bitsandbytes(folder: Path, files: list[Path]) -> dict:
    """Seconds of bitsandbytes' quantize_4bit over the tensors that we pack, reading them included."""
    from bitsandbytes.functional import quantize_4bit

    forget(files)
    part, spec = inspect(folder).components["transformer"], QuantSpec("nf4")
    started = time.perf_counter()
    reader = Reader()
    for weight in part.weights.values():
        if spec.scheme("transformer", weight.name, weight.shape):
            quantize_4bit(reader.read(weight)[""], compress_statistics=True, quant_type="nf4")
    return {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", default=";".join(["copy", "fp8", "int8", "nf4 absmax", "nf4 search", "bitsandbytes"]))
    options = parser.parse_args()
    part = inspect(options.folder).components["transformer"]
    results = {}
    for name in options.only.split(";"):
        print(f"{name:16} ...", file=sys.stderr, flush=True)
        if name == "copy":
            packed = sum(
                w.nbytes // 2 for w in part.weights.values() if QuantSpec("fp8").scheme("transformer", w.name, w.shape)
            )
            results[name] = copy(part.files, part.nbytes - packed, options.scratch / "copy")
        elif name == "bitsandbytes":
            results[name] = bitsandbytes(options.folder, part.files)
        else:
            results[name] = bake(options.folder, options.scratch / "baked", BAKES[name], part.files)
        results[name]["GB/s"] = round(part.nbytes / 1e9 / results[name]["seconds"], 3)
        print(f"{name:16} {results[name]}", flush=True)
    print(json.dumps({"benchmark": "bake", "source_bytes": part.nbytes, "cores": os.cpu_count(), "results": results}))


if __name__ == "__main__":
    main()
