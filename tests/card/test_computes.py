"""What a card multiplies in is asked of it, on cards that are not there, and a picture says it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fluxcli.cli import doctor
from fluxcli.engine import device
from fluxcli.engine.engine import Engine, EnginePhase
from fluxcli.errors import DeviceUnusable, DoesNotFit, ExitCode
from fluxcli.events import Event, explain
from quant import linear
from quant.checkpoint import inspect
from quant.spec import ROTATED
from tests.support.card import Card
from tests.support.card_driver import installed
from tests.support.helpers import BAKED, picture_of, tiny
from tests.support.on_card import draw_on_card, make_engine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
NO_ENGINE = "GET was unable to find an engine to execute this computation"


def test_without_a_row_wise_kernel_fp8_is_multiplied_per_tensor(baked):
    folder = baked("fp8", **BAKED["fp8"])
    order = tiny(precision="fp8", device="cuda")
    by_rows = draw_on_card(order, inspect(folder))
    run = draw_on_card(order, inspect(folder), Card(rowwise=False))
    assert run.card.problems == []
    assert (by_rows.multiply, run.multiply) == ("scaled_mm", "scaled_mm per tensor")
    why = "Rowwise scaling is not currently supported on your device"
    said = f"multiplied per tensor here, because {why}"
    assert run.hardware.explain_multiply("fp8") == said
    assert f"fp8: {said}" in run.plan.reasons
    difference = np.abs(run.pixels.astype(int) - by_rows.pixels.astype(int))
    assert difference.mean() < 4 and difference.any()


def test_a_card_whose_row_wise_kernel_adds_no_bias_is_told_by_the_probe(monkeypatch):
    multiply = torch._scaled_mm

    def refuse_bias(*given: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("bias") is not None:
            raise RuntimeError("no bias here")
        return multiply(*given, **options)

    monkeypatch.setattr(torch, "_scaled_mm", refuse_bias)
    with installed(Card()):
        assert linear.ask_multiply("fp8", "cuda:0") == (linear.PER_TENSOR, "no bias here")


@pytest.mark.parametrize(
    ("sm", "fp8", "int8"),
    [
        ((7, 0), "dequantize", "dequantize"),
        ((7, 5), "dequantize", "int_mm"),
        ((8, 9), "scaled_mm", "int_mm"),
    ],
)
def test_the_probe_is_quick_happens_once_and_leaves_no_error(sm, fp8, int8):
    card = Card(sm=sm, built_for=("sm_70", "sm_75", "sm_80"))
    with installed(card):
        found = device.probe("cuda")
        launched = card.launched[0]
        assert found.multiply == {"fp8": fp8, **dict.fromkeys(ROTATED, int8)}
        device.probe("cuda")
        assert card.launched[0] == launched <= 40
        assert torch.zeros(1, device="cuda").item() == 0 and card.problems == []


def test_only_the_card_that_is_used_is_asked():
    card = Card(cards=2)
    with installed(card):
        device.probe("cuda:1")
        assert card.launched[0] == 0 < card.launched[1]


def test_a_full_card_is_planned_by_its_capability_and_asked_again():
    card = Card(total_bytes=1 << 30)
    with installed(card):
        filler = torch.empty((1 << 30) - 1, dtype=torch.uint8, device="cuda")
        assert device.probe("cuda").multiply == {}
        del filler
        found = device.probe("cuda").multiply
        assert found == {"fp8": "scaled_mm", **dict.fromkeys(ROTATED, "int_mm")}


def test_a_card_without_kernels_is_exit_8_and_auto_takes_the_cpu():
    with installed(Card(sm=(6, 1))) as card:
        assert device.probe("auto").device == "cpu"
        with pytest.raises(DeviceUnusable, match="no kernels for the card"):
            device.probe("cuda")
        (bad,) = [each for each in doctor.examine("cuda") if each.name == "device"]
        assert bad.verdict == "bad" and "whl/cu126" in bad.fix
        assert card.launched == [0]


def test_bf16_that_is_asked_for_on_sm75_keeps_encoders_and_vae_in_float32(tiny_folder):
    order = tiny(precision="bf16", device="cuda")
    run = draw_on_card(order, inspect(tiny_folder), Card(sm=(7, 5)))
    assert run.card.problems == [] and run.pixels.any()
    by_component = dict(run.plan.dtypes)
    assert by_component.pop("transformer") == "bfloat16"
    assert set(by_component.values()) == {"float32"}


@pytest.mark.parametrize("is_short", [False, True])
def test_no_engine_of_cudnn_counts_as_memory_only_where_memory_is_short(is_short, tiny_folder):
    """The phase is stepped down for want of memory, and ends at once for want of a kernel."""
    order = tiny(device="cuda")

    def refuse(*_: object) -> Iterator[Event]:
        if is_short:
            with contextlib.suppress(torch.OutOfMemoryError):
                card.memory[0].take(1 << 50)
        raise RuntimeError(NO_ENGINE)

    with installed(Card()) as card:
        made = make_engine(order, inspect(tiny_folder))
        phases = [EnginePhase("decode", refuse)]
        engine = Engine(made.checkpoint, made.plan, made.hardware, phases=phases)
        with pytest.raises(DoesNotFit if is_short else RuntimeError, match=NO_ENGINE) as caught:
            list(engine.draw([picture_of(engine, order)]))
    failed = explain(caught.value)
    assert failed.exit_code == (ExitCode.DOES_NOT_FIT if is_short else ExitCode.DEVICE)
    assert is_short or "--precision fp32" in failed.hint
