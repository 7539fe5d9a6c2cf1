"""Where adapters are: a path, the user's folder, flux' own, the hub's cache; and what they are.

Knows nothing of the network: what is not here is an error with the command that gets it. Reads
headers, no weights. Stdlib only.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.models import find
from fluxcli.models.address import read_address
from fluxcli.models.shapes import read_known_shapes
from fluxcli.paths import BUNDLED, lora_folder
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.settings import LoraRef, merge_loras
from quant.checkpoint import Component
from quant.errors import CheckpointError
from quant.header import read_header
from quant.kinds import CONTROL_CHANNELS
from quant.lora import Adapter, compute_identity, read_adapter
from quant.lora_names import is_lora

BUNDLED_LORAS = BUNDLED / "lora"
# How far an adapter that moved is looked for.
MOVED_ENTRIES = 20_000
MOVED_DEPTH = 3
# BFL's, by which the transformer takes a control picture in its channels.
CONTROL_LORAS = (
    "black-forest-labs/FLUX.1-Canny-dev-lora",
    "black-forest-labs/FLUX.1-Depth-dev-lora",
)
# What files call the model that they were trained on.
BASE_MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version", "base_model")


def resolve_loras(
    refs: Sequence[LoraRef], components: Mapping[str, Component], *, channels: int = 0
) -> tuple[Adapter, ...]:
    """Return the adapters that --lora names for a model, in their order; reads each file's header.

    `channels` is how many the transformer is given, where a control picture makes them more than
    its own. A command calls this once for a model, and hands the adapters on. Raises what `locate`
    and `quant.lora.read_adapter` raise.
    """
    return tuple(
        read_adapter(locate(ref.name), components, scale=ref.scale, channels=channels)
        for ref in refs
    )


def count_channels(request: GenerationRequest) -> int:
    """Return how many channels a request gives to a transformer: more than its own, or 0."""
    return CONTROL_CHANNELS if request.control else 0


def names_control_lora(refs: Sequence[LoraRef]) -> bool:
    """Whether one of --lora is BFL's for control pictures, by its name alone."""
    return any(read_address(ref.name).partition(":")[0] in CONTROL_LORAS for ref in refs)


def locate(name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the file of a PATH, a NAME in the user's folder or flux' own, or ORG/NAME[:FILE].

    Raises `WeightsUnavailable` naming the command that gets it, and `UsageError` for a folder or a
    repository with several files if none is named.
    """
    path = find_path(name, environment)
    if path:
        return path
    bundled = _list_bundled()
    if name in bundled:
        return bundled[name]
    _refuse_folder(name, environment)
    name = read_address(name)
    repository, _, file = name.partition(":")
    if not file and name.endswith((".safetensors", ".gguf")):
        raise WeightsUnavailable("no such LoRA file", which=name[:100], hint="flux lora list")
    if not find.HUB_ID.fullmatch(repository) or ".." in name:
        why = f"it is neither a file, nor one in {lora_folder(environment)}, nor ORG/NAME[:FILE]"
        raise WeightsUnavailable("no such LoRA", which=name[:100], why=why, hint="flux lora list")
    if file:
        return find.locate_file(name, environment)
    return _locate_only_file(repository, environment)


def _list_bundled() -> dict[str, Path]:
    """Return the adapters that flux brings along, for its bundled model, by their names.

    Orders keep these names instead of paths, so that a picture is drawn again on any machine.
    """
    return {path.stem: path for path in sorted(BUNDLED_LORAS.glob("*.safetensors"))}


def _locate_only_file(repository: str, environment: Mapping[str, str]) -> Path:
    """Return the only .safetensors file of a hub repository that is here."""
    for folder in find.list_copies(repository, environment):
        files = sorted(folder.rglob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            why = f"it has {' '.join(path.name for path in files[:5])}"
            hint = f"--lora {repository}:{files[0].relative_to(folder).as_posix()}"
            raise UsageError("which of its files?", which=repository, why=why, hint=hint)
    hint = f"flux models download {repository}:FILE"
    raise WeightsUnavailable("that LoRA is not here", which=repository, hint=hint)


def find_path(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the absolute path of a file named by its path or in the user's folder, or None.

    A folder stands for the only adapter in it.
    """
    if name.startswith(find.SHARES):
        return None
    own = lora_folder(environment)
    # Too long a name, NUL in it, or ~ without a home.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        for path in (Path(name).expanduser(), own / name, own / f"{name}.safetensors"):
            if path.is_file():
                return path.absolute()
            if path.is_dir():
                inside = _list_adapters(path)
                if len(inside) == 1:
                    return inside[0].absolute()
    return None


def _list_adapters(folder: Path) -> list[Path]:
    """Return the adapters in a folder; of an only file it is not asked whether it is one."""
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if len(files) == 1:
        return files
    adapters = []
    for path in files:
        with contextlib.suppress(CheckpointError):
            if is_lora(read_header(path)):
                adapters.append(path)
    return adapters


def _refuse_folder(name: str, environment: Mapping[str, str]) -> None:
    """Raise `UsageError` where a name is that of a folder which has not exactly one adapter."""
    if name.startswith(find.SHARES):
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        for folder in (Path(name).expanduser(), lora_folder(environment) / name):
            if not folder.is_dir():
                continue
            inside = _list_adapters(folder)
            if inside:
                why = f"it has {len(inside)}: {', '.join(path.name for path in inside[:5])}"
                hint = f"--lora {inside[0]}"
                raise UsageError("which adapter of a folder?", which=name[:100], why=why, hint=hint)
            # It may still be the name of a repository.
            if not find.HUB_ID.fullmatch(name):
                why = "it holds no .safetensors file of an adapter"
                hint = "flux lora list"
                raise WeightsUnavailable(
                    "no LoRA in a folder", which=name[:100], why=why, hint=hint
                )


def find_moved(name: str, identity: str, folders: Iterable[Path]) -> Path | None:
    """Return the file of this identity (`Adapter.identity`) in one of these folders or below.

    Files of the name that it had come first. At most `MOVED_ENTRIES` files and folders are looked
    at, and `MOVED_DEPTH` folders deep.
    """
    old_name = Path(name).name
    found = [path for folder in folders for path in _walk(folder)]
    found.sort(key=lambda path: path.name != old_name)
    for path in dict.fromkeys(found):
        with contextlib.suppress(OSError):
            if compute_identity(path) == identity:
                return path.absolute()
    return None


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the .safetensors files in a folder and in those below it; links are not followed."""
    seen = 0
    depth = len(folder.parts)
    for here, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MOVED_ENTRIES:
            return
        if len(Path(here).parts) - depth >= MOVED_DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(here, name)
            if name.endswith(".safetensors") and path.is_file():
                yield path


def make_absolute(refs: Iterable[LoraRef]) -> tuple[LoraRef, ...]:
    """Return the references with absolute paths where they name files that are here.

    They then hold in any working folder. Of a file that is named twice the last scale counts.
    """
    found = []
    for ref in refs:
        path = None if ref.drops_weaker else find_path(ref.name)
        found.append(LoraRef(str(path) if path else read_address(ref.name), ref.scale))
    return merge_loras((), found)


def describe_unmatched(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield lines for the user: layers of an adapter without effect, what was taken for granted."""
    for adapter in adapters:
        for line in _list_doubts(adapter):
            yield f"{adapter.path.name}: {line}"


def _list_doubts(adapter: Adapter) -> list[str]:
    """Return what of an adapter is not used, and what was taken for granted."""
    doubts = list(adapter.notices)
    lost = len(adapter.unmatched)
    if lost:
        first = adapter.unmatched[0][:60]
        share = f"{lost} of {lost + len(adapter.parts)} layers"
        doubts.append(f"{share} have no place in this model, the first is {first}")
    return doubts


def name_identities(refs: Sequence[LoraRef], adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return what identifies each adapter and its scale, by the name that the user gave."""
    pairs = zip(refs, adapters, strict=True)
    return {ref.name: f"{adapter.identity} x {adapter.scale!r}" for ref, adapter in pairs}


def list_loras(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Return the LoRA files that are here, by what --lora takes.

    Those of the user's folder go before flux' own of the same name.
    """
    found = _list_bundled()
    own = lora_folder(environment)
    for path in sorted(own.rglob("*.safetensors")):
        if path.is_file():
            found[path.relative_to(own).with_suffix("").as_posix()] = path
    for snapshot in find.list_snapshots(environment):
        for path in sorted(snapshot.folder.rglob("*.safetensors")):
            with contextlib.suppress(CheckpointError):
                if is_lora(read_header(path)):
                    file = path.relative_to(snapshot.folder).as_posix()
                    found[f"{snapshot.model}:{file}"] = path
    return found


def describe(path: Path) -> dict[str, Any]:
    """Return what an adapter is, as JSON has it, whatever its width.

    These are its format, ranks, alphas and layers by component; what of it is not used and what was
    taken for granted, or why it cannot be used at all, under `problems`.
    """
    described: dict[str, Any] = {
        "path": str(path),
        "kind": "a LoRA",
        "bytes": path.stat().st_size,
    }
    published = read_known_shapes()
    assert published is not None
    try:
        adapter = read_adapter(path, published.components, fits=False, channels=CONTROL_CHANNELS)
    except CheckpointError as error:
        return described | {"usable": False, "needs": [], "problems": [str(error)]}
    products = [part for part in adapter.parts if part.rank]
    layers = [(part.component, layer) for part in adapter.parts for layer in part.layers]
    needs = ["a model of the same width: --lora"]
    if adapter.input_channels == CONTROL_CHANNELS:
        needs.append("a control picture: --control")
    bases = [adapter.about[key] for key in BASE_MODEL_KEYS if key in adapter.about]
    return described | {
        "usable": True,
        "format": adapter.format,
        "rank": sorted({part.rank for part in products}),
        "alpha": sorted({round(part.factor * part.rank, 4) for part in products}),
        "targets": dict(Counter(component for component, _ in layers)),
        "layers": sorted({_number_blocks_n(layer) for _, layer in layers}),
        "unmatched": list(adapter.unmatched),
        "base_model": bases[0] if bases else None,
        "needs": needs,
        "problems": _list_doubts(adapter),
    }


def _number_blocks_n(layer: str) -> str:
    """Return a layer's name with N for the number of its block: blocks have the same layers."""
    return re.sub(r"\.\d+\.", ".N.", layer, count=1)
