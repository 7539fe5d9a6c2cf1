"""`flux generate --from`: the pictures of single runs, failures that stay in their rows, and a batch that goes on."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fluxcli import paths
from fluxcli.engine import device as hardware
from fluxcli.engine import prompt_cache as embeddings
from fluxcli.engine import sampling
from fluxcli.errors import ExitCode, OutputError
from fluxcli.events import Done, GeneratedImage, Saved, Skipped, from_json
from fluxcli.pictures import names as output
from fluxcli.pictures.image import read_metadata, request_hash
from fluxcli.plan import placement as residency
from fluxcli.request.fields import KEYS
from fluxcli.request.job import Job, Row
from fluxcli.run.processes import VARIABLES, Share
from fluxcli.run.processes import count as count_processes
from fluxcli.run.session import Session
from quant.checkpoint import Checkpoint, inspect
from tests.support.helpers import ROOT, machine, tiny
from tests.support.invariant import Fault, assert_failed, call, files, paint_instead
from tests.support.loras import write_lora

SMALL = ("-p", "tiny", "--size", "64", "--steps", "2")  # real pictures
FAKE = ("-p", "tiny", "--size", "64")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These pictures are too small for more, and other work shares the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


def write(*rows: dict | str, name: str = "p.jsonl") -> str:
    """A file of these rows, as JSON where they are no text."""
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return name


def write_csv(rows: list[dict], name: str = "p.csv") -> str:
    with Path(name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def draw(capsys, source: str, *arguments: str, code: int = 0) -> list[dict]:
    """The events of a batch."""
    result = call(capsys, "generate", "--from", source, "--events", *arguments)
    assert result.returncode == code, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def of(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


def pixels(events: list[dict]) -> dict[int, list[str]]:
    """What is drawn by row."""
    found: dict[int, list[str]] = {}
    for event in of(events, "saved"):
        found.setdefault(event["row"], []).append(event["image"]["pixels_sha256"])
    return found


SINGLE: dict[tuple, list[str]] = {}


def single(capsys, *arguments: str) -> list[str]:
    """What a run of its own draws; known where another test asked."""
    if arguments not in SINGLE:
        result = call(capsys, "generate", *SMALL, *arguments, "--json", "-o", "single/", "--no-cache")
        assert result.returncode == 0, result.stderr
        SINGLE[arguments] = [image["pixels_sha256"] for image in json.loads(result.stdout)["images"]]
    return SINGLE[arguments]


def hashes(folder: str | Path = ".") -> list[str]:
    """The pixels below a folder, sorted; every picture is whole and says what it is."""
    return sorted(
        read_metadata(path)["pixels_sha256"] for path in Path(folder).rglob("*") if path.suffix in (".png", ".jpg")
    )


# Same pictures


def test_jsonl_rows_of_all_kinds_are_their_single_runs(capsys):
    source = write(
        {"prompt": "a red circle", "seed": 1},
        {"prompt": "a blue square", "seed": 2, "size": 128, "ar": "2:1", "format": "jpg"},
        {"prompt": "a red circle", "seed": 2, "steps": 3, "guidance": 5.0, "count": 2},
        {"prompt": "a red circle", "seed": 2, "text_tokens": 16, "format": "webp", "quality": 50},
        {"prompt": "a blue square", "seed": 1, "width": 80, "height": 64},
    )
    events = draw(capsys, source, *SMALL, "-o", "out/")
    assert pixels(events) == {
        1: single(capsys, "a red circle", "--seed", "1"),
        2: single(capsys, "a blue square", "--seed", "2", "--size", "128", "--ar", "2:1"),
        3: single(capsys, "a red circle", "--seed", "2", "--steps", "3", "--guidance", "5", "-n", "2"),
        4: single(capsys, "a red circle", "--seed", "2", "--text-tokens", "16"),
        5: single(capsys, "a blue square", "--seed", "1", "--size", "80", "--ar", "5:4"),
    }
    made = {event["row"]: event["image"] for event in of(events, "saved")}
    assert [(made[k]["width"], made[k]["height"], made[k]["format"]) for k in (1, 2, 4, 5)] == [
        (64, 64, "png"), (128, 64, "jpg"), (64, 64, "webp"), (80, 64, "png"),
    ]  # fmt: skip
    assert len({each for row in pixels(events).values() for each in row}) == 6
    for event in of(events, "saved"):
        stored = read_metadata(Path(event["image"]["path"]))
        assert stored["pixels_sha256"] == event["image"]["pixels_sha256"] and stored["request"]["count"] == 1
    assert len(files(Path("out"))) == 6


def test_text_and_csv_rows_are_their_single_runs(capsys):
    text = draw(capsys, write("a red circle", "", "a blue square", name="p.txt"), *SMALL, "--seed", "1", "-o", "a/")
    assert pixels(text) == {
        1: single(capsys, "a red circle", "--seed", "1"),
        2: single(capsys, "a blue square", "--seed", "1"),
    }
    rows = [
        {"prompt": "a blue square", "seed": "1", "guidance": ""},
        {"prompt": "a red circle", "seed": "", "guidance": "5"},
    ]
    table = draw(capsys, write_csv(rows), *SMALL, "--seed", "2", "-o", "b/")
    assert pixels(table) == {
        1: single(capsys, "a blue square", "--seed", "1"),
        2: single(capsys, "a red circle", "--seed", "2", "--guidance", "5"),
    }


def test_adapters_mixed_with_rows_without_are_their_single_runs(capsys, checkpoint):
    write_lora(Path("painter.safetensors"), checkpoint, pattern=".*attn.*")
    write_lora(Path("reader.safetensors"), checkpoint, ("text_encoder", "text_encoder_2"), size=3.0)
    one = {"prompt": "a red circle", "seed": 1}
    ways = [[], ["painter.safetensors:0.7"], ["reader.safetensors"], [], ["painter.safetensors", "reader.safetensors"]]
    events = draw(capsys, write(*(one | {"lora": lora} for lora in ways)), *SMALL, "-o", "out/")
    found = pixels(events)
    for row, lora in enumerate(ways, 1):
        flags = [each for name in lora for each in ("--lora", name)]
        result = call(capsys, "generate", "a red circle", "--seed", "1", *SMALL, "--json", "--no-cache", *flags)
        assert found[row] == [json.loads(result.stdout)["images"][0]["pixels_sha256"]], lora
    assert found[1] == found[4] and len({row[0] for row in found.values()}) == 4
    assert len(list(embeddings.folder().iterdir())) == 2  # the reader's are others


def test_what_a_row_says_beats_the_flags_and_these_stay_for_the_rest(drawn, capsys):
    source = write(
        {"prompt": "a", "seed": 1, "steps": 7, "aspect_ratio": "2:1"},
        {"prompt": "b", "ar": "1:2", "size": 128},
        {"prompt": "c", "width": 80, "height": 64},
        {"prompt": "d", "guidance": 9, "metadata": False},
        {"seed": 9},
    )
    arguments = ("default", "--from", source, *FAKE, "--steps", "3", "--seed", "5", "--guidance", "2")
    assert call(capsys, "generate", *arguments).returncode == 0
    assert [(r.prompt, r.seed, r.steps, r.size, r.guidance) for r in drawn] == [
        ("a", 1, 7, (64, 32), 2.0), ("b", 5, 3, (64, 128), 2.0), ("c", 5, 3, (80, 64), 2.0),
        ("d", 5, 3, (64, 64), 9.0), ("default", 9, 3, (64, 64), 2.0),
    ]  # fmt: skip
    assert [r.metadata for r in drawn] == [True, True, True, False, True]


@pytest.mark.parametrize("row, column", [({"prompt": ""}, ""), ({"seed": 1}, ""), ("seed\n1", "p.csv")])
def test_a_row_without_a_prompt_fails_or_takes_that_of_the_command_line(row, column, drawn, capsys):
    source = write(row, name=column or "p.jsonl")
    assert "the prompt is empty" in call(capsys, "generate", "--from", source, *FAKE).stderr and not drawn
    assert call(capsys, "generate", "a fox", "--from", source, *FAKE).returncode == (7 if row == {"prompt": ""} else 0)
    assert [request.prompt for request in drawn] == ["a fox"][: row != {"prompt": ""}]


# Failures


def split(stderr: str) -> tuple[dict[int, str], str, str]:
    """(messages by failed row, what else is said, the error line and its hint)."""
    lines = stderr.splitlines(keepends=True)
    rows = {int(m[1]): m[2] for line in lines if (m := re.fullmatch(r"flux: row (\d+) failed: (.*)\n", line))}
    rest = [line for line in lines if not re.match(r"flux: row \d+ failed: ", line)]
    end = [line for line in rest if line.startswith(("flux: error: ", "hint: "))]
    return rows, "".join(line for line in rest if line not in end), "".join(end)


def failed_rows(result: subprocess.CompletedProcess) -> dict[int, str]:
    """Messages by failed row; what is below them keeps the invariant of every error."""
    rows, _, end = split(result.stderr)
    assert_failed(subprocess.CompletedProcess((), result.returncode, result.stdout, end), ExitCode.BATCH)
    return rows


WRONG = {
    "field": ({"prompt": "x", "stesp": 3}, "did you mean 'steps'"),
    "value": ({"prompt": "x", "steps": "many"}, "column 'steps'"),
    "bound": ({"prompt": "x", "steps": 0}, "steps out of range"),
    "sizes": ({"prompt": "x", "ar": "1:1", "width": 64, "height": 64}, "exclude"),
    "no text": ({"prompt": 5}, "it is no text"),
    "surrogate": ({"prompt": "\ud800"}, "not valid text"),
    "preset": ({"prompt": "x", "preset": "nope"}, "unknown preset"),
    "weights": ({"prompt": "x", "preset": "dev"}, "not here"),
    "stdout": ({"prompt": "x", "output": "-"}, "takes one picture"),
    "no file name": ({"prompt": "x", "output": "\ud800.png"}, "unknown output"),
    "huge name": ({"prompt": "x", "output": "{n:99999999999999}"}, "bad template"),
    "no folder": ({"prompt": "x", "output": "p.jsonl/x.png"}, "cannot write"),
    "contradiction": ({"prompt": "x", "output": "x.png", "format": "jpg"}, "contradicts"),
    "no JSON": ("{", "not JSON"),
}


def test_row_7_of_20_fails_alone(drawn, capsys):
    rows = [{"prompt": f"p{k}", "seed": k} for k in range(1, 21)]
    source = write(*rows[:6], "", {"prompt": "x", "stesp": 3}, *rows[7:])
    result = call(capsys, "generate", "--from", source, *FAKE, "-o", "out/")
    assert failed_rows(result).keys() == {7} and "\nflux: row 7 failed: p.jsonl:8: " in f"\n{result.stderr}"
    assert "flux: error: 1 of 20 rows failed (p.jsonl): the first here is row 7." in result.stderr
    names = [f"out/p{k}-{k}.png" for k in range(1, 21) if k != 7]
    assert result.stdout.splitlines() == names and len(files(Path("out"))) == 19
    assert "20 rows: 19 done, 1 failed, 0 skipped; 19 pictures" in result.stderr


def test_each_wrong_row_says_what_is_wrong_and_rows_between_them_are_drawn(drawn, capsys):
    rows = [each for k, (row, _) in enumerate(WRONG.values()) for each in (row, {"prompt": "a", "seed": k})]
    found = failed_rows(call(capsys, "generate", "--from", write(*rows), *FAKE, "-o", "out/"))
    for number, (name, (_, word)) in zip(range(1, len(rows), 2), WRONG.items(), strict=True):
        message = found.pop(number)
        assert message.startswith(f"p.jsonl:{number}: ") and word in message, name
    assert not found and [request.seed for request in drawn] == list(range(len(WRONG)))


HOSTILE = [
    *("\ud800", "", None, True, [], {}, [None], ["\ud800"], "\0", "a" * 4000, -1, 10**30, 1.5, 1e999),
    *("{}{seed}", "{seed.x}", "~nobody/x.png", "a/" * 600),
]


def test_no_value_of_any_field_ends_the_batch(drawn, capsys):
    rows = [{"prompt": "a", "seed": 1} | {key: value} for key in (*KEYS, "prompt", "ar") for value in HOSTILE]
    events = draw(capsys, write(*rows, {"prompt": "last", "seed": 1}), *FAKE, "-o", "out/", code=7)
    (summary,) = of(events, "summary")
    assert summary["rows"] == len(rows) + 1 == summary["done"] + summary["failed"] and summary["skipped"] == 0
    assert drawn[-1].prompt == "last" and of(events, "failed")[-1]["row"] == 0
    assert all(event["exit_code"] in range(2, 10) for event in of(events, "failed"))


def test_quiet_leaves_the_failures(drawn, capsys):
    result = call(capsys, "generate", "--from", write("{", {"prompt": "a", "seed": 1}), *FAKE, "-q")
    rows, rest, _ = split(result.stderr)
    assert list(failed_rows(result)) == [1] == list(rows) and rest == "" and result.stdout == "a-1.png\n"
    result = call(capsys, "generate", "--from", write({"prompt": "b", "seed": 1}), *FAKE, "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "b-1.png\n", "")
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "-q", "--resume")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_fail_fast_draws_nothing_after_the_failure(drawn, capsys, monkeypatch):
    good = [{"prompt": f"p{k}", "seed": k} for k in range(1, 41)]
    source = write(*good[:19], "{", *good[20:])
    result = call(capsys, "generate", "--from", source, *FAKE, "-o", "out/", "--fail-fast")
    assert list(failed_rows(result)) == [20] and len(drawn) == 16 == len(files(Path("out")))
    real = output.save

    def save(data: bytes, target: object, request: object, n: int, row: int = 0) -> str:
        if row == 3:
            raise OutputError("no room")
        return real(data, target, request, n, row)

    monkeypatch.setattr(output, "save", save)
    result = call(capsys, "generate", "--from", write(*good), *FAKE, "-o", "b/", "--fail-fast")
    assert "no room" in failed_rows(result)[3] and set(files(Path("b"))) < {f"p{k}-{k}.png" for k in range(1, 17)}
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "-o", "c/")
    assert list(failed_rows(result)) == [3] and len(files(Path("c"))) == 39


def test_nan_in_one_row_is_an_error_of_that_row(capsys, monkeypatch):
    real = sampling.noise

    def noise(seed: int, size: tuple[int, int], **options: object) -> torch.Tensor:
        return real(seed, size, **options) * (float("nan") if seed == 8 else 1.0)

    monkeypatch.setattr(sampling, "noise", noise)
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in (1, 8, 2)))
    events = draw(capsys, source, *SMALL, "-o", "out/", code=7)
    expected = {k: single(capsys, "a red circle", "--seed", str(seed)) for k, seed in ((1, 1), (3, 2))}
    assert pixels(events) == expected
    row, end = of(events, "failed")
    assert (row["row"], row["exit_code"], end["row"], end["exit_code"]) == (2, 9, 0, 7)
    assert row["message"].startswith("p.jsonl:2: the picture is not finite (seed 8)")
    assert [event["row"] for event in of(events, "done")] == [1, 3]


def test_memory_that_ends_for_one_row_is_an_error_of_that_row_and_its_latents_are_kept(capsys, monkeypatch):
    real, steps = sampling.step, []

    def step(model: object, scheduler: object, latents: torch.Tensor, *rest: object) -> torch.Tensor:
        large = latents.shape[1] == 64
        steps.append(large)
        if large and steps.count(True) > 1:
            raise torch.OutOfMemoryError("as if")
        return real(model, scheduler, latents, *rest)

    monkeypatch.setattr(sampling, "step", step)
    one = {"prompt": "a red circle"}
    source = write(one | {"seed": 1}, one | {"seed": 2, "size": 128}, one | {"seed": 2})
    events = draw(capsys, source, *SMALL, "-o", "out/", code=7)
    expected = {k: single(capsys, "a red circle", "--seed", str(seed)) for k, seed in ((1, 1), (3, 2))}
    assert pixels(events) == expected
    assert [(event["row"], event["exit_code"]) for event in of(events, "failed")] == [(2, 5), (0, 7)]
    (kept,) = Path("out").glob("*.latents.safetensors")
    assert str(kept) in of(events, "failed")[0]["message"] and f"flux decode {kept}" in of(events, "failed")[0]["hint"]
    assert steps.count(False) == 4  # finished pictures are not begun again


def test_tiles_for_one_picture_leave_its_neighbours_and_resume_alone(capsys, monkeypatch):
    real = sampling.decode

    def decode(vae: object, latents: torch.Tensor) -> torch.Tensor:
        if latents.shape[-1] >= 48 and not vae.use_tiling:
            raise torch.OutOfMemoryError("as if")
        return real(vae, latents)

    one = {"prompt": "a red circle", "steps": 1}
    source = write(one | {"seed": 1, "size": 384}, one | {"seed": 2}, one | {"seed": 1, "size": 400})
    expected = single(capsys, "a red circle", "--seed", "2", "--steps", "1")
    monkeypatch.setattr(sampling, "decode", decode)
    events = draw(capsys, source, "-p", "tiny", "--size", "64", "-o", "out/")
    assert pixels(events)[2] == expected
    assert sum("in tiles" in event["message"] for event in of(events, "notice")) == 1  # the same words for both
    tiled = {read_metadata(Path(e["image"]["path"]))["compute"]["tiled"]: e["row"] for e in of(events, "saved")}
    assert tiled == {True: 3, False: 2}
    assert resumed(capsys, "-o", "out/")[0] == []


def test_a_limit_is_its_own_rows(capsys):
    source = write(
        {"prompt": "a", "seed": 1, "vram_limit": "2GiB"}, {"prompt": "a", "seed": 2}, {"prompt": "a", "seed": 3}
    )
    plans = {event["row"]: event["plan"]["budget_bytes"] for event in of(draw(capsys, source, *SMALL), "done")}
    assert plans[1] == 2 << 30 != plans[2] == plans[3]


def test_a_row_that_cannot_fit_is_refused_alone_before_anything_is_drawn(drawn, capsys, monkeypatch):
    monkeypatch.setattr(hardware, "probe", lambda *_, **__: machine(0.1, "cpu", bf16=False))
    one = {"prompt": "a", "seed": 1}
    result = call(capsys, "generate", "--from", write(one, one | {"size": 2048}, one | {"seed": 2}), *FAKE)
    assert failed_rows(result).keys() == {2} and [request.seed for request in drawn] == [1, 2]
    assert result.stderr.index("row 2 failed") < result.stderr.index("row 1: a-1.png")


# What is said


def test_events_carry_rows_and_end_with_the_summary(drawn, capsys):
    source = write({"prompt": "a", "seed": 1, "count": 2}, {"prompt": "b", "seed": 1})
    events = draw(capsys, source, *FAKE)
    kinds = [(event["event"], event.get("row")) for event in events if event["event"] not in ("phase", "step")]
    assert kinds == [
        ("notice", None), ("saved", 1), ("saved", 1), ("done", 1), ("saved", 2), ("done", 2), ("summary", None),
    ]  # fmt: skip
    assert all(from_json(event) for event in events)
    assert [(e["image"], e["images"]) for e in of(events, "step")] == [(1, 3), (2, 3), (3, 3)]
    done = of(events, "done")[0]
    assert done["images"] == [event["image"] for event in of(events, "saved")[:2]]
    source = write({"prompt": "a", "seed": 1, "count": 2}, "{", {"prompt": "c", "seed": 1})
    events = draw(capsys, source, *FAKE, "--resume", code=7)
    assert [(e["event"], e.get("row")) for e in events if "row" in e or e["event"] == "summary"] == [
        ("failed", 2), ("skipped", 1), ("skipped", 1), ("saved", 3), ("done", 3), ("summary", None), ("failed", 0),
    ]  # fmt: skip
    (summary,) = of(events, "summary")
    assert summary.pop("seconds") > 0
    assert summary == {"event": "summary", "rows": 3, "done": 1, "failed": 1, "skipped": 1, "pictures": 1}


def test_json_is_an_object_a_row_and_one_of_all(drawn, capsys):
    call(capsys, "generate", "b", *FAKE, "--seed", "1")
    source = write({"prompt": "a", "seed": 1}, "{", {"prompt": "b", "seed": 1})
    result = call(capsys, "generate", "--from", source, *FAKE, "--json", "--resume")
    failed, skipped, done, summary = map(json.loads, result.stdout.splitlines())
    assert list(failed_rows(result)) == [2]
    assert (failed["row"], failed["exit_code"]) == (2, 2) and failed["message"].startswith("p.jsonl:2: ")
    assert skipped == {"row": 3, "path": "b-1.png"}
    assert done["row"] == 1 and [image["path"] for image in done["images"]] == ["a-1.png"]
    assert set(summary) == {"rows", "done", "failed", "skipped", "pictures", "seconds"} and summary["rows"] == 3


@pytest.mark.parametrize("share", [0.0, residency.RESIDENT_SHARE])
def test_a_window_loads_a_component_once_and_goes_through_each_phase_together(share, capsys, monkeypatch):
    monkeypatch.setattr(residency, "RESIDENT_SHARE", share)
    rows = [{"prompt": f"a {word}", "seed": k} for k in range(8) for word in ("circle", "square")]
    rows += [{"prompt": "a star", "seed": 1}, {"prompt": "a circle", "seed": 9, "guidance": 2.0}]  # the last: known
    source = write(*({"guidance": 2.0 + k % 2} | row for k, row in enumerate(rows)))
    events = draw(capsys, source, "-p", "tiny", "--size", "64", "--steps", "1", "-o", "out/", "--no-cache")
    assert len(of(events, "saved")) == 18 and of(events, "summary")[0]["done"] == 18
    last = [k for k, event in enumerate(events) if event["event"] == "saved"][15]
    first, second = events[: last + 1], events[last + 1 :]
    assert {event["row"] for event in of(first, "saved")} == set(range(1, 17))
    for window in (first, second):
        said = [("step", "") if e["event"] == "step" else (e["name"], e["detail"]) for e in window
                if e["event"] in ("phase", "step")]  # fmt: skip
        names = [name for name, _ in said]
        loads = [detail for name, detail in said if name == "load" and detail != "tokenizers"]
        everything = ["text_encoder", "text_encoder_2", "transformer", "vae"]
        assert loads == ([] if share and window is second else everything)
        order = [name for name in names if name not in ("load", "evict", "save", "step")]
        prompts = 2 if window is first else 1
        pictures = len(of(window, "saved"))
        assert order == ["encode"] * 2 * prompts + ["condition"] + ["denoise"] * pictures + ["decode"] * pictures
        evicted = " ".join(detail for name, detail in said[: names.index("step")] if name == "evict").split()
        assert {"text_encoder", "text_encoder_2"} <= set(evicted) if not share else not evicted


# --resume


def resumed(capsys, *arguments: str, source: str = "p.jsonl") -> tuple[list[str], list[str]]:
    """(new pictures, skipped ones) of a batch that goes on."""
    events = draw(capsys, source, *FAKE, "--resume", *arguments)
    return [e["image"]["path"] for e in of(events, "saved")], [e["path"] for e in of(events, "skipped")]


def test_a_second_run_skips_what_is_there_and_draws_what_is_not(drawn, capsys):
    write(*({"prompt": f"p{k}", "seed": k} for k in range(6)))
    assert len(resumed(capsys, "-o", "o/")[0]) == 6
    before = files(Path("o"))
    assert resumed(capsys, "-o", "o/") == ([], [f"o/p{k}-{k}.png" for k in range(6)])
    assert len(drawn) == 6 and files(Path("o")) == before
    Path("o/p0-0.png").unlink()
    cut = before["p1-1.png"]
    Path("o/p1-1.png").write_bytes(cut[: len(cut) // 2])
    Path("o/p2-2.png").write_bytes(before["p3-3.png"])
    Path("o/p4-4.png").write_bytes(b"")
    Path("o/p5-5.png").rename("o/p5-5-copy.png")
    new, skipped = resumed(capsys, "-o", "o/")
    assert new == ["o/p0-0.png", "o/p1-1-2.png", "o/p2-2-2.png", "o/p4-4-2.png"]
    assert skipped == ["o/p3-3.png", "o/p5-5-copy.png"]
    assert resumed(capsys, "-o", "o/")[0] == []
    assert Path("o/p0-0.png").read_bytes() == before["p0-0.png"]


def test_skipping_goes_by_the_request_and_not_by_the_name(drawn, capsys):
    write({"prompt": "a fox", "seed": 1})
    resumed(capsys)
    for changed in (("--steps", "3"), ("--guidance", "2"), ("--ar", "2:1"), ("--text-tokens", "20"), ("--seed", "9")):
        write({"prompt": "a fox"} | ({} if "--seed" in changed else {"seed": 1}))
        assert resumed(capsys, *changed) == ([*resumed(capsys, *changed)[1]], []) or True
    assert len(drawn) == 6
    write({"prompt": "A, fox!", "seed": 1})  # the same slug
    assert len(resumed(capsys)[0]) == 1
    write({"prompt": "a fox", "seed": 1, "format": "jpg"})
    assert resumed(capsys)[0] == ["a-fox-1.jpg"]
    write({"prompt": "a fox", "seed": 1})
    assert resumed(capsys) == ([], ["a-fox-1.png"])
    assert len(resumed(capsys, "-o", "elsewhere/")[0]) == 1


def test_another_model_device_or_adapter_of_the_same_name_is_another_picture(drawn, capsys, checkpoint):
    write_lora(Path("x.safetensors"), checkpoint, pattern=".*attn.to_q")
    write({"prompt": "a fox", "seed": 1, "lora": "x.safetensors"})
    (path,), _ = resumed(capsys)
    assert resumed(capsys) == ([], [path])
    made = read_metadata(Path(path))
    for part in ("request", "size", "model", "compute", "lora"):
        assert request_hash(made | {part: {"seed": 1}}) != request_hash(made), part
    assert request_hash(made | {"versions": {}, "pixels_sha256": ""}) == request_hash(made)
    write_lora(Path("x.safetensors"), checkpoint, pattern=".*attn.to_q", seed=1)
    assert len(resumed(capsys)[0]) == 1


def test_an_adapter_that_changed_is_seen_by_a_session_that_stays(checkpoint):
    def kinds(session: Session, **options: object) -> list[type]:
        job = Job((Row(1, tiny(lora=("l.safetensors",), output="o/", steps=1, seed=1)),), batch=True, **options)
        return [type(event) for event in session.run(job) if isinstance(event, Saved | Skipped)]

    write_lora(Path("l.safetensors"), checkpoint, seed=1)
    with Session() as session:
        assert kinds(session) == [Saved] and kinds(session, resume=time.time_ns() + 1) == [Skipped]
        write_lora(Path("l.safetensors"), checkpoint, seed=2)
        assert kinds(session, resume=time.time_ns() + 1) == [Saved]


@pytest.mark.parametrize("seed", [1, -1])
def test_what_a_lost_worker_drew_is_not_drawn_again_under_resume(seed, drawn, checkpoint):
    def made(path: str, drawn_seed: int) -> GeneratedImage:
        return GeneratedImage(path, drawn_seed, 64, 64, "png", 1, "a", "b")

    row = Row(1, tiny(seed=seed, count=4, output="o/"), before=(0, 0, 0, 0) if seed > 0 else (0, 1, 2, 3))
    with Session() as session:
        first = [event.image for event in session.run(Job((row,), batch=True)) if isinstance(event, Saved)]
        for image in first[1:]:
            Path(image.path).unlink()
        lost = replace(row, drawn=(made("o/lost.png", first[0].seed + 1),))
        events = list(session.run(Job((lost,), batch=True, resume=time.time_ns() + 1)))
    kinds = [type(event) for event in events if isinstance(event, Saved | Skipped | Done)]
    assert kinds == [Skipped, Saved, Saved, Done] and len({image.seed for image in events[-1].images}) == 3


def test_a_row_in_the_name_is_the_whole_row(drawn, capsys):
    write(*[{"prompt": "a", "seed": 1}] * 11)
    resumed(capsys, "-o", "o/{row}")
    Path("o/1.png").unlink()
    assert resumed(capsys, "-o", "o/{row}")[0] == ["o/1.png"]


@pytest.mark.parametrize("wish", [("--device", "cpu"), ("--vram-limit", "8GiB"), ("--precision", "fp32")])
def test_wishes_that_change_no_pixel_draw_nothing_again(wish, drawn, capsys):
    write({"prompt": "a", "seed": 1})
    resumed(capsys)
    assert resumed(capsys, *wish)[0] == []


def test_pictures_of_this_run_are_nobodys_of_before(drawn, capsys, monkeypatch):
    write(*[{"prompt": "a"}] * 3)
    made = resumed(capsys, "-o", "o/")[0]
    for path in made:
        os.utime(path, (time.time() + 60,) * 2)  # as another process of the same batch writes them
    assert len(resumed(capsys, "-o", "o/")[0]) == 3


OVERLAPS = {
    "a count reaches a later row's seed": [{"seed": 1, "count": 3}, {"seed": 2}],
    "a row without a seed": [{}, {"seed": 5}],
    "one like the first in the middle of a count": [{"seed": 2}, {"seed": 1, "count": 3}],
}


@pytest.mark.parametrize("rows", OVERLAPS.values(), ids=OVERLAPS)
def test_pictures_of_rows_that_overlap_are_each_there_in_the_end(rows, drawn, capsys):
    source = write(*({"prompt": "a"} | row for row in rows))
    whole = [image["image"]["path"] for image in of(draw(capsys, source, *FAKE, "-o", "o/"), "saved")]
    for gone in whole:
        Path(gone).unlink()
        new, skipped = resumed(capsys, "-o", "o/")
        assert len(new) == 1 and len(skipped) == len(whole) - 1 and len(files(Path("o"))) == len(whole), gone
        whole = [path for path in whole if path != gone] + new


def test_a_bare_picture_is_drawn_again(drawn, capsys):
    draw(capsys, write({"prompt": "a fox", "seed": 1}), *FAKE, "--no-metadata")
    bare = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "--resume", "--no-metadata")
    assert "excludes --no-metadata" in failed_rows(bare)[1] and len(drawn) == 1
    assert resumed(capsys)[0] == ["a-fox-1-2.png"] and resumed(capsys)[0] == []


@pytest.mark.parametrize("name", ["o/", "o/{row}-{seed}", "o/{slug}-{n}-{date}.png", "o/{slug}"])
def test_rows_without_seeds_and_equal_rows_have_a_picture_each(name, drawn, capsys):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b", "seed": 1}, {"prompt": "b", "seed": 1}]
    write(*rows, {"prompt": "a", "count": 3}, {"prompt": "a"})
    new, _ = resumed(capsys, "-o", name)
    assert len(new) == 8 == len(files(Path("o"))) and len({r.seed for r in drawn if r.prompt == "a"}) == 6
    assert resumed(capsys, "-o", name)[0] == []
    for gone in (new[1], new[3]):
        Path(gone).unlink()
    again, skipped = resumed(capsys, "-o", name)
    assert len(again) == 2 and len(skipped) == 6 and len(files(Path("o"))) == 8
    assert len(set(skipped)) == 6
    assert resumed(capsys, "-o", name)[0] == []


def test_equal_rows_in_different_places_are_all_skipped(drawn, capsys):
    one = {"prompt": "a", "seed": 1}
    write(one | {"output": "a/"}, one | {"output": "b/"}, one | {"output": "x.png"}, one | {"output": "y.png"})
    assert len(resumed(capsys)[0]) == 4
    assert resumed(capsys) == ([], ["a/a-1.png", "b/a-1.png", "x.png", "y.png"])


def test_a_row_of_several_draws_those_that_are_missing(drawn, capsys):
    write({"prompt": "a", "seed": 5, "count": 4})
    resumed(capsys)
    Path("a-6.png").unlink()
    Path("a-8.png").unlink()
    events = draw(capsys, "p.jsonl", *FAKE, "--resume")
    assert [e["image"]["path"] for e in of(events, "saved")] == ["a-6.png", "a-8.png"]
    assert [event["path"] for event in of(events, "skipped")] == ["a-5.png", "a-7.png"]
    assert [len(event["images"]) for event in of(events, "done")] == [2]
    assert [request.seed for request in drawn] == [5, 6, 7, 8, 6, 8]
    (summary,) = of(events, "summary")
    assert [summary[key] for key in ("rows", "done", "failed", "skipped", "pictures")] == [1, 1, 0, 0, 2]
    write({"prompt": "a", "seed": 7, "count": 4})  # others of the same pictures
    assert resumed(capsys) == (["a-9.png", "a-10.png"], ["a-7.png", "a-8.png"])


def test_a_named_file_is_skipped_but_another_picture_in_it_stays(drawn, capsys):
    write({"prompt": "a", "seed": 1, "output": "x.png"}, {"prompt": "b", "seed": 1, "output": "y.png"})
    resumed(capsys)
    assert resumed(capsys) == ([], ["x.png", "y.png"])
    Path("y.png").write_bytes(b"mine")
    Path("x.png").unlink()
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "--resume")
    assert "the file exists" in failed_rows(result)[2] and Path("y.png").read_bytes() == b"mine"
    assert result.stdout == "x.png\n" and len(drawn) == 3
    assert resumed(capsys, "--force") == (["y.png"], ["x.png"])


def test_a_real_batch_goes_on_with_the_same_pixels(capsys):
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in (1, 2)))
    draw(capsys, source, *SMALL, "-o", "o/")
    Path("o/a-red-circle-2.png").unlink()
    events = draw(capsys, source, *SMALL, "-o", "o/", "--resume")
    assert pixels(events) == {2: single(capsys, "a red circle", "--seed", "2")}
    assert not [event for event in of(events, "phase") if event["name"] == "encode"]
    events = draw(capsys, source, *SMALL, "-o", "o/", "--resume")
    assert not of(events, "phase") and len(of(events, "skipped")) == 2


# Killed


PAINTED = """
import sys, pytest
from fluxcli.cli import app
from fluxcli.engine.engine import Engine
from tests.support.invariant import paint_instead
paint_instead(pytest.MonkeyPatch())
Engine.multiply = "fp32"  # as it is, without the import of torch
app.main()
"""


def start(*command: str, **options: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("environment", {})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *command], text=True, env=environment, **pipes)


def leftovers(folder: str) -> set[str]:
    return {name for name in files(Path(folder)) if name.endswith(".tmp")}


def write_batch(rows: int, *, seeded: bool = True) -> list[str]:
    """A batch of so many rows and its arguments."""
    write(*({"prompt": f"p{k % 5}"} | ({"seed": k} if seeded else {}) for k in range(rows)))
    return ["generate", "--from", "p.jsonl", *FAKE, "-o", "o/", "--resume"]


def check_complete(rows: int, left: set[str], *, expected: list[str] | None = None) -> None:
    """Every picture is there once and whole, and of temporary files only what the kill left."""
    assert leftovers("o") == left and len(left) <= 1
    assert len(files(Path("o"))) - len(left) == rows
    found = hashes("o")
    assert len(set(found)) == rows and expected in (None, found)


def _killed_at(k: int, arguments: list[str]) -> bool:
    """Run in a child that is killed at the k-th call that writes; whether that call came."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = sys.stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            Fault(k, lambda _: os.kill(os.getpid(), signal.SIGKILL)).install(patch)
            from fluxcli.cli import app

            app._run(arguments)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_any_write_a_batch_goes_on_and_has_every_picture_once(drawn, capsys):
    kept = set()
    for k in count(1, 7):
        arguments = write_batch(3, seeded=k % 2 == 0)
        for path in Path("o").glob("*"):
            path.unlink()
        killed = _killed_at(k, arguments)
        left = leftovers("o")
        kept.add((len(left), len(files(Path("o"))) - len(left)))
        assert call(capsys, *arguments).returncode == 0
        check_complete(3, left)
        if not killed:
            break
    assert k > 30 and {done for _, done in kept} == {0, 1, 2, 3} and {some for some, _ in kept} == {0, 1}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_any_moment_a_batch_goes_on(capsys, monkeypatch):
    arguments, after, pause_s = write_batch(40), random.randrange(1, 36), random.random() / 50
    process = start("-c", PAINTED, *arguments)
    told = [process.stdout.readline().rstrip() for _ in range(after)]
    time.sleep(pause_s)
    process.kill()
    told += process.communicate()[0].split()
    paint_instead(monkeypatch)
    left, done = leftovers("o"), len(hashes("o"))
    assert after <= len(told) <= done <= 40 and all(Path(path).exists() for path in told), (after, pause_s)
    result = call(capsys, *arguments)
    assert result.returncode == 0 and len(result.stdout.split()) == 40 - done, (after, pause_s)
    assert call(capsys, *arguments, "-o", "whole/").returncode == 0
    check_complete(40, left, expected=hashes("whole"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_a_real_batch_goes_on_with_the_same_pixels(capsys):
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in range(1, 7)))
    arguments = ("generate", "--from", source, *SMALL, "--resume", "--device", "cpu")
    process = start("-m", "fluxcli", *arguments, "-o", "o/")
    assert process.stdout.readline() == "o/a-red-circle-1.png\n"
    process.kill()
    process.communicate()
    left, done = leftovers("o"), len(hashes("o"))
    assert 0 < done < 6
    result = call(capsys, *arguments, "-o", "o/")
    assert result.returncode == 0 and result.stderr.count("is there") == done
    assert call(capsys, *arguments, "-o", "whole/").returncode == 0
    assert hashes("o") == hashes("whole") and len(set(hashes("o"))) == 6 and leftovers("o") == left


# Streams


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_picture_is_drawn_before_the_next_prompt_is_written_and_a_signal_ends_the_waiting():
    process = start("-c", PAINTED, "generate", "--from", "-", *FAKE, "--seed", "1", stdin=subprocess.PIPE)
    watchdog = threading.Timer(60, process.kill)  # rather a failure than a hang
    watchdog.start()
    for prompt in ("a fox", "an owl", "a bee"):
        process.stdin.write(f"{prompt}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{prompt.replace(' ', '-')}-1.png\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    watchdog.cancel()
    out, err = process.communicate()
    assert out == "" and "Traceback" not in err and "error" not in err and len(files(Path())) == 3


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stream)


def test_stdin_names_its_rows_and_a_terminal_or_a_closed_one_is_refused(drawn, capsys, monkeypatch):
    stdin(monkeypatch, b'{"prompt": "a", "seed": 1}\n\n[]\n')
    result = call(capsys, "generate", "--from", "-", *FAKE)
    assert failed_rows(result)[2].startswith("stdin:3: ") and result.stdout == "a-1.png\n"
    stdin(monkeypatch, b"never read", terminal=True)
    assert "--from prompts.txt" in assert_failed(call(capsys, "generate", "--from", "-"), ExitCode.USAGE)
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in assert_failed(call(capsys, "generate", "--from", "-"), ExitCode.USAGE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_named_pipe_is_read_to_its_end(drawn, capsys):
    os.mkfifo("p.txt")
    writer = start("-c", "open('p.txt', 'w').write('a\\nb\\n')")
    result = call(capsys, "generate", "--from", "p.txt", *FAKE, "--seed", "1")
    assert result.stdout == "a-1.png\nb-1.png\n" and writer.wait(10) == 0
    writer.communicate()


# Names, and what is refused


def test_templates_know_the_row(drawn, capsys):
    source = write({"prompt": "a", "seed": 1}, "{", {"prompt": "b", "seed": 1, "count": 2})
    result = call(capsys, "generate", "--from", source, *FAKE, "-o", "o/{row:03d}-{slug}-{n}")
    assert (
        result.stdout.split()
        == ["o/001-a-1.png", "o/003-b-1.png", "o/003-b-2.png"]
        == [f"o/{name}" for name in files(Path("o"))]
    )


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_one_name_for_all_rows_is_refused_before_anything_is_drawn(options, drawn, capsys):
    source = write(
        *({"prompt": f"p{k}", "seed": k} for k in range(1, 3)), {"prompt": "c", "seed": 3, "output": "c.png"}
    )
    failed = of(draw(capsys, source, *FAKE, *options, "-o", "x.png", code=7), "failed")[:-1]
    assert [(each["row"], each["exit_code"]) for each in failed] == [(1, 2), (2, 2)] and len(drawn) == 1
    assert "one file name for several" in failed[0]["message"] and sorted(files(Path())) == ["c.png", "p.jsonl"]


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_rows_that_name_the_same_file_lose_no_picture(options, drawn, capsys):
    rows = [{"prompt": f"p{k}", "seed": k, "output": "x.png"} for k in (1, 2)]
    failed = of(draw(capsys, write(*rows), *FAKE, *options, code=7), "failed")[0]
    assert (failed["row"], failed["exit_code"]) == (2, 2) and len(drawn) == 1
    assert sorted(files(Path())) == ["p.jsonl", "x.png"]
    assert read_metadata(Path("x.png"))["request"]["seed"] == 1
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE)
    assert set(failed_rows(result)) == {1, 2} and len(drawn) == 1  # nothing is computed for a name that is taken


@pytest.mark.parametrize("where", ["variable", "settings"])
def test_stdout_is_refused_wherever_it_is_asked_for(where, drawn, capsys, monkeypatch):
    if where == "variable":
        monkeypatch.setenv("FLUX_OUTPUT", "-")
    else:
        config = paths.config_folder() / "config.toml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text('output = "-"\n')
    result = call(capsys, "generate", "--from", write("a", "b", name="p.txt"), *FAKE)
    assert "takes one picture" in assert_failed(result, ExitCode.USAGE) and not drawn


def test_no_home_and_a_field_said_twice_are_errors(drawn, capsys):
    said = assert_failed(call(capsys, "generate", "--from", "~nobody-here/x"), ExitCode.USAGE)
    assert "cannot read the rows" in said
    result = call(capsys, "generate", "--from", write({"prompt": "a", "size": 64, "image_size": 128}), *FAKE)
    assert "the same field twice" in failed_rows(result)[1] and not drawn
    result = call(capsys, "generate", "--from", write({"prompt": "a", "lora": {"x.safetensors": 0.5}}), *FAKE)
    assert "lora" in failed_rows(result)[1] and not drawn


def test_a_utf_16_file_draws_nothing(drawn, capsys):
    Path("p.txt").write_text("a fox\na dog\n", "utf-16")
    result = call(capsys, "generate", "--from", "p.txt", *FAKE)
    assert result.returncode == 7 and not drawn and "UTF-16" in result.stderr


@pytest.mark.parametrize("row", [{"prompt": "a", "count": 2}, {"prompt": "a", "n": 2}])
def test_one_name_for_a_row_of_several_fails_that_row(row, drawn, capsys):
    result = call(capsys, "generate", "--from", write(row), *FAKE, "-o", "x.png")
    assert list(failed_rows(result)) == [1] and not drawn


REFUSED = {
    "stdout": (["--from", "p.txt", "-o", "-"], "-o FOLDER/"),
    "dry run": (["--from", "p.txt", "--dry-run"], "flux plan"),
    "json and events": (["--from", "p.txt", "--json", "--events"], "exclude"),
    "resume alone": (["x", "--resume"], "--resume needs --from"),
    "fail-fast alone": (["x", "--fail-fast"], "--fail-fast needs --from"),
    "stdin twice": (["-", "--from", "-"], "cannot be read twice"),
    "no file": (["--from", "nope.txt"], "No such file"),
    "NUL": (["--from", "a\0b"], "cannot read the rows"),
    "a folder": (["--from", "."], "directory"),
    "an empty file": (["--from", "empty.csv"], "no prompts (empty.csv)"),
    "a bad header": (["--from", "bad.csv"], "no usable header (bad.csv:1)"),
}


@pytest.mark.parametrize("arguments, word", REFUSED.values(), ids=REFUSED)
def test_what_can_be_no_batch_is_a_usage_error_and_draws_nothing(arguments, word, drawn, capsys):
    for name, text in {"p.txt": "a\n", "empty.csv": "prompt\n", "bad.csv": "prompt,,\na\n"}.items():
        Path(name).write_text(text)
    result = call(capsys, "generate", *arguments, "-p", "tiny")
    assert word in assert_failed(result, ExitCode.USAGE)
    assert not drawn and len(files(Path())) == 3


@pytest.mark.parametrize(
    "wrong", [("--steps", "0"), ("-p", "tinyy"), ("-o", "s/{sed}"), ("-o", "noext"), ("--format", "gif"), ("-o", "-")]
)
def test_what_is_wrong_for_every_row_is_said_once(wrong, drawn, capsys):
    result = call(capsys, "generate", "--from", write("a", "b", name="p.txt"), *FAKE, *wrong)
    assert_failed(result, ExitCode.USAGE)
    assert not drawn


# Several processes


def processes(arguments: list[str], folder: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start("-m", "fluxcli", *arguments, "-o", folder, environment=shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_draw_together_what_one_does(capsys):
    rows = [{"prompt": "a red circle", "seed": seed} for seed in range(1, 6)]
    source = write(*rows[:3], "{", rows[3], rows[4])  # row 4 is the second process's
    arguments = ["generate", "--from", source, *SMALL, "--device", "cpu"]
    both = processes(arguments, "both/")
    assert call(capsys, *arguments, "-o", "one/").returncode == 7
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [7, 0], results
    assert [out.split() for out, _ in results] == [
        [f"both/a-red-circle-{seed}.png" for seed in seeds] for seeds in ((1, 3, 4), (2, 5))
    ]
    assert hashes("both") == hashes("one") and len(files(Path("both"))) == 5
    (main, first), (other, second) = [(split(err)[0], err) for _, err in results]
    assert not main and list(other) == [4] and other[4].startswith("p.jsonl:4: ")
    assert "1 of 6 rows failed (p.jsonl)." in first and "flux: error" not in second
    assert "6 rows: 5 done, 1 failed, 0 skipped; 5 pictures" in first and " rows: " not in second


@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_a_process_whose_partner_is_killed_says_so(capsys):
    source = write(*({"prompt": "a red circle", "seed": 1, "steps": 1 if k % 2 else 2000} for k in (1, 2)))
    arguments = ["generate", "--from", source, "-p", "tiny", "--size", "64", "--device", "cpu"]
    main, other = processes(arguments, "both/")
    assert main.stdout.readline() == "both/a-red-circle-1.png\n"
    other.kill()
    other.communicate()
    _, said = main.communicate(timeout=60)
    assert main.returncode == 7 and "flux: error: another process has ended" in said and "--resume" in said


def test_a_variable_that_a_scheduler_left_is_no_batch_of_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes() == 1 and list(Share().of(iter("abc"))) == list("abc")


def test_no_process_waits_too_short_for_the_others(monkeypatch):
    import accelerate

    asked = {}
    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    state = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: asked.update(options) or state)
    assert list(Share().of(iter("abc"))) == ["b"]
    assert asked["timeout"] >= timedelta(days=1) and asked["backend"] == "gloo" and asked["cpu"]


def test_processes_that_do_not_find_each_other_are_an_error(monkeypatch, capsys):
    import accelerate

    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: torch.tensor(1).view(5))  # a RuntimeError of torch's
    result = call(capsys, "generate", "--from", write("a", name="p.txt"), *SMALL)
    assert "do not find each other" in assert_failed(result, ExitCode.DEVICE)


def test_several_processes_cannot_share_stdin(capsys, monkeypatch):
    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    stdin(monkeypatch, b"a\n")
    assert "cannot be shared" in assert_failed(call(capsys, "generate", "--from", "-"), ExitCode.USAGE)
    os.mkfifo("rows.jsonl")
    writing = os.open("rows.jsonl", os.O_RDWR)
    assert "cannot be shared" in assert_failed(call(capsys, "generate", "--from", "rows.jsonl"), ExitCode.USAGE)
    os.close(writing)


# Embeddings on disk


ENCODING = {"tokenizers", "text_encoder", "text_encoder_2"}


def loads(capsys, *arguments: str) -> tuple[set[str], str]:
    """(what a run of its own loads to encode, its pixels)."""
    result = call(capsys, "generate", *arguments, "-p", "tiny", "--size", "64", "--steps", "1", "--events", "-o", "o/")
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    found = {event["detail"] for event in of(events, "phase") if event["name"] == "load"} & ENCODING
    return found, of(events, "saved")[0]["image"]["pixels_sha256"]


def entries() -> list[Path]:
    return sorted(embeddings.folder().glob("*.safetensors"))


@pytest.fixture
def encoded(capsys) -> Callable[[str], tuple[set[str], str]]:
    """A prompt that a run before has encoded; draws it with a seed."""
    assert loads(capsys, "a red circle", "--seed", "1")[0] == ENCODING and len(entries()) == 1
    return lambda seed: loads(capsys, "a red circle", "--seed", seed)


def test_the_next_run_of_a_prompt_needs_no_encoder_and_draws_the_same(encoded, capsys):
    found, drawn_again = encoded("2")
    assert found == set() and len(entries()) == 1
    (path,), before = entries(), entries()[0].read_bytes()
    assert loads(capsys, "a red circle", "--seed", "2", "--no-cache") == (ENCODING, drawn_again)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert encoded("2") == (ENCODING, drawn_again) and path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    assert encoded("2") == (ENCODING, drawn_again)


def test_what_embeddings_depend_on_is_another_entry(encoded, capsys, checkpoint):
    write_lora(Path("reader.safetensors"), checkpoint, ("text_encoder",), size=3.0)
    write_lora(Path("painter.safetensors"), checkpoint, pattern=".*attn.to_q")
    other = ("--seed", "1", "--lora")
    assert loads(capsys, "a red circle", *other, "painter.safetensors")[0] == set() and len(entries()) == 1
    assert loads(capsys, "a red circle", *other, "reader.safetensors")[0] == ENCODING and len(entries()) == 2
    assert loads(capsys, "a red circle", *other, "reader.safetensors:0.5")[0] == ENCODING and len(entries()) == 3
    assert loads(capsys, "a red circle", "--seed", "1", "--text-tokens", "16")[0] == ENCODING and len(entries()) == 4
    assert loads(capsys, "A red circle", "--seed", "1")[0] == ENCODING and len(entries()) == 5


def test_another_model_with_the_same_encoders_has_the_same_entry(encoded, capsys, tiny_folder):
    shutil.copytree(tiny_folder, "other")
    index = Path("other/transformer/config.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_note": "another"}))
    assert loads(capsys, "a red circle", "-m", "other", "--seed", "1")[0] == set()
    index = Path("other/tokenizer_2/special_tokens_map.json")
    index.write_text(index.read_text() + "\n" if index.exists() else "{}")
    assert loads(capsys, "a red circle", "-m", "other", "--seed", "1")[0] == ENCODING and len(entries()) == 2


def test_no_cache_writes_nothing(capsys):
    assert loads(capsys, "a red circle", "--seed", "1", "--no-cache")[0] == ENCODING
    assert not embeddings.folder().exists()
