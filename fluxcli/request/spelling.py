"""The command line that asks for a picture again, from its order. Knows no shell but POSIX'."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.request import presets
from fluxcli.request.fields import DEFAULTS, Order
from fluxcli.request.settings import LORA_NONE, SETTINGS, Setting, to_json_value

# Where a picture went, and how often it was asked for.
UNSAID = ("preset", "seed", "count", "output", "preview_every")


def spell_command(order: Order, config_folder: Path) -> str:
    """Return `flux generate ...` for one picture of an order that has its seed.

    Said is what its preset here does not say. Under a preset that is not here, everything is that
    is not the default.
    """
    words = ["flux", "generate"]
    try:
        base = presets.merge({"preset": order.preset}, config_folder, {}).values
        words += ["-p", order.preset]
    except UsageError:
        base = DEFAULTS
    for name, value in order.settings().items():
        if name not in UNSAID and value != base[name]:
            words += _spell_setting(SETTINGS[name], value)
    words += ["--seed", str(order.request.seed)]
    prompt = order.request.prompt
    if prompt.startswith("-"):
        words.append("--")
    if prompt:
        words.append(prompt)
    return shlex.join(words)


def _spell_setting(setting: Setting, value: Any) -> Iterator[str]:
    """Yield the words of a setting; what no option says yields none."""
    if isinstance(value, bool):
        if value != DEFAULTS[setting.name]:
            yield setting.flag
        return
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        if setting.name == "lora":  # a preset's are added to those that are said
            yield from (setting.flag, LORA_NONE)
        for each in value:
            yield from (setting.flag, str(each))
        return
    if value is None:
        if setting.name == "guidance":
            yield from (setting.flag, "none")
        return
    yield from (setting.flag, str(to_json_value(value)))
