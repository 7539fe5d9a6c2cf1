"""The benchmark that waits for a card runs here, shrunk: each rung as planned, no peak above its
plan.
"""

import json
import subprocess
import sys

import torch

from benchmarks import cards
from benchmarks.cards import measure_products
from quant.codecs import Reader
from tests.support.helpers import ROOT


def test_cards_runs_shrunk(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.cards",
        "--shrunk",
        "--caps",
        "9,12",
        "--steps",
        "2",
        "--out",
        str(out),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["shrunk"] and len(found["diffusers"]) == 1
    rows = found["placements"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    answers = [line for line in lines if "question" in line]
    assert lines == answers + rows + found["diffusers"]
    assert {answer["question"] for answer in answers} == {"layer", "vae"}
    assert {row["cap"] for row in rows} == {9, 12} and {row["precision"] for row in rows} == {
        "fp32",
        "nf4",
        "fp8",
        "int8",
    }
    assert {row["placed"] for row in rows} >= {"resident", "streamed 6", "sequential"}
    for row in rows:
        assert row["went_on_as_planned"] and row["step_s"] > 0
        for phase, planned in row["plan_bytes"].items():
            assert 0 < row["measured_bytes"][phase] <= planned + (256 << 10), (
                row["precision"],
                row["placed"],
                phase,
            )


def test_every_arithmetic_of_a_device_is_measured():
    found = measure_products("cpu", torch.bfloat16, rows=32, columns=64, warm_s=0.0)
    assert set(found) == {"wide", "fp8", "int8"} and all(rate > 0 for rate in found.values())


def test_the_random_model_reads_its_tensors_from_one_buffer(monkeypatch):
    monkeypatch.setattr(cards, "NOISE_NUMEL", 80_000)
    with cards.random_model() as model:
        vae = model.components["vae"]
        weight = vae.weights["decoder.conv_in.weight"]
        assert Reader().read(weight)[""].shape == weight.shape
