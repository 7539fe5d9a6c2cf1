"""Pictures without a file of their own: whole, private, bounded, one file for the same bytes."""

import os
import stat

import pytest

from fluxcli.errors import ExitCode, OutputError
from fluxcli.pictures import kept_inputs
from tests.support.invariant import call


def test_the_same_bytes_are_one_private_file():
    first = kept_inputs.keep(b"a picture")
    assert kept_inputs.keep(b"a picture") == first and first.read_bytes() == b"a picture"
    assert kept_inputs.keep(b"another") != first
    assert len(kept_inputs.list_kept()) == 2
    assert kept_inputs.find(first.name) == first
    if os.name != "nt":
        assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700


def test_a_damaged_file_is_written_anew():
    path = kept_inputs.keep(b"a picture")
    path.write_bytes(b"a pic")
    assert kept_inputs.keep(b"a picture").read_bytes() == b"a picture"


@pytest.mark.parametrize("name", ["", "../x", "a" * 64, "A" * 64])
def test_what_is_no_hash_of_a_kept_picture_is_not_found(name):
    kept_inputs.keep(b"a picture")
    assert kept_inputs.find(name) is None


def test_the_longest_unused_are_deleted_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(kept_inputs, "LIMIT_BYTES", 250)
    old, middle = (kept_inputs.keep(bytes([k]) * 100) for k in range(2))
    os.utime(old, (1, 1))
    os.utime(middle, (2, 2))
    new = kept_inputs.keep(bytes([2]) * 100)
    assert [kept.path for kept in kept_inputs.list_kept()] == [middle, new]
    large = kept_inputs.keep(bytes(1000))  # which is wanted now, whatever its size
    assert [kept.path for kept in kept_inputs.list_kept()] == [large]


def test_all_are_cleared_and_what_is_not_ours_stays():
    path = kept_inputs.keep(b"a picture")
    other = path.parent / "notes.txt"
    other.write_text("mine")
    assert [kept.path for kept in kept_inputs.clear()] == [path]
    assert kept_inputs.list_kept() == [] and other.exists()


def test_a_folder_that_is_a_link_or_cannot_be_written_is_exit_6(tmp_path):
    kept_inputs.folder().parent.mkdir(parents=True, exist_ok=True)
    kept_inputs.folder().symlink_to(tmp_path)
    with pytest.raises(OutputError) as linked:
        kept_inputs.keep(b"a picture")
    kept_inputs.folder().unlink()
    kept_inputs.folder().write_text("a file")
    with pytest.raises(OutputError) as file:
        kept_inputs.keep(b"a picture")
    assert linked.value.exit_code == file.value.exit_code == ExitCode.OUTPUT


def test_the_cache_command_shows_and_deletes_them(capsys):
    kept_inputs.keep(bytes(3 << 20))
    shown = call(capsys, "cache").stdout
    assert str(kept_inputs.folder()) in shown and "pictures 3.0 MiB" in shown
    assert "deleted 3.0 MiB of pictures" in call(capsys, "cache", "--clear").stderr
    assert kept_inputs.list_kept() == []
