"""32 requests of the bundled model, hashed: python -m benchmarks.pixels [--compare FILE]

Precisions, placements, adapters, sizes, several pictures, a batch and the worker. Of each picture
the sha256 of the decoded pixels, and where the engine runs here also that of the final latents: not
of files, which hold versions. Before and after a change of the code on the same machine the hashes
must be equal; other processors round differently. With --compare it prints what differs from a file
that an earlier run wrote, and exits with 1.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fluxcli.engine.device import probe
from fluxcli.engine.engine import Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.models.loras import resolve_loras
from fluxcli.pictures.image import hash_pixels
from fluxcli.plan.costs import make_workload
from fluxcli.plan.placement import Placement
from fluxcli.plan.planner import make_plan
from fluxcli.request.fields import Order
from fluxcli.request.settings import coerce
from quant.bake import bake
from quant.checkpoint import Checkpoint, inspect
from quant.recipe import make_recipe
from quant.spec import QuantSpec

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "presets" / "tiny"
BASE = {
    "prompt": "a red circle on a blue background",
    "steps": 3,
    "seed": 7,
    "image_size": 64,
    "text_tokens": 16,
}
BAKES: dict[str, dict[str, str]] = {"nf4": {"text_encoder": "nf4"}, "fp8": {}, "int8": {}}
STREAMED = Placement(encode="sequential", denoise="streamed", decode="alone", streamed=(1, 3, 4, 5))
SEQUENTIAL = Placement(encode="sequential", denoise="sequential", decode="alone")
TILED = Placement(decode="tiled")
ALL_KEPT = Placement(keep=("text_encoder", "text_encoder_2", "transformer", "vae", "modulation"))
ATTENTION = "attention.safetensors"
MODULATION = "modulation.safetensors"
ADAPTERS = {  # which layers each adapter acts on
    ATTENTION: r".*attn\.(to|add)_.*(q|k|v|out\.0|add_out|_proj)\.weight",
    MODULATION: r"(.*norm1?(_context)?\.linear|.*proj_mlp|x_embedder)\.weight",
}
ROWS = [
    {"prompt": "a red circle", "seed": 1},
    {"prompt": "a green star on a white background", "seed": 5, "steps": 4, "count": 2},
    {"prompt": "a yellow square", "seed": 9, "width": 96, "height": 64, "guidance": 2},
]


@dataclass(frozen=True)
class Case:
    """One request: what differs from `BASE`, in which folder, with which placement."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    baked: str = ""  # the precision of the folder, "" for the bundled one
    placement: Placement | None = None  # None: as the plan says


def list_cases() -> Iterator[Case]:
    """Yield the cases that the engine draws here."""
    yield Case("fp32")
    for precision in ("bf16", "fp16"):
        yield Case(precision, {"precision": precision})
    for precision in BAKES:
        yield Case(f"{precision} packed while loading", {"precision": precision})
    for precision in BAKES:
        yield Case(f"{precision} baked", baked=precision)
    for precision in ("", *BAKES):
        name = precision or "fp32"
        yield Case(f"{name} streamed", baked=precision, placement=STREAMED)
        yield Case(f"{name} sequential", baked=precision, placement=SEQUENTIAL)
    yield Case("fp32 tiled", {"image_size": 576, "steps": 1}, placement=TILED)
    yield Case("everything kept", placement=ALL_KEPT)
    yield Case("adapter", {"lora": [f"{ATTENTION}:0.8"]})
    yield Case("adapter on modulation", {"lora": [f"{MODULATION}:1.5"]})
    yield Case("two adapters", {"lora": [f"{ATTENTION}:0.8", f"{MODULATION}:-0.5"]})
    one = {"lora": [f"{ATTENTION}:1.0"]}
    yield Case("adapter nf4", one, baked="nf4")
    yield Case("adapter fp8 streamed", one, baked="fp8", placement=STREAMED)
    both = {"lora": [f"{ATTENTION}:1.0", f"{MODULATION}:1.0"]}
    yield Case("adapters fp32 sequential", both, placement=SEQUENTIAL)
    yield Case("16:9", {"aspect_ratio": "16:9", "image_size": 128})
    yield Case("9:16 longer text", {"aspect_ratio": "9:16", "image_size": 96, "text_tokens": 64})
    yield Case("width and height", {"width": 80, "height": 112})
    yield Case("guidance 1.5, 8 steps", {"guidance": 1.5, "steps": 8})
    yield Case("three of one request", {"count": 3})


def write_adapter(path: Path, checkpoint: Checkpoint, pattern: str, seed: int) -> None:
    """Write an adapter of rank 4 with random numbers for the layers that match."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in checkpoint.components["transformer"].weights.items():
        if re.fullmatch(pattern, name):
            rows, columns = weight.shape
            layer = f"transformer.{name.removesuffix('.weight')}"
            down = torch.randn(4, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, 4, generator=generator) / 2
            tensors[f"{layer}.lora_A.weight"] = down
            tensors[f"{layer}.lora_B.weight"] = up
    save_file(tensors, path)


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def draw_case(case: Case, folder: Path) -> list[dict[str, str]]:
    """Draw a case with an engine of its own; return the hashes of each picture."""
    settings = {"preset": "tiny", "model": "bundled/tiny", "device": "cpu", "format": "png"}
    settings |= BASE | case.changes
    settings["lora"] = [f"{folder}/{name}" for name in settings.get("lora", [])]
    prompt = settings.pop("prompt")
    values = {name: coerce(name, value, where=case.name) for name, value in settings.items()}
    order = Order.from_settings(prompt, values)
    found = inspect(folder / case.baked if case.baked else TINY)
    adapters = resolve_loras(order.request.lora, found.components)
    hardware = probe("cpu")
    workload = make_workload(order.request, adapters)
    checkpoint, plan = make_plan(workload, order.resources, [found], hardware)
    if case.placement:
        plan = replace(plan, placement=case.placement)
    engine = Engine(checkpoint, plan, hardware)
    count = order.output.count
    pictures = [
        Picture(order.picture(k).request, adapters=adapters, position=k + 1, total=count)
        for k in range(count)
    ]
    hashes = []
    for event in engine.draw(pictures):
        if isinstance(event, Drawn):
            picture = event.picture
            pixels = hash_pixels(picture.pixels)
            hashes.append({"pixels": pixels, "latents": hash_tensor(picture.tokens)})
    return hashes


def draw_rows(*, worker: bool) -> list[dict[str, str]]:
    """Draw a batch with the command line, in the worker or in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        lines = "\n".join(json.dumps(row) for row in ROWS)
        (Path(folder) / "rows.jsonl").write_text(lines, encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": f"{folder}/cache",
            "TMPDIR": folder,
            "OMP_NUM_THREADS": "1",
        }

        def flux(*arguments: str) -> str:
            command = [sys.executable, "-m", "fluxcli", *arguments]
            run = subprocess.run(
                command, cwd=folder, env=environment, check=True, capture_output=True, text=True
            )
            return run.stdout

        arguments = ["generate", "--from", "rows.jsonl", "-p", "tiny", "--size", "64"]
        arguments += ["--steps", "3", "--text-tokens", "16", "--format", "png"]
        arguments += ["--device", "cpu", "-o", "out/", "--events"]
        if worker:
            flux("worker", "start")
        else:
            arguments.append("--no-worker")
        try:
            events = [json.loads(line) for line in flux(*arguments).splitlines()]
        finally:
            if worker:
                flux("worker", "stop")
    saved = [event for event in events if event["event"] == "saved"]
    saved.sort(key=lambda event: (event["row"], event["image"]["seed"]))
    return [{"pixels": event["image"]["pixels_sha256"]} for event in saved]


def draw_all() -> dict[str, list[dict[str, str]]]:
    """Draw every case; return the hashes by the case's name."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = inspect(TINY)
        for seed, (file, pattern) in enumerate(ADAPTERS.items(), 1):
            write_adapter(folder / file, whole, pattern, seed)
        for to, options in BAKES.items():
            recipe = make_recipe(whole, QuantSpec(to, **options))
            for _ in bake(recipe, folder / to, origin={"model": "bundled/tiny"}):
                pass
        for case in list_cases():
            found[case.name] = draw_case(case, folder)
    found["batch"] = draw_rows(worker=False)
    found["worker"] = draw_rows(worker=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", type=Path, help="hashes of an earlier run")
    given = parser.parse_args()
    found = draw_all()
    if not given.compare:
        print(json.dumps(found, indent=1))
        return
    before = json.loads(given.compare.read_text(encoding="utf-8"))
    different = sorted(
        name for name in before.keys() | found if before.get(name) != found.get(name)
    )
    print(f"{len(found)} requests, {len(found) - len(different)} identical")
    for name in different:
        print("different:", name)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
