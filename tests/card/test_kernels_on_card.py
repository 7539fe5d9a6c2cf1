"""comfy-kitchen on the card that is not there: which pictures it computes, and who says so."""

import numpy as np
import pytest

from fluxcli.cli import doctor
from fluxcli.engine import device
from fluxcli.engine.picture import Picture
from fluxcli.run.saving import make_metadata
from quant import linear
from quant.checkpoint import inspect
from quant.kernels import Library
from tests.support.card import Card
from tests.support.card_driver import installed
from tests.support.helpers import tiny
from tests.support.kitchen import CUDA, TRITON, Registry
from tests.support.on_card import draw_on_card, draw_on_cpu, make_engine

ENGAGED = "comfy-kitchen cuda"


def make_card(**options: object) -> Card:
    return Card(kitchen=Library(Registry(cuda=CUDA, triton=TRITON)), **options)


@pytest.mark.parametrize(
    ("precision", "placement"),
    [
        ("w4a8", "stream"),
        pytest.param("int8", "none", marks=pytest.mark.exhaustive),
        pytest.param("w6a8", "sequential", marks=pytest.mark.exhaustive),
    ],
)
def test_a_picture_by_kernels_is_nearly_that_of_torch(precision, placement, baked):
    checkpoint = inspect(baked(precision))
    order = tiny(precision=precision, offload=placement, device="cuda")
    run = draw_on_card(order, checkpoint, make_card())
    assert run.multiply == ENGAGED and run.card.problems == [] and run.waits() == []
    launches = run.steps[-1].launches
    product = "int8_linear" if precision == "int8" else "packed_linear"
    assert launches[product] and launches["rms_rope"] and launches["adaln"]
    assert not launches["_int_mm"] and not launches["rms_norm"]
    run.ways = {scheme: linear.Multiplication("int_mm") for scheme in run.ways}
    difference = run.pixels.astype(float) - draw_on_cpu(order, run)
    assert 0 < np.square(difference).mean() < 12


def test_doctor_plan_and_metadata_say_whose_kernels_they_are(baked):
    order = tiny(precision="int8", device="cuda")
    with installed(make_card()):
        engine = make_engine(order, inspect(baked("int8")))
        compute = make_metadata(engine, order, Picture(order.request))["compute"]
        assert compute["multiply"] == compute["kernels"] == ENGAGED
        hardware = device.probe("cuda")
        assert hardware.find_multiply("int8") == ENGAGED
        assert hardware.explain_multiply("int8") == ""
        found = {check.name: check.found for check in doctor.examine("cuda")}
        assert found["int8"] == f"computed ({ENGAGED})"
    with installed(Card()):
        engine = make_engine(order, inspect(baked("int8")))
        compute = make_metadata(engine, order, Picture(order.request))["compute"]
        assert compute["multiply"] == "int_mm" and "kernels" not in compute
        why = "int8: multiplied by torch here, because comfy-kitchen is not installed"
        assert why in engine.plan.reasons


def test_without_a_driver_for_it_the_next_back_end_is_taken(monkeypatch):
    monkeypatch.setattr("tests.support.card_driver.DRIVER", 12080)
    with installed(make_card()):
        hardware = device.probe("cuda")
    assert hardware.find_multiply("int8") == "comfy-kitchen triton"
    assert hardware.explain_multiply("int8") == (
        "multiplied by comfy-kitchen triton here, because comfy-kitchen cuda: the driver is for"
        " CUDA 12, and it needs one for CUDA 13"
    )
    monkeypatch.setenv("FLUX_KERNELS", "off")
    with installed(make_card()):
        hardware = device.probe("cuda")
    assert hardware.explain_multiply("int8") == (
        "multiplied by torch here, because FLUX_KERNELS is off"
    )
