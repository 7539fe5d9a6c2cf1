"""`flux presets`: the named settings, or what one of them comes to."""

from typing import Annotated, Any, Optional

import typer

from fluxcli.cli import complete, console
from fluxcli.cli.show import SHORT_NAMES, describe_value
from fluxcli.errors import UsageError
from fluxcli.paths import config_folder
from fluxcli.request import controls, presets
from fluxcli.request.settings import SETTINGS, to_json_value


def presets_command(
    name: Annotated[
        Optional[str],
        typer.Argument(
            help="Show this one, merged, with each value's origin.",
            autocompletion=complete.offer_presets,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the presets and the kinds of --control, or show what one comes to."""
    if name is None:
        _list(as_json=json_output)
        return
    kind = None
    if name not in presets.list_presets(config_folder()):
        kind = controls.find_kind(name, config_folder())
    if kind:
        _show_kind(kind, as_json=json_output)
    else:
        _show(name, as_json=json_output)


def _list(*, as_json: bool) -> None:
    """List every preset and kind of control; one that cannot be read is named on stderr."""
    rows = []
    described: dict[str, Any] = {}
    kinds = {}
    for name, path in controls.list_kinds(config_folder()).items():
        try:
            kind = controls.load_kind(path)
        except UsageError as error:
            console.say(f"control {name}: {error}")
            continue
        rows.append((f"--control {name}", kind.description or "-"))
        kinds[name] = kind.describe()
    for name in presets.list_presets(config_folder()):
        try:
            preset = presets.load(name, config_folder())
        except UsageError as error:
            console.say(f"{name}: {error}")
            continue
        rows.append((name, preset.description or "-"))
        settings = {key: to_json_value(value) for key, value in preset.settings.items()}
        described[name] = {"description": preset.description, **settings}
    described["--control"] = kinds
    console.table(rows, described, as_json=as_json)


def _describe(key: str, value: object) -> str:
    """A setting's value in words."""
    if key == "seed" and value == -1:
        return "a new one"
    if key == "guidance" and value is None:
        return "none"
    return describe_value(value)


def _show_kind(kind: controls.ControlKind, *, as_json: bool) -> None:
    """Show what a kind of control says, and in which file."""
    described = kind.describe()
    rows = [(key, describe_value(value), str(kind.path)) for key, value in described.items()]
    console.table(rows, described, as_json=as_json)


def _show(name: str, *, as_json: bool) -> None:
    """Show the settings that a preset comes to here, and where each value is from."""
    merged = presets.merge({"preset": name}, config_folder())
    rows = []
    described = {}
    for key in (name for name in SETTINGS if name in merged.values):
        value = to_json_value(merged.values[key])
        origin = merged.origins[key]
        described[key] = {"value": value, "origin": origin}
        rows.append((SHORT_NAMES.get(key, key), _describe(key, value), origin))
    console.table(rows, described, as_json=as_json)
