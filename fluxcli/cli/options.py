"""The options that several commands share, declared once. Knows their names and help, not what they do."""

import inspect
from collections.abc import Callable
from typing import Annotated, Optional

import typer

from fluxcli.request.settings import SETTINGS


def _option(kind: type, *names: str, text: str) -> object:
    """The annotation of an option: a bool is a switch, others may be absent."""
    shown = typer.Option(*names, help=text, show_default=False)
    return Annotated[bool, shown] if kind is bool else Annotated[Optional[kind], shown]


def _setting_options() -> dict[str, object]:
    """The options of the settings, by the name of their parameter."""
    found = {}
    for setting in SETTINGS.values():
        name = setting.name
        kind = setting.kind.option_type
        if kind is bool:
            name = f"no_{name}"
        found[name] = _option(kind, *setting.flags, text=setting.help)
    return found


REQUEST_OPTIONS: dict[str, object] = _setting_options() | {
    "force": _option(bool, "--force", text="Replace an existing -o file."),
    "no_wait": _option(bool, "--no-wait", text="Fail (exit 5) where another flux has the device, instead of waiting."),
    "no_worker": _option(bool, "--no-worker", text="Run here, even where flux worker is up."),
    "no_cache": _option(bool, "--no-cache", text="Neither read nor keep encoded prompts on disk: see flux cache."),
    "json_output": _option(bool, "--json", text="One JSON object on stdout instead of paths."),
    "events": _option(bool, "--events", text="One JSON object a line while it goes on."),
    "quiet": _option(bool, "-q", "--quiet", text="Only errors on stderr."),
    "debug": _option(bool, "--debug", text="Tracebacks and library warnings."),
}  # fmt: skip


def with_request_options(command: Callable) -> Callable:
    """Give a command whose last parameter is `**options` every option of the table as a real parameter."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(name, kind, annotation=hint, default=False if hint.__origin__ is bool else None)
        for name, hint in REQUEST_OPTIONS.items()
    ]
    command.__signature__ = inspect.Signature([p.replace(kind=kind) for p in own] + shared)
    command.__annotations__ = {p.name: p.annotation for p in own} | REQUEST_OPTIONS
    return command
