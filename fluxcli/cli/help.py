"""How help pages look: commands and options in groups, whole summaries, examples at the end.

A group of commands that is called without one shows its page and ends with exit code 0, as with
--help. Knows nothing of what commands do. Loads typer alone.
"""

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

PICTURE = "Picture"
PICTURES = "From pictures"
OUTPUT = "Output"
MANY = "Many pictures"
MACHINE = "Machine"
OTHER = "Options"
ORDER = ("Arguments", PICTURE, PICTURES, OUTPUT, MANY, MACHINE, OTHER)
WIDEST = 30  # columns of what stands left of an explanation; longer ones have a line of their own


def write_examples(*lines: str) -> str:
    """Return the end of a help page: command lines that are shown as they are."""
    return "\n".join(lines)


def name_argument(argument: Any) -> str:
    """Return an argument as usage lines have it, in brackets if it may be left out."""
    name = argument.name.upper()
    if argument.nargs != 1:
        name += "..."
    return name if argument.required else f"[{name}]"


class Command(TyperCommand):
    """A command whose options stand in groups."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words after the command's name in the line of its usage."""
        return ["[OPTIONS]", *(name_argument(each) for each in _list_arguments(self))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, each group under its name."""
        _write_sections(_group_parameters(self, ctx), formatter)

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write_text(f"\b\n{self.epilog}")


class Group(TyperGroup):
    """A group of commands; without one it shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take apart what was typed; nothing at all asks for help."""
        if not args and not ctx.resilient_parsing:  # that is completion
            args = ["--help"]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their whole summaries, and below them the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                panel = command.rich_help_panel or "Commands"
                groups.setdefault(panel, []).append((name, summarize(command)))
        _write_sections(groups, formatter)
        _write_sections(_group_parameters(self, ctx), formatter)


def summarize(command: Any) -> str:
    """Return the first paragraph of a command's help."""
    return " ".join((command.help or "").split("\n\n")[0].split())


class App(typer.Typer):
    """An application, or a group of its commands, with these help pages."""

    def __init__(self, **settings: Any) -> None:
        """Take what `typer.Typer` takes."""
        super().__init__(
            cls=Group,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """Return what makes a command of a function, as `typer.Typer.command` does."""
        return super().command(name, cls=Command, **settings)


def _list_arguments(command: Any) -> list[Any]:
    return [each for each in command.params if each.param_type_name == "argument"]


def _group_parameters(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """The names and explanations of what a command takes, by group, without what is hidden."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        name, text = record
        panel = getattr(parameter, "rich_help_panel", None) or OTHER
        if parameter.param_type_name == "argument":
            name = parameter.name.upper()
            text = parameter.help or ""
            panel = "Arguments"
        groups.setdefault(panel, []).append((name, text))
    known = {panel: groups.pop(panel) for panel in ORDER if panel in groups}
    return known | groups


def _write_sections(groups: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    """Write rows under the names of their groups, all explanations in one column."""
    names = [name for rows in groups.values() for name, _ in rows]
    width = max((len(name) for name in names if len(name) <= WIDEST), default=0)
    for panel, rows in groups.items():
        with formatter.section(panel):
            formatter.write_dl(_align(rows, width), col_max=width)


def _align(rows: Sequence[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    return [(name.ljust(width), text) for name, text in rows]
