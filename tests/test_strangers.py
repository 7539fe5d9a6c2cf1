"""Files that a stranger may have prepared, the user's folders, what is printed, broken imports."""

import errno
import os
import socket
from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.cli import console
from fluxcli.errors import ExitCode, find_broken_library
from fluxcli.events import explain
from quant.files import open_appending, open_regular, read_small_file

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX files")


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_small_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="too large") as caught:
        read_small_file(path, 4)
    assert caught.value.errno == errno.EFBIG


@posix
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "device", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("x")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x")
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo("y")
        path.symlink_to("y")
    for read in (open_regular, open_appending, lambda path: read_small_file(path, 10)):
        with pytest.raises(OSError) as caught:
            read(path)
        assert caught.value.strerror


@pytest.mark.parametrize("value", ["x", "./x", "~/x", ""])
@pytest.mark.parametrize("kind", ["cache", "config", "data"])
def test_a_relative_folder_counts_for_nothing(kind, value):
    home = {"HOME": "/home/me"}
    relative = home | {f"XDG_{kind.upper()}_HOME": value}
    assert paths.user_folder(kind, relative) == paths.user_folder(kind, home)
    assert paths.hub_cache_folder(relative) == paths.hub_cache_folder(home)
    variables = relative | {"PATH": "x"}
    paths.forget_relative_folders(variables)
    assert variables == home | {"PATH": "x"}


@posix
def test_without_a_home_nothing_is_kept_in_the_current_folder(monkeypatch):
    monkeypatch.setenv("HOME", "here")
    for folder in (paths.cache_folder({}), paths.config_folder({}), paths.lora_folder({})):
        assert folder.is_absolute() and not folder.exists()


@pytest.mark.parametrize(
    "character", ["\x1b", "\x9b", "\x7f", "\u202e", "\u2066", "\u200b", "\u2028", "\ufeff", "\xad"]
)
def test_a_hidden_character_is_spelled_out_everywhere(character, capsys):
    console.line(f"a{character}b")
    console.table([(f"a{character}b", "c")], None, as_json=False)
    console.data_json({f"a{character}b": 1}, indent=2)
    console.say(f"a{character}b")
    console.error(f"a{character}b", f"c{character}d")
    said = capsys.readouterr()
    assert character not in said.out + said.err
    assert said.out.count("\\") == 3


def test_other_text_stays_as_it_is(capsys):
    text = "naïve 雪 🦊 العربية\u00a0x"
    console.line(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("raised", ["ImportError", "RuntimeError", "OSError", "ValueError"])
def test_an_error_of_an_import_names_the_library(raised, tmp_path, monkeypatch):
    (tmp_path / "brokenlibrary.py").write_text(f"raise {raised}('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Exception, match="no") as caught:
        import brokenlibrary  # noqa: F401
    assert find_broken_library(caught.value) == "brokenlibrary"
    wrapped = ValueError("its values make no model")
    wrapped.__cause__ = caught.value
    assert find_broken_library(wrapped) == "brokenlibrary"
    failed = explain(caught.value)
    assert failed.exit_code == ExitCode.DEVICE and "brokenlibrary" in failed.hint


def test_other_errors_are_of_no_import():
    with pytest.raises(ValueError, match="invalid") as caught:
        int("x")
    assert find_broken_library(caught.value) == ""
