"""`--install-completion` and `--show-completion`, which leave the user's start files whole.

typer has the scripts and the options; its own installer writes ~/.bashrc in place, which a full
disk empties. Here files are written beside and renamed. Knows bash, zsh and fish; PowerShell is
left to typer, which appends to the profile there.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import typer
import typer.completion

from fluxcli.errors import OutputError, UsageError
from quant.files import write_atomically

POWERSHELL = ("powershell", "pwsh")
make_typers_script = typer.completion.get_completion_script
install_typers = typer.completion.install


class _Shell(NamedTuple):
    """Where a shell's script goes and what its start file needs; paths are below the home folder.

    Each line of `lines` is added unless the start file has the word that stands before it.
    """

    script: str
    start_file: str = ""
    lines: tuple[tuple[str, str], ...] = ()


SHELLS = {
    "bash": _Shell(
        ".bash_completions/{name}.sh", ".bashrc", (("source {script}", "source {script}"),)
    ),
    "zsh": _Shell(
        ".zfunc/_{name}",
        ".zshrc",
        (
            ("fpath+=~/.zfunc; autoload", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
            ("zstyle", "zstyle ':completion:*' menu select"),
        ),
    ),
    "fish": _Shell(".config/fish/completions/{name}.fish"),
}


def use_own_installer() -> None:
    """Let typer's options call the functions below."""
    typer.completion.install = install  # type: ignore[assignment]  # typer gives it a shell alone
    typer.completion.get_completion_script = make_script


def name_program() -> str:
    """The name under which this runs: flux, or fluxcli where that is what was typed.

    The variable by which a shell asks for completions has the program's name in it, too.
    """
    name = Path(sys.argv[0]).stem
    if name == "fluxcli" and "_FLUX_COMPLETE" not in os.environ:
        return name
    return "flux"


def check_request() -> None:
    """Raise `UsageError` where a shell asks for completions whose script is none of ours."""
    asked = os.environ.get(f"_{name_program().upper()}_COMPLETE", "")
    what, _, shell = asked.partition("_")
    if asked and (what not in ("complete", "source") or shell not in (*SHELLS, *POWERSHELL)):
        hint = "flux --show-completion prints the script of a shell"
        raise UsageError("no completion", which=asked[:40], why="no such shell", hint=hint)


def install(shell: str | None = None) -> tuple[str, Path]:
    """Install completion for a shell, by default the one that called; returns it and the script.

    Raises `UsageError` for a shell that is not known, `OutputError` for files that cannot be
    written.
    """
    shell = shell or _detect_shell()
    if shell in POWERSHELL:
        return install_typers(shell)
    name = name_program()
    text = make_script(prog_name=name, complete_var=f"_{name.upper()}_COMPLETE", shell=shell)
    wanted = SHELLS[shell]
    script = Path.home() / wanted.script.format(name=name)
    _write(script, text.encode() + b"\n")
    if wanted.start_file:
        _add_lines(Path.home() / wanted.start_file, wanted.lines, script)
    return shell, script


def make_script(*, prog_name: str, complete_var: str, shell: str) -> str:
    """Return the script for a shell; raises `UsageError` for one that is not known."""
    if shell not in (*SHELLS, *POWERSHELL):
        why = f"known are {', '.join((*SHELLS, *POWERSHELL))}"
        hint = "run it in one of these shells"
        raise UsageError("no completion", which=shell or "no shell was found", why=why, hint=hint)
    return make_typers_script(prog_name=prog_name, complete_var=complete_var, shell=shell)


def _detect_shell() -> str:
    """The shell that called, "" where it cannot be found."""
    import shellingham  # type: ignore[import-untyped]

    try:
        return str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        return ""


def _add_lines(path: Path, lines: tuple[tuple[str, str], ...], script: Path) -> None:
    """Add to a start file the lines that it lacks; it keeps its mode, its owner and its links."""
    path = path.resolve()
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise _explain(path, error) from error
    quoted = "'" + str(script).replace("'", "'\\''") + "'"
    added = b""
    for sign, line in lines:
        if sign.format(script=quoted).encode() not in content:
            added += b"\n" + line.format(script=quoted).encode() + b"\n"
    if added:
        _write(path, content + added)


def _write(path: Path, data: bytes) -> None:
    """Write a file, which afterwards is whole or as before."""
    try:
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise PermissionError(0, "it is no file that may be written")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, place=_replace)
    except OSError as error:
        raise _explain(path, error) from error


def _replace(temporary: Path, path: Path) -> None:
    """Give a file its name, and the mode and owner of the one that it replaces."""
    if path.exists():
        old, new = path.stat(), temporary.stat()
        if hasattr(os, "chown") and (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.chown(temporary, old.st_uid, old.st_gid)
        shutil.copymode(path, temporary)
    os.replace(temporary, path)


def _explain(path: Path, error: OSError) -> OutputError:
    why = error.strerror or str(error)
    hint = "flux --show-completion prints the script"
    return OutputError("completion is not installed", path, why=why, hint=hint)
