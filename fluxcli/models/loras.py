"""Where adapters are: a path, the user's folder of LoRAs, or the hub's own cache; and a request's. Stdlib at import.

Never touches the network.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fluxcli import paths
from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.models import find as models
from fluxcli.request.settings import LoraRef, merge_loras
from quant.checkpoint import Component
from quant.errors import CheckpointError
from quant.header import read_header
from quant.lora import Adapter, is_lora, read_adapter


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The user's folder of LoRA files, whose names are enough for --lora."""
    return paths.user_folder("data", environment) / "flux" / "loras"


def locate(name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The file of PATH, NAME or REPO[:FILE]; raises `WeightsUnavailable`, `UsageError` where there are several."""
    if path := local(name, environment):
        return path
    repo, _, file = name.partition(":")
    if not file and name.endswith((".safetensors", ".gguf")):
        raise WeightsUnavailable("no such LoRA file", which=name[:100], hint="flux lora list")
    if not models.HUB_ID.fullmatch(repo) or ".." in name:
        why = f"it is neither a file, nor one in {folder(environment)}, nor ORG/NAME[:FILE]"
        raise WeightsUnavailable("no such LoRA", which=name[:100], why=why, hint="flux lora list")
    if file:
        return models.cached_file(name, environment)
    snapshots = [*(models.repository(repo, environment) / "snapshots").glob("*")]
    snapshots += [share / repo] if (share := models.mirror(environment)) else []
    newest = max(filter(Path.is_dir, snapshots), key=os.path.getmtime, default=Path(os.devnull))
    if not (files := sorted(newest.rglob("*.safetensors"))):
        raise WeightsUnavailable("that LoRA is not here", which=repo, hint=f"flux models download {repo}:FILE")
    if len(files) > 1:
        first, why = files[0].relative_to(newest).as_posix(), f"it has {' '.join(path.name for path in files[:5])}"
        raise UsageError("which of its files?", which=repo, why=why, hint=f"--lora {repo}:{first}")
    return files[0]


def local(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The absolute path of a file that is named by its path, or lies in the user's folder."""
    if name.startswith(models.SHARES):
        return None
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long a name, NUL, no home
        places = (Path(name).expanduser(), *(folder(environment) / f"{name}{end}" for end in ("", ".safetensors")))
        return next((path.absolute() for path in places if path.is_file()), None)
    return None


def adapters_of(refs: Sequence[LoraRef], components: Mapping[str, Component]) -> tuple[Adapter, ...]:
    """The adapters of --lora for a model, in their order; raises what `locate` and `quant.lora.read` raise."""
    return tuple(read_adapter(locate(ref.name), components, scale=ref.scale) for ref in refs)


def with_absolute_paths(refs: Iterable[LoraRef]) -> tuple[LoraRef, ...]:
    """The references with the absolute paths of those that are files here; a file that is named twice only once."""
    found = []
    for ref in refs:
        path = None if ref.drops_weaker else local(ref.name)
        found.append(LoraRef(str(path), ref.scale) if path else ref)
    return merge_loras((), found)


def warnings(adapters: Sequence[Adapter]) -> Iterator[str]:
    """What of the adapters has no effect, for the user."""
    for each in adapters:
        if lost := len(each.unmatched):
            every = f"{lost} of {lost + len(each.parts)} layers"
            yield f"{each.path.name}: {every} have no place in this model, the first is {each.unmatched[0][:60]}"


def identities(refs: Sequence[LoraRef], adapters: Sequence[Adapter]) -> dict[str, str]:
    """What identifies each adapter, by name."""
    each = zip(refs, adapters, strict=True)
    return {ref.name: f"{adapter.identity} x {adapter.scale!r}" for ref, adapter in each}


def listing(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The LoRA files of the user's folder and of the hub's cache, by what --lora takes for them."""
    own, cache = folder(environment), models.hub_cache(environment)
    found = {path.relative_to(own).with_suffix("").as_posix(): path for path in sorted(own.rglob("*.safetensors"))
             if path.is_file()}  # fmt: skip
    for path in sorted(cache.glob("models--*/snapshots/*/**/*.safetensors")):
        repo, _, _, *inner = path.relative_to(cache).parts
        with contextlib.suppress(CheckpointError):
            if is_lora(read_header(path)):
                found[f"{repo.removeprefix('models--').replace('--', '/', 1)}:{'/'.join(inner)}"] = path
    return found


def describe(path: Path) -> dict:
    """What an adapter is, JSON-able, whatever its width: format, ranks, layers by component; or its `problems`."""
    described = {"path": str(path), "kind": "a LoRA", "bytes": path.stat().st_size}
    try:
        adapter = read_adapter(path, models.known_shapes(models.PUBLISHED).components, fits=False)
    except CheckpointError as error:
        return described | {"needs": [], "problems": [str(error)]}
    low, about = [part for part in adapter.parts if part.rank], adapter.about
    layers = [(part.component, layer) for part in adapter.parts for layer in part.layers]
    base = (about[key] for key in ("modelspec.architecture", "ss_base_model_version", "base_model") if key in about)
    return described | {
        "format": adapter.format, "rank": sorted({part.rank for part in low}),
        "alpha": sorted({round(part.factor * part.rank, 4) for part in low}),
        "targets": dict(Counter(component for component, _ in layers)),
        "layers": sorted({re.sub(r"\.\d+\.", ".N.", layer, count=1) for _, layer in layers}),
        "unmatched": list(adapter.unmatched), "base_model": next(base, None),
        "needs": ["a model of the same width: --lora"], "problems": [],
    }  # fmt: skip
