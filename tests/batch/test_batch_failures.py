"""A row that fails leaves the others: bad fields, no memory, NaN, no room."""

import json
from pathlib import Path

import pytest
import torch

from fluxcli.engine import decode, denoise
from fluxcli.engine import device as hardware
from fluxcli.errors import ExitCode, OutputError
from fluxcli.pictures import names as output
from fluxcli.pictures.image import read_metadata
from fluxcli.request.settings import SETTINGS as KEYS
from tests.support.batches import (
    FAKE,
    SMALL,
    draw,
    failed_rows,
    of,
    pixels,
    resumed,
    single,
    split,
    write,
)
from tests.support.helpers import machine
from tests.support.invariant import assert_failed, call, files

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
    assert (
        failed_rows(result).keys() == {7}
        and "\nflux: row 7 failed: p.jsonl:8: " in f"\n{result.stderr}"
    )
    assert "flux: error: 1 of 20 rows failed (p.jsonl): the first here is row 7." in result.stderr
    names = [f"out/p{k}-{k}.png" for k in range(1, 21) if k != 7]
    assert result.stdout.splitlines() == names and len(files(Path("out"))) == 19
    assert "20 rows: 19 done, 1 failed, 0 skipped; 19 pictures" in result.stderr


def test_each_wrong_row_says_what_is_wrong_and_rows_between_them_are_drawn(drawn, capsys):
    rows = [
        each
        for k, (row, _) in enumerate(WRONG.values())
        for each in (row, {"prompt": "a", "seed": k})
    ]
    found = failed_rows(call(capsys, "generate", "--from", write(*rows), *FAKE, "-o", "out/"))
    for number, (name, (_, word)) in zip(range(1, len(rows), 2), WRONG.items(), strict=True):
        message = found.pop(number)
        assert message.startswith(f"p.jsonl:{number}: ") and word in message, name
    assert not found and [order.request.seed for order in drawn] == list(range(len(WRONG)))


HOSTILE = [
    *(
        "\ud800",
        "",
        None,
        True,
        [],
        {},
        [None],
        ["\ud800"],
        "\0",
        "a" * 4000,
        -1,
        10**30,
        1.5,
        1e999,
    ),
    *("{}{seed}", "{seed.x}", "~nobody/x.png", "a/" * 600),
]


def test_no_value_of_any_field_ends_the_batch(drawn, capsys):
    rows = [
        {"prompt": "a", "seed": 1} | {key: value}
        for key in (*KEYS, "prompt", "ar")
        for value in HOSTILE
    ]
    events = draw(capsys, write(*rows, {"prompt": "last", "seed": 1}), *FAKE, "-o", "out/", code=7)
    (summary,) = of(events, "summary")
    assert (
        summary["rows"] == len(rows) + 1 == summary["done"] + summary["failed"]
        and summary["skipped"] == 0
    )
    assert drawn[-1].request.prompt == "last" and of(events, "failed")[-1]["row"] == 0
    assert all(event["exit_code"] in range(2, 10) for event in of(events, "failed"))


def test_quiet_leaves_the_failures(drawn, capsys):
    result = call(capsys, "generate", "--from", write("{", {"prompt": "a", "seed": 1}), *FAKE, "-q")
    rows, rest, _ = split(result.stderr)
    assert (
        list(failed_rows(result)) == [1] == list(rows)
        and rest == ""
        and result.stdout == "a-1.png\n"
    )
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

    def save(data: bytes, destination: output.Destination) -> str:
        if destination.row == 3:
            raise OutputError("no room")
        return real(data, destination)

    monkeypatch.setattr(output, "save", save)
    result = call(capsys, "generate", "--from", write(*good), *FAKE, "-o", "b/", "--fail-fast")
    assert "no room" in failed_rows(result)[3] and set(files(Path("b"))) < {
        f"p{k}-{k}.png" for k in range(1, 17)
    }
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "-o", "c/")
    assert list(failed_rows(result)) == [3] and len(files(Path("c"))) == 39


def test_nan_in_one_row_is_an_error_of_that_row(capsys, monkeypatch):
    real = denoise.make_noise

    def noise(seed: int, size: tuple[int, int], **options: object) -> torch.Tensor:
        return real(seed, size, **options) * (float("nan") if seed == 8 else 1.0)

    monkeypatch.setattr(denoise, "make_noise", noise)
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in (1, 8, 2)))
    events = draw(capsys, source, *SMALL, "-o", "out/", code=7)
    expected = {
        k: single(capsys, "a red circle", "--seed", str(seed)) for k, seed in ((1, 1), (3, 2))
    }
    assert pixels(events) == expected
    row, end = of(events, "failed")
    assert (row["row"], row["exit_code"], end["row"], end["exit_code"]) == (2, 9, 0, 7)
    assert row["message"].startswith("p.jsonl:2: the picture is not finite (seed 8)")
    assert [event["row"] for event in of(events, "done")] == [1, 3]


def test_memory_that_ends_for_one_row_is_an_error_of_that_row_and_its_latents_are_kept(
    capsys, monkeypatch
):
    real, steps = denoise.take_step, []

    def step(
        model: object, scheduler: object, latents: torch.Tensor, **rest: object
    ) -> torch.Tensor:
        large = latents.shape[1] == 64
        steps.append(large)
        if large and steps.count(True) > 1:
            raise torch.OutOfMemoryError("as if")
        return real(model, scheduler, latents, **rest)

    monkeypatch.setattr(denoise, "take_step", step)
    one = {"prompt": "a red circle"}
    source = write(one | {"seed": 1}, one | {"seed": 2, "size": 128}, one | {"seed": 2})
    events = draw(capsys, source, *SMALL, "-o", "out/", code=7)
    expected = {
        k: single(capsys, "a red circle", "--seed", str(seed)) for k, seed in ((1, 1), (3, 2))
    }
    assert pixels(events) == expected
    assert [(event["row"], event["exit_code"]) for event in of(events, "failed")] == [
        (2, 5),
        (0, 7),
    ]
    (kept,) = Path("out").glob("*.latents.safetensors")
    assert (
        str(kept) in of(events, "failed")[0]["message"]
        and f"flux decode {kept}" in of(events, "failed")[0]["hint"]
    )
    assert steps.count(False) == 4  # finished pictures are not begun again
    monkeypatch.setattr(denoise, "take_step", real)
    # what is kept is finished, not drawn again
    events = draw(capsys, source, *SMALL, "-o", "out/", "--resume")
    assert [(step["index"], step["total"]) for step in of(events, "step")] == [(2, 2)]
    assert pixels(events) == {2: single(capsys, "a red circle", "--seed", "2", "--size", "128")}
    assert len(of(events, "skipped")) == 2
    Path("out/a-red-circle-2-2.png").unlink()
    # another picture of that name
    events = draw(capsys, source, *SMALL, "-o", "out/", "--resume", "--guidance", "2")
    assert len(of(events, "step")) == 6


def test_tiles_for_one_picture_leave_its_neighbours_and_resume_alone(capsys, monkeypatch):
    real = decode.decode_latents

    def decode_latents(vae: object, latents: torch.Tensor) -> torch.Tensor:
        if latents.shape[-1] >= 48 and not vae.use_tiling:
            raise torch.OutOfMemoryError("as if")
        return real(vae, latents)

    one = {"prompt": "a red circle", "steps": 1}
    source = write(
        one | {"seed": 1, "size": 384}, one | {"seed": 2}, one | {"seed": 1, "size": 400}
    )
    expected = single(capsys, "a red circle", "--seed", "2", "--steps", "1")
    monkeypatch.setattr(decode, "decode_latents", decode_latents)
    events = draw(capsys, source, "-p", "tiny", "--size", "64", "-o", "out/")
    assert pixels(events)[2] == expected
    # the same words for both
    assert sum("in tiles" in event["message"] for event in of(events, "notice")) == 1
    tiled = {
        read_metadata(Path(e["image"]["path"]))["compute"]["tiled"]: e["row"]
        for e in of(events, "saved")
    }
    assert tiled == {True: 3, False: 2}
    assert resumed(capsys, "-o", "out/")[0] == []


def test_a_limit_is_its_own_rows(capsys):
    source = write(
        {"prompt": "a", "seed": 1, "vram_limit": "2GiB"},
        {"prompt": "a", "seed": 2},
        {"prompt": "a", "seed": 3},
    )
    plans = {
        event["row"]: event["plan"]["budget_bytes"]
        for event in of(draw(capsys, source, *SMALL), "done")
    }
    assert plans[1] == 2 << 30 != plans[2] == plans[3]


def test_a_row_that_cannot_fit_is_refused_alone_before_anything_is_drawn(
    drawn, capsys, monkeypatch
):
    monkeypatch.setattr(hardware, "probe", lambda *_, **__: machine(0.1, "cpu", bf16=False))
    one = {"prompt": "a", "seed": 1}
    result = call(
        capsys, "generate", "--from", write(one, one | {"size": 2048}, one | {"seed": 2}), *FAKE
    )
    assert failed_rows(result).keys() == {2} and [order.request.seed for order in drawn] == [1, 2]
    assert result.stderr.index("row 2 failed") < result.stderr.index("row 1: a-1.png")


def test_missing_weights_of_the_command_line_are_one_error(drawn, capsys):
    source = write(*({"prompt": f"p{k}"} for k in range(40)))
    result = call(capsys, "generate", "--from", source, "-p", "dev")
    assert "FLUX.1-dev are not here" in assert_failed(result, ExitCode.WEIGHTS)
    assert len(result.stderr.splitlines()) == 2 and not drawn


def test_rows_that_fail_alike_are_said_together_and_are_events_of_their_own(drawn, capsys):
    wrong, good = {"prompt": "x", "steps": 0}, {"prompt": "x", "seed": 1}
    rows = [*[wrong] * 40, good, wrong, {"prompt": "x", "steps": "many"}, wrong]
    command = ("generate", "--from", write(*rows), *FAKE)
    failures = [*range(1, 41), 42, 43, 44]
    result = call(capsys, *command)
    assert result.stderr.count("steps out of range") == 1
    assert "flux: row 1 failed: p.jsonl:1: steps out of range" in result.stderr
    assert "flux: row 43 failed: p.jsonl:43: " in result.stderr
    assert " failed as row 43 did" not in result.stderr
    assert sorted(failed_rows(result)) == failures and len(result.stderr) < 2000
    for option in ("--json", "--events"):
        events = [json.loads(line) for line in call(capsys, *command, option).stdout.splitlines()]
        failed = [event for event in events if "exit_code" in event and event["row"]]
        assert [event["row"] for event in failed] == failures
        for event in failed:
            assert event["message"].startswith(f"p.jsonl:{event['row']}: ")


def test_missing_weights_are_of_their_rows_where_another_row_names_a_model(drawn, capsys):
    rows = [{"prompt": f"p{k}"} for k in range(20)]
    source = write(*rows, {"prompt": "q", "preset": "tiny", "seed": 1})
    result = call(capsys, "generate", "--from", source, "-p", "dev", "--size", "64")
    assert list(failed_rows(result)) == list(range(1, 21)) and len(drawn) == 1


@pytest.mark.parametrize(
    "prompt, word",
    [
        ("a fox --n blurry --w 512 --h 768 --s 28 --d 42 --l 7", "columns"),
        ('--prompt "a fox" --steps 20', "columns"),
        ("# a note", "--comments"),
        ("a fox -- n - w", ""),
    ],
)
def test_what_other_tools_take_for_more_than_words_is_said_once(prompt, word, drawn, capsys):
    source = write(prompt, prompt, name="p.txt")
    result = call(capsys, "generate", "--from", source, *FAKE, "--seed", "1")
    assert result.returncode == 0 and len(drawn) == 2
    assert result.stderr.count(word or "columns") == bool(word)
    assert ("p.txt:1: " in result.stderr) == bool(word)
