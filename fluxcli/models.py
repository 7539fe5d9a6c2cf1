"""Where a model's folder is: bundled, a path, or the hub's own cache; and how to download one. Stdlib at import.

`locate` never touches the network. `download` is a thin call of huggingface_hub: one pinned commit, only the files
of the diffusers layout, the disk checked first.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fluxcli import state
from fluxcli.errors import FluxError, OutputError, UsageError, WeightsUnavailable
from fluxcli.presets import BUNDLED
from quant.checkpoint import MANIFEST, Checkpoint, Component, is_complete
from quant.config import READ
from quant.header import TensorInfo
from quant.spec import SCHEMES
from quant.weights import Piece, Weight
from quant.writer import check_room

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = [
    "model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*",
    *(f"{part}/{kind}" for part in ("text_encoder", "text_encoder_2", "transformer", "vae")
      for kind in ("*.json", "*.safetensors")),
]  # fmt: skip
IGNORED = ["*.py", "*.bin", "*.pt", "*.msgpack"]
NON_COMMERCIAL = re.compile(r"black-forest-labs/FLUX\.1-.*dev")
KNOWN = re.compile(r"black-forest-labs/FLUX\.1-(dev|schnell|Krea-dev)")
TRY_TINY = 'or try at once: flux generate "a red circle on a blue background" -p tiny'


def locate(model: str, *, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of `model` (bundled/NAME, a folder, or a hub id in the cache).

    Raises `WeightsUnavailable` naming the command that gets it, `UsageError` for what can be no model.
    """
    if match := re.fullmatch(r"bundled/([\w-]+)", model):
        if (path := BUNDLED / match[1]).is_dir():
            return path
        raise WeightsUnavailable("no such bundled model", which=model, hint="flux presets")
    if (path := folder_of(model)) is not None:
        return path
    if not HUB_ID.fullmatch(model) or ".." in model:
        raise WeightsUnavailable("no such model folder", which=model[:100], hint=f"-m FOLDER, {TRY_TINY}")
    whole, partial = _cached(model, environment)
    if whole:
        return whole
    what = "the download is incomplete" if partial else f"the weights of {model.rpartition('/')[2]} are not here"
    raise WeightsUnavailable(what, which=model, hint=f"flux models download {model}  ({TRY_TINY})")


def folders(model: str) -> list[Path]:
    """Every folder that can serve `model`: what was baked from it, then the model itself, where it is here.

    Raises what `locate` raises where there is none.
    """
    found = list(baked(model).values())
    try:
        found.append(locate(model))
    except WeightsUnavailable:
        if not found:
            raise
    return found


def known_shapes(model: str) -> Checkpoint | None:
    """The published model's sizes without its files, for planning; None for a model that is not known."""
    if not KNOWN.fullmatch(model):
        return None
    table, guided = json.loads((BUNDLED / "shapes" / "flux1.json").read_text(encoding="utf-8")), "schnell" not in model
    parts = {}
    for name, part in table.items():
        names = {}
        for pattern, shape in part["tensors"].items():
            start, count, end = re.fullmatch(r"(.*?)(?:\{(\d+)\})?([^{}]*)", pattern).groups()
            names |= {f"{start}{k}{end}" if count else pattern: tuple(shape) for k in range(int(count or 1))}
        infos = [TensorInfo(key, "BF16", shape) for key, shape in names.items() if guided or "guidance" not in key]
        weights = {info.name: Weight(info.name, info.shape, "", {"": Piece(Path(), info)}) for info in infos}
        config = part["config"] | ({"guidance_embeds": guided} if name == "transformer" else {})
        parts[name] = Component(name, Path(), config, weights)
    return Checkpoint(Path(), parts, dict(READ["scheduler"]))


def baked(model: str) -> dict[str, Path]:
    """What `flux quantize` made of `model` in the user's model folder, by precision; of several the first by name."""
    found = []
    for path in baked_folder().glob(f"*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            to, left = manifest["recipe"]["to"], ".tmp-" in path.parent.name  # of a bake that goes on, or was killed
            if manifest["model"] == model and to in SCHEMES and not left:
                found.append((path.parent.name, to, path.parent))
    return {to: folder for _, to, folder in sorted(found, reverse=True)}


def baked_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where quantized models go unless told: the user's data folder, by the rules of the platform."""
    return state.user_folder("data", environment) / "flux" / "models"


def folder_of(model: str) -> Path | None:
    """The absolute folder that `model` names, None if it names none; raises `UsageError` for another kind of file."""
    if not model or model.startswith(("\\\\", "//")):  # a share of another machine is never opened unasked
        raise UsageError("no model", which=model, why="a folder or a hub id is needed", hint="-m FOLDER")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path.resolve()
        present = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long a name, NUL, no home
        return None
    if present:
        why = "a model is a folder in the published diffusers layout"
        raise UsageError("not a model folder", which=model, why=why, hint=f"-m {path.parent}")
    return None


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The hub's cache folder, by the rules of huggingface_hub."""
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(given)))  # without a home ~ stays as it is


def _cached(model: str, environment: Mapping[str, str]) -> tuple[Path | None, bool]:
    """(the model's newest complete snapshot, the one of `main` before others; whether any snapshot is there)."""
    root, main = hub_cache(environment) / f"models--{model.replace('/', '--')}", ""
    with contextlib.suppress(OSError):
        main = (root / "refs" / "main").read_text(errors="replace").strip()
    try:
        found = [(path.name == main, path.stat().st_mtime, path) for path in (root / "snapshots").iterdir()]
    except OSError:
        return None, False
    return next((path for *_, path in sorted(found, reverse=True) if is_complete(path)), None), bool(found)


def download(model: str, *, say: Callable[[str], None]) -> Path:
    """The folder of a hub model, downloaded; raises `UsageError`, `WeightsUnavailable`, `WriteError`."""
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
        check_room(hub_cache(), missing, hint="HF_HOME moves the cache elsewhere")
        say(f"{model}@{commit[:12]}: {len(files)} files, {missing / 1e9:.1f} GB to download")
        return Path(snapshot_download(model, **options))
    except Exception as error:
        raise _hub_error(model, error) from error


def _hub_error(model: str, error: Exception) -> FluxError:
    """The user's view of what huggingface_hub raised; ours, or an unknown one, is returned as it is."""
    from huggingface_hub import errors

    page, why, again = f"huggingface.co/{model}", str(error).partition("\n")[0][:120], "run the command again"
    if isinstance(error, errors.GatedRepoError):
        what, why = "the model is gated", "this account has no access"
        again = f"accept the licence at {page}, then: hf auth login"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        what, why = "no such model", "the hub knows no such model, or this account may not see it"
        again = f"look at {page}, then: hf auth login"
    elif isinstance(error, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        what, why = "the hub does not deliver", why or type(error).__name__
    elif isinstance(error, OSError) and error.errno is not None:
        return OutputError("cannot store the model", which=hub_cache(), why=error.strerror or str(error))
    elif isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests")):
        what, why = "the hub is out of reach", f"no connection ({type(error).__name__})"
    else:
        return error
    return WeightsUnavailable(what, which=model, why=why, hint=again)
