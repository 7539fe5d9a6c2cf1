"""Write a quantized checkpoint: read, encode and write overlap, one tensor at a time; then verify, then rename.

Everything goes to `DST.tmp-PID-...`; killed at any point, DST is absent or the old one. Sizes are in bytes.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quant import codecs
from quant.checkpoint import MANIFEST
from quant.errors import CheckpointError, WriteError
from quant.files import flush_to_disk
from quant.header import read_header
from quant.lazy import Tensor, Tensors, psutil, torch
from quant.lora import BIAS, DOWN, NORM, UP
from quant.recipe import OutputTensor, Recipe, check_disk
from quant.writer import SafetensorsWriter

AHEAD = 6  # tensors that wait to be packed, and to be written


@dataclass(frozen=True)
class Progress:
    """`done` of `total` source bytes are packed and handed to the writer; `tensor` was the last."""

    tensor: str
    done: int
    total: int


def bake(
    recipe: Recipe, target: Path, *, origin: dict, device: str = "cpu", verify: bool = True
) -> Iterator[Progress]:
    """Write the recipe's checkpoint to `target`, replacing what is there; yields after every tensor.

    `origin` goes into the manifest. Raises `WriteError`, and `CheckpointError` for a source that is not finite.
    """
    started = time.perf_counter()
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    manifest = {
        "format": 1,
        **origin,
        "source": {},
        "recipe": recipe.spec.to_json(),
        "layout": recipe.layout,
    }
    manifest |= {"verified": verify, "bytes": recipe.sizes, "seconds": 0.0, "relative_errors": {}}
    writers = {}
    try:
        remove_remains(target)
        check_disk(recipe, target)
        for scheme in {job.scheme for job in recipe.tensors if job.scheme}:
            codecs.import_library(
                scheme
            )  # now: a signal in an import kills at once, and would leave the folder
        for file in (*recipe.texts, *recipe.links, *recipe.sizes):
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
        for file, text in recipe.texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        for file, path in recipe.links.items():
            try:
                os.link(os.path.realpath(path), temporary / file)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(path, temporary / file)
        writers = recipe.writers(temporary)
        yield from _pack(recipe, writers, device, manifest)
        for writer in writers.values():
            writer.finish()
        if name := next((name for w in writers.values() if verify and (name := w.find_damage())), ""):
            why = f"{name} does not read back as it was written"
            raise WriteError(
                "the file is damaged", target, why=why, hint="check the disk, then run it again"
            )
        _place(
            recipe,
            temporary,
            target,
            manifest | {"seconds": round(time.perf_counter() - started, 1)},
        )
    except OSError as error:
        raise WriteError(
            "cannot write the checkpoint", target, why=error.strerror or str(error)
        ) from error
    finally:
        for writer in writers.values():
            writer.close()
        _remove(temporary)
        _remove(Path(f"{temporary}.json"))


def remove_remains(target: Path) -> None:
    """Remove what killed bakes of this target left; an old one that was out of the way comes back."""
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        match = re.fullmatch(
            re.escape(target.name) + r"\.tmp-(\d+)-[0-9a-f]{8}(\.json|\.old)?", path.name
        )
        if match and not psutil.pid_exists(int(match[1])):
            if match[2] == ".old" and not target.exists():
                os.rename(path, target)
            _remove(path)


def _pack(
    recipe: Recipe, writers: dict[str, SafetensorsWriter], device: str, manifest: dict
) -> Iterator[Progress]:
    """Read the next tensor and write the last ones while one is packed; a job begins when its last source is there."""
    uses = defaultdict(list)  # (job, source) by file and tensor
    for n, job in enumerate(recipe.tensors):
        for k, source in enumerate(job.sources):
            uses[source.pieces[""].file, source.pieces[""].info.name].append((n, k))
    files = sorted({path for path, _ in uses})
    arrived, search = defaultdict(dict), recipe.spec.scales == "search"  # rows by job and source
    done, total = 0, sum(path.stat().st_size for path in files)
    tensors, threads = _read(files, manifest["source"]), torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))  # one core reads, hashes and writes
    try:
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            ahead = deque(reading.submit(next, tensors, None) for _ in range(AHEAD))
            written = deque(writing.submit(int) for _ in range(AHEAD))
            while item := ahead.popleft().result():
                ahead.append(reading.submit(next, tensors, None))
                path, name, tensor = item
                for n, k in uses[path, name]:
                    job, parts = recipe.tensors[n], arrived[n]
                    values = codecs.take_rows(tensor, job.sources[k].pieces[""])
                    parts[k] = _merged(
                        recipe, job.file.partition("/")[0], job.sources[k].name, values
                    )
                    if len(parts) == len(job.sources):
                        pieces = _encode(
                            job, arrived.pop(n), device, search, manifest["relative_errors"]
                        )
                        written.append(writing.submit(_write, writers[job.file], job, pieces))
                        written.popleft().result()
                done += tensor.nbytes
                yield Progress(name, done, total)
            for future in written:
                future.result()
    finally:
        torch.set_num_threads(threads)


def _read(files: list[Path], sources: dict[str, dict]) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of the files in their order, in memory of its own; on the way each file's size and sha256."""
    for path in files:
        digest, infos, size = hashlib.sha256(), read_header(path), path.stat().st_size
        start = size - sum(info.nbytes for info in infos.values())
        with path.open("rb") as file:
            digest.update(file.read(start))
            for info in infos.values():
                data = torch.empty(info.nbytes, dtype=torch.uint8)
                if file.readinto(data.numpy()) < info.nbytes:
                    raise CheckpointError(
                        "weight file is truncated", path, why=f"it ends in {info.name[:60]}"
                    )
                digest.update(data.numpy())
                if hasattr(
                    os, "posix_fadvise"
                ):  # what was written shall stay in the page cache, to be verified
                    os.posix_fadvise(
                        file.fileno(), start + info.start, info.nbytes, os.POSIX_FADV_DONTNEED
                    )
                known = codecs.DTYPES.get(info.dtype)  # of others nothing but the bytes matters
                yield (
                    path,
                    info.name,
                    data.view(known).view(info.shape) if known else data,
                )
        sources[f"{path.parent.name}/{path.name}"] = {"bytes": size, "sha256": digest.hexdigest()}


def _merged(recipe: Recipe, component: str, name: str, values: Tensor) -> Tensor:
    """A tensor's values with what the recipe's adapters add to them: summed in float32, rounded once."""
    (layer, _, leaf), reader, total = (
        name.removeprefix("text_model.").rpartition("."),
        codecs.Reader(),
        values,
    )
    for adapter, part in (
        (a, part) for a in recipe.adapters for part in a.active_parts(component or "transformer")
    ):
        if layer in part.layers:
            tensors = {
                kind: tensor.float() for kind, tensor in reader.read_checked(part.stored).items()
            }
            (start, stop), scale, total = (
                part.layers[layer],
                adapter.scale * part.factor,
                total.float(),
            )
            if leaf == "weight":
                low = None if NORM in tensors else (tensors[UP][start:stop], tensors[DOWN])
                total = total.addmm(*low, alpha=scale) if low else tensors[NORM]
            elif BIAS in tensors:
                total = total + scale * tensors[BIAS][start:stop]
    return total.to(values.dtype)


def _encode(
    job: OutputTensor, parts: dict[int, Tensor], device: str, search: bool, errors: dict
) -> Tensors:
    """What is stored for the rows of the job's sources, by suffix."""
    tensor = codecs.stack_rows([parts[k] for k in range(len(parts))])
    tensor = (codecs.stack_rows(tensor.chunk(2)[::-1]) if job.swap else tensor).to(device)
    where = job.sources[0].pieces[""]
    if not job.scheme:
        codecs.check_values(job.name, {"": tensor}, where)
        return {"": tensor}
    quantized = codecs.quantize(
        tensor, job.scheme, name=job.name, where=where, search=search, scalar=job.scalar
    )
    errors[job.name] = round(quantized.relative_error, 6)
    return quantized.stored


def _write(writer: SafetensorsWriter, job: OutputTensor, pieces: Tensors) -> None:
    for suffix, tensor in pieces.items():
        writer.add(
            job.name + suffix, memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        )


def _place(recipe: Recipe, temporary: Path, target: Path, manifest: dict) -> None:
    """Give the finished checkpoint its name. A folder that is replaced is out of the way for two renames."""
    is_folder, old = recipe.layout == "diffusers", Path(f"{temporary}.old")
    described = temporary / MANIFEST if is_folder else Path(f"{temporary}.json")
    with described.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        flush_to_disk(file)
    try:
        if is_folder and target.exists():
            os.rename(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    if not is_folder:
        os.replace(described, f"{target}.json")
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
