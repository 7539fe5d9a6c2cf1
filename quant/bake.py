"""Write a quantized checkpoint: read, encode and write overlap, one tensor at a time; then verify, then rename.

Everything goes to `DST.tmp-PID-...`; killed at any point, DST is absent or the old one. Knows recipes and tensors,
nothing of models or pictures. Sizes are in bytes.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant import codecs
from quant.checkpoint import MANIFEST
from quant.errors import WriteError
from quant.recipe import Job, Recipe
from quant.tensors import Reader
from quant.writer import SafetensorsWriter

if TYPE_CHECKING:
    import torch

MARGIN = 64 << 20  # of free disk, beside what is written
HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache names its files by their sha256


@dataclass(frozen=True)
class Progress:
    """`done` of `total` source bytes are packed and handed to the writer; `tensor` was the last."""

    tensor: str
    done: int
    total: int


def bake(recipe: Recipe, target: Path, *, origin: dict, device: str = "cpu", verify: bool = True) -> Iterator[Progress]:
    """Write the recipe's checkpoint to `target`, replacing what is there; yields after every tensor.

    `origin` goes into the manifest. Raises `WriteError`, and `CheckpointError` for a source that is not finite.
    """
    started = time.perf_counter()
    remove_remains(target)
    check_disk(recipe, target)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    errors: dict[str, float] = {}
    writers: dict[str, SafetensorsWriter] = {}
    try:
        with _explaining(target):
            writers = _prepare(recipe, temporary)
            with ThreadPoolExecutor(1) as hashing:
                files = sorted({piece.file for job in recipe.jobs for w in job.sources for piece in w.pieces.values()})
                digests = {path: hashing.submit(_sha256, path) for path in files}
                try:
                    yield from _pack(recipe, writers, device, errors)
                finally:
                    hashing.shutdown(cancel_futures=True)
                sources = {
                    path.name: {"bytes": path.stat().st_size, "sha256": d.result()} for path, d in digests.items()
                }
            for writer in writers.values():
                writer.finish()
            if verify:
                _verify(writers, target)
            manifest = {
                "format": 1, **origin, "source": sources, "recipe": recipe.spec.to_json(), "layout": recipe.layout,
                "verified": verify, "bytes": recipe.sizes, "relative_errors": errors,
                "seconds": round(time.perf_counter() - started, 1),
            }  # fmt: skip
            _place(recipe, temporary, target, manifest)
    finally:
        for writer in writers.values():
            writer.close()
        _remove(temporary)


def remove_remains(target: Path) -> list[Path]:
    """Remove what killed bakes of this target left; returns what was removed."""
    import psutil

    found = []
    for path in target.parent.glob(f"{target.name}.tmp-*") if target.parent.is_dir() else ():
        match = re.fullmatch(re.escape(target.name) + r"\.tmp-(\d+)-[0-9a-f]{8}(\.json|\.old)?", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            _remove(path)
            found.append(path)
    return found


def check_disk(recipe: Recipe, target: Path) -> None:
    """Raise `WriteError` where the weights, and the links in case they must be copies, have no room."""
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    apart = [path for path in recipe.links.values() if path.stat().st_dev != folder.stat().st_dev]
    need = sum(recipe.sizes.values()) + sum(path.stat().st_size for path in apart) + MARGIN
    free = shutil.disk_usage(folder).free
    if need > free:
        why = f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise WriteError("the disk is too small", which=folder, why=why, hint="another DST, or --modulation nf4")


def _prepare(recipe: Recipe, temporary: Path) -> dict[str, SafetensorsWriter]:
    """The temporary folder with texts and links in it, and the writers of its weight files."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for file in (*recipe.texts, *recipe.links, *recipe.sizes):
        (temporary / file).parent.mkdir(parents=True, exist_ok=True)
    for file, text in recipe.texts.items():
        (temporary / file).write_text(text, encoding="utf-8")
    for file, path in recipe.links.items():
        real = os.path.realpath(path)
        try:
            os.link(real, temporary / file)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(real, temporary / file)
    return recipe.writers(temporary)


def _pack(
    recipe: Recipe, writers: dict[str, SafetensorsWriter], device: str, errors: dict[str, float]
) -> Iterator[Progress]:
    """Read the next tensor and write the last one while this one is packed."""
    done, total = 0, recipe.source_nbytes
    with Reader() as reader, ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        ahead, written = reading.submit(_read, reader, recipe.jobs[0], device), Future()
        written.set_result(None)
        for k, job in enumerate(recipe.jobs):
            tensor = ahead.result()
            if k + 1 < len(recipe.jobs):
                ahead = reading.submit(_read, reader, recipe.jobs[k + 1], device)
            pieces = _encode(recipe, job, tensor, errors)
            written.result()
            written = writing.submit(_write, writers[job.file], job, pieces)
            done += sum(source.nbytes for source in job.sources)
            yield Progress(job.name, done, total)
        written.result()


def _read(reader: Reader, job: Job, device: str) -> "torch.Tensor":
    """The job's tensor, unpacked, in memory of its own."""
    import torch

    parts = [reader.weight(source)[""] for source in job.sources]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    if job.swap:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return tensor.to(device)


def _encode(recipe: Recipe, job: Job, tensor: "torch.Tensor", errors: dict[str, float]) -> "dict[str, torch.Tensor]":
    where = next(iter(job.sources[0].pieces.values()))
    if not job.scheme:
        codecs.check(job.name, {"": tensor}, where)
        return {"": tensor}
    options = {"search": recipe.spec.scales == "search", "scalar": job.scalar}
    encoded = codecs.encode(tensor, job.scheme, name=job.name, where=where, **options)
    errors[job.name] = round(encoded.relative_error, 6)
    return encoded.pieces


def _write(writer: SafetensorsWriter, job: Job, pieces: "dict[str, torch.Tensor]") -> None:
    import torch

    for suffix, tensor in pieces.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        writer.add(job.name + suffix, memoryview(flat.numpy()))


def _verify(writers: dict[str, SafetensorsWriter], target: Path) -> None:
    """Reopen every file: its header is the one laid out, and its bytes are those that were measured."""
    for writer in writers.values():
        if name := writer.damaged():
            why = f"{name} does not read back as it was written"
            raise WriteError("the file is damaged", which=target, why=why, hint="check the disk, then run it again")


def _place(recipe: Recipe, temporary: Path, target: Path, manifest: dict) -> None:
    """Give the finished checkpoint its name. A folder that is replaced is out of the way for two renames."""
    text = json.dumps(manifest, indent=1) + "\n"
    beside = temporary.with_name(f"{temporary.name}.json")
    described = temporary / MANIFEST if recipe.layout == "diffusers" else beside
    with described.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    old = temporary.with_name(f"{temporary.name}.old")
    if recipe.layout != "diffusers":
        os.replace(described, f"{target}.json")
    elif target.exists():
        os.rename(target, old)
    os.replace(temporary, target)
    _remove(old)


def _sha256(path: Path) -> str:
    real = Path(os.path.realpath(path))
    if HUB_BLOB.fullmatch(real.name):
        return real.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explaining(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError("cannot write the checkpoint", which=target, why=error.strerror or str(error)) from error
