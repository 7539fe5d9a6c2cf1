"""Folders: the user's own for settings, data and cache, and the files that come with flux.

A variable that names a folder counts only where it is absolute, as the XDG specification says: a
relative one would mean another folder in every place. Stdlib only.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A wheel has the presets inside the package, a checkout at its top level.
BUNDLED = HERE / "bundled" if (HERE / "bundled").is_dir() else HERE.parent / "presets"

# The default of each kind of folder by the platform, below the home folder.
MAC_FOLDERS = {
    "cache": "Library/Caches",
    "config": "Library/Application Support",
    "data": "Library/Application Support",
}
XDG_FOLDERS = {"cache": ".cache", "config": ".config", "data": ".local/share"}
WINDOWS_FOLDERS = {
    "cache": ("LOCALAPPDATA", "AppData/Local"),
    "config": ("APPDATA", "AppData/Roaming"),
    "data": ("LOCALAPPDATA", "AppData/Local"),
}
NAMING_FOLDERS = (
    "HOME",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "XDG_STATE_HOME",
)


def forget_relative_folders(environment: MutableMapping[str, str]) -> None:
    """Remove variables that name a folder by a relative path, so that no library obeys them."""
    for name in NAMING_FOLDERS:
        if name in environment and not os.path.isabs(environment[name]):
            del environment[name]


def home_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's home folder: HOME, else what the system knows of the user.

    Without one it is a place where nothing can be kept.
    """
    named = environment.get("HOME", "")
    if os.name == "nt" or not os.path.isabs(named):
        named = os.path.expanduser("~")
    return Path(named) if os.path.isabs(named) else Path(os.devnull)


def user_folder(kind: str, environment: Mapping[str, str]) -> Path:
    """Return the user's folder for "cache", "config" or "data", by the rules of the platform."""
    variable = f"XDG_{kind.upper()}_HOME"
    default = MAC_FOLDERS[kind] if sys.platform == "darwin" else XDG_FOLDERS[kind]
    if os.name == "nt":
        variable, default = WINDOWS_FOLDERS[kind]
    chosen = environment.get(variable, "")
    return Path(chosen) if os.path.isabs(chosen) else home_folder(environment) / default


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's cache folder for flux; it may not exist."""
    return user_folder("cache", environment) / "flux"


def compiled_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where compilers keep what --compile made; it may not exist."""
    return cache_folder(environment) / "compiled"


def is_linked(folder: Path) -> bool:
    """Whether a folder, or flux' own above it, is a link: what it leads to is somebody else's."""
    return folder.is_symlink() or folder.parent.is_symlink()


def config_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's folder of settings and presets; it may not exist."""
    return user_folder("config", environment) / "flux"


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
    """Return the hub's cache folder, by the rules of huggingface_hub; it may not exist."""
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    if not given:
        home = environment.get("HF_HOME")
        if not home:
            cache = environment.get("XDG_CACHE_HOME", "")
            if not os.path.isabs(cache):
                cache = str(home_folder(environment) / ".cache")
            home = os.path.join(cache, "huggingface")
        given = os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(given)))


def mirror_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of ORG/NAME folders that FLUX_MIRROR names, None if it names none.

    It may be a share for machines without a network.
    """
    named = environment.get("FLUX_MIRROR")
    return Path(named).expanduser().absolute() if named else None
