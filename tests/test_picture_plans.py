"""Plans for requests with pictures: bytes against counted ones, and what pictures add.

dev with Union-Pro 2.0 is at full size on FakeTensors, by its shapes; the counter knows nothing of
plans. `python -m tests.test_picture_plans` prints the table of docs/memory.md.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.counting import Counter, pretend_baked
from fluxcli.engine.cards import describe_card
from fluxcli.engine.picture import Picture
from fluxcli.models.parts import Control
from fluxcli.models.shapes import read_known_controlnet
from fluxcli.pictures.inputs import load_inputs
from fluxcli.plan.costs import make_workload
from fluxcli.plan.placement import GIB, MemoryPlan
from fluxcli.plan.planner import make_plan
from quant.checkpoint import Checkpoint
from quant.spec import BAKEABLE, SCHEMES, QuantSpec
from tests.support.helpers import order
from tests.support.simulate import count_phases, full_size, on_card

MIB = 2**20
UNION_PRO_2 = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"
CARDS = [  # card, request; without a precision it is the plan's choice
    ("8GiB:sm89", {}),
    ("12GiB:sm89", {}),
    ("16GiB:sm89", {}),
    ("24GiB:sm89", {}),
    ("8GiB:sm89", {"precision": "bf16"}),
    ("12GiB:sm89", {"precision": "int8"}),
    ("8GiB:sm89", {"precision": "w4a8", "offload": "stream"}),
    ("8GiB:sm89", {"precision": "bf16", "offload": "sequential"}),
]


def count(
    card: str, wanted: dict, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[MemoryPlan, Counter]:
    """The plan of dev with Union-Pro 2.0 on a card, and the counter after two pictures of it."""
    asked = order("x", steps=2, seed=1, control=f"union-pro-2:{picture_file}", **wanted)
    inputs = load_inputs(asked.request)
    controls = (Control("controlnet", scale=0.7),)
    with full_size(monkeypatch) as dev:
        specs = [QuantSpec(name, SCHEMES[name].text_encoder) for name in BAKEABLE]
        both = add_network(dev)
        variants = [*(pretend_baked(both, spec) for spec in specs), both]
        here = describe_card(card)
        here = replace(here, ram_bytes=64 * GIB, ram_free_bytes=64 * GIB)
        checkpoint, plan = make_plan(
            make_workload(asked.request, controls=controls),
            asked.resources,
            variants,
            here,
        )
        counter, engine = Counter(), on_card(checkpoint, plan, here)
        for seed in (1, 2):  # the second one's prompt is known: nothing leaves for the encoders
            request = replace(asked.request, seed=seed)
            picture = Picture(request, inputs=inputs, controls=controls)
            count_phases(engine, picture, counter)
    return plan, counter


def add_network(checkpoint: Checkpoint) -> Checkpoint:
    network = read_known_controlnet(UNION_PRO_2)
    return replace(checkpoint, components=checkpoint.components | {"controlnet": network})


def make_map(folder: Path) -> Path:
    path = folder / "map.png"
    Image.new("RGB", (256, 256), (0, 128, 255)).save(path)
    return path


if __name__ == "__main__":  # the table of docs/memory.md
    import tempfile

    for name, asked in CARDS:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            plan, counter = count(name, asked, make_map(Path(folder)), patch)
        cells = [
            f"{plan.live_bytes[phase] / GIB:.2f} / {counter.peaks[phase] / GIB:.2f}"
            for phase in plan.live_bytes
        ]
        placed = plan.placement
        how = f"{placed.level('denoise')}, {placed.controls}"
        what = ", ".join(f"{key} {value}" for key, value in asked.items() if key != "precision")
        cells = [name, f"{plan.precision} {what}".strip(), how, *cells]
        print(f"| {' | '.join(cells)} |", flush=True)
