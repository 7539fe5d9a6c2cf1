"""What the hub's library does for models: download one pinned commit, verify, remove.

huggingface_hub does the work, in its own cache and with its own patience. Knows no terminal: what
it has to tell goes to `say(line)` and `count(bytes_done, bytes_total, what)`. Sizes are in bytes.
"""

import contextlib
import glob
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxcli import paths
from fluxcli.errors import BadInputFile, OutputError, UsageError, WeightsUnavailable
from fluxcli.models import find
from fluxcli.models.hub_errors import explain, is_wrong_size, may_pass, name_failure
from fluxcli.models.local import LocalModel
from fluxcli.models.network import check_network
from quant.checkpoint import COMPONENTS, MANIFEST, TOKENIZERS
from quant.config import read_json
from quant.errors import CheckpointError
from quant.files import check_room, nearest, read_small_file
from quant.header import read_header
from quant.placing import FOLDER_LAYOUT, find_foreign, remove_checkpoint
from quant.redux import REDUX_PARTS

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

Say = Callable[[str], None]
Count = Callable[[int, int, str], None]

# Pauses before a download is taken up again after a dropped connection or an error of the server.
PAUSES_S = (1, 4, 15, 60)
# How long the library's threads may take to end, and to remove their partial files, after Ctrl-C.
GRACE_S = 2
NON_COMMERCIAL = re.compile(r"black-forest-labs/FLUX\.1-.*dev(-lora)?")
# The files of a model folder that are used: never code, pickles or half-precision copies.
WANTED = re.compile(
    r"model_index\.json"
    r"|scheduler/[^/]+\.json"
    r"|tokenizer(_2)?/[^/]+\.(json|txt|model)"
    r"|feature_extractor/[^/]+\.json"
    r"|(text_encoder|text_encoder_2|transformer|vae|image_encoder|image_embedder)"
    r"/(?![^/]*\.fp16)[^/]+\.(json|safetensors)"
)
# Those of a repository with one network in diffusers' layout, such as a ControlNet.
NETWORK = re.compile(r"config\.json|diffusion_pytorch_model(?!.*\.fp16)[^/]*\.(json|safetensors)")
# Files of every part that come with whichever part is asked for.
SMALL = re.compile(r"model_index\.json|scheduler/.*|feature_extractor/.*|.*/config\.json")
MAX_NOTE_BYTES = 4096  # of what the library notes of a file
DAMAGED = "the hub delivers a damaged file"
PROXY = "is a proxy in between? try it later"
WEIGHTS = (".safetensors", ".gguf")
PARTS: dict[str, Sequence[str]] = {
    "tokenizers": TOKENIZERS,
    **{name: (name,) for name in (*COMPONENTS, *TOKENIZERS, *REDUX_PARTS)},
}


# --- download


class _Place(NamedTuple):
    """A hub id and where its files go: the folder of a mirror, or None for the hub's cache."""

    model: str
    mirror: Path | None

    @property
    def folder(self) -> Path:
        return self.mirror or find.get_repository(self.model)

    @property
    def arguments(self) -> dict[str, Path]:
        """What the library's functions call the place."""
        if self.mirror:
            return {"local_dir": self.mirror}
        return {"cache_dir": paths.hub_cache_folder()}


def download(
    name: str,
    say: Say,
    count: Count,
    *,
    only: Sequence[str] = (),
    mirror: Path | None = None,
    revision: str = "",
) -> Path:
    """Download a model and return its folder, or for ORG/NAME[@REVISION]:FILE that file.

    The files lie in the hub's cache, or as plain files in the folder ORG/NAME below `mirror`. All
    of them are of one commit, to which `revision` is resolved first; without it that of the name
    counts, else main. `only` names `PARTS`.

    Raises `UsageError`; `WeightsUnavailable` if the hub does not give the files; `WriteError`
    before the first byte if the disk is too small; `OutputError` if the files cannot be written;
    and `BadInputFile`, after it was removed, for a file that is not what the hub publishes.
    """
    model, colon, file = name.partition(":")
    model, _, named_revision = model.partition("@")
    is_file_name = not colon or (file.endswith(WEIGHTS) and file.isprintable())
    if not find.HUB_ID.fullmatch(model) or ".." in name or not is_file_name:
        why = "it is no ORG/NAME or ORG/NAME:FILE.safetensors"
        hint = "flux models download ORG/NAME:FILE, with a FILE in .safetensors or .gguf"
        raise UsageError("nothing to download", which=name, why=why, hint=hint)
    unknown = sorted(set(only) - set(PARTS))
    if unknown:
        why = f"known are {', '.join(PARTS)}"
        raise UsageError("unknown part", which=unknown[0], why=why, hint="--only vae")
    check_network()
    if NON_COMMERCIAL.fullmatch(model):
        say(f"{model} comes under a non-commercial licence: read it at huggingface.co/{model}")
    place = _Place(model, mirror.expanduser().absolute() / model if mirror else None)
    check_hub_files(find.get_repository(model))
    try:
        revision = revision or named_revision or "main"
        return _download(place, file, only=only, revision=revision, say=say, count=count)
    except Exception as error:
        raise explain(error, name, place.folder) from error


def check_hub_files(folder: Path) -> None:
    """Raise `BadInputFile` for a FIFO below a folder, or in place of the token.

    The hub's library would wait for it.
    """
    from huggingface_hub import constants

    for path in (Path(constants.HF_TOKEN_PATH), *folder.rglob("*")):
        is_fifo = False
        with contextlib.suppress(OSError):
            is_fifo = path.is_fifo()
        if is_fifo:
            why = "it is a FIFO"
            raise BadInputFile("cannot use the hub's files", path, why=why, hint=f"delete {path}")


def _download(
    place: _Place, file: str, *, only: Sequence[str], revision: str, say: Say, count: Count
) -> Path:
    """Download as `download` does, with the errors of the library."""
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    if is_offline_mode():
        raise OfflineModeIsEnabled
    commit = _resolve(place, revision)
    names = _choose_files(place.model, file, only, published=_list_files(place, commit))
    wanted: dict[str, Any] = {
        "repo_id": place.model,
        "revision": commit,
        # The names are patterns to the library, and may hold brackets.
        "allow_patterns": [glob.escape(name) for name in names],
        "cache_dir": paths.hub_cache_folder(),  # a mirror copies from it what it has
        "local_dir": place.mirror,
    }
    silent = _make_progress_class(count, [], [])
    plan = snapshot_download(**wanted, tqdm_class=silent, dry_run=True)
    missing = [each for each in plan if each.will_download or not Path(each.local_path).exists()]
    # What the cache has is linked there, but copied to a mirror.
    need_bytes = sum(each.file_size or 0 for each in missing if each.will_download or place.mirror)
    room_hint = "HF_HOME moves the cache elsewhere, --mirror takes a folder"
    check_room(place.folder, need_bytes, hint=room_hint)
    free_bytes = shutil.disk_usage(nearest(place.folder)).free
    say(
        f"{place.model}@{commit[:12]}: {len(plan)} files, {len(missing)} of them missing, "
        f"{need_bytes / 1e9:.2f} GB to download, {free_bytes / 1e9:.0f} GB free"
    )
    for each in missing:
        if each.filename.endswith(WEIGHTS):
            say(f"{each.filename}: {(each.file_size or 0) / 1e9:.2f} GB")
    if missing:
        _fetch(place, wanted, missing=missing, say=say, count=count)
        _check_downloaded(place, commit, missing)
    folder = place.mirror or place.folder / "snapshots" / commit
    return folder / file


def _resolve(place: _Place, revision: str) -> str:
    """The commit that a branch or tag means now.

    The cache notes it, so that `find.locate` knows later which of several commits `main` was.
    """
    from huggingface_hub import HfApi

    if place.mirror:
        return str(HfApi().model_info(place.model, revision=revision).sha)
    cache = paths.hub_cache_folder()
    resolved = HfApi().resolve_revision(place.model, revision=revision, cache_dir=cache)
    return str(resolved.resolved)


def _list_files(place: _Place, commit: str) -> list[str]:
    """The names of all files of a repository at a commit: as kept by the library, or the hub's."""
    from huggingface_hub import HfApi, RepoFile, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(place.model, revision=commit, **place.arguments)
    except CachedRepoTreeNotFoundError:
        files = HfApi().list_repo_tree(place.model, recursive=True, revision=commit)
    return [each.path for each in files if isinstance(each, RepoFile)]


def _choose_files(
    model: str, file: str, only: Sequence[str], *, published: Sequence[str]
) -> list[str]:
    """The files to download of those that the repository has.

    Raises `WeightsUnavailable` where it lacks one, with the weight files that it has for a hint.
    """
    hint = ""
    weights = [name for name in published if name.endswith(WEIGHTS)]
    if weights:
        hint = f"flux models download {model}:FILE, with FILE one of {', '.join(weights[:5])}"
    needed = file or "model_index.json"
    network = [name for name in published if NETWORK.fullmatch(name)]
    if not file and needed not in published and "config.json" in network and len(network) > 1:
        _refuse_parts_of_network(model, only)
        return network
    if needed not in published:
        raise WeightsUnavailable("not in this repository", which=f"{model}:{needed}", hint=hint)
    if file:
        return [file]
    parts = {*COMPONENTS, *TOKENIZERS}
    if all(f"{name}/config.json" in published for name in REDUX_PARTS):
        parts = set(REDUX_PARTS)
    if only:
        parts = {folder for part in only for folder in PARTS[part]}
    wanted = [name for name in published if WANTED.fullmatch(name)]
    usable = {name.partition("/")[0] for name in wanted if not SMALL.fullmatch(name)}
    lacking = sorted(parts - usable)
    if lacking:
        why = f"no usable file in {lacking[0]}/"
        raise WeightsUnavailable("not a whole model", which=model, why=why, hint=hint)
    return [name for name in wanted if SMALL.fullmatch(name) or name.partition("/")[0] in parts]


def _refuse_parts_of_network(model: str, only: Sequence[str]) -> None:
    """Raise `UsageError` where parts are asked for of a repository that holds one network."""
    if only:
        why = "it holds one network"
        raise UsageError("--only does not apply", which=model, why=why, hint="leave --only out")


def _fetch(
    place: _Place,
    wanted: dict[str, Any],
    *,
    missing: Sequence["DryRunFileInfo"],
    say: Say,
    count: Count,
) -> None:
    """Download the missing files; a connection that drops, or a server's error, is tried again.

    The library itself waits for a hub that is busy, and takes up a file that was cut off while the
    process lives. It keeps no part of a file for a later one (huggingface_hub 2.4 writes to a name
    of its own for each try, and removes it), so a file that was interrupted begins anew there.
    """
    pauses_s = list(PAUSES_S)
    while True:
        left = _list_missing(missing)
        try:
            bars = _make_progress_class(count, missing, left)
            _run_apart(wanted | {"tqdm_class": bars}, place.folder)
            return
        except Exception as error:
            names = [each.filename for each in _list_missing(missing)]
            named = ", ".join(names[:3]) or "what has changed"
            if len(names) > 3:
                named += f" and {len(names) - 3} more"
            if not pauses_s or not may_pass(error):
                say(f"not downloaded: {named}; the same command gets what is missing")
                if not is_wrong_size(error):
                    raise
                why = "its size is not what the hub announced"
                raise BadInputFile(DAMAGED, which=named, why=why, hint=PROXY) from error
            pause_s = pauses_s.pop(0)
            say(f"{name_failure(error)}: goes on with {named}, in {pause_s} s")
        time.sleep(pause_s)


def _list_missing(files: Sequence["DryRunFileInfo"]) -> list["DryRunFileInfo"]:
    return [each for each in files if not Path(each.local_path).exists()]


def _run_apart(wanted: dict[str, Any], folder: Path) -> None:
    """Run the library in a thread, so that Ctrl-C need not wait until whole files are downloaded.

    The signal unwinds this thread. The library's threads end when they next count bytes, and remove
    their partial files; what is left of those that do not end is removed here.
    """
    from huggingface_hub import snapshot_download

    executor = ThreadPoolExecutor(max_workers=1)
    running = executor.submit(snapshot_download, **wanted)
    try:
        running.result()
    finally:
        executor.shutdown(wait=False)
        ended = wait([running], timeout=GRACE_S).done
        if not ended:
            _remove_open_parts(folder)


def _remove_open_parts(folder: Path) -> None:
    """Remove the partial files that this process has open, and none that another one writes."""
    import psutil

    with contextlib.suppress(OSError, psutil.Error):
        for file in psutil.Process().open_files():
            path = Path(file.path)
            if path.suffix == ".incomplete" and path.is_relative_to(folder.resolve()):
                path.unlink(missing_ok=True)


def _make_progress_class(
    count: Count, missing: Sequence["DryRunFileInfo"], left: Sequence["DryRunFileInfo"]
) -> type:
    """The class of the library's progress bars for one try: they show nothing, and count bytes.

    `left` are the files of this try; those of `missing` that an earlier one brought count at once.
    """
    from huggingface_hub.utils import tqdm

    total_bytes = sum(each.file_size or 0 for each in missing)
    done_bytes = total_bytes - sum(each.file_size or 0 for each in left)
    what = f"download {len(missing)} files"
    lock = threading.Lock()  # several files are downloaded at once

    class Progress(tqdm):
        def __init__(self, *args: object, name: str | None = None, **kwargs: object) -> None:
            kwargs["disable"] = True
            super().__init__(*args, name=name, **kwargs)
            # One bar counts files, one bytes on the wire, and this one bytes of files.
            self._counts = name == "huggingface_hub.snapshot_download"

        def update(self, n: float | None = 1) -> None:
            nonlocal done_bytes
            if self._counts:
                with lock:
                    done_bytes += int(n or 0)
                    count(done_bytes, total_bytes, what)

    return Progress


def _check_downloaded(place: _Place, commit: str, files: Sequence["DryRunFileInfo"]) -> None:
    """Compare what was downloaded with the published checksums.

    Raises `BadInputFile` for a file that differs, or whose header cannot be read; it is removed.
    """
    from huggingface_hub import HfApi

    why = {}
    for each in files:
        path = Path(each.local_path)
        if path.suffix == ".safetensors":
            try:
                read_header(path)
            except CheckpointError as error:
                why[each.filename] = error.why
    found = HfApi().verify_repo_checksums(place.model, revision=commit, **place.arguments)
    for mismatch in found.mismatches:
        why.setdefault(mismatch["path"], _describe_mismatch(mismatch["algorithm"]))
    damaged = [each for each in files if each.filename in why]
    for each in damaged:
        path = Path(each.local_path)
        path.resolve().unlink(missing_ok=True)  # the blob of the cache
        path.unlink(missing_ok=True)
    if damaged:
        first = damaged[0].filename
        raise BadInputFile(DAMAGED, which=first, why=why[first], hint=PROXY)


def _describe_mismatch(algorithm: str) -> str:
    return f"its {algorithm.removeprefix('git-')} is not the published one"


# --- verify and remove


class Verification(NamedTuple):
    """Damaged files as `file: why`, and how many were compared with a published checksum."""

    damaged: list[str]
    checked: int


def verify(model: LocalModel) -> Verification:
    """Compare a model's files with the checksums that the hub publishes, which asks the hub.

    Of a model that is not the hub's, sizes are compared with its manifest, and headers are read.
    Raises `WeightsUnavailable` where the hub does not answer.
    """
    if model.kind not in ("hub", "mirror"):
        return Verification(_verify_sizes(model), 0)
    from huggingface_hub import HfApi

    check_hub_files(model.path)
    check_network()
    place = _Place(model.name, model.path if model.kind == "mirror" else None)
    commit = model.commit or _read_mirrored_commit(model.path)
    try:
        found = HfApi().verify_repo_checksums(model.name, revision=commit, **place.arguments)
    except Exception as error:
        raise explain(error, model.name, model.path) from error
    damaged = [
        f"{path.relative_to(model.path).as_posix()}: its data are gone"
        for path in model.files
        if not path.exists()
    ]
    for each in found.mismatches:
        damaged.append(f"{each['path']}: {_describe_mismatch(each['algorithm'])}")
    return Verification(damaged, found.checked_count)


def _read_mirrored_commit(folder: Path) -> str | None:
    """The commit that the library has noted beside the files of a mirror, None if it has not."""
    for note in sorted((folder / ".cache/huggingface/download").rglob("*.metadata")):
        words = read_small_file(note, MAX_NOTE_BYTES).decode(errors="replace").split()
        return words[0] if words else None
    return None


def _verify_sizes(model: LocalModel) -> list[str]:
    """What of a bundled or baked model is damaged; nothing outside of its folder is looked at."""
    sizes: dict[str, Any] = {}
    damaged = []
    if model.kind == "baked":
        try:
            manifest = read_json(model.path / MANIFEST, "no manifest")
        except CheckpointError as error:
            return [f"{MANIFEST}: {error.why}"]
        for key in ("bytes", "files"):
            named = manifest.get(key, {})
            if isinstance(named, dict):
                sizes |= named
            else:
                damaged.append(f"{MANIFEST}: its {key} are no list of files")
    here = {path.relative_to(model.path).as_posix() for path in model.files}
    for name in sorted(here | set(sizes)):
        why = "it leads out of the folder"
        if _is_inside(name, model.path):
            why = _find_damage(model.path / name, sizes.get(name))
        if why:
            damaged.append(f"{name[:100]}: {why}")
    return damaged


def _is_inside(name: str, folder: Path) -> bool:
    """Whether a manifest's name is of a file in the folder, on every system and behind links."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\0]|^\w:", name):
        return False
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return (folder / name).resolve().is_relative_to(folder.resolve())
    return False


def _find_damage(path: Path, expected_bytes: object) -> str:
    """What is wrong with a file, "" where nothing is; `expected_bytes` is None where unknown."""
    try:
        if not path.exists():
            return "it is missing"
        if not path.is_file():
            return "it is no regular file"
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            read_header(path)
    except CheckpointError as error:
        return error.why or "unreadable"
    except OSError as error:
        return error.strerror or "unreadable"
    if expected_bytes is not None and size != expected_bytes:
        return f"it has {size} bytes"
    return ""


def remove(model: LocalModel) -> None:
    """Delete a baked folder, or all that the hub's cache has of a model.

    Raises `OutputError`, also for a baked folder with files that `flux quantize` has not made.
    """
    path = find.get_repository(model.name) if model.kind == "hub" else model.path
    if model.kind == "hub":  # whose library reads all of the cache
        check_hub_files(paths.hub_cache_folder())
    try:
        if model.kind == "hub":
            _remove_revisions(path)
        if path.is_symlink():
            path.unlink()
        elif model.kind == "baked":
            _remove_baked(path)
        elif path.exists():  # also what the library leaves out as corrupted
            shutil.rmtree(path)
    except OSError as error:
        why = error.strerror or str(error)
        hint = "see who owns it, and that its disk is not read-only"
        raise OutputError("cannot remove the model", path, why=why, hint=hint) from error


def _remove_baked(folder: Path) -> None:
    foreign = find_foreign(folder, FOLDER_LAYOUT)
    if foreign:
        why = f"flux quantize did not make {', '.join(foreign[:3])}"
        hint = "move them, or delete the folder yourself"
        raise OutputError("not removed", folder, why=why, hint=hint)
    remove_checkpoint(folder)


def _remove_revisions(repository: Path) -> None:
    """Delete all revisions of a repository of the cache.

    The library deletes by commit; a copy of the repository under another name may have the same
    commits, so the library is shown this repository alone.
    """
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(paths.hub_cache_folder())
    own = frozenset(repo for repo in cache.repos if repo.repo_path.name == repository.name)
    commits = [revision.commit_hash for repo in own for revision in repo.revisions]
    replace(cache, repos=own).delete_revisions(*commits).execute()
