"""Shell loops: calls of `flux generate -p tiny` cold and warm, `--from` with many prompts, plain
diffusers.

    python -m benchmarks.loops [CALLS] [PROMPTS]

Prints a table and one JSON line. A warm call's seconds beyond compute are its own minus those of
its phases in the worker. Each cold call has a prompt of its own, so that no kept embeddings help
it. Run it from the repository's root with the interpreter of the environment to measure; it has a
cache folder and a worker of its own.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import time_command

COLORS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("", " at the top", " at the bottom", " at the left")
SIZES = ("", "small ", "large ")
PHASES = ("encode", "condition", "denoise", "decode")
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


def list_prompts(count: int) -> list[str]:
    """Different sentences that the bundled model knows."""
    every = []
    for back, size, place, shape, color in itertools.product(COLORS, SIZES, PLACES, SHAPES, COLORS):
        if color != back:
            every.append(f"a {size}{color} {shape}{place} on a {back} background")
    return every[:: max(1, len(every) // count)][:count]


def call(prompt: str, folder: str, *more: str) -> tuple[float, dict]:
    """(wall seconds, the JSON of the run) of one call."""
    command = [*FLUX, "generate", prompt, "-p", "tiny", "--seed", "1", "-o", f"{folder}/", "--json"]
    taken_s, out = time_command([*command, *more])
    return taken_s, json.loads(out)


def time_warm_calls(calls: int, folder: str) -> tuple[list[float], list[float], dict]:
    """(wall seconds, seconds beyond compute) of calls to a worker, and what it has loaded."""
    time_command([*FLUX, "worker", "start"])
    call("a red circle", folder)  # loads the model
    walls_s, beyond_s = [], []
    for prompt in list_prompts(calls):
        wall_s, done = call(prompt, folder)
        walls_s.append(wall_s)
        beyond_s.append(wall_s - sum(done["timings_s"].get(phase, 0.0) for phase in PHASES))
    _, status = time_command([*FLUX, "worker", "status", "--json"])
    time_command([*FLUX, "worker", "stop"])
    return walls_s, beyond_s, json.loads(status)["loads"]


def time_many_prompts(listed: Path, folder: str) -> tuple[float, float]:
    """(seconds of one `flux generate --from`, seconds of a loop of plain diffusers) over a list."""
    Path(folder).mkdir()
    rows = ["generate", "--from", str(listed), "-p", "tiny", "--seed", "1", "-o", f"{folder}/rows/"]
    ours_s, _ = time_command([*FLUX, *rows, "-q", "--no-worker", "--no-cache"])
    theirs_s, _ = time_command([sys.executable, "-c", PLAIN_LOOP, str(listed), folder])
    return ours_s, theirs_s


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    many = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # no cache of before, and a worker of its own
        listed = Path(folder) / "prompts.txt"
        listed.write_text("\n".join(list_prompts(many)))
        plain = [sys.executable, "benchmarks/plain_diffusers.py", f"{folder}/plain.png"]
        time_command(plain)  # warm the disk cache
        call("a red circle", folder)
        diffusers, cold, again = [], [], []
        for _ in range(calls):
            diffusers.append(time_command(plain)[0])
        for prompt in list_prompts(calls):
            cold.append(call(prompt, folder, "--no-worker", "--no-cache")[0])
        for _ in range(calls):
            again.append(call("a red circle", folder, "--no-worker", "--force")[0])
        warm, beyond, loads = time_warm_calls(calls, folder)
        pairs = [time_many_prompts(listed, f"{folder}/many{k}") for k in range(3)]
    middle = statistics.median
    result = {
        "calls": calls,
        "cold_s": round(middle(cold), 3),
        "cached_prompt_s": round(middle(again), 3),
        "warm_s": round(middle(warm), 3),
        "warm_beyond_compute_s": round(middle(beyond), 3),
        "diffusers_s": round(middle(diffusers), 3),
        "total_warm_s": round(sum(warm), 2),
        "total_diffusers_s": round(sum(diffusers), 2),
        "loads": loads,
        "prompts": many,
        "from_s": round(middle(ours for ours, _ in pairs), 2),
        "loop_s": round(middle(theirs for _, theirs in pairs), 2),
        "from_to_loop": round(middle(ours / theirs for ours, theirs in pairs), 3),
    }
    result["diffusers_to_warm"] = round(result["total_diffusers_s"] / result["total_warm_s"], 2)
    for name, value in result.items():
        print(f"{name:<24}{value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
