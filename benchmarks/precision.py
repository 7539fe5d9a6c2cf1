"""What each precision does to the bundled model's pictures: held-out facts it draws right, and PSNR
at equal seeds.

    python -m benchmarks.precision [--count 600] [--only bf16;fp8;...]

Pictures come from the engine, weights are packed while loading (the same pixels as a baked folder).
"bf16" are the stored weights, computed in float32 as everything here: it is what the others are
compared with. Prints a table with 95 % intervals and one JSON line.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace

import numpy as np
from PIL import Image

from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.models import find as models
from fluxcli.plan import costs
from fluxcli.plan.planner import make_plan
from fluxcli.request.fields import Order
from quant.checkpoint import inspect
from quant.spec import SCHEMES, QuantSpec
from training import check, data
from training.evaluate import wilson

VARIANTS = {
    "bf16": None,
    "fp8": QuantSpec("fp8"),
    "fp8, T5 fp8": QuantSpec("fp8", "fp8"),
    "int8": QuantSpec("int8"),
    "nf4 search": QuantSpec("nf4", SCHEMES["nf4"].text_encoder),
    "nf4 absmax": QuantSpec("nf4", SCHEMES["nf4"].text_encoder, scales="absmax"),
    "nf4 search, modulation nf4": QuantSpec("nf4", SCHEMES["nf4"].text_encoder, modulation="nf4"),
}
SETTINGS = {"preset": "tiny", "model": "bundled/tiny", "device": "cpu"}
SETTINGS |= {"image_size": 128, "steps": 10, "text_tokens": 24, "format": "png"}


def make_engine(spec: QuantSpec | None) -> Engine:
    """The bundled model's engine; with a spec its weights are quantized while they are loaded."""
    order = Order.from_settings("x", SETTINGS)
    checkpoint = inspect(models.locate("bundled/tiny"))
    machine = hardware.probe("cpu")
    workload = costs.make_workload(order.request)
    _, plan = make_plan(workload, order.resources, [checkpoint], machine)
    if spec:
        plan = replace(plan, spec=spec, precision=spec.to)
    return Engine(checkpoint, plan, machine)


def draw(engine: Engine, fact: data.Fact, seed: int) -> np.ndarray:
    """Pixels (H, W, 3) of a fact's sentence."""
    order = Order.from_settings(data.prompt(fact), SETTINGS | {"seed": seed})
    picture = Picture(order.request)
    for _ in engine.draw([picture]):
        pass
    return picture.pixels


def psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; equal pictures have 114."""
    error = float(np.mean((pixels.astype(float) - reference) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-3))


def measure(
    spec: QuantSpec | None, facts: list[data.Fact], reference: list[np.ndarray]
) -> tuple[dict, list[np.ndarray]]:
    """(shares of right answers per attribute, PSNR, seconds a picture; the pictures).

    PSNR is against the reference pictures, where there are any.
    """
    engine = make_engine(spec)
    started = time.perf_counter()
    pictures = [draw(engine, fact, seed) for seed, fact in enumerate(facts)]
    seconds = time.perf_counter() - started
    seen = [
        check.check(Image.fromarray(pixels), fact)
        for pixels, fact in zip(pictures, facts, strict=True)
    ]
    found = {
        "right": {name: sum(each[name] for each in seen) for name in check.ATTRIBUTES},
        "seconds": round(seconds / len(facts), 3),
        "path": engine.multiply,
    }
    if reference:
        ratios = [psnr(ours, whole) for ours, whole in zip(pictures, reference, strict=True)]
        found["psnr"] = round(statistics.median(ratios), 1)
        found["psnr_worst"] = round(min(ratios), 1)
    return found, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--only", default=";".join(VARIANTS))
    options = parser.parse_args()
    facts = data.held_out_facts()[: options.count]
    results = {}
    reference: list[np.ndarray] = []
    for name in options.only.split(";"):
        results[name], pictures = measure(VARIANTS[name], facts, reference)
        reference = reference or pictures
        cells = []
        for attribute, right in results[name]["right"].items():
            low, high = wilson(right, len(facts))
            percent = 100 * right / len(facts)
            cells.append(f"{attribute} {percent:5.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        more = {key: value for key, value in results[name].items() if key != "right"}
        print(f"{name:28} {'  '.join(cells)}  {more}", flush=True)
    print(json.dumps({"benchmark": "precision", "pictures": len(facts), "results": results}))


if __name__ == "__main__":
    main()
