"""`flux presets`: the named settings, or what one of them comes to."""

from typing import Annotated, Optional

import typer

from fluxcli.cli import console
from fluxcli.errors import UsageError
from fluxcli.paths import config_folder
from fluxcli.request import presets
from fluxcli.request.settings import to_json_value


def presets_command(
    name: Annotated[Optional[str], typer.Argument(help="Show this one, merged, with each value's origin.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the presets, or show what one comes to."""
    if name is not None:
        merged = presets.merge({"preset": name}, config_folder())
        shown = {
            key: {"value": to_json_value(value), "origin": merged.origins[key]} for key, value in merged.values.items()
        }
        rows = [f"{key:<13} {'none' if each['value'] is None else each['value']!s:<32} {each['origin']}"
                for key, each in shown.items() if each["value"] is not None or key == "guidance"]  # fmt: skip
    else:
        shown, rows = {}, []
        for known in presets.list_presets(config_folder()):
            try:
                found = presets.load(known, config_folder())
                shown[known] = {
                    "description": found.description,
                    **{key: to_json_value(value) for key, value in found.settings.items()},
                }
                rows.append(f"{known:<10} {found.description}")
            except UsageError as error:
                console.say(f"{known}: {error}")
    if json_output:
        console.data_json(shown)
    for row in [] if json_output else rows:
        console.data(row)
