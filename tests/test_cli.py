"""The command line: what is taken, what is refused before anything heavy loads, and what goes
where.
"""

import hashlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import typer

from fluxcli.cli.app import app
from fluxcli.errors import ExitCode
from fluxcli.pictures.image import read_metadata
from tests.support.helpers import ROOT
from tests.support.invariant import assert_failed, call, files

GIVEN = ("generate", "a fox", "-p", "tiny", "--seed", "5")


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch):
    """Nothing heavier than the request may be touched, and no file."""
    Path("old.png").write_bytes(b"old")

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("went on to the model")

    monkeypatch.setattr("fluxcli.models.find.locate", reached)
    monkeypatch.setattr("fluxcli.engine.device.probe", reached)
    yield
    assert files(Path()) == {"old.png": b"old"}


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stream)


REFUSED = {
    "no prompt": (["generate"], "prompt"),
    "empty": (["generate", ""], "prompt is empty"),
    "blank": (["generate", " \n\t"], "prompt is empty"),
    "words without quotes": (["generate", "a", "fox"], "quote"),
    "no UTF-8": (["generate", "ab\udcffc"], "byte 2"),
    "unknown command": (["generat", "x"], "did you mean 'generate'"),
    "unknown subcommand": (["models", "downlaod", "dev"], "did you mean 'download'"),
    "near-miss option": (["generate", "x", "--stps", "4"], "did you mean --steps"),
    "near-miss of two": (["generate", "x", "--guidence", "4"], "did you mean --guidance"),
    "far option": (["generate", "x", "--zzz"], "--zzz"),
    "no value": (["generate", "x", "--steps"], "--steps"),
    "no number": (["generate", "x", "--steps", "many"], "--steps"),
    "steps 0": (["generate", "x", "--steps", "0"], "--steps"),
    "guidance NaN": (["generate", "x", "--guidance", "nan"], "--guidance"),
    "guidance text": (["generate", "x", "--guidance", "much"], "--guidance"),
    "quality 0": (["generate", "x", "--quality", "0"], "--quality"),
    "quality 101": (["generate", "x", "--quality", "101"], "--quality"),
    "seed -2": (["generate", "x", "--seed", "-2"], "--seed"),
    "seed 2^64": (["generate", "x", "--seed", str(2**64)], "--seed"),
    "count 0": (["generate", "x", "-n", "0"], "--count"),
    "text tokens": (["generate", "x", "--text-tokens", "513"], "--text-tokens"),
    "ratio 0:9": (["generate", "x", "--ar", "0:9"], "--ar"),
    "ratio a:b": (["generate", "x", "--ar", "a:b"], "16:9"),
    "ratio 1e9:1": (["generate", "x", "--ar", "1e9:1"], "--ar"),
    "size no multiple": (["generate", "x", "--size", "1000"], "992 and 1008"),
    "size 0": (["generate", "x", "--size", "0"], "64"),
    "size huge": (["generate", "x", "--size", "999999999"], "4096"),
    "width and size": (["generate", "x", "--width", "512", "--size", "512"], "--height"),
    "three sides": (["generate", "x", "--width", "512", "--size", "512x512"], "exclude"),
    "no size": (["generate", "x", "--size", "big"], "--size 1024"),
    "odd size": (["generate", "x", "--size", "1000x700"], "nearest"),
    "no seed": (["generate", "x", "--seed", "abc"], "whole number"),
    "two sizes": (["generate", "x", "--width", "512", "--height", "512", "--ar", "1:1"], "exclude"),
    "format": (["generate", "x", "--format", "gif"], "--format"),
    "extension": (["generate", "x", "-o", "x.gif"], "jpg, png, webp"),
    "contradiction": (["generate", "x", "-o", "x.png", "--format", "jpg"], "--format"),
    "one name for two": (["generate", "x", "-o", "x.png", "-n", "2"], "{seed}"),
    "template": (["generate", "x", "-o", "{nope}.png"], "{seed}"),
    "stdout for two": (["generate", "x", "-o", "-", "-n", "2"], "--count"),
    "stdout twice": (["generate", "x", "-o", "-", "--json"], "exclude"),
    "json and events": (["generate", "x", "--json", "--events"], "exclude"),
    "device": (["generate", "x", "--device", "gpu"], "--device"),
    "preset": (["generate", "x", "-p", "drafft"], "did you mean 'draft'"),
    "unknown preset shown": (["presets", "drafft"], "did you mean 'draft'"),
}


@pytest.mark.parametrize("arguments, word", REFUSED.values(), ids=REFUSED)
def test_usage_errors_are_exit_2_before_a_model_or_a_file_is_touched(
    arguments, word, unmoved, capsys
):
    result = call(capsys, *arguments)
    message = assert_failed(result, ExitCode.USAGE)
    assert word in message
    if "--events" in arguments:
        failed = json.loads(result.stdout)
        assert (
            failed["event"] == "failed"
            and failed["exit_code"] == 2
            and failed["message"] in message
        )
    else:
        assert result.stdout == ""


def test_after_two_dashes_everything_is_prompt(drawn, capsys):
    assert call(capsys, *GIVEN[:1], *GIVEN[2:], "--", "--steps of stone").returncode == 0
    assert drawn[0].request.prompt == "--steps of stone" and Path("steps-of-stone-5.png").exists()
    assert "-a" in assert_failed(call(capsys, "generate", "-a", "-p", "tiny"), ExitCode.USAGE)


@pytest.mark.parametrize(
    "data, prompt",
    [
        (b"a fox", "a fox"),
        (b"\xef\xbb\xbfa fox\r\n", "a fox"),
        (b"a\r\nfox\n\n", "a\nfox"),
        ("狐 🦊".encode(), "狐 🦊"),
    ],
)
def test_a_dash_reads_the_prompt_from_stdin_to_its_end(data, prompt, drawn, capsys, monkeypatch):
    stdin(monkeypatch, data)
    assert call(capsys, "generate", "-", "-p", "tiny").returncode == 0
    assert drawn[0].request.prompt == prompt


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf\r\n", "empty"),
        (b"abc\xff", "byte 3"),
        (b"\xef\xbb\xbfa\xff", "byte 4"),
    ],
)
def test_stdin_that_is_no_prompt_is_refused(data, word, unmoved, capsys, monkeypatch):
    stdin(monkeypatch, data)
    assert word in assert_failed(call(capsys, "generate", "-"), ExitCode.USAGE)


def test_stdin_on_a_terminal_or_closed_is_a_hint_not_a_hang(unmoved, capsys, monkeypatch):
    stdin(monkeypatch, b"never read", terminal=True)
    assert "| flux generate -" in assert_failed(call(capsys, "generate", "-"), ExitCode.USAGE)
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in assert_failed(call(capsys, "generate", "-"), ExitCode.USAGE)


def test_a_byte_order_mark_is_no_part_of_a_prompt(drawn, capsys):
    call(capsys, "generate", "\ufeffa fox", "-p", "tiny")
    assert drawn[0].request.prompt == "a fox"


def test_stdout_has_the_paths_and_stderr_the_rest(drawn, capsys):
    result = call(capsys, *GIVEN, "-n", "3", "-o", "pics/")
    names = [f"pics/a-fox-{seed}.png" for seed in (5, 6, 7)]
    assert result.returncode == 0 and result.stdout.splitlines() == names == sorted(files(Path()))
    assert (
        all(name in result.stderr for name in names)
        and "128x128" in result.stderr
        and "\x1b" not in result.stderr
    )


def test_quiet_leaves_stderr_empty(drawn, capsys):
    result = call(capsys, *GIVEN, "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a-fox-5.png\n", "")


def test_json_is_one_object_that_repeats_the_run(drawn, capsys):
    result = call(capsys, *GIVEN, "-n", "2", "--json", "-o", "x/")
    done = json.loads(result.stdout)
    assert set(done) == {"images", "request", "plan", "timings_s", "peak_memory", "versions", "row"}
    assert [image["seed"] for image in done["images"]] == [5, 6]
    for image in done["images"]:
        data = Path(image["path"]).read_bytes()
        assert image["bytes"] == len(data) and image["sha256"] == hashlib.sha256(data).hexdigest()
        assert (image["width"], image["height"], image["format"]) == (128, 128, "png")
        stored = read_metadata(Path(image["path"]))
        assert (
            stored["pixels_sha256"] == image["pixels_sha256"]
            and stored["request"]["seed"] == image["seed"]
        )
    assert (
        done["request"]["prompt"] == "a fox"
        and done["request"]["count"] == 2
        and done["request"]["seed"] == 5
    )
    assert {"denoise", "save", "total"} <= set(done["timings_s"]) and done["peak_memory"][
        "rss_bytes"
    ] > 0
    assert done["timings_s"]["total"] >= done["timings_s"]["denoise"] >= 0


def test_events_are_one_object_a_line_and_end_with_done(drawn, capsys):
    result = call(capsys, *GIVEN, "-n", "2", "--events")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["notice", *["phase", "step"] * 2, *["phase", "saved"] * 2, "done"]
    assert [e["image"]["path"] for e in events if e["event"] == "saved"] == [
        "a-fox-5.png",
        "a-fox-6.png",
    ]
    assert events[-1]["images"] == [e["image"] for e in events if e["event"] == "saved"]


def test_a_random_seed_is_reported(drawn, capsys):
    seed = json.loads(call(capsys, "generate", "a fox", "-p", "tiny", "--json").stdout)["images"][
        0
    ]["seed"]
    assert seed >= 0 and drawn[0].request.seed == seed and Path(f"a-fox-{seed}.png").exists()


def test_stdout_takes_the_picture_and_nothing_else(drawn, capsysbinary):
    from fluxcli.cli.app import run

    assert run([*GIVEN, "-o", "-", "--format", "webp"]) == 0
    data = capsysbinary.readouterr().out
    Path("x.webp").write_bytes(data)
    assert data[:4] == b"RIFF" and len(data) == 8 + int.from_bytes(data[4:8], "little")
    assert read_metadata(Path("x.webp"))["request"]["seed"] == 5 and len(files(Path())) == 1


def test_no_metadata_writes_a_bare_picture(drawn, capsys):
    call(capsys, *GIVEN, "--no-metadata")
    assert b"fox" not in Path("a-fox-5.png").read_bytes()


def test_a_file_that_exists_is_exit_6_before_the_compute(drawn, capsys):
    Path("x.png").write_bytes(b"old")
    assert "--force" in assert_failed(call(capsys, *GIVEN, "-o", "x.png"), ExitCode.OUTPUT)
    assert not drawn and files(Path()) == {"x.png": b"old"}
    assert call(capsys, *GIVEN, "-o", "x.png", "--force").returncode == 0
    assert read_metadata(Path("x.png"))


def test_pictures_that_are_finished_are_kept_when_a_later_one_fails(drawn, capsys, monkeypatch):
    from fluxcli.pictures import names as output

    real = output.write_atomically

    def fails_third(path, data, **options):
        if "7" in path.name:
            raise OSError(28, "No space left on device")
        real(path, data, **options)

    monkeypatch.setattr(output, "write_atomically", fails_third)
    result = call(capsys, *GIVEN, "-n", "4", "-q")
    assert "disk is full" in assert_failed(result, ExitCode.OUTPUT)
    assert result.stdout.split() == sorted(files(Path())) == ["a-fox-5.png", "a-fox-6.png"]


def test_a_dry_run_says_what_and_why_and_writes_nothing(drawn, capsys):
    text = call(capsys, *GIVEN, "--ar", "16:9", "--size", "256", "--dry-run", "-o", "new/").stdout
    assert "256x144" in text and "seed 5" in text and "because" in text and "GiB" in text
    plan = json.loads(call(capsys, *GIVEN, "--dry-run", "--json").stdout)
    assert plan["size"] == [128, 128] and plan["request"]["seed"] == 5 and plan["plan"]["reasons"]
    assert not drawn and list(Path().iterdir()) == []


def test_absent_weights_are_exit_3_with_both_ways_on(drawn, capsys):
    message = assert_failed(call(capsys, "generate", "a fox"), ExitCode.WEIGHTS)
    assert "flux models download" in message and "-p tiny" in message and not drawn


def test_presets_are_listed_and_shown_with_origins(capsys, monkeypatch):
    assert [line.split()[0] for line in call(capsys, "presets").stdout.splitlines()][-2:] == [
        "tiny",
        "turbo",
    ]
    assert set(json.loads(call(capsys, "presets", "--json").stdout)) >= {"dev", "tiny"}
    monkeypatch.setenv("FLUX_STEPS", "33")
    rows = dict(
        line.split(None, 1) for line in call(capsys, "presets", "schnell").stdout.splitlines()
    )
    assert re.fullmatch(r"33 +FLUX_STEPS", rows["steps"]) and re.fullmatch(
        r"none +preset schnell", rows["guidance"]
    )
    assert json.loads(call(capsys, "presets", "tiny", "--json").stdout)["steps"] == {
        "value": 33,
        "origin": "FLUX_STEPS",
    }


def commands(group: object, path: str = "flux") -> list[tuple[str, object]]:
    found = [(path, group)]
    for name, command in getattr(group, "commands", {}).items():
        found += [] if command.hidden else commands(command, f"{path} {name}")
    return found


@pytest.mark.parametrize(
    "path, command", commands(typer.main.get_command(app)), ids=lambda value: str(value)[:40]
)
def test_every_command_and_option_is_documented(path, command):
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    if not getattr(command, "commands", None):
        assert f"`{path} " in text or f"`{path}`" in text
    for option in command.params:
        names = option.opts if option.param_type_name == "option" else []
        assert all(re.search(rf"`(?:flux )?{re.escape(name)}\b", text) for name in names), names


def test_debug_adds_the_traceback_and_nothing_else_changes(capsys):
    result = call(capsys, "generate", "x", "--ar", "0:9", "--debug")
    assert (
        result.returncode == ExitCode.USAGE
        and "Traceback" in result.stderr
        and "UsageError" in result.stderr
    )
    assert "NoneType: None" not in result.stderr and result.stderr.count("flux: error:") == 1
    assert "Traceback" not in call(capsys, "generate", "x", "--ar", "0:9", "--", "--debug").stderr
