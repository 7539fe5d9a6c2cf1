"""Presets and settings: TOML deltas, merged weakest first, each value with its origin.

Order: defaults < config.toml < preset (and what it extends) < FLUX_* variables < flags. A later size setting
(`width`/`height` or `aspect_ratio`/`image_size`) replaces the other kind of an earlier layer. Stdlib only.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from fluxcli.errors import UsageError
from fluxcli.request import ALIASES, KEYS, GenerationRequest, coerce, flag

BUNDLED = Path(__file__).resolve().parent / "bundled"
if not BUNDLED.is_dir():  # a checkout keeps them at the top level, a wheel inside the package
    BUNDLED = Path(__file__).resolve().parent.parent / "presets"
DEFAULT_PRESET = "dev"
PRESET_ONLY = ("extends", "description")


@dataclass(frozen=True)
class Preset:
    """One TOML file: its name, where it is, what it says of itself and the settings it changes."""

    name: str
    path: Path
    description: str
    extends: str | None
    settings: dict


@dataclass(frozen=True)
class Settings:
    """Merged settings: the values by field name, and where each came from."""

    values: dict
    origins: dict


def folders(config_folder: Path) -> tuple[Path, ...]:
    """Where presets are looked for, strongest first."""
    return (config_folder / "presets", BUNDLED)


def available(config_folder: Path) -> dict[str, Path]:
    """Return every preset by name; a user's own hides a bundled one of the same name."""
    found: dict[str, Path] = {}
    for folder in folders(config_folder):
        for path in _listing(folder):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.toml"))
    except OSError:
        return []


def load(name: str, config_folder: Path, *, bundled: bool = False) -> Preset:
    """Read one preset; raises `UsageError` for an unknown name, malformed TOML, unknown keys or wrong types."""
    known = {path.stem: path for path in _listing(BUNDLED)} if bundled else available(config_folder)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "flux presets"
        raise UsageError("unknown preset", which=name, why="known are " + " ".join(known), hint=hint)
    table = _read_toml(known[name])
    for key in PRESET_ONLY:
        if not isinstance(table.get(key, ""), str):
            raise UsageError("wrong value", which=f"{known[name]}", why=f"{key} is not a text")
    settings = {key: value for key, value in table.items() if key not in PRESET_ONLY}
    if "preset" in settings:
        raise UsageError("unknown setting", which=known[name], why="'preset' is none here", hint="use extends = ...")
    checked = _checked(settings, known[name])
    return Preset(name, known[name], table.get("description", ""), table.get("extends"), checked)


def chain(name: str, config_folder: Path) -> list[Preset]:
    """The preset and what it extends, weakest first; a user's own may extend the bundled one of its name.

    Raises `UsageError` on a cycle.
    """
    presets = [load(name, config_folder)]
    while following := presets[-1].extends:
        preset = load(following, config_folder, bundled=following == presets[-1].name)
        if preset.path in [each.path for each in presets]:
            raise UsageError("presets extend each other", which=name, why=f"{following} comes round again")
        presets.append(preset)
    return presets[::-1]


def read_config(config_folder: Path) -> dict:
    """The user's config.toml, checked; an absent or unreadable folder is an empty one."""
    path = config_folder / "config.toml"
    try:
        present = path.is_file()
    except OSError:
        return {}
    return _checked(_read_toml(path), path) if present else {}


def _checked(table: Mapping[str, object], path: Path) -> dict:
    return {
        ALIASES.get(key, key): coerce(ALIASES.get(key, key), value, where=str(path)) for key, value in table.items()
    }


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError("malformed TOML", which=path, why=str(error)) from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError("unreadable settings", which=path, why=str(error)) from error


def from_environment(environment: Mapping[str, str] = os.environ) -> dict:
    """FLUX_* variables that name a field, e.g. FLUX_STEPS=20; raises `UsageError` for a near miss of one."""
    names = {f"FLUX_{key.upper()}": ALIASES.get(key, key) for key in (*KEYS, *ALIASES)}
    found = {}
    for variable, value in environment.items():
        if variable in names:
            found |= {names[variable]: coerce(names[variable], value, where=variable)} if value else {}
        elif variable.startswith("FLUX_") and (near := get_close_matches(variable, names, n=1, cutoff=0.85)):
            raise UsageError("unknown variable", which=variable, hint=f"did you mean {near[0]}?")
    return found


def merge(flags: Mapping[str, object], config_folder: Path, environment: Mapping[str, str] = os.environ) -> Settings:
    """Merge every layer. `flags` holds only what the command line gave, by field name."""
    defaults = {field.name: field.default for field in fields(GenerationRequest) if field.name != "prompt"}
    config, variables = read_config(config_folder), from_environment(environment)
    given = {key: coerce(key, value, where=flag(key)) for key, value in flags.items()}
    name = {"preset": DEFAULT_PRESET, **config, **variables, **given}["preset"]
    layers: list[tuple[str, Mapping[str, object]]] = [("default", defaults), ("config.toml", config)]
    layers += [(f"preset {preset.name}", preset.settings) for preset in chain(name, config_folder)]
    merged = Settings({}, {})
    for origin, layer in layers:
        _apply(merged, layer, dict.fromkeys(layer, origin))
    _apply(merged, variables, {key: f"FLUX_{key.upper()}" for key in variables})
    _apply(merged, given, {key: flag(key) for key in given})
    merged.values["preset"] = name
    return merged


def overlay(base: Mapping[str, object], changes: Mapping[str, object]) -> dict:
    """`base` with `changes` on top, the one rule of sizes included; both by field name, values of any text form."""
    merged = Settings(dict(base), {})
    checked = {key: value if value is None else coerce(key, value, where=flag(key)) for key, value in changes.items()}
    _apply(merged, checked, {key: flag(key) for key in checked if checked[key] is not None})
    return merged.values


def _apply(merged: Settings, layer: Mapping[str, object], origins: Mapping[str, str]) -> None:
    by_ratio, by_pixels = _names(layer, ("aspect_ratio", "image_size")), _names(layer, ("width", "height"))
    if by_ratio and by_pixels:
        raise UsageError("--width/--height exclude --ar/--size", which=origins[by_pixels[0]])
    if by_ratio:
        merged.values.update(width=None, height=None)
    merged.values.update(layer)
    merged.origins.update(origins)


def _names(layer: Mapping[str, object], names: Iterable[str]) -> list[str]:
    return [name for name in names if layer.get(name) is not None]
