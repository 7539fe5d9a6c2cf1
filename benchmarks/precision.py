"""What each precision does to the bundled model's pictures: held-out facts it draws right, and PSNR
at equal seeds.

    python -m benchmarks.precision [--count 725] [--only bf16;int8;...] [--out FILE]

Pictures come from the engine, weights are packed while loading (the same pixels as a baked folder).
"bf16" are the stored weights, computed in float32 as everything here: it is what the others are
compared with, picture by picture. A picture is right if the checker finds all five words of its
fact. Prints a row for each size and precision; `--out` gets all rows as JSON after each of them.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.models import find as models
from fluxcli.plan import costs
from fluxcli.plan.planner import make_plan
from fluxcli.request.fields import Order
from quant.checkpoint import inspect
from quant.spec import BAKEABLE, SCHEMES, QuantSpec
from training import check, data
from training.evaluate import wilson

REFERENCE = "bf16"
# As `flux quantize --to` bakes them, T5 included, and some other choices.
VARIANTS: dict[str, QuantSpec | None] = {REFERENCE: None}
VARIANTS |= {scheme: QuantSpec(scheme, SCHEMES[scheme].text_encoder) for scheme in BAKEABLE}
VARIANTS |= {
    "fp8, T5 fp8": QuantSpec("fp8", "fp8"),
    "nf4 absmax": QuantSpec("nf4", "nf4", scales="absmax"),
    "nf4, modulation nf4": QuantSpec("nf4", "nf4", modulation="nf4"),
}
SETTINGS = {"preset": "tiny", "model": "bundled/tiny", "device": "cpu"}
SETTINGS |= {"steps": 10, "text_tokens": 24, "format": "png"}
# Of wide sizes the bundled model was taught this ratio; at 192x96 it draws 16 % of the facts.
SIZES: dict[str, dict[str, Any]] = {
    "128x128": {"image_size": 128},
    "128x80": {"image_size": 128, "aspect_ratio": "16:9"},
}
Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Drawn:
    """Pictures of facts, and which of them are right."""

    pictures: list[np.ndarray]  # (H, W, 3) each
    right: list[bool]  # all five words of the fact
    words: dict[str, int]  # how many pictures show each word
    seconds: float  # of one picture
    multiply: str


class Change(NamedTuple):
    """How many pictures a format makes wrong that were right, less the reverse, as a share."""

    lost: int  # right in the reference, wrong in the format
    won: int  # the reverse
    share: float
    low: float  # of the 95 % interval
    high: float


def make_engine(spec: QuantSpec | None) -> Engine:
    """The bundled model's engine; with a spec its weights are quantized while they are loaded."""
    order = Order.from_settings("x", SETTINGS | SIZES["128x128"])
    checkpoint = inspect(models.locate("bundled/tiny"))
    machine = hardware.probe("cpu")
    workload = costs.make_workload(order.request)
    _, plan = make_plan(workload, order.resources, [checkpoint], machine)
    if spec:
        plan = replace(plan, spec=spec, precision=spec.to)
    return Engine(checkpoint, plan, machine)


def draw(engine: Engine, fact: data.Fact, *, seed: int, size: str) -> np.ndarray:
    """Pixels (H, W, 3) of a fact's sentence."""
    order = Order.from_settings(data.prompt(fact), SETTINGS | SIZES[size] | {"seed": seed})
    picture = Picture(order.request)
    for _ in engine.draw([picture]):
        pass
    return picture.pixels


def draw_all(spec: QuantSpec | None, facts: list[data.Fact], *, size: str) -> Drawn:
    """A picture of each fact, with its number as its seed."""
    engine = make_engine(spec)
    started_s = time.perf_counter()
    pictures = [draw(engine, fact, seed=seed, size=size) for seed, fact in enumerate(facts)]
    seconds = (time.perf_counter() - started_s) / len(facts)
    seen = [
        check.check(Image.fromarray(pixels), fact)
        for pixels, fact in zip(pictures, facts, strict=True)
    ]
    return Drawn(
        pictures,
        right=[all(each.values()) for each in seen],
        words={name: sum(each[name] for each in seen) for name in check.ATTRIBUTES},
        seconds=round(seconds, 3),
        multiply=engine.multiply,
    )


def psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; equal pictures have 114."""
    error = float(np.mean((pixels.astype(float) - reference) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-3))


def compare(right: list[bool], reference: list[bool]) -> Change:
    """What a format loses of the pictures that the reference has right, picture by picture.

    The interval is that of Bonett and Price (2012): one picture is added to each of the two counts,
    so that it holds for counts of a few pictures, too.
    """
    pairs = list(zip(right, reference, strict=True))
    lost = sum(was and not now for now, was in pairs)
    won = sum(now and not was for now, was in pairs)
    total = len(pairs) + 2
    changed = (lost + won + 2) / total
    middle = (lost - won) / total
    half = Z * math.sqrt(max(0.0, changed - middle**2) / total)
    return Change(lost, won, (lost - won) / len(pairs), middle - half, middle + half)


def describe(drawn: Drawn, reference: Drawn | None) -> dict[str, Any]:
    """A row of the results; beside a reference with what differs from it."""
    low, high = wilson(sum(drawn.right), len(drawn.right))
    row: dict[str, Any] = {
        "right": sum(drawn.right),
        "right_interval": [round(low, 4), round(high, 4)],
        "words": drawn.words,
        "seconds": drawn.seconds,
        "multiply": drawn.multiply,
    }
    if reference:
        row |= compare(drawn.right, reference.right)._asdict()
        pairs = zip(drawn.pictures, reference.pictures, strict=True)
        ratios = [psnr(ours, whole) for ours, whole in pairs]
        row["psnr"] = round(statistics.median(ratios), 1)
        row["psnr_worst"] = round(min(ratios), 1)
    return row


def tell(size: str, name: str, row: dict[str, Any], *, count: int) -> str:
    """The line of a row."""
    low, high = row["right_interval"]
    cells = [f"{size:8} {name:20}"]
    cells += [f"right {100 * row['right'] / count:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"]
    if "lost" in row:
        change = f"lost {row['lost']} won {row['won']}: {100 * row['share']:+.2f} %"
        cells += [f"{change} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"]
        cells += [f"PSNR {row['psnr']} dB, worst {row['psnr_worst']}"]
    cells += [f"{row['multiply']}, {row['seconds']} s"]
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=len(data.held_out_facts()))
    parser.add_argument("--only", default=";".join(VARIANTS), help="of them, bf16 first")
    parser.add_argument("--sizes", default=";".join(SIZES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # its products are too small for more
    facts = data.held_out_facts()[: options.count]
    results: dict[str, dict[str, Any]] = {}
    found = {"benchmark": "precision", "pictures": len(facts), "results": results}
    for size in options.sizes.split(";"):
        results[size] = {}
        reference = None
        for name in options.only.split(";"):
            drawn = draw_all(VARIANTS[name], facts, size=size)
            row = describe(drawn, reference)
            results[size][name] = row
            if name == REFERENCE:
                reference = drawn
            print(tell(size, name, row, count=len(facts)), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
