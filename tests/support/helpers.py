"""Requests and runs that several tests share."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fluxcli.engine import device as hardware
from fluxcli.engine import loader
from fluxcli.engine.engine import Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import Event, Notice, Saved
from fluxcli.models import loras
from fluxcli.models.parts import resolve_parts
from fluxcli.pictures import names as output
from fluxcli.pictures.image import open_picture
from fluxcli.pictures.inputs import load_inputs
from fluxcli.pictures.latents import Latents
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import Hardware, Speeds
from fluxcli.plan.placement import GIB, Candidate
from fluxcli.plan.planner import Planned, make_plan, survey
from fluxcli.request.fields import Order
from fluxcli.request.settings import coerce
from fluxcli.run import saving
from quant.checkpoint import Checkpoint, Component
from quant.expected import map_names

ROOT = Path(__file__).resolve().parents[2]


def order(prompt: str = "a fox", **settings: object) -> Order:
    """An order with these settings by name, the others at their defaults; values may be texts."""
    return Order.from_settings(
        prompt, {name: coerce(name, value, where="a test") for name, value in settings.items()}
    )


TINY = order(
    "a red circle on a blue background",
    preset="tiny",
    model="bundled/tiny",
    steps=3,
    seed=7,
    image_size=64,
    text_tokens=16,
    format="png",
    device="cpu",
)

BAKED: dict[str, dict] = {  # specs of the packed bundled model that most tests share
    "nf4": {"text_encoder": "nf4", "scales": "absmax"},
    "fp8": {"text_encoder": "fp8"},
    "int8": {"text_encoder": "int8"},
    "w6a8": {},
    "w4a8": {},
}


def machine(
    gib: float,
    device: str = "cuda:0",
    *,
    bf16: bool = True,
    sm: tuple[int, int] = (8, 9),
    **more: object,
) -> Hardware:
    """A machine of that much memory on the device, all of it free, and 64 GiB of RAM.

    Its speeds are as a table has them.
    """
    size = int(gib * GIB)
    table = Speeds(
        wide=50e12,
        eight_bit={"fp8": 80e12} if sm >= (8, 9) else {},
        attention=50e12,
        memory_bytes=500e9,
        bus_bytes=24e9,
        pageable_bytes=4e9,
        host_copy_bytes=5e9,
        disk_bytes=2e9,
        launch_s=5e-6,
        source="a test's",
    )
    made = Hardware(
        device, "a test", size, size, 64 * GIB, 64 * GIB, bf16, "a test", table, "test", sm
    )
    return replace(made, **more)


def changed(before: Order, **settings: object) -> Order:
    """The order with other settings by name."""
    return order(before.request.prompt, **before.settings() | settings)


def tiny(**changes: object) -> Order:
    """A small, quick order of the bundled model."""
    return order(str(changes.pop("prompt", TINY.request.prompt)), **TINY.settings() | changes)


def engine_of(checkpoint: Checkpoint, request: Order = TINY) -> Engine:
    machine = hardware.probe("cpu")
    return Engine(*plan_for(request, [checkpoint], machine), machine)


def plan_for(
    order: Order, checkpoints: Sequence[Checkpoint], hardware: Hardware, **options: object
) -> Planned:
    """The checkpoint, with the parts of the order's controls, and the plan."""
    request = order.request
    adapters = loras.resolve_loras(
        request.lora, checkpoints[-1].components, channels=loras.count_channels(request)
    )
    parts = resolve_parts(request, checkpoints[-1], adapters)
    checkpoints = [parts.add_to(checkpoint) for checkpoint in checkpoints]
    workload = make_workload(request, adapters, controls=parts.controls)
    return make_plan(
        workload, order.resources, checkpoints, hardware, model=request.model, **options
    )


def survey_for(
    order: Order, checkpoints: Sequence[Checkpoint], hardware: Hardware, **options: object
) -> list[Candidate]:
    """Every candidate for an order without adapters."""
    return survey(make_workload(order.request), order.resources, checkpoints, hardware, **options)


def run(engine: Engine, request: Order, target: output.Target) -> Iterator[Event]:
    """The events of a request's pictures, saved in the target."""
    request = request.with_seed()
    count = request.output.count
    places = {}
    for k in range(count):
        one = request.picture(k)
        picture = picture_of(engine, one, position=k + 1, total=count)
        places[picture] = output.Destination(target, one, n=k + 1)
    for event in engine.draw(list(places)):
        if isinstance(event, Drawn):
            yield Saved(saving.save_picture(event.picture, places[event.picture], engine))
        else:
            yield event


def picture_of(
    engine: Engine, order: Order, *, resume: Latents | None = None, **options: object
) -> Picture:
    """A picture of the engine's model with the order's adapters, begun or (`resume`) half done."""
    request = order.request
    adapters = loras.resolve_loras(
        request.lora, engine.checkpoint.components, channels=loras.count_channels(request)
    )
    options.setdefault("inputs", load_inputs(request))
    parts = resolve_parts(request, engine.checkpoint, adapters)
    picture = Picture(request, adapters, controls=parts.controls, **options)
    if resume:
        picture.tokens = resume.tokens
        picture.step = resume.step
    return picture


def draw(
    engine: Engine, request: Order, *, resume: Latents | None = None
) -> tuple[list[Event], np.ndarray]:
    """Run one picture to its end: (events, pixels)."""
    picture = picture_of(engine, request, resume=resume)
    events: list[Event] = [Notice(said) for said in loras.describe_unmatched(picture.adapters)]
    events += [event for event in engine.draw([picture]) if not isinstance(event, Drawn)]
    return events, picture.pixels


def draw_all(engine: Engine, orders: list[Order]) -> list[np.ndarray]:
    """The pixels of these orders' pictures, which go through the phases together."""
    pictures = [picture_of(engine, each) for each in orders]
    for _ in engine.draw(pictures):
        pass
    return [picture.pixels for picture in pictures]


def read_pixels(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8."""
    with open_picture(path) as image:
        return np.asarray(image.convert("RGB"))


def expected_shapes(part: Component) -> tuple[dict, dict]:
    """(shapes that the component's class wants, those that it has), by the module's keys."""
    expected = {
        name: tuple(tensor.shape) for name, tensor in loader.build(part).state_dict().items()
    }
    names = map_names(part.name, part.weights)
    return expected, {name: part.weights[stored].shape for name, stored in names.items()}
