"""`--install-completion` leaves the user's start files whole, whatever happens."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fluxcli.cli import shells
from fluxcli.errors import ExitCode
from tests.support.invariant import Fault, assert_failed, call, files

OLD = b"alias ll='ls -l'\n\xff no text\n"
START = {"bash": ".bashrc", "zsh": ".zshrc"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "its home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def install(capsys, monkeypatch):
    """`flux --install-completion` from a shell."""

    def run(shell: str):
        monkeypatch.setattr(shells, "_detect_shell", lambda: shell)
        return call(capsys, "--install-completion")

    return run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_is_installed_once_and_the_start_file_keeps_what_it_had(shell, home, install):
    start = home / START.get(shell, "config.fish")
    start.write_bytes(OLD)
    start.chmod(0o640)
    assert install(shell).returncode == 0
    after = files(home)
    assert after[start.name].startswith(OLD) and stat.S_IMODE(start.stat().st_mode) == 0o640
    (script,) = set(after) - {start.name}
    assert b"_FLUX_COMPLETE" in after[script]
    assert install(shell).returncode == 0
    assert files(home) == after


def test_a_start_file_that_is_a_link_stays_one(home, install):
    (home / "dotfiles").mkdir()
    (home / "dotfiles" / "bashrc").write_bytes(OLD)
    (home / ".bashrc").symlink_to("dotfiles/bashrc")
    assert install("bash").returncode == 0
    assert (home / ".bashrc").is_symlink()
    assert b"source '" in (home / "dotfiles" / "bashrc").read_bytes()


def test_without_a_start_file_one_is_made(home, install):
    assert install("bash").returncode == 0
    assert "source" in (home / ".bashrc").read_text()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=os.strerror)
def test_a_disk_that_is_full_at_any_call_leaves_the_start_file_as_it_was(code, home, install):
    (home / ".bashrc").write_bytes(OLD)

    def fail(name: str) -> None:
        if name != "unlink":  # who cannot remove cannot clean up
            raise OSError(code, os.strerror(code))

    k, names, failed = 0, [], 0
    while k <= len(names):
        k += 1
        with pytest.MonkeyPatch.context() as patch:
            names = Fault(k, fail).install(patch).names
            result = install("bash")
        assert (home / ".bashrc").read_bytes().startswith(OLD)
        assert not list(home.rglob("*.tmp"))
        if result.returncode:
            message = assert_failed(result, ExitCode.OUTPUT)
            assert os.strerror(code) in message and "--show-completion" in message
            failed += 1
    assert failed > 4


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_start_file_that_is_none_is_refused(make, home, install):
    make(home / ".bashrc")
    assert "no file" in assert_failed(install("bash"), ExitCode.OUTPUT)


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
@pytest.mark.parametrize("shell", ["", "tcsh"])
def test_a_shell_that_is_not_known_is_exit_2(shell, option, home, capsys, monkeypatch):
    monkeypatch.setattr(shells, "_detect_shell", lambda: shell)
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell or None)
    assert "known are bash" in assert_failed(call(capsys, option), ExitCode.USAGE)
    assert files(home) == {}
