"""Shell loops: calls of `flux generate -p tiny` cold and warm, `--from` with many prompts, and plain diffusers.

    python benchmarks/loops.py [CALLS] [PROMPTS]

Prints a table and one JSON line. A warm call's seconds beyond compute are its own minus those of its phases in the
worker. Each cold call has a prompt of its own, so that no embedding cache helps it. Run it from the repository's root
with the interpreter of the environment to measure; a worker that is up is stopped, and another started.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COLORS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("", " at the top", " at the bottom", " at the left")
FLUX = [sys.executable, "-m", "fluxcli"]
PLAIN_LOOP = """
import sys, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained("presets/tiny", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
for k, prompt in enumerate(open(sys.argv[1]).read().splitlines()):
    generator = torch.Generator("cpu").manual_seed(1)
    options = {"width": 128, "height": 128, "num_inference_steps": 10, "guidance_scale": 3.5}
    image = pipe(prompt, max_sequence_length=24, generator=generator, **options).images[0]
    image.save(f"{sys.argv[2]}/{k}.png")
"""


def prompts(count: int) -> list[str]:
    """Different sentences that the bundled model knows."""
    every = [
        f"a {size}{color} {shape}{place} on a {back} background"
        for back in COLORS for size in ("", "small ", "large ") for place in PLACES for shape in SHAPES
        for color in COLORS if color != back
    ]  # fmt: skip
    return every[:: max(1, len(every) // count)][:count]


def seconds(command: list[str]) -> tuple[float, str]:
    """(wall seconds, stdout) of one process that must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, run.stdout


def call(prompt: str, folder: str, *more: str) -> tuple[float, dict]:
    """(wall seconds, the JSON of the run) of one call."""
    taken, out = seconds([*FLUX, "generate", prompt, "-p", "tiny", "--seed", "1", "-o", f"{folder}/", "--json", *more])
    return taken, json.loads(out)


def main() -> None:
    calls, many = (int(sys.argv[k]) if len(sys.argv) > k else default for k, default in ((1, 20), (2, 100)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # no cache of before, and a worker of its own
        listed = Path(folder) / "prompts.txt"
        listed.write_text("\n".join(prompts(many)))
        plain = [sys.executable, "benchmarks/plain_diffusers.py", f"{folder}/plain.png"]
        seconds(plain), call("a red circle", folder)  # warm the disk cache
        diffusers = [seconds(plain)[0] for _ in range(calls)]
        cold = [call(prompt, folder, "--no-worker", "--no-cache")[0] for prompt in prompts(calls)]
        again = [call("a red circle", folder, "--no-worker", "--force")[0] for _ in range(calls)]
        seconds([*FLUX, "worker", "start"])
        call("a red circle", folder)
        warm = [call(prompt, folder) for prompt in prompts(calls)]
        loads = json.loads(seconds([*FLUX, "worker", "status", "--json"])[1])["loads"]
        seconds([*FLUX, "worker", "stop"])
        beyond = [
            taken - sum(done["timings_s"].get(phase, 0.0) for phase in ("encode", "condition", "denoise", "decode"))
            for taken, done in warm
        ]  # fmt: skip
        pairs = []
        for k in range(3):
            (Path(folder) / f"loop{k}").mkdir()
            loop = [sys.executable, "-c", PLAIN_LOOP, str(listed), f"{folder}/loop{k}"]
            rows = ["generate", "--from", str(listed), "-p", "tiny", "--seed", "1", "-o", f"{folder}/rows{k}/", "-q"]
            pairs.append((seconds([*FLUX, *rows, "--no-worker", "--no-cache"])[0], seconds(loop)[0]))
    middle = statistics.median
    result = {
        "calls": calls, "cold_s": round(middle(cold), 3), "cached_prompt_s": round(middle(again), 3),
        "warm_s": round(middle(taken for taken, _ in warm), 3), "warm_beyond_compute_s": round(middle(beyond), 3),
        "diffusers_s": round(middle(diffusers), 3), "total_warm_s": round(sum(taken for taken, _ in warm), 2),
        "total_diffusers_s": round(sum(diffusers), 2), "loads": loads, "prompts": many,
        "from_s": round(middle(ours for ours, _ in pairs), 2),
        "loop_s": round(middle(theirs for _, theirs in pairs), 2),
        "from_to_loop": round(middle(ours / theirs for ours, theirs in pairs), 3),
    }  # fmt: skip
    result["diffusers_to_warm"] = round(result["total_diffusers_s"] / result["total_warm_s"], 2)
    for name, value in result.items():
        print(f"{name:<24}{value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
