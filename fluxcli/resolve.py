"""From a prompt and settings to an order: layers are merged, formats and paths are decided.

The command line and the Python face both go through here, so that the same words mean the same
picture. Knows nothing of options or how text reaches it.
"""

from collections.abc import Mapping
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.models import find, loras
from fluxcli.paths import config_folder
from fluxcli.pictures import names
from fluxcli.request import presets
from fluxcli.request.fields import Order
from fluxcli.request.sizes import add_other_side


def resolve_order(prompt: str, given: Mapping[str, Any]) -> Order:
    """Return the order of a prompt and of what was said, by field name.

    What was not said comes from variables, presets, config.toml and the defaults. Raises
    `UsageError`.
    """
    return build_order(prompt, presets.merge(given, config_folder()).values, given)


def build_order(prompt: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> Order:
    """Return the order of settings that are merged already; `given` are those that were said.

    A file name decides the format, and the ratio a side of which the other is given. Folders and
    files are stored with absolute paths, so that the order means the same in a worker, which has
    another working folder. Raises `UsageError`.
    """
    if "\0" in prompt:
        raise UsageError(
            "the prompt holds NUL", why="is it of a UTF-16 file?", hint="save it as UTF-8"
        )
    format_given = values["format"] if given.get("format") else None
    format_of_name = names.read_format(values["output"], given=format_given)
    resolved = dict(values)
    if format_of_name:
        resolved["format"] = format_of_name
    # A preset's name stands for its model, as in `flux models download`, unless it is a folder's.
    named = find.make_absolute(values["model"])
    resolved["model"] = presets.model_of(named, config_folder())
    if values["vae"]:
        resolved["vae"] = find.make_absolute(values["vae"])
    resolved["text_encoders"] = tuple(find.make_absolute(each) for each in values["text_encoders"])
    resolved["lora"] = loras.make_absolute(values["lora"])
    width, height = values["width"], values["height"]
    if (width is None) != (height is None):
        sides = add_other_side(values["aspect_ratio"], width=width, height=height)
        resolved["width"], resolved["height"] = sides
    return Order.from_settings(prompt, resolved)
