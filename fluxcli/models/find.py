"""Where a model is: bundled, a path, the hub's own cache or a mirror. Never touches the network. Stdlib only."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from fluxcli import paths
from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.paths import BUNDLED
from fluxcli.request.fields import GenerationRequest, Order
from fluxcli.request.presets import base_models
from quant.checkpoint import COMPONENTS, MANIFEST, Checkpoint, Component, is_complete
from quant.config import READ
from quant.errors import CheckpointError
from quant.single_file import assemble_checkpoint
from quant.spec import BAKEABLE
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(HUB_ID.pattern + r":(?!/)[^\x00-\x1f]+\.(?:safetensors|gguf)")
MODEL_FILES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
PUBLISHED = "black-forest-labs/FLUX.1-dev"  # whose sizes are those of files that do not say theirs
SHARES = ("\\\\", "//")  # of other machines: never opened unasked
KNOWN = re.compile(r"black-forest-labs/FLUX\.1-(dev|schnell|Krea-dev)")
TRY_TINY = 'or try at once: flux generate "a red circle on a blue background" -p tiny'


def locate(
    model: str, *, components: Collection[str] = COMPONENTS, environment: Mapping[str, str] = os.environ
) -> Path:
    """Where `model` is: bundled/NAME, a folder or file, ORG/NAME:FILE, or a hub id's folder with these components.

    Raises `WeightsUnavailable` naming the command that gets it, `UsageError` for what can be no model.
    """
    if match := re.fullmatch(r"bundled/([\w-]+)", model):
        if (path := BUNDLED / match[1]).is_dir():
            return path
        raise WeightsUnavailable("no such bundled model", which=model, hint="flux presets")
    if (path := folder_of(model)) is not None:
        return path
    if HUB_FILE.fullmatch(model):
        return cached_file(model, environment)
    if not HUB_ID.fullmatch(model) or ".." in model or model.lower().endswith(MODEL_FILES):
        raise WeightsUnavailable("no such model", which=model[:100], hint=f"-m FOLDER or FILE, {TRY_TINY}")
    whole, partial = _cached(model, environment, components)
    if not whole and (share := mirror(environment)) and is_complete(share / model, components):
        whole = share / model
    if whole:
        return whole
    what = "the download is incomplete" if partial else f"the weights of {model.rpartition('/')[2]} are not here"
    raise WeightsUnavailable(what, which=model, hint=f"flux models download {model}  ({TRY_TINY})")


def cached_file(name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """One file of a hub repository, ORG/NAME:FILE, in the cache or the mirror; raises `WeightsUnavailable`."""
    model, _, file = name.partition(":")
    found = [*(repository(model, environment) / "snapshots").glob(f"*/{glob.escape(file)}")]
    found += [share / model / file] if (share := mirror(environment)) else []
    found = [path for path in found if path.is_file()]
    if not found or ".." in name:
        raise WeightsUnavailable("that file is not here", which=name, hint=f"flux models download {name}")
    return max(found, key=lambda path: path.stat().st_mtime)


def folders(model: str) -> list[Path]:
    """Every folder (or file) that can serve `model`: what was baked from it, then the model itself, where it is here.

    Raises what `locate` raises where there is none.
    """
    found = list(baked(model).values())
    try:
        found.append(locate(model))
    except WeightsUnavailable:
        if not found:
            raise
    return found


def assembled(path: Path, request: GenerationRequest, bases: Callable[[], Sequence[str]]) -> Checkpoint:
    """The checkpoint of a model folder or file with the request's encoders and VAE; what it lacks is the first base's.

    Raises what `locate` and `quant.single_file.assemble_checkpoint` raise.
    """
    encoders = [locate(name, components=()) for name in request.text_encoders]

    def base(lacking: Collection[str]) -> Path:
        if folder := next((each for each in encoders if is_complete(each, lacking)), None):
            return folder
        for name in (names := bases()):
            with contextlib.suppress(WeightsUnavailable):
                if (folder := locate(name, components=lacking)).is_dir():
                    return folder
        parts = ",".join(("tokenizers", *lacking))
        why = f"it has no {' and no '.join((*lacking, 'tokenizers'))}, and {names[0]} is not here"
        hint = f"flux models download {names[0]} --only {parts}; or --text-encoders FOLDER"
        raise WeightsUnavailable("not a whole model", which=path, why=why, hint=hint)

    vae = locate(request.vae, components=()) if request.vae else None
    return assemble_checkpoint(path, base, text_encoders=encoders, vae=vae)


def checkpoints_of(order: Order, settings: Path, say: Callable[[str], None]) -> list[Checkpoint]:
    """Every checkpoint that can serve the request's model; a damaged one that was baked is left out and named.

    `settings` is the user's folder of presets. Raises `WeightsUnavailable`, `UsageError` and `CheckpointError`.
    """
    found, every = [], folders(order.request.model)
    for folder in every:
        try:
            found.append(assembled(folder, order.request, lambda: base_models(order.preset, settings)))
            check_guidance(order.request, found[-1])
        except CheckpointError as error:
            if folder == every[-1] and not found:
                raise
            say(f"left out: {error}")
    return found


def check_guidance(request: GenerationRequest, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` where guidance is given to a model without that input, or missing for one with it."""
    if checkpoint.takes_guidance and request.guidance is None:
        raise UsageError("this model needs a guidance", which=request.model, hint="--guidance 3.5")
    if not checkpoint.takes_guidance and request.guidance is not None:
        why = "it has no guidance input, the value would do nothing"
        raise UsageError("guidance without effect", which=request.model, why=why, hint="-p schnell, or --guidance none")


def absolute(name: str) -> str:
    """The name of a model or a part of one; that of a folder or file without regard to the working folder."""
    folder = None if name.startswith("bundled/") else folder_of(name)
    return str(folder) if folder else name


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
            if manifest["model"] == model and to in BAKEABLE and not left:
                found.append((path.parent.name, to, path.parent))
    return {to: folder for _, to, folder in sorted(found, reverse=True)}


def baked_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where quantized models go unless told: the user's data folder, by the rules of the platform."""
    return paths.user_folder("data", environment) / "flux" / "models"


def folder_of(model: str) -> Path | None:
    """The absolute folder or weight file that `model` names, None if none; raises `UsageError` for other files."""
    if not model or model.startswith(SHARES):
        raise UsageError("no model", which=model, why="a folder or a hub id is needed", hint="-m FOLDER")
    try:
        path = Path(model).expanduser()
        if path.is_dir() or (path.suffix.lower() in MODEL_FILES and path.exists()):
            return path.resolve() if path.is_dir() else Path(os.path.abspath(path))  # not a hub file's blob
        present = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long a name, NUL, no home
        return None
    if present:
        why = "a model is a folder in the published diffusers layout, or a .safetensors or .gguf file"
        raise UsageError("not a model", which=model, why=why, hint=f"-m {path.parent}")
    return None


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The hub's cache folder, by the rules of huggingface_hub."""
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(given)))  # without a home ~ stays as it is


def mirror(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of ORG/NAME folders that FLUX_MIRROR names, e.g. a share for machines without a network."""
    return Path(share).expanduser().absolute() if (share := environment.get("FLUX_MIRROR")) else None


def repository(model: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of a hub id in the hub's cache, whether it is there or not."""
    return hub_cache(environment) / f"models--{model.replace('/', '--')}"


def _cached(model: str, environment: Mapping[str, str], components: Collection[str]) -> tuple[Path | None, bool]:
    """(the model's newest snapshot with these components, that of `main` before others; whether any is there)."""
    root, main = repository(model, environment), ""
    with contextlib.suppress(OSError):
        main = (root / "refs" / "main").read_text(errors="replace").strip()
    try:
        found = [(path.name == main, path.stat().st_mtime, path) for path in (root / "snapshots").iterdir()]
    except OSError:
        return None, False
    return next((path for *_, path in sorted(found, reverse=True) if is_complete(path, components)), None), bool(found)
