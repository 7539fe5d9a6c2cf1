"""What else happens to an engine, on the card that is not there: other plans, and broken loops."""

from collections.abc import Iterator

import numpy as np
import pytest

from fluxcli.events import Step
from fluxcli.pictures.latents import Latents
from quant.checkpoint import inspect
from tests.support import loras
from tests.support.card import Card
from tests.support.card_driver import installed
from tests.support.helpers import changed, draw, draw_all, picture_of, plan_for, tiny
from tests.support.on_card import make_engine

ORDER = tiny(precision="bf16", offload="stream", device="cuda", steps=2)


@pytest.fixture
def card() -> Iterator[Card]:
    """A card that has no problem then, and on which nothing stays."""
    with installed(Card()) as card:
        yield card
    assert card.problems == [] and card.pinned == {}


def test_another_placement_and_back_gives_the_same_pixels(card, tiny_folder):
    """An engine adopts a plan, with all of its weights elsewhere, and pictures go on."""
    checkpoint = inspect(tiny_folder)
    engine = make_engine(ORDER, checkpoint)
    orders = [changed(ORDER, seed=k) for k in range(2)]
    pixels = []
    for offload in ("stream", "none", "sequential", "stream"):
        order = changed(ORDER, offload=offload)
        _, plan = plan_for(order, [checkpoint], engine.hardware)
        engine.adopt(plan, engine.hardware)
        pixels.append(draw_all(engine, orders))
    for found in pixels[1:]:
        assert np.array_equal(found, pixels[0])
    engine.components.clear()


def test_a_loop_that_was_broken_goes_on_where_it_ended(card, tiny_folder):
    order = changed(ORDER, steps=4)
    engine = make_engine(order, inspect(tiny_folder))
    _, whole = draw(engine, order)
    picture = picture_of(engine, order)
    run = engine.draw([picture])
    for event in run:
        if isinstance(event, Step) and event.index == 2:
            break
    run.close()
    kept = Latents(order.request, picture.tokens.cpu(), picture.step, "")
    _, resumed = draw(engine, order, resume=kept)
    assert np.array_equal(resumed, whole)
    del picture, run
    engine.components.clear()


def test_adapters_change_between_pictures(card, tiny_folder, tmp_path):
    """What an adapter adds to streamed layers comes and goes; the weights stay."""
    checkpoint = inspect(tiny_folder)
    adapter = loras.write_lora(tmp_path / "every.safetensors", checkpoint)
    engine = make_engine(ORDER, checkpoint)
    _, plain = draw(engine, ORDER)
    _, other = draw(engine, changed(ORDER, lora=(f"{adapter}:0.5",)))
    _, again = draw(engine, ORDER)
    assert np.array_equal(plain, again) and not np.array_equal(plain, other)
    engine.components.clear()
