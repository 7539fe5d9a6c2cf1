"""The options that the drawing commands share, declared once.

Those of the settings come from `request.settings`; the others say how a command runs and what it
prints. Knows their names and help, not what they do.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from fluxcli.request.settings import SETTINGS


def _declare_option(kind: Any, *flags: str, text: str) -> Any:
    """Return the annotation of an option: a bool is a switch, others may be left out."""
    option = typer.Option(*flags, help=text, show_default=False)
    if kind is bool:
        return Annotated[bool, option]
    return Annotated[Optional[kind], option]


def _declare_settings() -> dict[str, Any]:
    """Return the annotations of the settings' options by the names of their parameters.

    A setting that is a switch is on unless its flag --no-NAME is given.
    """
    found = {}
    for setting in SETTINGS.values():
        kind = setting.kind.option_type
        name = f"no_{setting.name}" if kind is bool else setting.name
        found[name] = _declare_option(kind, *setting.flags, text=setting.help)
    return found


REQUEST_OPTIONS: dict[str, Any] = {
    **_declare_settings(),
    "force": _declare_option(bool, "--force", text="Replace an existing -o file."),
    "no_wait": _declare_option(
        bool,
        "--no-wait",
        text="Fail (exit 5) where another flux has the device, instead of waiting.",
    ),
    "no_worker": _declare_option(
        bool, "--no-worker", text="Run here, even where flux worker is up."
    ),
    "no_cache": _declare_option(
        bool, "--no-cache", text="Neither read nor keep encoded prompts on disk: see flux cache."
    ),
    "json_output": _declare_option(
        bool, "--json", text="One JSON object on stdout instead of paths."
    ),
    "events": _declare_option(bool, "--events", text="One JSON object a line while it goes on."),
    "quiet": _declare_option(bool, "-q", "--quiet", text="Only errors on stderr."),
    "debug": _declare_option(bool, "--debug", text="Tracebacks and library warnings."),
}


def with_request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command whose last parameter is `**options` every shared option as a real parameter.

    typer reads signatures, so the options are written into the command's own.
    """
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    shared = []
    for name, annotation in REQUEST_OPTIONS.items():
        is_switch = annotation.__origin__ is bool
        shared.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=annotation,
                default=False if is_switch else None,
            )
        )
    command.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    annotations = {parameter.name: parameter.annotation for parameter in own}
    command.__annotations__ = annotations | REQUEST_OPTIONS
    return command
