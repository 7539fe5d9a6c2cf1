"""Whole-process time of `flux generate -p tiny` against the shortest plain diffusers script, in
pairs.

    python -m benchmarks.against_diffusers [PAIRS]

Prints a table and one JSON line: medians, the median of the ratios pair by pair, and where flux's
time goes. Run it from the repository's root with the interpreter of the environment to measure.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import time_command

PROMPT = "a red circle on a blue background"
FLUX = [sys.executable, "-m", "fluxcli", "generate", PROMPT]
FLUX += ["-p", "tiny", "--seed", "1", "--force", "-q"]
HELP = [sys.executable, "-m", "fluxcli", "--help"]


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ours, theirs, ratios = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        plain = [sys.executable, "benchmarks/plain_diffusers.py", str(Path(folder) / "plain.png")]
        flux = [*FLUX, "-o", str(Path(folder) / "flux.png")]
        for command in (plain, flux):  # warm the disk cache
            time_command(command)
        for _ in range(pairs):
            flux_s, _ = time_command(flux)
            plain_s, _ = time_command(plain)
            ours.append(flux_s)
            theirs.append(plain_s)
            ratios.append(flux_s / plain_s)
        _, answer = time_command([*flux, "--json"])
        helps = [time_command(HELP)[0] for _ in range(2 * pairs)]
    result = {
        "flux_s": round(statistics.median(ours), 3),
        "diffusers_s": round(statistics.median(theirs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "pairs": pairs,
        "help_s": round(statistics.median(helps), 3),
        "phases_s": json.loads(answer)["timings_s"],
    }
    print(f"{'flux generate -p tiny':<32}{result['flux_s']:>8.2f} s")
    print(f"{'plain diffusers':<32}{result['diffusers_s']:>8.2f} s")
    print(f"{'ratio, median of pairs':<32}{result['ratio']:>8.2f}")
    print(f"{'flux --help':<32}{result['help_s']:>8.2f} s")
    for phase, taken in result["phases_s"].items():
        print(f"  {phase:<30}{taken:>8.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
