"""Pictures that are drawn on the card that is not there, and the same ones on the CPU."""

import traceback
from collections.abc import Container
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch

from fluxcli.engine import device
from fluxcli.engine.engine import Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import Event, Step
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan
from fluxcli.request.fields import Order
from quant import linear
from quant.checkpoint import Checkpoint
from tests.support.card import Card, Counts
from tests.support.card_driver import installed
from tests.support.helpers import draw, picture_of, plan_for


@dataclass
class OnCardRun:
    """What a run on the card gave."""

    card: Card
    pixels: np.ndarray
    plan: MemoryPlan  # at the end, on the card
    multiply: str  # how the transformer's blocks multiplied, see `Engine.multiply`
    ways: dict[str, linear.Multiplication]  # how the card multiplies, by scheme
    hardware: Hardware
    checkpoint: Checkpoint
    events: list[Event] = field(default_factory=list)
    steps: list[Counts] = field(default_factory=list)  # what happened in each step

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return getattr(torch, self.plan.dtypes["transformer"])

    def waits(self) -> list[str]:
        """Where the host waited for the card in the last step, each place as often as it did."""
        return sorted(self.steps[-1].waits.elements())


def make_engine(order: Order, checkpoint: Checkpoint, **options: object) -> Engine:
    """An engine on the device that the order asks for, which must be installed."""
    hardware = device.probe(order.resources.device)
    return Engine(*plan_for(order, [checkpoint], hardware, **options), hardware)


def run_to_end(
    engine: Engine, picture: Picture, card: Card | None = None
) -> tuple[list[Event], list[Counts]]:
    """Draw the picture; returns its events, and what happened on the card in each step."""
    events: list[Event] = []
    steps: list[Counts] = []
    for event in engine.draw([picture]):
        if card and isinstance(event, Step):
            steps.append(card.take_counts())
        if not isinstance(event, Drawn):
            events.append(event)
    return events, steps


def draw_on_card(
    order: Order,
    checkpoint: Checkpoint,
    card: Card | None = None,
    *,
    failing: Container[int] = (),
) -> OnCardRun:
    """Draw the order's picture on a card; whatever is wrong by then is among its problems.

    `failing` are numbers of launches for which there is no memory, counted while it is drawn.
    """
    card = card or Card()
    with installed(card):
        try:
            run = _draw(order, checkpoint, card, failing=failing)
        except Exception as error:
            # Frames hold tensors, which must go while the card is there.
            traceback.clear_frames(error.__traceback__)
            raise
    card.problems += [f"{size} bytes stay pinned" for size in card.pinned.values()]
    return run


def _draw(
    order: Order, checkpoint: Checkpoint, card: Card, *, failing: Container[int]
) -> OnCardRun:
    engine = make_engine(order, checkpoint)
    card.launched = [0] * len(card.launched)
    card.failing = failing
    picture = picture_of(engine, order)
    events, steps = run_to_end(engine, picture, card)
    return OnCardRun(
        card=card,
        pixels=picture.pixels,
        plan=engine.plan,
        multiply=engine.multiply,
        ways={scheme: linear.ask_multiply(scheme, engine.plan.device) for scheme in linear.WAYS},
        hardware=engine.hardware,
        checkpoint=engine.checkpoint,
        events=events,
        steps=steps,
    )


def draw_on_cpu(order: Order, run: OnCardRun) -> np.ndarray:
    """The pixels of the same plan on the CPU, with 8-bit products as the card has them."""
    plan = replace(run.plan, device="cpu")
    hardware = replace(run.hardware, device="cpu")
    ways = {(scheme, "cpu"): way for scheme, way in run.ways.items()}
    with mock.patch.dict(linear.PROBED, ways):
        _, pixels = draw(Engine(run.checkpoint, plan, hardware), order)
    return pixels
