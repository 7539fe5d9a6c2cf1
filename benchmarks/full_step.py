"""A denoising step of the full-size model on this CPU from a baked folder: seconds, and the memory of the process.

    python -m benchmarks.full_step BAKED_FOLDER [--size 256] [--steps 2] [--text-tokens 64]

Runs `flux generate` as a process of its own and reads its events; RssAnon is the peak of anonymous memory, sampled.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.bake import peaks


def watch(run: subprocess.Popen, phase: list[str], most: dict[str, dict[str, float]]) -> None:
    """Sample the process's memory, GiB by phase, until it ends."""
    while run.poll() is None:
        for name, value in peaks(run.pid).items():
            at = most.setdefault(phase[0], {})
            at[name] = max(at.get(name, 0.0), round(value / 2**30, 2))
        time.sleep(0.05)


def main() -> None:
    """Reads the command line, runs, prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "fluxcli", "generate", "a fox", "-m", str(given.folder), "--size", str(given.size),
            "--steps", str(given.steps), "--text-tokens", str(given.text_tokens), "--seed", "1", "--events", "-q",
            "-o", f"{folder}/fox.png",
        ]  # fmt: skip
        started, phase = time.perf_counter(), ["start"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        most: dict[str, dict[str, float]] = {}
        watcher = threading.Thread(target=watch, args=(run, phase, most))
        watcher.start()
        steps, done = [], {}
        for line in run.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                steps.append(time.perf_counter())
            elif event["event"] == "phase":
                phase[0] = f"{event['name']} {event['detail']}".strip()
            elif event["event"] in ("done", "failed"):
                done = event
        watcher.join()
    between = [round(b - a, 2) for a, b in pairwise(steps)]
    print(json.dumps({
        "size": given.size, "steps": given.steps, "step_s": between, "total_s": round(time.perf_counter() - started, 1),
        "GiB": most, "timings_s": done.get("timings_s"), "error": done.get("message"),
        "plan": {key: done.get("plan", {}).get(key) for key in ("precision", "dtypes", "peak_bytes", "multiply")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
