"""What each precision does to the bundled model's pictures: held-out facts it draws right, and PSNR at equal seeds.

    python -m benchmarks.precision [--count 600] [--only bf16;fp8;...]

Pictures come from the engine, weights are packed while loading (the same pixels as a baked folder). "bf16" are the
stored weights, computed in float32 as everything here: it is what the others are compared with. Prints a table with
95 % intervals and one JSON line.
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
from fluxcli.plan import planner as plan
from fluxcli.plan.costs import make_workload
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
SIZE = {"image_size": 128, "steps": 10, "text_tokens": 24, "format": "png"}


def picture(engine: Engine, fact: data.Fact, seed: int) -> np.ndarray:
    """Pixels (H, W, 3) of a fact's sentence."""
    request = Order.from_settings(
        data.prompt(fact), {"preset": "tiny", "model": "bundled/tiny", "seed": seed, "device": "cpu"} | SIZE
    )
    drawn = Picture(request.request)
    for _ in engine.draw([drawn]):
        pass
    return drawn.pixels


def measure(name: str, facts: list[data.Fact], reference: list[np.ndarray]) -> tuple[dict, list[np.ndarray]]:
    """Shares of right answers per attribute, PSNR against the reference pictures, seconds per picture."""
    spec = VARIANTS[name]
    request = Order.from_settings("x", {"preset": "tiny", "model": "bundled/tiny", "device": "cpu"} | SIZE)
    checkpoint = inspect(models.locate("bundled/tiny"))
    machine = hardware.probe("cpu")
    _, planned = plan.make_plan(make_workload(request.request), request.resources, [checkpoint], machine)
    planned = replace(planned, spec=spec, precision=spec.to if spec else planned.precision)
    engine, started = Engine(checkpoint, planned, machine), time.perf_counter()
    pictures = [picture(engine, fact, seed) for seed, fact in enumerate(facts)]
    seconds = time.perf_counter() - started
    seen = [check.check(Image.fromarray(p), fact) for p, fact in zip(pictures, facts, strict=True)]
    right = {attribute: sum(each[attribute] for each in seen) for attribute in check.ATTRIBUTES}
    noise = [float(np.mean((p.astype(float) - r) ** 2)) for p, r in zip(pictures, reference, strict=False)]
    psnr = [10 * math.log10(255**2 / max(mse, 1e-3)) for mse in noise]
    found = {"right": right, "seconds": round(seconds / len(facts), 3), "path": engine.multiply}
    return found | (
        {"psnr": round(statistics.median(psnr), 1), "psnr_worst": round(min(psnr), 1)} if psnr else {}
    ), pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--only", default=";".join(VARIANTS))
    options = parser.parse_args()
    facts = data.held_out_facts()[: options.count]
    results, reference = {}, []
    for name in options.only.split(";"):
        results[name], pictures = measure(name, facts, reference)
        reference = reference or pictures
        cells = []
        for attribute, right in results[name]["right"].items():
            low, high = wilson(right, len(facts))
            cells.append(f"{attribute} {100 * right / len(facts):5.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        more = {key: value for key, value in results[name].items() if key != "right"}
        print(f"{name:28} {'  '.join(cells)}  {more}", flush=True)
    print(json.dumps({"benchmark": "precision", "pictures": len(facts), "results": results}))


if __name__ == "__main__":
    main()
