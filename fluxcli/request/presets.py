"""Presets and settings: TOML deltas, merged weakest first, each value with its origin.

Order: defaults < config.toml < preset (and what it extends) < FLUX_* variables < flags. A later size setting
(`width`/`height` or `aspect_ratio`/`image_size`) replaces the other kind of an earlier layer. Stdlib only.
"""

import contextlib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from fluxcli.errors import UsageError
from fluxcli.paths import BUNDLED
from fluxcli.request.fields import ALIASES, KEYS, GenerationRequest, coerce, flag, joined


@dataclass(frozen=True)
class Preset:
    """One TOML file: where it is, what it says of itself, what it builds on and the settings it changes."""

    path: Path
    description: str
    extends: str
    settings: dict


@dataclass(frozen=True)
class Settings:
    """Merged settings: the values by field name, and where each came from."""

    values: dict
    origins: dict


def available(config_folder: Path | None) -> dict[str, Path]:
    """Return every preset by name; a user's own hides a bundled one of the same name. None: the bundled ones."""
    found = {path.stem: path for path in BUNDLED.glob("*.toml")}
    with contextlib.suppress(OSError):
        found |= {path.stem: path for path in (config_folder / "presets").glob("*.toml")} if config_folder else {}
    return dict(sorted(found.items()))


def load(name: str, config_folder: Path, *, bundled: bool = False) -> Preset:
    """Read one preset; raises `UsageError` for an unknown name, malformed TOML, unknown keys or wrong types."""
    known = available(None if bundled else config_folder)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "flux presets"
        raise UsageError("unknown preset", which=name, why="known are " + " ".join(known), hint=hint)
    path = known[name]
    settings = _read_toml(path)
    extends, description = settings.pop("extends", ""), settings.pop("description", "")
    if not isinstance(extends, str) or not isinstance(description, str):
        raise UsageError("wrong value", which=path, why="extends and description are texts")
    if "preset" in settings:
        raise UsageError("unknown setting", which=path, why="'preset' is none here", hint="use extends = ...")
    return Preset(path, description, extends, _checked(settings, path))


def chain(name: str, config_folder: Path) -> list[Preset]:
    """The preset and what it extends (a user's own: the bundled one, too), weakest first; `UsageError` on a cycle."""
    presets = [load(name, config_folder)]
    while following := presets[-1].extends:
        preset = load(following, config_folder, bundled=following == presets[-1].path.stem)
        if preset.path in [each.path for each in presets]:
            raise UsageError("presets extend each other", which=name, why=f"{following} comes round again")
        presets.append(preset)
    return presets[::-1]


def model_of(name: str, config_folder: Path) -> str:
    """The model of a preset; any other name is a model's own."""
    return str(merge({"preset": name}, config_folder, {}).values["model"]) if name in available(config_folder) else name


def bases_of(name: str, config_folder: Path) -> list[str]:
    """The models of a preset and of what it extends, strongest first: where a model in one file finds the rest."""
    said = [preset.settings.get("model") for preset in chain(name, config_folder)[::-1]]
    return list(dict.fromkeys(filter(None, said)))


def read_config(config_folder: Path) -> dict:
    """The user's config.toml, checked; an absent or unreadable folder is an empty one."""
    path = config_folder / "config.toml"
    with contextlib.suppress(OSError):
        return _checked(_read_toml(path), path) if path.is_file() else {}
    return {}


def _checked(table: Mapping[str, object], path: Path) -> dict:
    return {(name := ALIASES.get(key, key)): coerce(name, value, where=str(path)) for key, value in table.items()}


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        what = "malformed TOML" if isinstance(error, tomllib.TOMLDecodeError) else "unreadable settings"
        raise UsageError(what, which=path, why=str(error)) from error


def from_environment(environment: Mapping[str, str] = os.environ) -> dict:
    """FLUX_* variables that name a field, e.g. FLUX_STEPS=20; raises `UsageError` for a near miss of one."""
    names = {f"FLUX_{key.upper()}": ALIASES.get(key, key) for key in (*KEYS, *ALIASES)}
    for unknown in (name for name in environment if name.startswith("FLUX_") and name not in names):
        if near := get_close_matches(unknown, names, n=1, cutoff=0.85):
            raise UsageError("unknown variable", which=unknown, hint=f"did you mean {near[0]}?")
    given = {name: value for name, value in environment.items() if name in names and value}
    return {names[name]: coerce(names[name], value, where=name) for name, value in given.items()}


def merge(flags: Mapping[str, object], config_folder: Path, environment: Mapping[str, str] = os.environ) -> Settings:
    """Merge every layer. `flags` holds only what the command line gave, by field name."""
    defaults = {field.name: field.default for field in fields(GenerationRequest) if field.name != "prompt"}
    config, variables = read_config(config_folder), from_environment(environment)
    given = {key: coerce(key, value, where=flag(key)) for key, value in flags.items()}
    name = {**defaults, **config, **variables, **given}["preset"]
    merged = Settings({}, {})
    _apply(merged, defaults, lambda _: "default")
    _apply(merged, config, lambda _: "config.toml")
    for preset in chain(name, config_folder):
        _apply(merged, preset.settings, lambda _, of=preset: f"preset {of.path.stem}")
    _apply(merged, variables, lambda key: f"FLUX_{key.upper()}")
    _apply(merged, given, flag)
    return merged


def overlay(base: Mapping[str, object], changes: Mapping[str, object]) -> dict:
    """`base` with `changes` on top, the one rule of sizes included; both by field name, values of any text form."""
    merged = Settings(dict(base), {})
    _apply(merged, {key: coerce(key, value, where=flag(key)) for key, value in changes.items()}, flag)
    return merged.values


def _apply(merged: Settings, layer: Mapping[str, object], origin: Callable[[str], str]) -> None:
    said = {key for key, value in layer.items() if value is not None}
    by_ratio, by_pixels = said & {"aspect_ratio", "image_size"}, said & {"width", "height"}
    if by_ratio and by_pixels:
        raise UsageError("--width/--height exclude --ar/--size", which=origin(max(by_pixels)))
    added = {"lora": joined(merged.values.get("lora", ()), layer["lora"])} if "lora" in layer else {}
    merged.values.update(dict.fromkeys(("width", "height") if by_ratio else ()) | dict(layer) | added)
    merged.origins.update({key: origin(key) for key in layer})
