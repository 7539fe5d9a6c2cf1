"""Write the checkpoint that a recipe describes: read, quantize and write, then verify, then rename.

Reading, quantizing and writing overlap: a thread reads the next tensors and another writes the last
ones while one is quantized. Everything goes to a staging folder first (`quant.placing`). A bake
that is killed, at any point, leaves DST absent or as it was. Sizes are in bytes.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant import codecs
from quant.checkpoint import MANIFEST
from quant.errors import CheckpointError, WriteError
from quant.files import Unchanged, changed, copy_file, explain_reading, flush_to_disk
from quant.header import read_header
from quant.lora import Adapter
from quant.merging import Arrival, merge_adapter, order_rows
from quant.placing import (
    FOLDER_LAYOUT,
    FORMAT,
    NEW,
    describe_path,
    open_staging,
    place,
)
from quant.recipe import OutputTensor, Recipe, check_disk
from quant.spec import name_stored
from quant.tensor_info import TensorInfo
from quant.writer import SafetensorsWriter

# As many tensors may be read ahead, and as many wait to be written.
AHEAD = 6


@dataclass(frozen=True)
class Progress:
    """`done_bytes` of `total_bytes` of the source were read and quantized, `tensor` last.

    Done are the bytes of tensors; the total is of whole files, with their headers.
    """

    tensor: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Report:
    """What the manifest says.

    It has each source file's size and sha256, each tensor's relative error, and what arrived of
    each adapter.
    """

    sources: dict[str, dict[str, Any]]
    relative_errors: dict[str, float]
    arrivals: list[dict[str, Any]]


@dataclass(frozen=True)
class _SourceTensor:
    """A tensor as it is in a file of the source, by its name there."""

    path: Path
    name: str
    tensor: Tensor


def bake(
    recipe: Recipe,
    target: Path,
    *,
    origin: Mapping[str, Any],
    device: str = "cpu",
    verify: bool = True,
    force: bool = False,
) -> Generator[Progress, None, None]:
    """Write the recipe's checkpoint to `target`; yields with each tensor.

    With `force` it replaces a checkpoint that a bake has made, otherwise nothing. Tensors are
    quantized on `device`, and with `verify` all weight files are read back. `origin` has more keys
    for the manifest. Raises `WriteError`, and `CheckpointError` for a source that is damaged,
    changes meanwhile, has values that are not finite, or weights that the scheme cannot hold.
    """
    started = time.perf_counter()
    try:
        check_disk(recipe, target)
        _import_libraries(recipe)
        adapters = [_identify_adapter(adapter) for adapter in recipe.adapters]
        with open_staging(target) as staging:
            new = staging / NEW
            report = yield from _make(recipe, new, target, device=device, verify=verify)
            manifest = {
                "format": FORMAT,
                **origin,
                **_describe_adapters(adapters, report.arrivals),
                "source": report.sources,
                "recipe": recipe.spec.to_json(),
                "layout": recipe.layout,
                "verified": verify,
                "bytes": recipe.sizes,
                "seconds": round(time.perf_counter() - started, 1),
                "relative_errors": report.relative_errors,
            }
            if recipe.layout == FOLDER_LAYOUT:
                manifest["files"] = _list_files(new)
                _write_manifest(new / MANIFEST, manifest)
            else:
                _write_manifest(describe_path(new), manifest)
            place(new, target, recipe.layout, force=force)
    except OSError as error:
        why = error.strerror or str(error)
        hint = "another DST, or --dry-run for the bytes that it takes"
        raise WriteError("cannot write the checkpoint", target, why=why, hint=hint) from error


def _make(
    recipe: Recipe, new: Path, target: Path, *, device: str, verify: bool
) -> Generator[Progress, None, _Report]:
    """Write all files but the manifest to `new`; with `verify` weights are read back."""
    _write_other_files(recipe, new)
    writers = recipe.make_writers(new)
    try:
        report = yield from _write_tensors(recipe, writers, device=device)
        for writer in writers.values():
            writer.finish()
        if verify:
            _check_files(writers, target)
    finally:
        for writer in writers.values():
            writer.close()
    return report


def _identify_adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter as the manifest names it."""
    with explain_reading(adapter.path), adapter.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(adapter.path), "scale": adapter.scale, "sha256": digest}


def _describe_adapters(
    adapters: Sequence[Mapping[str, Any]], arrivals: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the manifest says of the adapters that were merged, and of what arrived of each."""
    described = [
        {**adapter, **arrival} for adapter, arrival in zip(adapters, arrivals, strict=True)
    ]
    return {"lora": described} if described else {}


def _list_files(folder: Path) -> dict[str, int]:
    """The size of every file in a folder by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _import_libraries(recipe: Recipe) -> None:
    """Import the libraries that quantize, before anything is written.

    A signal during such an import kills the process at once, which would leave a folder behind.
    """
    for scheme in {tensor.scheme for tensor in recipe.tensors if tensor.scheme}:
        codecs.import_library(scheme)


def _write_other_files(recipe: Recipe, folder: Path) -> None:
    """Make all folders, write the texts, and copy the files that stay as they are."""
    for file in (*recipe.texts, *recipe.copies, *recipe.sizes):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    for file, text in recipe.texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    for file, path in recipe.copies.items():
        copy_file(path, folder / file)


def _write_tensors(
    recipe: Recipe, writers: Mapping[str, SafetensorsWriter], *, device: str
) -> Generator[Progress, None, _Report]:
    """Read, quantize and write all tensors, in the order in which the files have their sources."""
    gatherer = _Gatherer(recipe)
    reader = _SourceReader(gatherer.files)
    quantizer = _Quantizer(recipe, device)
    relative_errors: dict[str, float] = {}
    done_bytes = 0
    total_bytes = 0
    for path in gatherer.files:
        with explain_reading(path):
            total_bytes += path.stat().st_size
    threads = torch.get_num_threads()
    # One core is left to read, hash and write.
    torch.set_num_threads(max(1, threads - 1))
    try:
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            ahead = deque(reading.submit(reader.read_next) for _ in range(AHEAD))
            written: deque[Future[None]] = deque()
            source = ahead.popleft().result()
            while source is not None:
                ahead.append(reading.submit(reader.read_next))
                for output, values in gatherer.add(source):
                    quantized = quantizer.quantize(output, values)
                    if output.scheme:
                        relative_errors[output.name] = round(quantized.relative_error, 6)
                    writer = writers[output.file]
                    written.append(writing.submit(_write, writer, output.name, quantized.stored))
                    if len(written) > AHEAD:
                        written.popleft().result()
                done_bytes += source.tensor.nbytes
                yield Progress(source.name, done_bytes, total_bytes)
                source = ahead.popleft().result()
            for future in written:
                future.result()
    finally:
        reader.close()
        torch.set_num_threads(threads)
    arrivals = [arrival.describe() for arrival in quantizer.arrivals]
    return _Report(reader.described, relative_errors, arrivals)


class _SourceReader:
    """Reads every tensor of the files in their order, each into memory of its own.

    `described` has the size and sha256 of each file that was read to its end.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, TensorInfo]]) -> None:
        """Take the files, each with the tensors that it had when the recipe was made."""
        self.described: dict[str, dict[str, Any]] = {}
        self._tensors = self._read_all(files)

    def read_next(self) -> _SourceTensor | None:
        """The next tensor, None when all are read."""
        return next(self._tensors, None)

    def close(self) -> None:
        """Close the file that is being read; to be called when no thread reads any more."""
        self._tensors.close()

    def _read_all(
        self, files: Mapping[Path, Mapping[str, TensorInfo]]
    ) -> Generator[_SourceTensor, None, None]:
        """Yield the tensors.

        Raises `CheckpointError` for a file that ends early, cannot be read, or changes meanwhile.
        """
        for path, expected in files.items():
            unchanged = Unchanged(path)
            digest = hashlib.sha256()
            infos = read_header(path)
            if any(infos.get(name) != info for name, info in expected.items()):
                raise changed(path)
            with explain_reading(path):
                size = path.stat().st_size
                file = path.open("rb")
            data_start = size - sum(info.nbytes for info in infos.values())
            with file:
                with explain_reading(path):
                    digest.update(file.read(data_start))
                for info in infos.values():
                    data = torch.empty(info.nbytes, dtype=torch.uint8)
                    with explain_reading(path):
                        read_bytes = file.readinto(data.numpy().data)
                    if read_bytes < info.nbytes:
                        why = f"it ends in {info.name[:60]}"
                        raise CheckpointError("weight file is truncated", path, why=why)
                    digest.update(data.numpy().data)
                    start = data_start + info.start
                    _forget_pages(file.fileno(), start, info.nbytes)
                    dtype = codecs.DTYPES.get(info.dtype)
                    # No recipe quantizes a tensor of another dtype; its bytes are only hashed.
                    if dtype is not None:
                        data = data.view(dtype).view(info.shape)
                    yield _SourceTensor(path, info.name, data)
            unchanged.check()
            name = f"{path.parent.name}/{path.name}"
            self.described[name] = {"bytes": size, "sha256": digest.hexdigest()}


def _forget_pages(descriptor: int, start: int, length: int) -> None:
    """Let the system drop what was read from the page cache.

    It is not read again, while what was written is, to be verified. A file system may refuse.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


class _Use(NamedTuple):
    """Where a tensor of the source is needed: which output tensor, and which of its sources."""

    output_index: int
    source_index: int


class _Gatherer:
    """Makes the values of each output tensor, as soon as all its sources were read."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        # By file and name of a tensor of the source.
        self._uses: dict[tuple[Path, str], list[_Use]] = defaultdict(list)
        needed: dict[Path, dict[str, TensorInfo]] = defaultdict(dict)
        for n, output in enumerate(recipe.tensors):
            for k, source in enumerate(output.sources):
                piece = source.pieces[""]
                self._uses[piece.file, piece.info.name].append(_Use(n, k))
                needed[piece.file][piece.info.name] = piece.info
        # By output tensor and source of that, as indexes: values of which others are awaited.
        self._arrived: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self.files = dict(sorted(needed.items()))

    def add(self, source: _SourceTensor) -> Iterator[tuple[OutputTensor, Tensor]]:
        """Yield the output tensors that this source completes, with the rows of their sources."""
        for use in self._uses[source.path, source.name]:
            output = self._recipe.tensors[use.output_index]
            weight = output.sources[use.source_index]
            parts = self._arrived[use.output_index]
            parts[use.source_index] = codecs.take_rows(source.tensor, weight.pieces[""])
            if len(parts) == len(output.sources):
                del self._arrived[use.output_index]
                yield output, codecs.stack_rows([parts[k] for k in range(len(parts))])


class _Quantizer:
    """Quantizes output tensors, after the recipe's adapters were merged into them.

    `arrivals` say how much of each adapter has arrived.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self._recipe = recipe
        self._device = device
        self._search = recipe.spec.scales == "search"
        self.arrivals = [Arrival() for _ in recipe.adapters]
        # flux reads their originals, and not what is quantized (see `quant.recipe`).
        self._unread = {tensor.name for tensor in recipe.tensors if tensor.is_original}

    def quantize(self, output: OutputTensor, values: Tensor) -> codecs.Quantized:
        """What is stored for the values of an output tensor's sources; raises `CheckpointError`.

        Adapters are summed in float32, and rounded once to the dtype of the values.
        """
        dtype = values.dtype
        is_read = not output.scheme or output.name not in self._unread
        quantized = None
        for adapter, arrival in zip(self._recipe.adapters, self.arrivals, strict=True):
            merged = merge_adapter(adapter, output, values)
            if merged is None:
                continue
            if is_read:
                without = quantized or self._quantize(output, values)
                quantized = self._quantize(output, merged.to(dtype))
                stored = without.stored, quantized.stored
                arrival.add(
                    output,
                    before=order_rows(output, values),
                    after=order_rows(output, merged),
                    stored=stored,
                )
            values = merged
        return quantized or self._quantize(output, values.to(dtype))

    def _quantize(self, output: OutputTensor, values: Tensor) -> codecs.Quantized:
        """What is stored for values, by suffix; raises `CheckpointError` unless they are finite."""
        values = order_rows(output, values).to(self._device)
        where = output.sources[0].pieces[""]
        if not output.scheme:
            stored = {"": values}
            codecs.check_values(output.name, stored, where)
            return codecs.Quantized(stored, relative_error=0.0)
        return codecs.quantize(
            values,
            output.scheme,
            name=output.name,
            where=where,
            search=self._search,
            scalar=output.has_one_scale,
        )


def _write(writer: SafetensorsWriter, name: str, stored: Mapping[str, Tensor]) -> None:
    """Write a weight's stored tensors, which are given by suffix."""
    for suffix, tensor in stored.items():
        data = tensor.cpu().reshape(-1).view(torch.uint8)
        writer.add(name_stored(name, suffix), data.numpy().data)


def _check_files(writers: Mapping[str, SafetensorsWriter], target: Path) -> None:
    """Read all weight files back; raises `WriteError` unless they are as they were written."""
    hint = "check the disk, then run it again"
    for writer in writers.values():
        try:
            damaged = writer.find_damage()
        except (CheckpointError, OSError) as error:  # of what was written, not of the source
            why = f"it cannot be read back: {error}"
            raise WriteError("the file is damaged", target, why=why, hint=hint) from error
        if damaged:
            why = f"{damaged} does not read back as it was written"
            raise WriteError("the file is damaged", target, why=why, hint=hint)


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        flush_to_disk(file)
