"""`flux generate`: what is said of options without effect, and what a run leaves behind that never
began.
"""

import json
from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.errors import ExitCode
from fluxcli.pictures.image import read_metadata
from quant.spec import BAKEABLE, SCHEMES
from tests.support.helpers import read_pixels
from tests.support.invariant import assert_failed, call, paint_instead

TINY = (
    "generate",
    "a red circle",
    "-p",
    "tiny",
    "--steps",
    "2",
    "--size",
    "64",
    "--seed",
    "3",
    "--device",
    "cpu",
)


def test_a_prompt_that_begins_with_a_dash_is_told_about_the_double_dash(capsys):
    message = assert_failed(call(capsys, "generate", "-5 degrees", "-p", "tiny"), ExitCode.USAGE)
    assert "generate -- '-5 degrees'" in message


def test_options_without_effect_are_said(capsys, monkeypatch):
    paint_instead(monkeypatch)
    result = call(capsys, "generate", "x", "-p", "tiny", "--quality", "50", "--force", "-o", "out/")
    assert result.returncode == 0
    assert (
        "--quality does nothing for png" in result.stderr
        and "--force does nothing" in result.stderr
    )


def test_jpeg_is_jpg(capsys, monkeypatch):
    paint_instead(monkeypatch)
    result = call(capsys, "generate", "x", "-p", "tiny", "--format", "jpeg", "-o", "out/")
    assert result.stdout.strip().endswith(".jpg")


def test_a_run_that_fails_early_leaves_no_folder(capsys):
    assert_failed(call(capsys, "generate", "x", "-o", "new/{seed}/"), ExitCode.WEIGHTS)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("to", BAKEABLE)
def test_a_precision_is_the_same_picture_packed_while_loading_baked_or_found(to, baked, capsys):
    from quant.linear import find_multiply

    folder = baked(to, text_encoder=SCHEMES[to].text_encoder)
    packed = call(capsys, *TINY, "--precision", to, "-o", "packed.png", "--json")
    assert packed.returncode == 0 and f"flux quantize ... --to {to} saves that" in packed.stderr
    paths.baked_folder().mkdir(parents=True)
    (paths.baked_folder() / "found").symlink_to(folder)
    found = call(capsys, *TINY, "--precision", to, "-o", "found.png", "--json")
    given = call(capsys, *TINY, "-m", str(folder), "-o", "given.png", "--json")
    for result in (packed, found, given):
        plan = json.loads(result.stdout)["plan"]
        assert (plan["precision"], plan["multiply"]) == (to, find_multiply(to, "cpu"))
        assert plan["multiply"] in {"nf4": ("dequantize",), "fp8": ("scaled_mm", "dequantize")}.get(
            to, ("int_mm", "dequantize")
        )
    for result in (found, given):
        assert (
            result.returncode == 0
            and "flux quantize" not in result.stderr
            and f"in {to}" in result.stderr
        )
    pictures = [Path(f"{name}.png") for name in ("packed", "found", "given")]
    assert len({read_pixels(path).tobytes() for path in pictures}) == 1
    described = [read_metadata(path) for path in pictures]
    computed = {(m["compute"]["precision"], m["compute"]["multiply"]) for m in described}
    assert computed == {(to, find_multiply(to, "cpu"))}
    assert [m["request"]["precision"] for m in described] == [to, to, "auto"]
    assert described[1]["model"]["fingerprint"] == described[2]["model"]["fingerprint"]
    same = call(capsys, "replay", "given.png", "--check")
    assert (same.returncode, same.stdout, same.stderr) == (0, "given.png: identical\n", "")
    # the same pixels of another folder, and it says so
    other = call(capsys, "replay", str(pictures[0]), "--check")
    assert other.stdout.endswith(": identical\n") and "made with the model " in other.stderr


def test_quiet_says_nothing_of_packing(capsys):
    result = call(capsys, *TINY, "--precision", "int8", "-q")
    assert (result.returncode, result.stderr) == (0, "")
