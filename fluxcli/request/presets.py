"""Presets and settings: TOML deltas, merged weakest first, each value with its origin.

The layers are defaults < config.toml < preset (and what it extends) < FLUX_* variables < flags; but
a bundled preset that no flag or variable asked for is weaker than config.toml. A size in a later
layer (`width`/`height`, or `aspect_ratio`/`image_size`) replaces the other kind of an earlier one.
Stdlib only.
"""

import contextlib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.paths import BUNDLED
from fluxcli.request.fields import DEFAULTS
from fluxcli.request.settings import (
    ALIASES,
    SETTINGS,
    coerce_all,
    find_name,
    flag,
    merge_loras,
)
from quant.files import read_small_file

MAX_SETTINGS_BYTES = 256 << 10
MAX_DOTS = 100
MAX_WHY = 100  # characters of an error of a library
BY_RATIO = {"aspect_ratio", "image_size"}
BY_PIXELS = {"width", "height"}
PRESET_KEYS = ("description", "extends")  # of presets alone


@dataclass(frozen=True)
class Preset:
    """One TOML file: where it is, what it says of itself, what it builds on, what it changes."""

    path: Path
    description: str
    extends: str
    settings: dict[str, Any]

    @property
    def is_bundled(self) -> bool:
        """Whether it comes with flux."""
        return self.path.parent == BUNDLED


@dataclass(frozen=True)
class Settings:
    """Merged settings: the values by field name, and where each of them came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def apply(self, layer: Mapping[str, Any], origin: Callable[[str], str]) -> None:
        """Put a stronger layer on top; `origin` names where a setting of it came from.

        Adapters add up. Sizes by ratio replace those by pixels. Raises `UsageError` for a layer
        that gives a size in both ways.
        """
        said = {name for name, value in layer.items() if value is not None}
        # A ratio may stand beside one side: the other follows from it.
        if said & BY_PIXELS and ("image_size" in said or said >= {"aspect_ratio", *BY_PIXELS}):
            which = origin(max(said & BY_PIXELS))
            raise UsageError(
                "--width/--height exclude --ar/--size",
                which=which,
                hint="--width and --height, or --ar and --size",
            )
        if said & BY_RATIO:
            self.values.update(width=None, height=None)
        for name, value in layer.items():
            if name == "lora":
                value = merge_loras(self.values.get("lora", ()), value)  # noqa: PLW2901
            self.values[name] = value
            self.origins[name] = origin(name)


def list_presets(config_folder: Path | None) -> dict[str, Path]:
    """Return the file of every preset by its name, in order.

    A preset of the user hides a bundled one of the same name. Without a folder only the bundled
    ones are listed.
    """
    found = {path.stem: path for path in BUNDLED.glob("*.toml")}
    if config_folder:
        with contextlib.suppress(OSError):
            found |= {path.stem: path for path in (config_folder / "presets").glob("*.toml")}
    return dict(sorted(found.items()))


def load(name: str, config_folder: Path, *, bundled: bool = False) -> Preset:
    """Read one preset, with `bundled` the one that comes with flux.

    Raises `UsageError` for an unknown name, malformed TOML, unknown keys and wrong values.
    """
    known = list_presets(None if bundled else config_folder)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise UsageError(
            "unknown preset",
            which=name,
            why="known are " + " ".join(known),
            hint=f"did you mean {near[0]!r}?" if near else "flux presets",
        )
    path = known[name]
    settings = read_toml(path)
    extends = settings.pop("extends", "")
    description = settings.pop("description", "")
    if not isinstance(extends, str) or not isinstance(description, str):
        raise UsageError(
            "wrong value",
            which=path,
            why="extends and description are texts",
            hint='extends = "dev"',
        )
    if "preset" in settings:
        raise UsageError(
            "unknown setting",
            which=path,
            why="'preset' is none here",
            hint="use extends = ...",
        )
    return Preset(
        path, description, extends, settings=_coerce_table(settings, path, also=PRESET_KEYS)
    )


def load_chain(name: str, config_folder: Path) -> list[Preset]:
    """Read a preset and all that it extends, weakest first.

    A preset of the user that extends its own name builds on the bundled one. Raises `UsageError`
    where presets extend each other in a circle, and what `load` raises.
    """
    presets = [load(name, config_folder)]
    while following := presets[-1].extends:
        own_name = following == presets[-1].path.stem
        preset = load(following, config_folder, bundled=own_name)
        if preset.path in [each.path for each in presets]:
            why = f"{following} comes round again"
            hint = f"leave extends out of {preset.path}"
            raise UsageError("presets extend each other", which=name, why=why, hint=hint)
        presets.append(preset)
    return presets[::-1]


def model_of(name: str, config_folder: Path) -> str:
    """Return the model of the preset of that name; any other name is returned as it is."""
    if name not in list_presets(config_folder):
        return name
    return str(merge({"preset": name}, config_folder, {}).values["model"])


def weights_of(name: str, config_folder: Path) -> str:
    """Return what there is to download for the preset of that name; any other as it is.

    That is its model, unless its own file adds other weights to the model of what it extends.
    """
    if name not in list_presets(config_folder):
        return name
    added: tuple[str, ...] = load(name, config_folder).settings.get("redux_model", ())
    return added[0] if added else model_of(name, config_folder)


def base_models(name: str, config_folder: Path) -> list[str]:
    """Return the models of a preset and of what it extends, strongest first.

    A model in one file takes the components that it lacks from the first of these that is here.
    """
    found = []
    for preset in load_chain(name, config_folder)[::-1]:
        model = preset.settings.get("model")
        if model and model not in found:
            found.append(model)
    return found


def read_config(config_folder: Path) -> dict[str, Any]:
    """Read the user's config.toml; an absent or unreadable folder counts as an empty file.

    Raises `UsageError` for a file that is there and cannot be read.
    """
    path = config_folder / "config.toml"
    try:
        path.lstat()
    except OSError:
        return {}
    return _coerce_table(read_toml(path), path)


def read_environment(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the settings that FLUX_* variables give, such as FLUX_STEPS=20.

    Other FLUX_* variables are none of its business, but a near miss of one of its own raises
    `UsageError`.
    """
    names = {f"FLUX_{name.upper()}": name for name in SETTINGS}
    names |= {f"FLUX_{alias.upper()}": name for alias, name in ALIASES.items()}
    given = {}
    variables = {}
    for variable, value in environment.items():
        if variable in names:
            if value:
                given[names[variable]] = value
                variables[names[variable]] = variable
        elif variable.startswith("FLUX_"):
            near = get_close_matches(variable, names, n=1, cutoff=0.85)
            if near:
                hint = f"did you mean {near[0]}?"
                raise UsageError("unknown variable", which=variable, hint=hint)
    return coerce_all(given, lambda name: variables.get(name, "FLUX_SIZE"))


def merge(
    flags: Mapping[str, Any],
    config_folder: Path,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Merge every layer of settings. `flags` holds only what the command line gave, by name."""
    config = read_config(config_folder)
    variables = read_environment(environment)
    given = coerce_all(flags, flag)
    preset_name = {**DEFAULTS, **config, **variables, **given}["preset"]
    merged = Settings()
    merged.apply(DEFAULTS, lambda _: "default")
    chain = load_chain(preset_name, config_folder)
    is_asked_for = "preset" in variables or "preset" in given
    weaker = [preset for preset in chain if preset.is_bundled and not is_asked_for]
    stronger = [preset for preset in chain if preset not in weaker]
    for preset in weaker:
        merged.apply(preset.settings, _always(f"preset {preset.path.stem}"))
    merged.apply(config, lambda _: "config.toml")
    for preset in stronger:
        merged.apply(preset.settings, _always(f"preset {preset.path.stem}"))
    merged.apply(variables, lambda name: f"FLUX_{name.upper()}")
    merged.apply(given, flag)
    return merged


def find_hidden(flags: Mapping[str, Any], config_folder: Path) -> list[str]:
    """Return the keys of config.toml that do nothing here, since a preset says another value."""
    config = read_config(config_folder)
    merged = merge(flags, config_folder)
    return [
        SETTINGS[name].key
        for name, value in config.items()
        if merged.origins[name].startswith("preset ") and merged.values[name] != value
    ]


def override(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of two layers as one layer, which `merge` takes.

    For a batch, the command line and a row; in Python, `Flux(...)` and a call. `overlay` alone
    would leave a ratio of the weaker layer beside pixels of the stronger one, which `merge` refuses
    in one layer: here the pixels take its place.
    """
    merged = overlay(overlay({}, weaker), stronger)
    sides = [name for name in BY_PIXELS if merged.get(name)]
    if sides:
        merged.pop("image_size", None)
    if len(sides) == len(BY_PIXELS):
        merged.pop("aspect_ratio", None)
    return merged


def _always(text: str) -> Callable[[str], str]:
    """Return a function that names the same origin for every setting."""
    return lambda _: text


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` on top, by the rules of `Settings.apply`.

    Both are by field name; the values of `changes` may be texts.
    """
    merged = Settings(dict(base))
    merged.apply(coerce_all(changes, flag), flag)
    return merged.values


def _coerce_table(
    table: Mapping[str, Any], path: Path, *, also: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a file's settings by field name; raises `UsageError` naming the file.

    `also` are keys that may stand there beside the settings'.
    """
    where = str(path)
    named = {find_name(key, where=where, also=also): value for key, value in table.items()}
    return coerce_all(named, lambda _: where)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of settings; raises `UsageError` for what is no such file."""
    try:
        text = read_small_file(path, MAX_SETTINGS_BYTES).decode("utf-8-sig")
        # The parser takes minutes for a key of many parts.
        if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"a line has more than {MAX_DOTS} dots")
        table = tomllib.loads(text)
        repr(table)  # hexadecimal numbers of any length can be read, but not printed in an error
        return table
    except tomllib.TOMLDecodeError as error:
        hint = 'lines such as: steps = 20, or output = "pictures/"'
        raise UsageError("malformed TOML", which=path, why=str(error), hint=hint) from error
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)[:MAX_WHY]
        hint = "mend the file, or delete it"
        raise UsageError("unreadable settings", which=path, why=why, hint=hint) from error
