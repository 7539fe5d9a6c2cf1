"""Where a model is: bundled with flux, a folder or file, the hub's own cache, a mirror, or baked.

Knows nothing of the network: what is not here is an error with the command that gets it. Reads
manifests and headers, no weights. Stdlib only.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.models.abilities import apply_kind, check_abilities
from fluxcli.models.address import read_address
from fluxcli.paths import BUNDLED, baked_folder, hub_cache_folder, mirror_folder
from fluxcli.request.fields import GenerationRequest, Order
from fluxcli.request.presets import base_models
from quant.checkpoint import (
    COMPONENTS,
    MANIFEST,
    Checkpoint,
    check_components,
    find_kind_of,
    inspect_component,
    is_complete,
)
from quant.config import read_json
from quant.errors import CheckpointError, ExplainedError
from quant.files import read_small_file
from quant.single_file import assemble_checkpoint, inspect_transformer
from quant.spec import BAKEABLE

# ORG/NAME, and perhaps the branch, tag or commit of it that is meant.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@\w[\w./-]*)?")
HUB_FILE = re.compile(HUB_ID.pattern + r":(?!/)[^\x00-\x1f]+\.(?:safetensors|gguf)")
MODEL_FILES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
MAX_REF_BYTES = 1024  # of a file that names a commit
# Folders that other machines share: Windows would send them a password hash if they were opened.
SHARES = ("\\\\", "//")
# A bake that goes on, or was killed, writes to a folder with this in its name.
UNFINISHED = ".tmp-"
# How presets call the published models, and what getting them takes.
LICENCE = "huggingface.co/black-forest-labs/FLUX.1-dev"
LICENCE_KONTEXT = "huggingface.co/black-forest-labs/FLUX.1-Kontext-dev"
PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": (
        f"dev (34 GB, gated: first accept the licence at {LICENCE}, then hf auth login)"
    ),
    "black-forest-labs/FLUX.1-schnell": "schnell (34 GB)",
    "black-forest-labs/FLUX.1-Kontext-dev": (
        f"kontext (34 GB, gated: first accept the licence at {LICENCE_KONTEXT}, then hf auth login)"
    ),
}
TRY_TINY = 'or try at once: flux generate "a red circle on a blue background" -p tiny'


# --- one model


def locate(
    model: str,
    *,
    components: Collection[str] = COMPONENTS,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Return the folder or file of a model as a user names it.

    The name is bundled/NAME, a folder or file, ORG/NAME:FILE, or a hub id ORG/NAME. The folder of
    a hub id is one that has the weights of `components`.

    Raises `WeightsUnavailable` naming the command that gets it, and `UsageError` for what can be no
    model.
    """
    bundled = re.fullmatch(r"bundled/([\w-]+)", model)
    if bundled:
        path = BUNDLED / bundled[1]
        if path.is_dir():
            return path
        raise WeightsUnavailable("no such bundled model", which=model, hint="flux presets")
    named = find_path(model)
    if named:
        return named
    model = read_address(model)
    if HUB_FILE.fullmatch(model):
        return locate_file(model, environment)
    if not HUB_ID.fullmatch(model) or ".." in model or model.lower().endswith(MODEL_FILES):
        hint = f"a folder, a file or ORG/NAME; {TRY_TINY}"
        raise WeightsUnavailable("no such model", which=model[:100], hint=hint)
    copies = list_copies(model, environment)
    for folder in copies:
        if is_complete(folder, components):
            return folder
    what = f"the weights of {model.rpartition('/')[2]} are not here"
    if copies:
        what = "the download is incomplete"
    hint = f"flux models download {PUBLISHED.get(model, model)}; {TRY_TINY}"
    raise WeightsUnavailable(what, which=model, hint=hint)


def locate_file(name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return one file of a hub repository, named ORG/NAME:FILE; raises `WeightsUnavailable`."""
    model, _, file = name.partition(":")
    if ".." not in name:
        for folder in list_copies(model, environment):
            if (folder / file).is_file():
                return folder / file
    hint = f"flux models download {name}"
    raise WeightsUnavailable("that file is not here", which=name, hint=hint)


def find_path(model: str) -> Path | None:
    """Return the absolute path of the folder or weight file that `model` names, or None.

    Raises `UsageError` for an empty name, a share of another machine, and a file of another kind.
    """
    if not model or model.startswith(SHARES):
        why = "a folder or a hub id is needed"
        raise UsageError("no model", which=model, why=why, hint="-m FOLDER")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path.resolve()
        if not path.exists():
            return None
    except (OSError, ValueError, RuntimeError):
        return None  # too long a name, NUL in it, or ~ without a home
    if path.suffix.lower() in MODEL_FILES:
        # Not resolved: a file of the hub's cache is a link to a blob, whose name says nothing.
        return Path(os.path.abspath(path))
    why = "a model is a folder in the published diffusers layout, or a .safetensors or .gguf file"
    raise UsageError("not a model", which=model, why=why, hint=f"-m {path.parent}")


def make_absolute(name: str) -> str:
    """Return a name of a model or part that holds in any working folder.

    An address of the hub becomes ORG/NAME:FILE.
    """
    path = None if name.startswith("bundled/") else find_path(name)
    return str(path) if path else read_address(name)


def read_kind(model: str) -> str:
    """Return which kind of FLUX.1 a model is, of `quant.kinds.KINDS`; "" for one that is not here.

    The transformer's header and the folder's index tell. Never raises for what is no model.
    """
    with contextlib.suppress(ExplainedError, OSError):
        path = locate(model, components=("transformer",))
        if path.is_file():
            return find_kind_of(inspect_transformer(path)).kind
        folder = path / "transformer"
        if not folder.is_dir():
            return find_kind_of(inspect_component("transformer", path)).kind
        index = read_json(path / "model_index.json", "not a FLUX model folder")
        pipeline = str(index.get("_class_name"))
        return find_kind_of(inspect_component("transformer", folder), pipeline).kind
    return ""


# --- the hub's cache


class Snapshot(NamedTuple):
    """The files of one commit of a repository in the hub's cache."""

    model: str
    commit: str
    folder: Path


def list_snapshots(environment: Mapping[str, str] = os.environ) -> Iterator[Snapshot]:
    """Yield every snapshot of the hub's cache, sorted by path."""
    for folder in sorted(hub_cache_folder(environment).glob("models--*--*/snapshots/*")):
        repository = folder.parent.parent.name
        model = repository.removeprefix("models--").replace("--", "/", 1)
        yield Snapshot(model, folder.name, folder)


def get_repository(model: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of a hub id in the hub's cache, whether it is there or not."""
    model = model.partition("@")[0]
    return hub_cache_folder(environment) / f"models--{model.replace('/', '--')}"


def list_copies(model: str, environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the folders that have files of a hub id, the best first.

    These are its snapshots in the hub's cache, first the one that `main` means, then the newest;
    and the folder ORG/NAME of the mirror. Of ORG/NAME@REVISION it is that snapshot alone.
    """
    repository = get_repository(model, environment)
    model, _, revision = model.partition("@")
    wanted = ""
    with contextlib.suppress(OSError):
        reference = repository / "refs" / (revision or "main")
        wanted = read_small_file(reference, MAX_REF_BYTES).decode(errors="replace").strip()
    copies = [folder for folder in (repository / "snapshots").glob("*") if folder.is_dir()]
    if revision:
        return [each for each in copies if each.name in (wanted, revision)]
    copies.sort(key=lambda folder: (folder.name == wanted, folder.stat().st_mtime), reverse=True)
    mirror = mirror_folder(environment)
    if mirror and (mirror / model).is_dir():
        copies.append(mirror / model)
    return copies


# --- whole checkpoints


def list_checkpoints(order: Order, settings: Path, say: Callable[[str], None]) -> list[Checkpoint]:
    """Return every checkpoint that can serve an order's model: those baked from it, then its own.

    One of them that is damaged is left out, which `say` is told, unless nothing else is there.
    `settings` is the user's folder of presets. Raises `WeightsUnavailable`, `UsageError` and
    `CheckpointError`.
    """
    request = order.request
    found = []
    folders = list_folders(request.model)
    for folder in folders:
        try:
            checkpoint = assemble(folder, request, lambda: base_models(order.preset, settings))
            checkpoint = apply_kind(request, checkpoint)
            check_components(checkpoint.components)
            check_abilities(request, checkpoint)
            found.append(checkpoint)
        except CheckpointError as error:
            if folder == folders[-1] and not found:
                raise
            say(f"left out: {error}")
    return found


def list_folders(model: str) -> list[Path]:
    """Return every folder or file that can serve a model: what was baked from it, then its own.

    Raises what `locate` raises where there is none.
    """
    found = list(list_baked(model).values())
    try:
        found.append(locate(model))
    except WeightsUnavailable:
        if not found:
            raise
    return found


def list_baked(model: str) -> dict[str, Path]:
    """Return what `flux quantize` made of a model in the user's model folder, by precision.

    Of several in one precision the first by name counts.
    """
    found: dict[str, Path] = {}
    for path in sorted(baked_folder().glob(f"*/{MANIFEST}"), reverse=True):
        # A manifest that is damaged, or was written by somebody else.
        with contextlib.suppress(CheckpointError, TypeError, KeyError):
            manifest = read_json(path, "no manifest")
            precision = manifest["recipe"]["to"]
            if manifest["model"] != model or precision not in BAKEABLE:
                continue
            if UNFINISHED not in path.parent.name:
                found[precision] = path.parent
    return found


def assemble(
    path: Path, request: GenerationRequest, list_bases: Callable[[], Sequence[str]]
) -> Checkpoint:
    """Return the checkpoint of a model folder or file, with the text encoders and VAE of a request.

    What it lacks then is taken from one of the request's text encoders' folders that has it, else
    from the first of the models of `list_bases` that is here. Raises what `locate` and
    `quant.single_file.assemble_checkpoint` raise.
    """
    text_encoders = [locate(name, components=()) for name in request.text_encoders]

    def find_base(lacking: Collection[str]) -> Path:
        for folder in text_encoders:
            if is_complete(folder, lacking):
                return folder
        bases = list_bases()
        for name in bases:
            with contextlib.suppress(WeightsUnavailable):
                base = locate(name, components=lacking)
                if base.is_dir():
                    return base
        absent = " and no ".join((*lacking, "tokenizers"))
        why = f"it has no {absent}, and {bases[0]} is not here"
        parts = ",".join(("tokenizers", *lacking))
        hint = f"flux models download {bases[0]} --only {parts}; or --text-encoders FOLDER"
        raise WeightsUnavailable("not a whole model", which=path, why=why, hint=hint)

    vae = None
    if request.vae:
        vae = locate(request.vae, components=())
    return assemble_checkpoint(path, find_base, text_encoders=text_encoders, vae=vae)
