"""A batch draws the pictures of single runs, says so row by row, and goes through the phases
together.
"""

import json
from pathlib import Path

import pytest

from fluxcli.engine import prompt_cache as embeddings
from fluxcli.events import from_json
from fluxcli.pictures.image import read_metadata
from fluxcli.plan import placement
from quant.checkpoint import Checkpoint, inspect
from tests.support.batches import (
    FAKE,
    SMALL,
    draw,
    failed_rows,
    of,
    pixels,
    single,
    write,
    write_csv,
)
from tests.support.invariant import call, files
from tests.support.loras import write_lora


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


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
        3: single(
            capsys, "a red circle", "--seed", "2", "--steps", "3", "--guidance", "5", "-n", "2"
        ),
        4: single(capsys, "a red circle", "--seed", "2", "--text-tokens", "16"),
        5: single(capsys, "a blue square", "--seed", "1", "--size", "80", "--ar", "5:4"),
    }
    made = {event["row"]: event["image"] for event in of(events, "saved")}
    assert [(made[k]["width"], made[k]["height"], made[k]["format"]) for k in (1, 2, 4, 5)] == [
        (64, 64, "png"),
        (128, 64, "jpg"),
        (64, 64, "webp"),
        (80, 64, "png"),
    ]
    assert len({each for row in pixels(events).values() for each in row}) == 6
    for event in of(events, "saved"):
        stored = read_metadata(Path(event["image"]["path"]))
        assert (
            stored["pixels_sha256"] == event["image"]["pixels_sha256"]
            and stored["request"]["count"] == 1
        )
    assert len(files(Path("out"))) == 6


def test_text_and_csv_rows_are_their_single_runs(capsys):
    text = draw(
        capsys,
        write("a red circle", "", "a blue square", name="p.txt"),
        *SMALL,
        "--seed",
        "1",
        "-o",
        "a/",
    )
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
    ways = [
        [],
        ["painter.safetensors:0.7"],
        ["reader.safetensors"],
        [],
        ["painter.safetensors", "reader.safetensors"],
    ]
    events = draw(capsys, write(*(one | {"lora": lora} for lora in ways)), *SMALL, "-o", "out/")
    found = pixels(events)
    for row, lora in enumerate(ways, 1):
        flags = [each for name in lora for each in ("--lora", name)]
        result = call(
            capsys,
            "generate",
            "a red circle",
            "--seed",
            "1",
            *SMALL,
            "--json",
            "--no-cache",
            *flags,
        )
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
    arguments = (
        "default",
        "--from",
        source,
        *FAKE,
        "--steps",
        "3",
        "--seed",
        "5",
        "--guidance",
        "2",
    )
    assert call(capsys, "generate", *arguments).returncode == 0
    assert [
        (r.request.prompt, r.request.seed, r.request.steps, r.request.size, r.request.guidance)
        for r in drawn
    ] == [
        ("a", 1, 7, (64, 32), 2.0),
        ("b", 5, 3, (64, 128), 2.0),
        ("c", 5, 3, (80, 64), 2.0),
        ("d", 5, 3, (64, 64), 9.0),
        ("default", 9, 3, (64, 64), 2.0),
    ]
    assert [r.output.metadata for r in drawn] == [True, True, True, False, True]


@pytest.mark.parametrize(
    "row, column", [({"prompt": ""}, ""), ({"seed": 1}, ""), ("seed\n1", "p.csv")]
)
def test_a_row_without_a_prompt_fails_or_takes_that_of_the_command_line(row, column, drawn, capsys):
    source = write(row, name=column or "p.jsonl")
    assert (
        "the prompt is empty" in call(capsys, "generate", "--from", source, *FAKE).stderr
        and not drawn
    )
    assert call(capsys, "generate", "a fox", "--from", source, *FAKE).returncode == (
        7 if row == {"prompt": ""} else 0
    )
    assert [order.request.prompt for order in drawn] == ["a fox"][: row != {"prompt": ""}]


def test_events_carry_rows_and_end_with_the_summary(drawn, capsys):
    source = write({"prompt": "a", "seed": 1, "count": 2}, {"prompt": "b", "seed": 1})
    events = draw(capsys, source, *FAKE)
    kinds = [
        (event["event"], event.get("row"))
        for event in events
        if event["event"] not in ("phase", "step")
    ]
    assert kinds == [
        ("notice", None),
        ("saved", 1),
        ("saved", 1),
        ("done", 1),
        ("saved", 2),
        ("done", 2),
        ("summary", None),
    ]
    assert all(from_json(event) for event in events)
    assert [(e["image"], e["images"]) for e in of(events, "step")] == [(1, 3), (2, 3), (3, 3)]
    done = of(events, "done")[0]
    assert done["images"] == [event["image"] for event in of(events, "saved")[:2]]
    source = write({"prompt": "a", "seed": 1, "count": 2}, "{", {"prompt": "c", "seed": 1})
    events = draw(capsys, source, *FAKE, "--resume", code=7)
    assert [
        (e["event"], e.get("row")) for e in events if "row" in e or e["event"] == "summary"
    ] == [
        ("failed", 2),
        ("skipped", 1),
        ("skipped", 1),
        ("saved", 3),
        ("done", 3),
        ("summary", None),
        ("failed", 0),
    ]
    (summary,) = of(events, "summary")
    assert summary.pop("seconds") > 0
    assert summary == {
        "event": "summary",
        "rows": 3,
        "done": 1,
        "failed": 1,
        "skipped": 1,
        "pictures": 1,
    }


def test_json_is_an_object_a_row_and_one_of_all(drawn, capsys):
    call(capsys, "generate", "b", *FAKE, "--seed", "1")
    source = write({"prompt": "a", "seed": 1}, "{", {"prompt": "b", "seed": 1})
    result = call(capsys, "generate", "--from", source, *FAKE, "--json", "--resume")
    failed, skipped, done, summary = map(json.loads, result.stdout.splitlines())
    assert list(failed_rows(result)) == [2]
    assert (failed["row"], failed["exit_code"]) == (2, 2) and failed["message"].startswith(
        "p.jsonl:2: "
    )
    assert skipped == {"row": 3, "path": "b-1.png"}
    assert done["row"] == 1 and [image["path"] for image in done["images"]] == ["a-1.png"]
    assert (
        set(summary) == {"rows", "done", "failed", "skipped", "pictures", "seconds"}
        and summary["rows"] == 3
    )


@pytest.mark.parametrize("share", [0.0, placement.RESIDENT_SHARE])
def test_a_window_loads_a_component_once_and_decodes_each_picture_at_once(
    share, capsys, monkeypatch
):
    monkeypatch.setattr(placement, "RESIDENT_SHARE", share)
    rows = [{"prompt": f"a {word}", "seed": k} for k in range(8) for word in ("circle", "square")]
    rows += [
        {"prompt": "a star", "seed": 1},
        {"prompt": "a circle", "seed": 9, "guidance": 2.0},
    ]  # the last: known
    source = write(*({"guidance": 2.0 + k % 2} | row for k, row in enumerate(rows)))
    events = draw(
        capsys, source, "-p", "tiny", "--size", "64", "--steps", "1", "-o", "out/", "--no-cache"
    )
    assert len(of(events, "saved")) == 18 and of(events, "summary")[0]["done"] == 18
    last = [k for k, event in enumerate(events) if event["event"] == "saved"][15]
    first, second = events[: last + 1], events[last + 1 :]
    assert {event["row"] for event in of(first, "saved")} == set(range(1, 17))
    for window in (first, second):
        said = [
            ("step", "") if e["event"] == "step" else (e["name"], e["detail"])
            for e in window
            if e["event"] in ("phase", "step")
        ]
        names = [name for name, _ in said]
        loads = [detail for name, detail in said if name == "load" and detail != "tokenizers"]
        everything = ["text_encoder", "text_encoder_2", "transformer", "vae"]
        assert loads == ([] if share and window is second else everything)
        order = [name for name in names if name not in ("load", "evict", "save", "step")]
        prompts = 2 if window is first else 1
        pictures = len(of(window, "saved"))
        together = ["encode"] * 2 * prompts + ["condition"]
        assert order == together + ["denoise", "decode"] * pictures
        evicted = " ".join(
            detail for name, detail in said[: names.index("step")] if name == "evict"
        ).split()
        assert {"text_encoder", "text_encoder_2"} <= set(evicted) if not share else not evicted
