"""What files and settings are, for people on a terminal; elsewhere it is JSON."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from fluxcli.cli import show
from quant.checkpoint import inspect
from tests.support.invariant import call
from tests.support.loras import write_special
from tests.support.terminals import read_until

END = "the end"


@pytest.fixture
def on_terminal(capsys, monkeypatch):
    """A function that returns what a command shows on a terminal of its stdout, and its code."""
    openpty = pytest.importorskip("pty").openpty
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> tuple[str, int]:
        ours, theirs = openpty()
        with os.fdopen(theirs, "w", buffering=1) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            code = call(capsys, *arguments).returncode
            stream.write(END)
            stream.flush()
            shown = read_until(ours, END.encode(), 10).decode()
        os.close(ours)
        return shown.removesuffix(END).replace("\r\n", "\n"), code

    return run


def test_a_picture_is_a_few_lines_on_a_terminal_and_json_elsewhere(drawn, on_terminal, capsys):
    call(capsys, "generate", "a fox", "-p", "tiny", "--seed", "5", "-o", "x.png")
    shown, code = on_terminal("inspect", "x.png")
    lines = dict(line.split(None, 1) for line in shown.splitlines())
    assert code == 0 and lines["prompt"] == "a fox" and lines["seed"] == "5"
    assert lines["size"] == "128x128" and lines["model"] == "bundled/tiny (preset tiny)"
    assert len(shown.splitlines()) < 12 and "null" not in shown and "None" not in shown
    as_json = json.loads(on_terminal("inspect", "x.png", "--json")[0])
    assert as_json == json.loads(call(capsys, "inspect", "x.png").stdout)
    call(capsys, "generate", "a fox", "-p", "tiny", "--image", "x.png", "-o", "y.png")
    shown, _ = on_terminal("inspect", "y.png")
    lines = dict(line.split(None, 1) for line in shown.splitlines())
    assert lines["image"].endswith("x.png") and lines["strength"] == "0.6" and "mask" not in lines


def test_a_model_is_a_table_of_its_parts_with_problems_below(tiny_folder, on_terminal):
    shown, code = on_terminal("inspect", str(tiny_folder))
    rows = [line.split() for line in shown.splitlines()]
    assert code == 0 and rows[-2][:2] == ["transformer", "BF16"] and "154 of 154" in shown
    shutil.copytree(tiny_folder, "lacking", ignore=shutil.ignore_patterns("vae"))
    shown, code = on_terminal("inspect", "lacking")
    assert code == 4 and "bad  vae is missing" in shown


def test_a_lora_is_shown_by_both_commands_alike(on_terminal, capsys, tiny_folder):
    path = write_special(Path("mine.safetensors"), inspect(tiny_folder))
    shown, code = on_terminal("inspect", str(path))
    assert code == 0 and "a LoRA" in shown and "rank" in shown
    assert on_terminal("lora", "info", str(path))[0].splitlines()[1:] == shown.splitlines()[1:]
    json.loads(call(capsys, "lora", "info", str(path)).stdout)


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        ([], "-"),
        (True, "yes"),
        (False, "no"),
        (3.0, "3"),
        (0, "0"),
        (["a", 1], "a, 1"),
    ],
)
def test_values_are_said_in_words(value, text):
    assert show.describe_value(value) == text


def test_what_strangers_write_is_shown_and_controls_nothing(on_terminal, monkeypatch):
    metadata = {
        "request": {"prompt": "\x1b[31mred\u202e", "seed": {"a": [1]}, "lora": 3},
        "size": "big",
        "compute": ["x"],
        "versions": {"python": None},
    }
    Path("x.png").touch()
    monkeypatch.setattr("fluxcli.pictures.image.read_metadata", lambda _: metadata)
    shown, code = on_terminal("inspect", "x.png")
    assert code == 0 and "\x1b" not in shown and "python -" in shown


def test_presets_and_models_are_in_plain_words(on_terminal, capsys):
    rows = dict(line.split(None, 1) for line in call(capsys, "presets", "dev").stdout.splitlines())
    assert {"ar", "size"} <= set(rows) and not {"aspect_ratio", "image_size"} & set(rows)
    assert rows["metadata"].startswith("yes ") and rows["lora"].startswith("- ")
    assert rows["seed"].startswith("a new one")
    shown, _ = on_terminal("models", "list")
    assert shown.split()[:5] == ["model", "from", "commit", "state", "size"]
    assert call(capsys, "models", "list").stdout.startswith("bundled/tiny  flux itself  -")
