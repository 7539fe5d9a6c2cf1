"""Plans for requests with pictures: bytes against counted ones, and what pictures add.

dev with Union-Pro 2.0 is at full size on FakeTensors, by its shapes; the counter knows nothing of
plans. `python -m tests.test_picture_plans` prints the table of docs/memory.md.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.counting import Counter, pretend_baked
from fluxcli.engine.cards import describe_card
from fluxcli.engine.picture import Picture
from fluxcli.models.controls import repository_of
from fluxcli.models.parts import Control
from fluxcli.models.shapes import read_known_controlnet, read_known_redux, read_known_shapes
from fluxcli.pictures.inputs import load_inputs
from fluxcli.plan.costs import Workload, count_control_steps, make_workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, MemoryPlan, Placement, step_down
from fluxcli.plan.planner import USABLE_SHARE, make_plan, survey
from fluxcli.request.controls import list_kinds
from fluxcli.request.fields import Resources
from quant.checkpoint import Checkpoint
from quant.spec import BAKEABLE, SCHEMES, QuantSpec
from tests.support.helpers import order
from tests.support.invariant import call
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
]


def count(
    card: str,
    wanted: dict,
    picture_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    depth: tuple[int, int] | None = None,
) -> tuple[MemoryPlan, Counter]:
    """The plan of dev with Union-Pro 2.0 on a card, and the counter after two pictures of it.

    With a `depth` dev has so many double and single blocks.
    """
    asked = order("x", steps=2, seed=1, control=f"union-pro-2:{picture_file}", **wanted)
    inputs = load_inputs(asked.request)
    controls = (Control("controlnet", scale=0.7),)
    with full_size(monkeypatch) as dev:
        plain = shorten(dev, *depth) if depth else dev
        specs = [QuantSpec(name, SCHEMES[name].text_encoder) for name in BAKEABLE]
        both = add_network(plain)
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


def shorten(checkpoint: Checkpoint, doubles: int, singles: int) -> Checkpoint:
    """The same model with fewer blocks."""
    part = checkpoint.components["transformer"]
    counts = {"transformer_blocks": doubles, "single_transformer_blocks": singles}
    weights = {}
    for name, weight in part.weights.items():
        kind, _, rest = name.partition(".")
        if kind not in counts or int(rest.partition(".")[0]) < counts[kind]:
            weights[name] = weight
    config = part.config | {"num_layers": doubles, "num_single_layers": singles}
    part = replace(part, config=config, weights=weights)
    return replace(checkpoint, components=checkpoint.components | {"transformer": part})


def check_counted(plan: MemoryPlan, counter: Counter) -> None:
    assert tuple(plan.live_bytes) == ("encode", "prepare", "condition", "denoise", "decode")
    for phase, predicted in plan.live_bytes.items():
        slack = 24 * MIB  # of small things, where nearly everything is evicted
        assert counter.peaks[phase] <= predicted * 1.01 + slack, phase
        assert predicted <= counter.peaks[phase] * 1.05 + slack, phase
    # beside the arenas one tensor and its block
    assert plan.host_bytes <= counter.host + MIB
    assert counter.host < plan.host_bytes + 600 * MIB


@pytest.mark.parametrize(("card", "wanted"), CARDS, ids=str)
@pytest.mark.exhaustive
def test_a_plan_with_a_controlnet_is_within_five_percent(card, wanted, tmp_path, monkeypatch):
    check_counted(*count(card, wanted, make_map(tmp_path), monkeypatch))


@pytest.mark.parametrize(
    ("card", "offload", "controls"),
    [
        ("6GiB:sm89", "stream", "streamed"),
        pytest.param("8GiB:sm89", "auto", "resident", marks=pytest.mark.exhaustive),
    ],
)
def test_so_is_that_of_a_shorter_model_of_full_width(
    card, offload, controls, tmp_path, monkeypatch
):
    wanted = {"precision": "bf16", "offload": offload}
    plan, counter = count(card, wanted, make_map(tmp_path), monkeypatch, depth=(2, 4))
    assert plan.placement.controls == controls
    check_counted(plan, counter)


# --- what pictures add, by the published shapes


@pytest.fixture(scope="module")
def dev() -> Checkpoint:
    """dev with Union-Pro 2.0, Redux and everything that can be baked of them."""
    known = add_network(read_known_shapes())
    return replace(known, components=known.components | read_known_redux())


def machine(gib: float) -> Hardware:
    here = describe_card(f"{gib}GiB:sm89")
    return replace(here, ram_bytes=64 * GIB, ram_free_bytes=64 * GIB)


def workload(**changes: object) -> Workload:
    return replace(make_workload(order("x").request), **changes)


def plan_of(dev: Checkpoint, here: Hardware, precision: str = "bf16", **changes) -> MemoryPlan:
    resources = Resources(precision=precision)
    return make_plan(workload(**changes), resources, [dev], here).plan


WITH_CONTROL = {"controls": ("controlnet",), "control_steps": (28,), "input_pixels": (1 << 20,)}


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_control_acts_in_the_steps_that_diffusers_lets_it_act_in(steps):
    for start, end in ((0.0, 1.0), (0.0, 0.5), (0.25, 0.8), (0.9, 1.0), (0.3, 0.31)):
        kept = [
            1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)
        ]  # of pipeline_flux_controlnet.py
        assert count_control_steps(steps, start=start, end=end) == sum(kept)


def test_pictures_and_true_guidance_take_their_bytes_and_seconds(dev):
    here = machine(48)
    plain = plan_of(dev, here)
    assert "prepare" not in plain.seconds and "prepare" not in plain.peak_bytes
    seconds = plain.seconds["denoise"]

    twice = plan_of(dev, here, passes=2)
    assert twice.seconds["denoise"] == pytest.approx(2 * seconds, rel=1e-3)
    assert twice.seconds["encode"] == pytest.approx(2 * plain.seconds["encode"], rel=0.01)

    edited = plan_of(dev, here, reference_tokens=4096, input_pixels=(1 << 20,))
    assert 1.9 * seconds < edited.seconds["denoise"] < 2.6 * seconds
    assert edited.activation_bytes["denoise"] > 1.8 * plain.activation_bytes["denoise"]
    assert edited.seconds["prepare"] > 0

    alike = plan_of(dev, here, extra_text_tokens=729)
    assert seconds < alike.seconds["denoise"] < 1.3 * seconds
    assert any("729 tokens" in reason for reason in alike.reasons)

    always = plan_of(dev, here, **WITH_CONTROL)
    half = plan_of(dev, here, **WITH_CONTROL | {"control_steps": (14,)})
    added = always.seconds["denoise"] - seconds
    # six of 19 double blocks, in the seconds of a step
    assert 0.1 * seconds < added < 0.4 * seconds
    assert half.seconds["denoise"] - seconds == pytest.approx(added / 2, rel=0.01)
    more_bytes = always.live_bytes["denoise"] - plain.live_bytes["denoise"]
    blocks_bytes = 6 * 24 * 3072**2 * 2
    # On this card the modulation stays, too, which is half of that.
    assert 1.5 * blocks_bytes < more_bytes < 1.7 * blocks_bytes

    both = plan_of(
        dev, here, **WITH_CONTROL | {"controls": ("controlnet",) * 2, "control_steps": (28, 28)}
    )
    assert both.seconds["denoise"] - seconds == pytest.approx(2 * added, rel=0.01)
    assert both.live_bytes["denoise"] - always.live_bytes["denoise"] < blocks_bytes / 4


def test_no_card_is_filled_beyond_its_budget_and_less_memory_is_never_faster(dev):
    levels = set()
    for precision in ("bf16", "w4a8"):
        seconds = []
        for gib in (4, 5, 6, 8, 12, 24, 48):
            found = survey(
                workload(**WITH_CONTROL), Resources(precision=precision), [dev], machine(gib)
            )
            plan = found[0].plan
            if plan is None:
                continue
            assert max(plan.peak_bytes.values()) <= gib * GIB * USABLE_SHARE
            levels.add(plan.placement.controls)
            seconds.append(plan.seconds["denoise"])
            network = [reason for reason in plan.reasons if reason.startswith("controlnet ")]
            assert len(network) == 1
        assert len(seconds) > 4
        assert seconds == sorted(seconds, reverse=True)
    assert levels == {"resident", "streamed", "sequential"}


@pytest.mark.parametrize("precision", ["bf16", "w4a8"])
def test_steps_down_take_less_memory_each_until_nothing_is_left(precision, dev):
    found = survey(workload(**WITH_CONTROL), Resources(precision=precision), [dev], machine(48))
    plan = found[0].plan
    plans = [plan]
    while following := step_down(plans[-1], "denoise", found[0]):
        plans.append(following.plan)
    for before, after in pairwise(plans):
        assert after.live_bytes["denoise"] < before.live_bytes["denoise"]
    last = plans[-1].placement
    assert "streamed" in {each.placement.controls for each in plans}
    # What would be quantized again in every step is not read from its file.
    assert last.controls == ("sequential" if precision == "bf16" else "streamed")
    prepared = step_down(plans[1], "prepare", found[0])
    assert prepared and prepared.plan.placement.prepare == "tiled"
    assert prepared.plan.live_bytes["prepare"] < plans[1].live_bytes["prepare"] / 2
    assert step_down(prepared.plan, "prepare", found[0]) is None


def test_a_controlnet_stays_where_the_transformer_stays():
    placed = Placement(keep=("transformer", "vae"))
    assert placed.allows("controlnet", "transformer")
    assert placed.allows("controlnet_2", "controlnet")
    assert placed.allows("vae", "controlnet")
    assert not placed.allows("text_encoder_2", "controlnet")
    alone = Placement()
    assert alone.allows("controlnet", "transformer")
    assert not alone.allows("vae", "controlnet")


def test_published_networks_have_the_bytes_of_their_files():
    """GB on the hub, as their pages list them."""
    union = "InstantX/FLUX.1-dev-Controlnet-Union"
    upscaler = "jasperai/Flux.1-dev-Controlnet-Upscaler"
    depth = "Shakker-Labs/FLUX.1-dev-ControlNet-Depth"
    xlabs = "XLabs-AI/flux-controlnet-collections:flux-canny-controlnet-v3.safetensors"
    sizes = {UNION_PRO_2: 4.28, union: 6.60, upscaler: 3.58, depth: 3.19, xlabs: 1.49}
    for name, size in sizes.items():
        assert round(read_known_controlnet(name).nbytes / 1e9, 2) == size
    assert read_known_controlnet("somebody/else") is None
    assert all(map(read_known_controlnet, map(repository_of, set(list_kinds(None)) - {"edges"})))


def test_a_network_that_is_not_here_and_does_not_fit_is_named(tmp_path, capsys):
    result = call(capsys, "plan", "x", "-p", "tiny", "--control", f"canny:{make_map(tmp_path)}")
    assert result.returncode == 4 and UNION_PRO_2 in result.stderr


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
