"""docs/commands.md from the application itself: every command, argument and option with its help.

`python -m fluxcli.cli.reference` prints it; a test compares it with the file.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from fluxcli.cli import console
from fluxcli.cli.app import app
from fluxcli.cli.help import name_argument
from fluxcli.cli.options import REQUEST_OPTIONS, describe_default
from fluxcli.request.settings import SETTINGS

Row = tuple[str, str, str]  # what is called, its default, its meaning

HEAD = """# Commands and options

This page is made by `python -m fluxcli.cli.reference > docs/commands.md`; `flux COMMAND --help`
says the same, and so does `flux help COMMAND`. `flux` alone, and a group such as `flux models`
alone, show their help and end with exit code 0. [settings.md](settings.md) says where
values come from, [batch-and-worker.md](batch-and-worker.md) what `--json` and `--events` print of
several pictures.

`flux --version` prints the version, `flux --install-completion` and `flux --show-completion` set up
the shell, and `-h` or `--help` explains every command. A prompt that begins with `-` goes after
`--`.
"""
SHARED = """## Options of drawing commands

`flux generate`, `flux replay`, `flux plan` and `flux decode` take these beside their own.
`flux decode` takes of the settings only those that say how and where, not what is drawn, and for
`flux plan` those that say how a picture is written change nothing: `--help` shows what matters.
"""
TAIL = """## What is printed

Paths of pictures go to stdout, everything for people to stderr. With `--json` stdout has one object
when all is done: `images`, `request`, `plan`, `timings_s`, `peak_memory`, `versions`, `row`; with
`--from` one for each row that is done, each failure, each picture that was skipped, and a summary.
With `--events` it has one object a line while it goes on: `phase`, `step`, `preview`, `notice`,
`saved` and `skipped`, at the end `done` or `failed`, of a batch `summary`. With
`--preview-every` an object with the `path` of each preview comes before the others of `--json`.
"""


def write_reference() -> str:
    """Return the text of docs/commands.md."""
    program: Any = typer.main.get_command(app)  # its class is private
    shared = _write_shared_options(program.commands["generate"])
    return "\n".join([HEAD, *_write_commands(program, "flux"), shared, TAIL])


def _write_commands(command: Any, path: str) -> Iterator[str]:
    """Yield a section for each command below `command`, those of a group after each other."""
    for name, below in command.commands.items():
        if below.hidden:
            continue
        if hasattr(below, "commands"):
            yield from _write_commands(below, f"{path} {name}")
        else:
            yield _write_command(below, f"{path} {name}")


def _write_command(command: Any, path: str) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    draws = "preset" in {each.name for each in options}
    own = [each for each in options if not draws or each.name not in REQUEST_OPTIONS]
    words = [path, *(name_argument(each) for each in arguments)]
    lines = [f"## `{path}`", "", f"`{' '.join(words)}`", "", " ".join(command.help.split()), ""]
    rows = [(f"`{name_argument(each)}`", "", each.help) for each in arguments]
    rows += [_describe_option(each) for each in own]
    if rows:
        lines += _write_table(rows)
    if draws:
        link = "[options of drawing commands](#options-of-drawing-commands)"
        lines += [f"And the {link}.", ""]
    return "\n".join(lines)


def _write_shared_options(generate: Any) -> str:
    """The section of the options that drawing commands share, as one of them has them."""
    options = [each for each in generate.params if each.name in REQUEST_OPTIONS]
    rows = [_describe_setting(each) or _describe_option(each) for each in options]
    return "\n".join([SHARED, *_write_table(rows)])


def _describe_setting(option: Any) -> Row | None:
    """As `_describe_option`, of an option whose default comes from files, presets and variables."""
    if option.name not in SETTINGS:
        return None
    flags, _, _ = _describe_option(option)
    return flags, describe_default(option.name), SETTINGS[option.name].help


def _describe_option(option: Any) -> Row:
    """An option's flags, default and help; a switch is off unless it is given."""
    flags = ", ".join(f"`{flag}`" for flag in option.opts)
    if option.metavar:
        flags += f" {option.metavar}"
    default = option.default
    shown = "" if default in (None, False, "", ()) else f"`{default}`"
    return flags, shown, option.help


def _write_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| | default | meaning |", "|---|---|---|"]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    for line in write_reference().rstrip("\n").split("\n"):
        console.data(line)
