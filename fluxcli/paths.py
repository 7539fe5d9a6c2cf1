"""Folders: the user's own for settings, data and cache, and the files that come with flux.

Stdlib only, but for the settings' folder, which typer knows.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A wheel has the presets inside the package, a checkout at its top level.
BUNDLED = HERE / "bundled" if (HERE / "bundled").is_dir() else HERE.parent / "presets"

MAC_FOLDERS = {"cache": "~/Library/Caches", "data": "~/Library/Application Support"}
XDG_FOLDERS = {"cache": "~/.cache", "data": "~/.local/share"}


def user_folder(kind: str, environment: Mapping[str, str]) -> Path:
    """Return the user's folder for "cache" or "data", by the rules of the platform.

    Where there is no home folder, ~ stays in the path as it is.
    """
    if os.name == "nt":
        return Path(os.path.expanduser(environment.get("LOCALAPPDATA") or "~/AppData/Local"))
    default = MAC_FOLDERS[kind] if sys.platform == "darwin" else XDG_FOLDERS[kind]
    chosen = environment.get(f"XDG_{kind.upper()}_HOME")
    return Path(os.path.expanduser(chosen or default))


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's cache folder for flux; it may not exist.

    Without a home folder it is a place where nothing can be kept.
    """
    folder = user_folder("cache", environment)
    if not folder.is_absolute():
        folder = Path(os.devnull)
    return folder / "flux"


def config_folder() -> Path:
    """Return the user's folder of settings and presets; it may not exist."""
    import typer

    return Path(typer.get_app_dir("flux"))


def baked_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder into which quantized models go unless told; it may not exist."""
    return user_folder("data", environment) / "flux" / "models"


def lora_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of LoRA files whose names are enough for --lora; it may not exist."""
    return user_folder("data", environment) / "flux" / "loras"


def latents_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where latents are kept that cannot lie beside their picture; it may not exist."""
    return user_folder("data", environment) / "flux" / "latents"


def hub_cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the hub's cache folder, by the rules of huggingface_hub; it may not exist.

    Where there is no home folder, ~ stays in the path as it is.
    """
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    if not given:
        home = environment.get("HF_HOME")
        if not home:
            cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
            home = os.path.join(cache, "huggingface")
        given = os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(given)))


def mirror_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of ORG/NAME folders that FLUX_MIRROR names, None if it names none.

    It may be a share for machines without a network.
    """
    named = environment.get("FLUX_MIRROR")
    return Path(named).expanduser().absolute() if named else None
