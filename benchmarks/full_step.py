"""A denoising step of the full-size model on this CPU from a baked folder: seconds, and memory.

    python -m benchmarks.full_step BAKED_FOLDER [--size 256] [--steps 2] [--text-tokens 64]

Runs `flux generate` as a process of its own and reads its events; RssAnon is the peak of anonymous
memory, sampled, by phase.
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

from benchmarks.processes import to_gib, watch


class Follower:
    """Reads the events of a run and keeps the peaks of its memory by phase."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self._phase = "start"
        self.peaks: dict[str, dict[str, int]] = {}  # bytes by phase and kind
        self.step_ends: list[float] = []
        self.end: dict = {}  # the event of the end

    def follow(self) -> None:
        """Read until the run ends."""
        watcher = threading.Thread(target=watch, args=(self._process, self._keep))
        watcher.start()
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                self.step_ends.append(time.perf_counter())
            elif event["event"] == "phase":
                self._phase = f"{event['name']} {event['detail']}".strip()
            elif event["event"] in ("done", "failed"):
                self.end = event
        watcher.join()

    def _keep(self, sample: dict[str, int]) -> None:
        peaks = self.peaks.setdefault(self._phase, {})
        for name, value in sample.items():
            peaks[name] = max(peaks.get(name, 0), value)


def main() -> None:
    """Read the command line, run, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=64)
    given = parser.parse_args()
    command = [sys.executable, "-m", "fluxcli", "generate", "a fox", "-m", str(given.folder)]
    command += ["--size", str(given.size), "--steps", str(given.steps), "--seed", "1"]
    command += ["--text-tokens", str(given.text_tokens), "--events", "-q"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command += ["-o", f"{folder}/fox.png"]
        follower = Follower(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        follower.follow()
    end = follower.end
    plan = end.get("plan", {})
    result = {
        "size": given.size,
        "steps": given.steps,
        "step_s": [round(after - before, 2) for before, after in pairwise(follower.step_ends)],
        "total_s": round(time.perf_counter() - started, 1),
        "GiB": {phase: to_gib(peaks) for phase, peaks in follower.peaks.items()},
        "timings_s": end.get("timings_s"),
        "error": end.get("message"),
        "plan": {key: plan.get(key) for key in ("precision", "dtypes", "peak_bytes", "multiply")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
