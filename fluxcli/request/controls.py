"""Kinds of control: which weights one takes, how strongly it acts, and in which mode of them.

Each is a TOML file in presets/control, or in that folder of the user, and says what its publisher
advises; shapes are read from the weights themselves. Stdlib only.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.paths import BUNDLED
from fluxcli.request.inputs import ControlRef
from fluxcli.request.presets import read_toml

KEYS = ("description", "repository", "scale", "start", "end", "modes")
# The modes of InstantX' and Shakker Labs' union networks, by their model cards.
UNION_MODES = {
    "canny": 0,
    "tile": 1,
    "depth": 2,
    "blur": 3,
    "pose": 4,
    "gray": 5,
    "low-quality": 6,
}


@dataclass(frozen=True)
class ControlKind:
    """What a preset says of one kind of control.

    `repository` is a path, ORG/NAME[:FILE] of the hub, or bundled/control/NAME. `modes` are those
    of its weights that this kind is one of; several ask for a choice.
    """

    name: str
    path: Path
    repository: str
    description: str = ""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    modes: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what it says, as JSON has it; modes only where there are some."""
        values = {key: getattr(self, key) for key in KEYS}
        values["modes"] = dict(self.modes)
        return {key: value for key, value in values.items() if key != "modes" or value}


def list_kinds(config_folder: Path | None) -> dict[str, Path]:
    """Return the file of every kind by its name, in order; one of the user hides a bundled one."""
    found = {path.stem: path for path in (BUNDLED / "control").glob("*.toml")}
    if config_folder:
        with contextlib.suppress(OSError):
            own = (config_folder / "presets" / "control").glob("*.toml")
            found |= {path.stem: path for path in own}
    return dict(sorted(found.items()))


def find_kind(name: str, config_folder: Path) -> ControlKind | None:
    """Return the kind of that name, None where no preset has it; raises what `load_kind` does."""
    path = list_kinds(config_folder).get(name)
    return load_kind(path) if path else None


def load_kind(path: Path) -> ControlKind:
    """Read one kind; raises `UsageError` for malformed TOML, unknown keys and wrong values."""
    table = read_toml(path)
    for key in table:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {' '.join(KEYS)}"
            why = f"{key[:60]!r} is no setting of a control"
            raise UsageError("unknown setting", which=path, why=why, hint=hint)
    _check_types(table, path)
    kind = ControlKind(path.stem, path, **table)
    # The same bounds as on the command line.
    span = (kind.start, kind.end)
    ControlRef.make(kind.name, "x", scale=kind.scale, span=span, where=str(path))
    return kind


def _check_types(table: Mapping[str, Any], path: Path) -> None:
    """Raise `UsageError` for a value of another type than the key's, and a missing repository."""
    texts = [table.get("description", ""), table.get("repository")]
    numbers = [table[key] for key in ("scale", "start", "end") if key in table]
    modes = table.get("modes", {})
    is_right = all(isinstance(each, str) and "\0" not in each for each in texts)
    is_right = is_right and bool(table["repository"])
    is_right = is_right and all(_is_number(each) for each in numbers)
    is_right = is_right and isinstance(modes, dict)
    is_right = is_right and all(type(each) is int and 0 <= each < 1000 for each in modes.values())
    if not is_right:
        why = "repository is a text, scale, start and end are numbers, modes a table of numbers"
        hint = 'repository = "ORG/NAME", scale = 0.7, modes = { canny = 0 }'
        raise UsageError("wrong value", which=path, why=why, hint=hint)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def choose_mode(ref: ControlRef, kind: ControlKind | None) -> int | None:
    """Return the mode that a control asks for, None where neither it nor its kind names one.

    Raises `UsageError` for a mode that the kind does not have, and where a kind of several is
    given without.
    """
    modes = dict(UNION_MODES)
    if kind:
        modes = dict(kind.modes)
    if ref.mode is None:
        if len(modes) == 1:
            return next(iter(modes.values()))
        if not kind or not modes:
            return None
        why = f"it has {', '.join(modes)}"
        hint = f"--control kind={ref.kind},mode={next(iter(modes))},image={ref.image}"
        raise UsageError("which mode of the control?", which=ref.kind, why=why, hint=hint)
    if ref.mode in modes:
        return modes[ref.mode]
    if ref.mode.isdecimal() and len(ref.mode) < 4:
        return int(ref.mode)
    why = f"{ref.mode[:40]!r} is none of its modes: {', '.join(modes)}"
    if not modes:
        why = f"it has no modes with names, such as {ref.mode[:40]!r}"
    raise UsageError("no such mode", which=ref.kind, why=why, hint="leave mode= out")
