"""The benchmark that waits for a card runs to its end on the card that is not there, shrunk: each
rung as planned, no peak above its plan, and what fails is a row.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cards, questions
from benchmarks.cards import measure_products
from fluxcli.engine import device
from fluxcli.models.shapes import read_known_shapes
from quant.codecs import Reader
from quant.spec import BAKEABLE, ROTATED
from tests.support.card import Card
from tests.support.card_driver import installed
from tests.support.helpers import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
SHRUNK = ["--shrunk", "--caps", "12", "--steps", "2"]


@pytest.fixture
def card() -> Iterator[Card]:
    """A card that has no problem then, and on which nothing stays."""
    # transformers' CLIP that is first made while the card is there has buffers of freed memory
    # whenever it is loaded later in this process.
    from transformers import CLIPTextModel

    CLIPTextModel.from_pretrained(ROOT / "presets/tiny/text_encoder")
    with installed(Card()) as card:
        yield card
    assert card.problems == [] and card.pinned == {} and card.left_error == ""


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


# Of codes by their scale, which a process makes once; in real plans they are within the margin.
TABLES_BYTES = {"w6a8": 2 << 20, "w4a8": 128 << 10}


def check_placements(rows: list[dict]) -> None:
    """Every placement was carried out as planned, within its plan."""
    assert {row["precision"] for row in rows} == {"bf16", *BAKEABLE}
    assert {row["placed"] for row in rows} >= {"resident", "streamed 6", "sequential"}
    for row in rows:
        assert row["cap"] == 12 and row["went_on_as_planned"] and row["step_s"] > 0
        for phase, planned in row["plan_bytes"].items():
            assert 0 < row["live_bytes"][phase] <= row["measured_bytes"][phase]
            most_bytes = planned + (256 << 10) + TABLES_BYTES.get(row["precision"], 0)
            assert row["measured_bytes"][phase] <= most_bytes, (
                row["precision"],
                row["placed"],
                phase,
            )


def test_cards_runs_shrunk(card, tmp_path, capsys, monkeypatch):
    def make(*args: object, way: str, make_pipeline: Callable = cards.make_pipeline) -> object:
        if way == "model offload":
            raise ImportError("No module named 'bitsandbytes'")
        return make_pipeline(*args, way=way)

    monkeypatch.setattr(cards, "make_pipeline", make)
    monkeypatch.setattr(cards, "WAYS", ("model offload", "resident"))
    out = tmp_path / "rows.jsonl"
    assert cards.main([*SHRUNK, "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    answers, rows, peers = found["questions"], found["placements"], found["diffusers"]
    assert read_rows(out) == answers + rows + peers
    check_placements(rows)
    assert not any("error" in answer for answer in answers)
    layers = [each for each in answers if each["question"] == "layer"]
    assert [(each["precision"], each.get("by")) for each in layers] == [
        ("bf16", None),
        ("nf4", "dequantize"),
        ("fp8", "scaled_mm"),
        ("fp8", "dequantize"),
        *((scheme, by) for scheme in ROTATED for by in ("int_mm", "dequantize")),
    ]
    assert all(each["ms"] > 0 and each["host_ms"] > 0 for each in layers)
    assert [each["question"] for each in answers if each not in layers] == [
        "card",
        *["pin"] * 4,
        "copy pageable",
        *["vae"] * 2,
        "used beside the allocator",
    ]
    assert peers[0]["error"] == "ImportError: No module named 'bitsandbytes'"
    assert peers[1]["step_s"] > 0 and peers[1]["peak_bytes"] > 0


def test_after_ctrl_c_there_are_the_rows_so_far(card, tmp_path, capsys, monkeypatch):
    def stop(*_: object, **__: object) -> dict:
        raise KeyboardInterrupt

    answer = {"question": "x"}
    monkeypatch.setattr(cards, "ask", lambda *_, **__: iter([answer]))
    monkeypatch.setattr(cards, "read_known_shapes", stop)
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    assert cards.main([]) == 130
    [out] = tmp_path.glob("*-cards-a-card-of-sm89-that-is-not-there.jsonl")
    assert read_rows(out) == [answer]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["questions"] == [answer] and found["placements"] == []


def test_a_refused_pin_is_an_answer_and_the_next_kernel_runs():
    """Neither a driver that pins nothing nor a torch without a library ends the questions."""
    with installed(Card(pinnable_bytes=1 << 20)) as card:
        answers = list(questions.ask_copies("cuda:0", shrunk=True))
        torch.zeros(1, device="cuda:0")
    assert [answer.get("refused") for answer in answers] == [0, 0, 2, None]
    assert answers[0]["GB_s"] > 0 and answers[-1]["GB_s"] > 0
    assert card.problems == [] and card.pinned == {} and card.left_error == ""


def test_the_cards_row_is_toml(card, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    row = cards.measure_row(device.probe("cuda"), shrunk=True)
    [figures] = tomllib.loads(row).values()
    assert set(figures) == {
        *("wide", "fp8", "int8", "memory", "bus", "pageable"),
        *("date", "driver"),
    }
    assert figures["driver"] == "unknown"


def test_without_a_card_it_says_so(capsys):
    assert cards.main([]) == 8
    assert "no such device" in capsys.readouterr().err


# On a card of its own in an interpreter of its own, as it is run: diffusers is imported whole.
ON_A_CARD = """
import sys
from diffusers import FluxPipeline
from benchmarks import cards
from tests.support.card import Card
from tests.support.card_driver import installed
with installed(Card({options})) as card:
    code = cards.main(sys.argv[1:])
assert card.problems == [] and card.pinned == {{}} and card.left_error == ""
sys.exit(code)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options, broken",
    [
        ("", ()),
        ("rowwise=False, pinnable_bytes=0", ()),
        # It has no convolution in bfloat16, which is all that diffusers is asked for.
        ("sm=(7, 5)", ("vae", *(f"diffusers {way}" for way in cards.WAYS))),
        ("sm=(8, 6), pinnable_bytes=1 << 20", ()),
    ],
)
def test_cards_runs_shrunk_on_every_card(options, broken):
    script = ON_A_CARD.format(options=options)
    command = [sys.executable, "-c", script, *SHRUNK]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    rows = found["questions"] + found["diffusers"]
    failed = {row.get("question", row.get("way")) for row in rows if "error" in row}
    assert failed == set(broken)
    assert not any("error" in row for row in found["placements"])
    if not broken:
        check_placements(found["placements"])
    ways = ["diffusers resident", "diffusers model offload", "diffusers group offload"]
    assert [row["way"] for row in found["diffusers"]] == ways


def test_every_arithmetic_of_a_device_is_measured():
    found = measure_products("cpu", torch.bfloat16, rows=32, columns=64, warm_s=0.0)
    assert set(found) == {"wide", "fp8", "int8"} and all(rate > 0 for rate in found.values())


def test_the_random_model_reads_its_tensors_from_one_buffer():
    model = read_known_shapes(cards.DEV)
    only = {"vae": model.components["vae"]}
    with cards.random_weights(replace(model, components=only), text_tokens=512):
        weight = only["vae"].weights["decoder.conv_in.weight"]
        assert Reader().read(weight)[""].shape == weight.shape
