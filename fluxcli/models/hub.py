"""Weights of the hub: one pinned commit downloaded, retried in process and checked; what is here verified, removed.

huggingface_hub does the work, in its own cache. Knows no terminal: `say(line)` and `count(bytes done, total, file)`.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fluxcli.errors import BadInputFile, OutputError, UsageError, WeightsUnavailable
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from quant.checkpoint import COMPONENTS, MANIFEST, TOKENIZERS, is_complete
from quant.config import read_json
from quant.errors import CheckpointError
from quant.files import check_room, nearest
from quant.header import read_header

PAUSES_S, LONGEST_PAUSE_S = (1, 4, 15, 60), 120  # between five tries, and the most that the hub may ask for
MAY_PASS = (408, 429, 500, 502, 503, 504)
NON_COMMERCIAL = re.compile(r"black-forest-labs/FLUX\.1-.*dev")
WANTED = re.compile(
    r"model_index\.json|scheduler/[^/]+\.json|tokenizer(_2)?/[^/]+\.(json|txt|model)"
    r"|(text_encoder|text_encoder_2|transformer|vae)/(?![^/]*\.fp16)[^/]+\.(json|safetensors)"
)
SMALL = re.compile(r"model_index\.json|scheduler/.*|.*/config\.json")  # taken with every part
SINGLE = (".safetensors", ".gguf")
PARTS = {"tokenizers": TOKENIZERS} | {name: (name,) for name in (*COMPONENTS, *TOKENIZERS)}
Say, Count = Callable[[str], None], Callable[[int, int, str], None]


def download(
    name: str, say: Say, count: Count, *, only: Sequence[str] = (), folder: Path | None = None, revision: str = "main"
) -> Path:
    """The folder of a hub id, in the hub's cache or below `folder`, or the file of ORG/NAME:FILE, downloaded.

    `only` names `PARTS`. Raises `UsageError`, `WeightsUnavailable`, `WriteError` for a disk that is too small (before
    the first byte), `OutputError`, and `BadInputFile` for a file that twice is not what the hub publishes.
    """
    model, colon, file = name.partition(":")
    if not models.HUB_ID.fullmatch(model) or ".." in name or (colon and not file.endswith(SINGLE)):
        raise UsageError("nothing to download", which=name, why="it is no ORG/NAME or ORG/NAME:FILE.safetensors")
    if unknown := sorted({*only} - {*PARTS}):
        raise UsageError("unknown part", which=unknown[0], why=f"known are {', '.join(PARTS)}")
    if NON_COMMERCIAL.fullmatch(model):
        say(f"{model} comes under a non-commercial licence: read it at huggingface.co/{model}")
    from huggingface_hub import HfApi, file_download, hf_hub_download, set_client_factory

    set_client_factory(_client)
    root = models.repository(model)
    target = folder.expanduser().absolute() / model if folder else root
    patiently = partial(_patiently, name, target, say)
    ask = partial(HfApi().model_info, model, revision=revision, files_metadata=True, timeout=20)
    info = patiently(ask, f"asks again for {model}", drops=False)
    published = {each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id or "" for each in info.siblings}
    place = {"revision": info.sha, "cache_dir": models.hub_cache(), "local_dir": target if folder else None}
    fetch, names = partial(hf_hub_download, model, **place), _wanted(model, file, only, list(published))
    plan = [patiently(partial(fetch, each, dry_run=True), f"asks again for {each}") for each in names]
    left = [each for each in plan if each.will_download or not os.path.exists(each.local_path)]
    size = {each.filename: each.file_size or 0 for each in left if each.will_download or folder}
    done, total = 0, sum(size.values())
    check_room(target, total, hint="HF_HOME moves the cache elsewhere, --mirror takes a folder")
    room = f"{total / 1e9:.2f} GB to download, {shutil.disk_usage(nearest(target)).free / 1e9:.0f} GB free"
    say(f"{model}@{info.sha[:12]}: {len(plan)} files, {len(left)} of them missing, {room}")
    for each in (info.filename for info in left):
        if each.endswith(SINGLE):
            say(f"{each}: {size.get(each, 0) / 1e9:.2f} GB")
        counted = {"count": staticmethod(partial(count, total=total, detail=each)), "done": done}
        get = partial(fetch, each, tqdm_class=type("Bar", (_Bar,), counted))
        patiently(partial(_fetch, get, each, published[each]), f"starts this file again: {each}")
        done += size.get(each, 0)
    if not folder:
        with contextlib.suppress(OSError):  # a pinned download leaves no ref; a cache that cannot be written will do
            file_download._cache_commit_hash_for_specific_revision(str(root), revision, info.sha)
    return (target if folder else root / "snapshots" / info.sha) / file


def _wanted(model: str, file: str, only: Sequence[str], names: list[str]) -> list[str]:
    """The files to download, weights last; raises `WeightsUnavailable` where the repository lacks them."""
    singles = ", ".join([name for name in names if name.endswith(SINGLE)][:5])
    hint = f"flux models download {model}:FILE, with FILE one of {singles}" if singles else ""
    if (needed := file or "model_index.json") not in names:
        raise WeightsUnavailable("not in this repository", which=f"{model}:{needed}", hint=hint)
    if file:
        return [file]
    parts = {folder for part in only for folder in PARTS[part]} or {*COMPONENTS, *TOKENIZERS}
    found = {name: name.partition("/")[0] for name in names if WANTED.fullmatch(name)}
    if missing := sorted(parts - {part for name, part in found.items() if not SMALL.fullmatch(name)}):
        raise WeightsUnavailable("not a whole model", which=model, why=f"no usable file in {missing[0]}/", hint=hint)
    taken = [name for name, part in found.items() if part in parts or SMALL.fullmatch(name)]
    return sorted(taken, key=lambda name: (name.endswith(SINGLE), name))


class _Bar(contextlib.ExitStack):
    """What the library takes for the progress bar of a file: it counts bytes, and shows nothing."""

    count, done = print, 0  # of a subclass

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def update(self, n: float | None = 1) -> None:
        self.done += int(n or 0)
        self.count(self.done)

    def update_transfer(self, *_: object, **__: object) -> None:
        """Nothing: xet's bytes on the wire are others than those of the file."""

    set_postfix_str = set_transfer_postfix_str = update_transfer


def _fetch(fetch: Callable[[], str], file: str, published: str) -> None:
    """Download a file; raises `BadInputFile` naming one that is damaged, after it is removed."""
    path, why = None, "its size is not what the hub announced"
    try:
        path = Path(fetch())
        why = damage(path, published)
    except OSError as error:
        if "Consistency check" not in str(error):
            raise
    if why:
        for each in {path, path.resolve()} if path else ():
            each.unlink(missing_ok=True)
        raise BadInputFile("the hub delivers a damaged file", file, why=why, hint="is a proxy in between? try it later")


def _patiently(name: str, target: Path, say: Say, call: Callable, again: str, *, drops: bool = True) -> object:
    """What `call` returns; a refusal, or a connection that `drops`, is tried again four times, damage once."""
    pauses = list(PAUSES_S)
    while True:
        try:
            return call()
        except BadInputFile as damaged:
            if not pauses:
                raise
            wait, pauses, why = 0, [], f"{damaged.which} is damaged ({damaged.why})"
        except Exception as raised:
            error = (isinstance(raised, FileNotFoundError) and raised.__cause__) or raised  # of "no local entry"
            status, asked = _answer(error)
            if not pauses or not (status in MAY_PASS or (drops and _is_drop(error))):
                raise _explained(name, error, status, target) from raised
            pause, why = pauses.pop(0), f"HTTP {status}" if status else f"connection dropped ({type(error).__name__})"
            wait = min(pause if asked is None else asked, LONGEST_PAUSE_S)
        say(f"{why}: {again}, in {wait} s")
        time.sleep(wait)


def _answer(error: Exception) -> tuple[int, int | None]:
    """(the hub's status, 0 if it did not answer; the seconds that it asks to wait)."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if (response := getattr(error, "response", None)) is None:
        return 0, None
    limit, after = parse_ratelimit_headers(response.headers), response.headers.get("retry-after", "")
    asked = limit.reset_in_seconds if limit and not limit.remaining else int(after) if after.isdigit() else None
    return response.status_code, asked


def _is_drop(error: Exception) -> bool:
    kinds, modules = (ConnectionError, TimeoutError, RuntimeError), ("httpx", "hf_xet")  # xet raises any of these
    return isinstance(error, kinds) or type(error).__module__.startswith(modules)


def _client() -> object:
    """The library's client, but a refusal is raised at once: its own retries wait as long as a hub asks."""
    from huggingface_hub.utils import _http

    client = _http.default_client_factory()
    client.event_hooks["response"].append(lambda it: it.status_code in MAY_PASS and _http.hf_raise_for_status(it))
    return client


def _explained(name: str, error: Exception, status: int, target: Path) -> Exception:
    """The user's view of what huggingface_hub raised (its own text has addresses); an unknown error as it is."""
    from huggingface_hub import errors, get_token

    page, kind = f"huggingface.co/{name.partition(':')[0]}", type(error).__name__
    here = "without it there is " + ", ".join(f"{each.name} ({each.state})" for each in listing())
    if isinstance(error, OSError) and error.errno is not None and not _is_drop(error):
        return OutputError("cannot store the model", which=target, why=error.strerror or kind)
    rows = (
        (isinstance(error, errors.GatedRepoError), "the model is gated",
         "this account or its token has no access" if get_token() else "nobody is logged in",
         f"1. accept the licence at {page}; 2. make a read token at huggingface.co/settings/tokens; "
         f"3. hf auth login; 4. flux models download {name}"),
        (isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)), "no such model",
         "the hub knows no such model, or this account may not see it", f"look at {page}, then: hf auth login"),
        (isinstance(error, errors.RevisionNotFoundError), "no such revision", "", f"{page}/commits/main has them"),
        (status in (401, 403), "the hub refuses the token", f"HTTP {status}", "hf auth login"),
        (status, "the hub does not deliver", f"HTTP {status}", "try it later"),
        (kind == "OfflineModeIsEnabled", "nothing is downloaded", "HF_HUB_OFFLINE is set", here),
        (_is_drop(error), "the hub is out of reach", f"no connection ({kind})", here),
        (isinstance(error, (ValueError, OSError)), "the hub is not understood", f"{kind}: the page of a proxy?", here),
    )  # fmt: skip
    found = next((row for applies, *row in rows if applies), None)
    return WeightsUnavailable(found[0], which=name, why=found[1], hint=found[2]) if found else error


@dataclass(frozen=True)
class Here:
    """A model of this machine; `kind` is bundled, hub, mirror or baked, `state` complete, partial or (single) files."""

    name: str
    kind: str
    path: Path
    commit: str = ""

    @property
    def state(self) -> str:
        return "complete" if is_complete(self.path) else "partial" if _pipeline(self.path) else "files"

    @property
    def files(self) -> list[Path]:
        found = (path for path in sorted(self.path.rglob("*")) if path.is_symlink() or not path.is_dir())
        return [path for path in found if ".cache" not in path.relative_to(self.path).parts]


def listing(named: str = "") -> list[Here]:
    """What is here and FLUX's by its model_index.json, else its name, or has a LoRA; and all that is `named` so."""
    share, baked = models.mirror(), models.baked_folder().glob(f"*/{MANIFEST}")
    found = [Here(f"bundled/{path.name}", "bundled", path) for path in models.BUNDLED.iterdir() if _pipeline(path)]
    for path in models.hub_cache().glob("models--*--*/snapshots/*"):
        found.append(Here(path.parts[-3].removeprefix("models--").replace("--", "/"), "hub", path, path.name))
    found += [Here(f"{path.parent.name}/{path.name}", "mirror", path) for path in (share.glob("*/*/") if share else ())]
    taken = {named} | {name.partition(":")[0] for name in lora.listing() if ":" in name}
    found = [it for it in found if it.name in taken or "flux" in (_pipeline(it.path) or it.name).lower()]
    found += [Here(path.parent.name, "baked", path.parent) for path in baked if ".tmp-" not in path.parent.name]
    return sorted(found, key=lambda each: (each.kind, each.name, each.commit))


def nbytes(found: list[Here]) -> int:
    """Bytes on the disk; what several revisions share counts once."""
    paths = {path.resolve() for each in found for path in each.files}
    return sum(path.stat().st_size for path in paths if path.exists())


def _pipeline(folder: Path) -> str:
    """The class that a model folder names, "" where it is none."""
    with contextlib.suppress(CheckpointError):
        return str(read_json(folder / "model_index.json", "").get("_class_name"))
    return ""


def damage(path: Path, published: str = "") -> str:
    """Why a file is not what was published (the hub's sha256, git's sha1 of a small file, "" if unknown), else ""."""
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        digest = hashlib.sha256() if len(published) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while published and (chunk := file.read(8 << 20)):
                digest.update(chunk)
    except (CheckpointError, OSError) as error:
        return getattr(error, "why", "") or getattr(error, "strerror", "") or "unreadable"
    return "" if published in ("", digest.hexdigest()) else f"its {digest.name} is not the published one"


def verify(model: Here, count: Count) -> tuple[list[str], int]:
    """(what is damaged, as `file: why`; how many files have a known checksum), without a network.

    A blob of the hub's cache has its checksum for a name, a mirror notes them; a baked folder knows sizes.
    """
    sizes = read_json(model.path / MANIFEST, "no manifest").get("bytes", {}) if model.kind == "baked" else {}
    damaged, known, done, total = [], 0, 0, nbytes([model])
    for path in sorted({*model.files, *(model.path / name for name in sizes)}):
        name, size = path.relative_to(model.path).as_posix(), path.stat().st_size if path.exists() else 0
        link, note = path.is_symlink(), model.path / ".cache/huggingface/download" / f"{name}.metadata"
        words = [os.path.basename(os.readlink(path))] if link else note.read_text().split() if note.is_file() else []
        published = next((word for word in words[-2:] if re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", word)), "")
        why = damage(path, published) or (f"it has {size} bytes" if size != sizes.get(name, size) else "")
        damaged += [f"{name}: {why}"] if why else []
        known, done = known + bool(published), done + size
        count(done, total, name)
    return damaged, known


def remove(model: Here) -> None:
    """Delete a baked folder, or all that the hub's cache has of a model; raises `OutputError`."""
    from huggingface_hub import scan_cache_dir

    path = models.repository(model.name) if model.kind == "hub" else model.path
    try:
        if model.kind == "hub":
            cache = scan_cache_dir(models.hub_cache())
            mine = frozenset(repo for repo in cache.repos if repo.repo_path.name == path.name)
            hashes = [each.commit_hash for repo in mine for each in repo.revisions]  # a copied repository has the same
            replace(cache, repos=mine).delete_revisions(*hashes).execute()
        if path.is_symlink():
            path.unlink()
        elif path.exists():  # also what the library leaves out as corrupted
            shutil.rmtree(path)
    except OSError as error:
        raise OutputError("cannot remove the model", which=path, why=error.strerror or str(error)) from error
