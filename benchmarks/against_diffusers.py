"""Whole-process time of `flux generate -p tiny` against the shortest plain diffusers script, in pairs.

    python benchmarks/against_diffusers.py [PAIRS]

Prints a table and one JSON line: medians, the median of the ratios pair by pair, and where flux's time goes. Run it
from the repository's root with the interpreter of the environment to measure.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "a red circle on a blue background"
FLUX = [sys.executable, "-m", "fluxcli", "generate", PROMPT, "-p", "tiny", "--seed", "1", "--force", "-q"]
HELP = [sys.executable, "-m", "fluxcli", "--help"]


def seconds(command: list[str]) -> tuple[float, str]:
    """(wall seconds, stdout) of one process that must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, run.stdout


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        plain = [sys.executable, "benchmarks/plain_diffusers.py", str(Path(folder) / "plain.png")]
        flux = [*FLUX, "-o", str(Path(folder) / "flux.png")]
        seconds(plain), seconds(flux)  # warm the disk cache
        measured = [(seconds(flux)[0], seconds(plain)[0]) for _ in range(pairs)]
        phases = json.loads(seconds([*flux, "--json"])[1])["timings_s"]
        helps = [seconds(HELP)[0] for _ in range(2 * pairs)]
    result = {
        "flux_s": round(statistics.median(pair[0] for pair in measured), 3),
        "diffusers_s": round(statistics.median(pair[1] for pair in measured), 3),
        "ratio": round(statistics.median(pair[0] / pair[1] for pair in measured), 3),
        "pairs": pairs,
        "help_s": round(statistics.median(helps), 3),
        "phases_s": phases,
    }
    print(f"{'flux generate -p tiny':<32}{result['flux_s']:>8.2f} s")
    print(f"{'plain diffusers':<32}{result['diffusers_s']:>8.2f} s")
    print(f"{'ratio, median of pairs':<32}{result['ratio']:>8.2f}")
    print(f"{'flux --help':<32}{result['help_s']:>8.2f} s")
    for phase, taken in phases.items():
        print(f"  {phase:<30}{taken:>8.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
