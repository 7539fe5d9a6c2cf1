"""`flux generate`: what is said of options without effect, and what a run leaves behind that never began."""

from pathlib import Path

from fluxcli.errors import ExitCode
from tests.invariant import assert_failed, call, paint_instead


def test_a_prompt_that_begins_with_a_dash_is_told_about_the_double_dash(capsys):
    message = assert_failed(call(capsys, "generate", "-5 degrees", "-p", "tiny"), ExitCode.USAGE)
    assert "generate -- PROMPT" in message


def test_options_without_effect_are_said(capsys, monkeypatch):
    paint_instead(monkeypatch)
    result = call(capsys, "generate", "x", "-p", "tiny", "--quality", "50", "--force", "-o", "out/")
    assert result.returncode == 0
    assert "--quality does nothing for png" in result.stderr and "--force does nothing" in result.stderr


def test_jpeg_is_jpg(capsys, monkeypatch):
    paint_instead(monkeypatch)
    result = call(capsys, "generate", "x", "-p", "tiny", "--format", "jpeg", "-o", "out/")
    assert result.stdout.strip().endswith(".jpg")


def test_a_run_that_fails_early_leaves_no_folder(capsys):
    assert_failed(call(capsys, "generate", "x", "-o", "new/{seed}/"), ExitCode.WEIGHTS)
    assert not list(Path().iterdir())
