"""Where a model's folder is: bundled, a path, or the hub's own cache; and how to download one. Stdlib at import.

`locate` never touches the network. `download` is a thin call of huggingface_hub: one pinned commit, only the files
of the diffusers layout, the disk checked first.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from fluxcli.errors import FluxError, OutputError, UsageError, WeightsUnavailable
from fluxcli.presets import BUNDLED

BUNDLED_PREFIX = "bundled/"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = [
    "model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*",
    *(f"{part}/{kind}" for part in ("text_encoder", "text_encoder_2", "transformer", "vae")
      for kind in ("*.json", "*.safetensors")),
]  # fmt: skip
IGNORED = ["*.py", "*.bin", "*.pt", "*.msgpack"]
NON_COMMERCIAL = re.compile(r"black-forest-labs/FLUX\.1-.*dev")
TRY_TINY = 'or try at once: flux generate "a red circle on a blue background" -p tiny'


def locate(model: str, *, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of `model` (bundled/NAME, a folder, or a hub id in the cache).

    Raises `WeightsUnavailable` naming the command that gets it.
    """
    if model.startswith(BUNDLED_PREFIX):
        path = BUNDLED / model.removeprefix(BUNDLED_PREFIX)
        if path.is_dir():
            return path
        raise WeightsUnavailable("no such bundled model", which=model, hint="flux presets")
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.exists():
        why = "a model is a folder in the published diffusers layout"
        raise UsageError("not a model folder", which=model, why=why, hint=f"-m {path.parent}")
    if HUB_ID.fullmatch(model) and ".." not in model:
        if folder := _cached(model, environment):
            return folder
        name = model.rpartition("/")[2]
        hint = f"flux models download {model}  ({TRY_TINY})"
        raise WeightsUnavailable(f"the weights of {name} are not on this computer", which=model, hint=hint)
    raise WeightsUnavailable("no such model folder", which=model, hint=TRY_TINY.removeprefix("or "))


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The hub's cache folder, by the rules of huggingface_hub."""
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expanduser(environment.get("HF_HUB_CACHE") or Path(home) / "hub"))


def _cached(model: str, environment: Mapping[str, str]) -> Path | None:
    """The model's newest whole snapshot in the cache; the one that `main` names before others."""
    root = hub_cache(environment) / f"models--{model.replace('/', '--')}"
    try:
        snapshots = sorted((root / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        main = (
            (root / "refs" / "main").read_text(errors="replace").strip() if (root / "refs" / "main").is_file() else ""
        )
    except OSError:
        return None
    whole = [path for path in snapshots if (path / "model_index.json").is_file()]
    return next((path for path in whole if path.name == main), whole[0] if whole else None)


def download(model: str, *, say: Callable[[str], None]) -> Path:
    """Download a hub model into the hub's cache and return its folder.

    Raises `UsageError` for what is no hub id, `WeightsUnavailable` when the hub refuses or is out of reach, and
    `OutputError` when the disk is too small.
    """
    if not HUB_ID.fullmatch(model):
        raise UsageError("nothing to download", which=model, why="it is no hub id ORG/NAME")
    if NON_COMMERCIAL.fullmatch(model):
        say(f"{model} comes under a non-commercial licence: read it at huggingface.co/{model}")
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(model, timeout=20).sha
        options = {"revision": commit, "allow_patterns": FILES, "ignore_patterns": IGNORED}
        files = snapshot_download(model, dry_run=True, **options)
        if "model_index.json" not in [file.filename for file in files]:
            raise WeightsUnavailable("not a FLUX.1 model", which=model, why="it has no model_index.json")
        missing = sum(file.file_size or 0 for file in files if file.will_download)
        _check_disk(missing)
        say(f"{model}@{commit[:12]}: {len(files)} files, {missing / 1e9:.1f} GB to download")
        return Path(snapshot_download(model, **options))
    except FluxError:
        raise
    except Exception as error:
        raise _hub_error(model, error) from error


def _check_disk(need: int) -> None:
    folder = hub_cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        why = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise OutputError("the disk is too small", which=folder, why=why, hint="HF_HOME moves the cache elsewhere")


def _hub_error(model: str, error: Exception) -> FluxError:
    """The user's view of what huggingface_hub raised; an unknown exception is returned as it is."""
    from huggingface_hub import errors

    page = f"huggingface.co/{model}"
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the licence at {page}, then: hf auth login"
        return WeightsUnavailable("the model is gated", which=model, why="this account has no access", hint=hint)
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        why = "the hub knows no such model, or this account may not see it"
        return WeightsUnavailable("no such model", which=model, why=why, hint=f"look at {page}, then: hf auth login")
    if isinstance(error, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return WeightsUnavailable("the hub does not deliver", which=model, why=why, hint="run the command again")
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError("cannot store the model", which=hub_cache(), why=error.strerror or str(error))
    if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests")):
        why = f"no connection ({type(error).__name__})"
        return WeightsUnavailable("the hub is out of reach", which=model, why=why, hint="run the command again")
    return error
