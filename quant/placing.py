"""Where a checkpoint is made, how it gets its name, and what may be deleted there.

A checkpoint is a folder with a manifest in it, or a file with its manifest `NAME.json` beside it.
It is made in a staging folder `NAME.tmp-...` beside its place. Nothing is deleted or replaced but
what a manifest of this package names. Knows nothing of tensors. Sizes are in bytes, times in
seconds.
"""

import contextlib
import errno
import itertools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from quant.checkpoint import MANIFEST
from quant.config import read_json
from quant.errors import CheckpointError, WriteError
from quant.files import move_if_free
from quant.header import read_whole_header

FOLDER_LAYOUT = "diffusers"  # the only layout that is a folder
FORMAT = 1  # of the manifest
# In the header of every weight file that a recipe makes: the schemes of its tensors.
DESCRIPTION = "flux_quant"
# In a staging folder: the new checkpoint, the one that it replaces, and the lock of the process
# that writes there. Locks are seen from other containers, too, where process ids are not.
NEW = "new"
OLD = "old"
LOCK = "lock"
# Staging folders that nobody has written to for so long, and nobody locks, are of killed bakes.
STALE_S = 24 * 3600
# What a rename answers where something lies at the new name.
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
# So many foreign files are named.
NAMED = 3
APPEARED = "something appeared there meanwhile"


# --- the staging folder


@contextlib.contextmanager
def open_staging(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, locked by this process; it is deleted afterwards."""
    from filelock import FileLock

    folder = target.with_name(f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True)
        # A file system without locks: others then go by the times of the files.
        with contextlib.suppress(OSError, NotImplementedError):
            lock.acquire()
        yield folder
    finally:
        lock.release()
        _remove_staging(folder)


def remove_remains(target: Path) -> list[Path]:
    """Remove what killed bakes of this target left beside it; returns what may be left by one.

    An old checkpoint that one of them had moved away to replace it gets its name back. A staging
    folder is removed when no process locks it and none has written to it for `STALE_S`.
    """
    if not target.parent.is_dir():
        return []
    name = re.compile(re.escape(target.name) + r"\.tmp-\d+-[0-9a-f]{8}")
    left = []
    for folder in sorted(target.parent.iterdir()):
        if not name.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        written_s = _find_last_write(folder)
        with _try_lock(folder) as is_free:
            if is_free and (folder / OLD).exists() and not os.path.lexists(target):
                os.rename(folder / OLD, target)
        if is_free and time.time() - written_s > STALE_S:
            _remove_staging(folder)
        else:
            left.append(folder)
    return left


@contextlib.contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a staging folder; yields whether it could be had."""
    from filelock import FileLock, Timeout

    path = folder / LOCK
    if not path.is_file():  # killed before it made one
        yield True
        return
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
        is_free = True
    except (Timeout, OSError, NotImplementedError):
        is_free = False
    try:
        yield is_free
    finally:
        lock.release()


def _find_last_write(folder: Path) -> float:
    """When something in a staging folder was last written; whoever asks for the lock touches it."""
    times_s = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        if path != folder / LOCK:
            with contextlib.suppress(OSError):
                times_s.append(path.lstat().st_mtime)
    return max(times_s)


def _remove_staging(folder: Path) -> None:
    """Remove a staging folder, unless somebody else's files are in the old checkpoint there."""
    old = folder / OLD
    with contextlib.suppress(OSError):
        if os.path.lexists(old):
            remove_checkpoint(old)
    if not os.path.lexists(old):
        shutil.rmtree(folder, ignore_errors=True)


# --- what is at the destination already


def check_place(target: Path, layout: str, *, force: bool) -> None:
    """Raise `WriteError` for something at `target` that must not be replaced.

    That is anything without `force`, and with it all that no bake has made.
    """
    foreign = find_foreign(target, layout)
    if foreign:
        named = ", ".join(foreign[:NAMED])
        if len(foreign) > NAMED:
            named += f" and {len(foreign) - NAMED} more"
        why = f"flux quantize did not make {named}"
        raise WriteError("not replaced", which=target, why=why, hint="another DST, or none")
    taken = [path for path in list_names(target, layout) if os.path.lexists(path)]
    if taken and not force:
        raise WriteError("the destination exists", which=taken[0], hint="--force replaces it")


def list_names(target: Path, layout: str) -> list[Path]:
    """The paths that a checkpoint of this layout takes."""
    if layout == FOLDER_LAYOUT:
        return [target]
    return [target, describe_path(target)]


def describe_path(target: Path) -> Path:
    """Where the manifest of a checkpoint that is one file lies."""
    return Path(f"{target}.json")


def find_foreign(target: Path, layout: str) -> list[str]:
    """The names of what lies at `target` and no bake of this layout has made."""
    if layout == FOLDER_LAYOUT:
        return _scan_folder(target).foreign
    foreign = []
    described = describe_path(target)
    if os.path.lexists(target) and not _is_our_file(target):
        foreign.append(target.name)
    if os.path.lexists(described) and _read_manifest(described) is None:
        foreign.append(described.name)
    return foreign


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint's folder, but for what its manifest does not name; raises OSError."""
    found = _scan_folder(folder)
    for path in found.own:
        path.unlink()
    for path in (*reversed(found.folders), folder):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


class _Scan(NamedTuple):
    """What is in a folder: files and folders by the manifest in it, and names of all else.

    The manifest is the last file, a folder comes before those that it holds.
    """

    own: list[Path]
    folders: list[Path]
    foreign: list[str]


def _scan_folder(folder: Path) -> _Scan:
    """Compare a checkpoint's folder with its manifest; a file of another size is foreign, too.

    Folders that the manifest has no file in are not looked into.
    """
    found = _Scan([], [], [])
    if not os.path.lexists(folder):
        return found
    sizes = None if folder.is_symlink() else _read_sizes(folder)
    if sizes is None:
        is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
        if not is_empty:
            found.foreign.append(folder.name)
        return found
    own_folders = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    for place, folders, files in os.walk(folder):
        for name in sorted(folders):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if relative in own_folders and not path.is_symlink():
                found.folders.append(path)
            else:
                folders.remove(name)
                found.foreign.append(relative)
        for name in sorted(files):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and sizes.get(relative) == status.st_size:
                found.own.append(path)
            elif relative != MANIFEST:
                found.foreign.append(relative)
    found.own.append(folder / MANIFEST)
    return found


def _read_sizes(folder: Path) -> dict[str, int] | None:
    """The size of each file of a checkpoint's folder by its name, None where it is none of ours."""
    manifest = _read_manifest(folder / MANIFEST)
    if manifest is None or manifest["layout"] != FOLDER_LAYOUT:
        return None
    sizes: dict[str, int] = manifest.get("files", {})
    return sizes


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest as a bake writes it, None where it is no file or says anything else."""
    if path.is_symlink():
        return None
    try:
        manifest = read_json(path, "no manifest")
    except CheckpointError:
        return None
    has_keys = isinstance(manifest.get("recipe"), dict) and isinstance(manifest.get("layout"), str)
    files = manifest.get("files", {})
    if manifest.get("format") != FORMAT or not has_keys or not isinstance(files, dict):
        return None
    return manifest


def _is_our_file(path: Path) -> bool:
    """Whether it is a weight file that a recipe made."""
    try:
        return not path.is_symlink() and DESCRIPTION in read_whole_header(path).metadata
    except CheckpointError:
        return False


# --- giving the name


def place(new: Path, target: Path, layout: str, *, force: bool) -> None:
    """Give the finished checkpoint `new`, of a staging folder, its name.

    Where something lies there that must not be replaced, it gets another name, and `WriteError`
    says which.
    """
    try:
        check_place(target, layout, force=force)
        if layout != FOLDER_LAYOUT:
            _place_file(new, target, force=force)
        elif os.path.lexists(target):
            _replace_folder(new, target)
        else:
            _move_folder(new, target)
        return
    except FileExistsError:
        why = APPEARED
    except WriteError as error:
        why = error.why or APPEARED
    kept = _place_beside(new, target, layout)
    why += f"; the new checkpoint is {kept}"
    raise WriteError("not replaced", target, why=why, hint=f"-m {kept}, or move it")


def _place_beside(new: Path, target: Path, layout: str) -> Path:
    """Give the checkpoint the first name like `target` that is free, and return it."""
    for number in itertools.count(2):
        suffix = "" if layout == FOLDER_LAYOUT else target.suffix
        path = target.with_name(f"{target.name.removesuffix(suffix)}-{number}{suffix}")
        try:
            if layout == FOLDER_LAYOUT:
                _move_folder(new, path)
            else:
                _place_file(new, path, force=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


def _move_folder(new: Path, target: Path) -> None:
    """Give a folder a name that is free; raises FileExistsError where it is not.

    A rename replaces no file and no folder with anything in it.
    """
    if os.path.lexists(target):
        raise FileExistsError(target)
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in TAKEN:
            raise FileExistsError(target) from error
        raise


def _replace_folder(new: Path, target: Path) -> None:
    """Put a folder in the place of a checkpoint of ours.

    No system call replaces a folder that has files, so the old one is moved away first, and moved
    back where the new one cannot get the name.
    """
    old = new.with_name(OLD)
    try:
        os.rename(target, old)
        _move_folder(new, target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            os.rename(old, target)
        raise


def _place_file(new: Path, target: Path, *, force: bool) -> None:
    """Give a file its name, then its manifest; without `force` only where both names are free."""
    described = describe_path(target)
    if force:
        os.replace(new, target)
        os.replace(describe_path(new), described)
        return
    if os.path.lexists(described):
        raise FileExistsError(described)
    move_if_free(new, target)
    try:
        move_if_free(describe_path(new), described)
    except FileExistsError:
        os.replace(target, new)
        raise
