"""An adapter's bytes are planned: against counted ones, and under budgets that leave no more."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.counting import Counter, pretend_baked
from fluxcli.engine.cards import describe_card
from fluxcli.plan.placement import PHASES
from quant import codecs
from quant.checkpoint import inspect
from quant.tensor_info import DTYPE_BITS
from tests import published
from tests.support.helpers import BAKED, draw, engine_of, order, plan_for, tiny
from tests.support.loras import write_lora
from tests.support.simulate import every_placement, follow, full_size, on_card
from tests.test_memory import BAKES, MIB

CASES = [
    ("24GiB:sm89", {"precision": "bf16"}, ("hyper_8step", "kohya_te1")),
    pytest.param("12GiB:sm89", {"precision": "bf16"}, ("peft",), marks=pytest.mark.exhaustive),
    pytest.param(
        "8GiB:sm89",
        {"precision": "nf4"},
        ("turbo_alpha", "kohya_te1"),
        marks=pytest.mark.exhaustive,
    ),
]


def sparse(name: str, path: Path) -> Path:
    """A published file with zeros for values, which take no room on the disk."""
    at, header = 0, {}
    for key, (dtype, shape) in published.tensors(name).items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize(("card", "wanted", "names"), CASES, ids=str)
def test_the_plan_is_within_five_percent_of_what_is_counted(
    card, wanted, names, tmp_path, monkeypatch
):
    # now: what it logs when it is imported keeps the frames of its first use alive
    codecs.import_library("nf4")
    files = tuple(str(sparse(f"lora_{name}", tmp_path / f"{name}.safetensors")) for name in names)
    with full_size(monkeypatch) as dev:
        request = order("x", steps=2, seed=1, lora=files, **wanted)
        precision = request.resources.precision
        folders = [pretend_baked(dev, BAKES[precision]) if precision in BAKES else dev]
        here = describe_card(card)
        checkpoint, made = plan_for(request, folders, here)
        counter, engine = Counter(), on_card(checkpoint, made, here)
        follow(engine, request, counter)
    for phase in PHASES:
        predicted = made.live_bytes[phase]
        slack = 24 * MIB  # the least of these adapters are 249 MiB
        assert counter.peaks[phase] <= predicted * 1.01 + slack, (
            phase,
            made.placement.level(phase),
        )
        assert predicted <= counter.peaks[phase] * 1.05 + slack, (
            phase,
            made.placement.level(phase),
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_under_its_budget_the_engine_completes_every_placement_with_adapters(
    precision, tiny_folder, baked, tmp_path, monkeypatch
):
    """Of more bytes than the rest: the same pixels on each, and not those without."""
    checkpoint = inspect(
        baked(precision, **BAKED[precision]) if precision in BAKED else tiny_folder
    )
    every = ("transformer", "text_encoder", "text_encoder_2")
    file = write_lora(tmp_path / "x.safetensors", inspect(tiny_folder), every, rank=64, size=3)
    request = tiny(precision=precision, lora=(f"{file}:0.5",))
    pictures = every_placement(request, checkpoint, monkeypatch, step_kib=256)
    _, plain = draw(engine_of(checkpoint, tiny(precision=precision)), tiny(precision=precision))
    assert np.abs(pictures[False][0].astype(int) - plain).max() > 5
