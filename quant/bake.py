"""Write a quantized checkpoint: read, encode and write overlap, one tensor at a time; then verify, then rename.

Everything goes to `DST.tmp-PID-...`; killed at any point, DST is absent or the old one. Knows recipes and tensors,
nothing of models or pictures. Sizes are in bytes.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant import codecs
from quant.checkpoint import MANIFEST
from quant.errors import CheckpointError, WriteError
from quant.header import read_header
from quant.recipe import Job, Recipe
from quant.tensors import rows_of
from quant.writer import SafetensorsWriter, check_room, nearest

if TYPE_CHECKING:
    import torch

AHEAD = 6  # tensors that wait to be packed, and to be written
MARGIN = 64 << 20  # of free disk, beside what is written
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


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
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    errors: dict[str, float] = {}
    digests: dict[Path, str] = {}
    writers: dict[str, SafetensorsWriter] = {}
    try:
        remove_remains(target)
        check_disk(recipe, target)
        for scheme in {job.scheme for job in recipe.jobs if job.scheme}:
            codecs.library(scheme)  # now: a signal in an import kills at once, and would leave the folder
        writers = _prepare(recipe, temporary)
        yield from _pack(recipe, writers, device, errors, digests)
        sources = {f"{p.parent.name}/{p.name}": {"bytes": p.stat().st_size, "sha256": d} for p, d in digests.items()}
        for writer in writers.values():
            writer.finish()
        if name := next((name for w in writers.values() if verify and (name := w.damaged())), ""):
            why = f"{name} does not read back as it was written"
            raise WriteError("the file is damaged", which=target, why=why, hint="check the disk, then run it again")
        manifest = {
            "format": 1, **origin, "source": sources, "recipe": recipe.spec.to_json(), "layout": recipe.layout,
            "verified": verify, "bytes": recipe.sizes, "seconds": round(time.perf_counter() - started, 1),
            "relative_errors": errors,
        }  # fmt: skip
        _place(recipe, temporary, target, manifest)
    except OSError as error:
        raise WriteError("cannot write the checkpoint", which=target, why=error.strerror or str(error)) from error
    finally:
        for writer in writers.values():
            writer.close()
        _remove(temporary)
        _remove(Path(f"{temporary}.json"))


def remove_remains(target: Path) -> None:
    """Remove what killed bakes of this target left; an old one that was out of the way comes back."""
    import psutil

    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        match = re.fullmatch(re.escape(target.name) + r"\.tmp-(\d+)-[0-9a-f]{8}(\.json|\.old)?", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            if match[2] == ".old" and not target.exists():
                os.rename(path, target)
            _remove(path)


def check_disk(recipe: Recipe, target: Path) -> None:
    """Raise `WriteError` where the weights, and the links in case they must be copies, have no room."""
    there = nearest(target.parent).stat().st_dev
    copies = [path.stat().st_size for path in recipe.links.values() if path.stat().st_dev != there]
    hint = "another DST, or --modulation nf4"
    check_room(target.parent, sum(recipe.sizes.values()) + sum(copies) + MARGIN, hint=hint)


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
    recipe: Recipe, writers: dict[str, SafetensorsWriter], device: str, errors: dict[str, float], digests: dict
) -> Iterator[Progress]:  # fmt: skip
    """Read the next tensor and write the last ones while one is packed; a job begins when its last source is there."""
    import torch

    uses: dict[tuple[Path, str], list[tuple[int, int]]] = {}
    for n, job in enumerate(recipe.jobs):
        for k, source in enumerate(job.sources):
            uses.setdefault((source.pieces[""].file, source.pieces[""].info.name), []).append((n, k))
    files = sorted({path for path, _ in uses})
    arrived: dict[int, dict[int, torch.Tensor]] = {}
    done, total = 0, sum(path.stat().st_size for path in files)
    tensors, threads = _read(files, digests), torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))  # one core reads, hashes and writes
    try:
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            ahead = deque(reading.submit(next, tensors, None) for _ in range(AHEAD))
            written = deque(writing.submit(int) for _ in range(AHEAD))
            while item := ahead.popleft().result():
                ahead.append(reading.submit(next, tensors, None))
                path, name, tensor = item
                for n, k in uses.get((path, name), ()):
                    job, parts = recipe.jobs[n], arrived.setdefault(n, {})
                    parts[k] = rows_of(tensor, job.sources[k].pieces[""])
                    if len(parts) == len(job.sources):
                        pieces = _encode(recipe, job, _joined(job, arrived.pop(n)).to(device), errors)
                        written.append(writing.submit(_write, writers[job.file], job, pieces))
                        written.popleft().result()
                done += tensor.nbytes
                yield Progress(name, done, total)
            for future in written:
                future.result()
    finally:
        torch.set_num_threads(threads)


def _read(files: list[Path], digests: dict[Path, str]) -> "Iterator[tuple[Path, str, torch.Tensor]]":
    """Every tensor of the files in their order, in memory of its own; on the way the sha256 of each file."""
    import torch

    for path in files:
        digest, infos = hashlib.sha256(), read_header(path)
        with path.open("rb", buffering=0) as file:
            start = path.stat().st_size - sum(info.nbytes for info in infos.values())
            digest.update(file.read(start))
            for info in infos.values():
                data = torch.empty(info.nbytes, dtype=torch.uint8)
                view = memoryview(data.numpy())
                while view and (count := file.readinto(view)):
                    digest.update(view[:count])
                    view = view[count:]
                if view:
                    raise CheckpointError("weight file is truncated", which=path, why=f"it ends in {info.name[:60]}")
                if hasattr(os, "posix_fadvise"):  # what was written shall stay in the page cache, to be verified
                    os.posix_fadvise(file.fileno(), start + info.start, info.nbytes, os.POSIX_FADV_DONTNEED)
                known = DTYPES.get(info.dtype)  # of others nothing but the bytes matters
                yield path, info.name, data.view(getattr(torch, known)).view(info.shape) if known else data
        digests[path] = digest.hexdigest()


def _joined(job: Job, parts: "dict[int, torch.Tensor]") -> "torch.Tensor":
    """The job's tensor of its sources' rows."""
    import torch

    tensor = torch.cat([parts[k] for k in range(len(parts))]) if len(parts) > 1 else parts[0]
    return torch.cat(tensor.chunk(2)[::-1]) if job.swap else tensor


def _encode(recipe: Recipe, job: Job, tensor: "torch.Tensor", errors: dict[str, float]) -> "dict[str, torch.Tensor]":
    where = job.sources[0].pieces[""]
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


def _place(recipe: Recipe, temporary: Path, target: Path, manifest: dict) -> None:
    """Give the finished checkpoint its name. A folder that is replaced is out of the way for two renames."""
    described = temporary / MANIFEST if recipe.layout == "diffusers" else Path(f"{temporary}.json")
    with described.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    old = Path(f"{temporary}.old")
    try:
        if recipe.layout == "diffusers" and target.exists():
            os.rename(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    if recipe.layout != "diffusers":
        os.replace(described, f"{target}.json")
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
