"""Folders: the user's own for settings, data and cache, and the files that come with flux. Stdlib only."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent  # a checkout keeps presets at the top level, a wheel inside the package
BUNDLED = HERE / "bundled" if (HERE / "bundled").is_dir() else HERE.parent / "presets"


def user_folder(kind: str, environment: Mapping[str, str]) -> Path:
    """The user's folder for a "cache" or "data", by the rules of the platform; ~ stays where there is no home."""
    if os.name == "nt":
        return Path(os.path.expanduser(environment.get("LOCALAPPDATA") or "~/AppData/Local"))
    mac, other = {"cache": ("Caches", "cache"), "data": ("Application Support", "local/share")}[kind]
    default = f"~/Library/{mac}" if sys.platform == "darwin" else f"~/.{other}"
    return Path(os.path.expanduser(environment.get(f"XDG_{kind.upper()}_HOME") or default))


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The user's cache folder for flux, by the rules of the platform."""
    folder = user_folder("cache", environment)
    return (folder if folder.is_absolute() else Path(os.devnull)) / "flux"  # without a home: nowhere


def config_folder() -> Path:
    """The user's folder of settings and presets."""
    import typer

    return Path(typer.get_app_dir("flux"))
