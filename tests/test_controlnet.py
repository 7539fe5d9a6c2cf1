"""ControlNets act as in diffusers' FluxControlNetPipeline: at most 1/255 from its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcli.engine.blocks import Residuals
from fluxcli.engine.controls import Controls
from fluxcli.engine.engine import Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.models.parts import Control, Parts
from fluxcli.pictures.inputs import InputPictures, read_picture
from fluxcli.request.fields import Order
from fluxcli.request.inputs import ControlRef
from quant.bake import bake
from quant.checkpoint import Checkpoint, Component, inspect
from quant.controlnet import inspect_controlnet
from quant.linear import QuantizedLinear
from quant.recipe import make_controlnet_recipe
from quant.spec import BAKEABLE, QuantSpec
from tests.support.controlnets import save_map
from tests.support.helpers import changed, engine_of, tiny
from tests.support.pictures import draw_by_diffusers

ORDER = tiny(steps=4, seed=5, width=96, height=64, text_tokens=24)
MOVED = 8  # of 255: less is no effect


@dataclass(frozen=True)
class Case:
    """Networks with their pictures, and how they act."""

    kinds: tuple[str, ...]
    scales: tuple[float, ...]
    spans: tuple[tuple[float, float], ...]
    modes: tuple[int | None, ...]

    @cached_property
    def keys(self) -> list[str]:
        """The component of each control picture: one for each network."""
        names = list(dict.fromkeys(self.kinds))
        return [f"controlnet_{names.index(kind) + 1}" for kind in self.kinds]


def case(*kinds: str, scales=None, spans=None, modes=None) -> Case:
    count = len(kinds)
    return Case(
        kinds,
        tuple(scales or [0.7] * count),
        tuple(spans or [(0.0, 1.0)] * count),
        tuple(modes or [None] * count),
    )


CASES = {
    "single": case("single"),
    "union": case("union", modes=[1], scales=[0.5]),
    "xlabs": case("xlabs", scales=[0.8]),
    "two": case("single", "double", scales=[0.4, 0.5]),
    "two of other depths": case("union", "double", modes=[2, None], scales=[0.6, 0.6]),
    "one union, two pictures": case("union", "union", modes=[0, 2], scales=[0.4, 0.3]),
    "windows": case("single", "double", scales=[0.5, 0.9], spans=[(0.0, 0.5), (0.25, 1.0)]),
    "no guidance": case("unguided"),
}


@pytest.fixture(scope="session")
def maps(tmp_path_factory) -> list[Path]:
    """Two control pictures of the size of `ORDER`."""
    folder = tmp_path_factory.mktemp("maps")
    size = ORDER.request.size
    boxes = {"first": (10, 12, 50, 52), "second": (40, 5, 90, 40)}
    return [save_map(folder / f"{name}.png", size=size, box=boxes[name]) for name in boxes]


@pytest.fixture(scope="session")
def pipeline(tiny_folder):
    """diffusers' pipeline of the bundled model, whose network is set by each case."""
    from diffusers import FluxControlNetPipeline, FluxPipeline

    plain = FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    made = FluxControlNetPipeline(**plain.components, controlnet=None)
    made.set_progress_bar_config(disable=True)
    return made


def draw_case_by_diffusers(pipeline, wanted: Case, controlnet, maps: Sequence[Path]) -> np.ndarray:
    from diffusers import FluxControlNetModel, FluxMultiControlNetModel

    networks = [
        FluxControlNetModel.from_pretrained(controlnet(kind), torch_dtype=torch.float32)
        for kind in dict.fromkeys(wanted.kinds)
    ]
    images = [Image.open(path) for path in maps[: len(wanted.kinds)]]
    options = {
        "control_image": images,
        "controlnet_conditioning_scale": list(wanted.scales),
        "control_guidance_start": [start for start, _ in wanted.spans],
        "control_guidance_end": [end for _, end in wanted.spans],
        "control_mode": list(wanted.modes),
    }
    pipeline.controlnet = FluxMultiControlNetModel(networks)
    if len(images) == 1:
        pipeline.controlnet = networks[0]
        options = {name: values[0] for name, values in options.items()}
    return draw_by_diffusers(pipeline, ORDER, **options).astype(int)


def make_parts(wanted: Case, controlnet) -> Parts:
    components = {
        key: inspect_controlnet(controlnet(kind))
        for key, kind in zip(wanted.keys, wanted.kinds, strict=True)
    }
    controls = [
        Control(key, scale, *span, mode)
        for key, scale, span, mode in zip(
            wanted.keys, wanted.scales, wanted.spans, wanted.modes, strict=True
        )
    ]
    return Parts(components, tuple(controls))


def draw_by_flux(
    engine: Engine, controls: Sequence[Control], maps: Sequence[Path], order: Order = ORDER
) -> np.ndarray:
    shown = tuple(read_picture(str(path)) for path in maps[: len(controls)])
    refs = tuple(ControlRef("a/network", each.path) for each in shown)
    request = replace(order.request, control=refs)
    picture = Picture(request, inputs=InputPictures(controls=shown), controls=tuple(controls))
    events = list(engine.draw([picture]))
    assert any(isinstance(event, Drawn) for event in events)
    return picture.pixels.astype(int)


@pytest.fixture(scope="session")
def checkpoint(tiny_folder) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="session")
def plain(checkpoint) -> np.ndarray:
    """The picture of `ORDER` without a control."""
    return draw_by_flux(engine_of(checkpoint, ORDER), (), ())


RARE = ("two", "one union, two pictures", "no guidance")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] if name in RARE else []) for name in CASES],
)
def test_equals_diffusers(name, pipeline, checkpoint, controlnet, maps, plain):
    wanted = CASES[name]
    reference = draw_case_by_diffusers(pipeline, wanted, controlnet, maps)
    parts = make_parts(wanted, controlnet)
    engine = engine_of(parts.add_to(checkpoint), ORDER)
    found = draw_by_flux(engine, parts.controls, maps)
    apart = np.abs(found - reference).max()
    moved = np.abs(found - plain).max()
    other = np.abs(found - draw_by_flux(engine, parts.controls, maps[::-1])).max()
    print(f"{name}: {apart}/255 apart, moved by {moved}, by another map {other}")
    assert apart <= 1
    assert moved > MOVED
    assert other > MOVED
    assert reference.std() > 1


# --- wherever its weights are, in whatever precision


def with_controls(checkpoint: Checkpoint, parts: Parts, order: Order = ORDER, **placed) -> Engine:
    """An engine for a picture with controls, whose blocks are where `placed` says."""
    engine = engine_of(parts.add_to(checkpoint), order)
    if placed:
        plan = replace(engine.plan, placement=replace(engine.plan.placement, **placed))
        engine = Engine(engine.checkpoint, plan, engine.hardware)
    return engine


PLACES = {
    "streamed": {"denoise": "streamed", "streamed": (1, 4, 6), "controls": "streamed"},
    "sequential": {"denoise": "sequential", "controls": "sequential"},
}


@pytest.fixture(scope="session")
def two(controlnet) -> Parts:
    """Two networks: double and single blocks with a mode, and double blocks that act in the end."""
    return make_parts(CASES["two of other depths"], controlnet)


@pytest.fixture(scope="session")
def resident(checkpoint, two, maps) -> np.ndarray:
    return draw_by_flux(with_controls(checkpoint, two), two.controls, maps)


@pytest.mark.parametrize("place", PLACES)
def test_pixels_are_the_same_wherever_the_blocks_are(place, checkpoint, two, maps, resident):
    engine = with_controls(checkpoint, two, **PLACES[place])
    assert np.array_equal(draw_by_flux(engine, two.controls, maps), resident)


def test_memory_that_runs_out_is_survived(checkpoint, two, maps, resident, monkeypatch):
    real, failed = Controls.compute, []

    def compute(self: Controls, tokens: torch.Tensor, index: int) -> list[Residuals]:
        if index == 2 and len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, tokens, index)

    monkeypatch.setattr(Controls, "compute", compute)
    engine = with_controls(checkpoint, two)
    assert np.array_equal(draw_by_flux(engine, two.controls, maps), resident)
    assert len(engine.out_of_memory) == 2


def test_an_engine_goes_from_one_network_to_another(checkpoint, controlnet, maps, plain):
    """The transformer stays loaded, and so do networks that are asked for again."""
    asked = {
        name: make_parts(
            case(name, scales=[0.6], modes=[1 if name == "union" else None]), controlnet
        )
        for name in ("double", "union")
    }
    fresh = {
        name: draw_by_flux(with_controls(checkpoint, parts), parts.controls, maps)
        for name, parts in asked.items()
    }
    engine = engine_of(checkpoint, ORDER)
    assert np.array_equal(draw_by_flux(engine, (), ()), plain)
    kept = engine.components.loaded["transformer"]
    for name in ("double", "double", "union"):
        parts = asked[name]
        planned = engine_of(parts.add_to(checkpoint), ORDER)
        engine.adopt(planned.plan, planned.hardware, checkpoint=planned.checkpoint)
        before = engine.components.loaded.get("controlnet_1")
        assert np.array_equal(draw_by_flux(engine, parts.controls, maps), fresh[name])
        if before:
            assert engine.components.loaded["controlnet_1"] is before
    engine.adopt(planned.plan, planned.hardware, checkpoint=checkpoint)
    assert np.array_equal(draw_by_flux(engine, (), ()), plain)
    assert engine.components.loaded["transformer"] is kept
    assert "controlnet_1" not in engine.components.loaded


def bake_controlnet(component: Component, to: str, folder: Path) -> Component:
    recipe = make_controlnet_recipe(component, QuantSpec(to))
    assert list(bake(recipe, folder, origin={"model": "a test"}))
    return inspect_controlnet(folder)


@pytest.mark.parametrize(
    "to",
    ["int8", *(pytest.param(to, marks=pytest.mark.exhaustive) for to in BAKEABLE if to != "int8")],
)
def test_quantized_while_loading_is_as_baked(to, checkpoint, controlnet, maps, resident, tmp_path):
    order = changed(ORDER, precision=to)
    wanted = CASES["two of other depths"]
    parts = make_parts(wanted, controlnet)
    engine = with_controls(checkpoint, parts, order)
    while_loading = draw_by_flux(engine, parts.controls, maps, order)
    assert engine.plan.precision == to
    layer = engine.components.loaded["controlnet_1"].module.transformer_blocks[0].ff.net[2]
    assert isinstance(layer, QuantizedLinear)

    components = {
        name: bake_controlnet(component, to, tmp_path / name)
        for name, component in parts.components.items()
    }
    assert {component.precision for component in components.values()} == {to}
    baked = Parts(components, parts.controls)
    engine = with_controls(checkpoint, baked, order)
    assert np.array_equal(draw_by_flux(engine, baked.controls, maps, order), while_loading)
    assert np.abs(while_loading - resident).mean() < 40
