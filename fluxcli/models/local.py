"""Which models are on this machine: bundled, in the hub's cache or a mirror, or baked.

Knows nothing of the network and loads no library. Sizes are in bytes.
"""

import contextlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxcli import paths
from fluxcli.models import find
from quant.checkpoint import MANIFEST, is_complete
from quant.config import read_json
from quant.errors import CheckpointError
from quant.redux import is_whole_redux


@dataclass(frozen=True)
class LocalModel:
    """A model of this machine.

    `kind` is bundled, hub, mirror or baked; `commit` is of those in the hub's cache.
    """

    name: str
    kind: str
    path: Path
    commit: str = ""

    @property
    def state(self) -> str:
        """Return "complete", "partial" for a model folder that lacks something, or "files"."""
        if is_complete(self.path) or is_whole_redux(self.path):
            return "complete"
        return "partial" if _read_pipeline(self.path) else "files"

    @property
    def files(self) -> list[Path]:
        """All files, sorted, with links that point nowhere.

        What the hub's library notes below `.cache` in a mirror is left out.
        """
        found = [path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir()]
        return sorted(path for path in found if ".cache" not in path.relative_to(self.path).parts)


def list_models(also: Collection[str] = ()) -> list[LocalModel]:
    """The FLUX models that are here, sorted by kind and name.

    A folder of the hub's cache or of the mirror is one if its model_index.json names a pipeline of
    FLUX, if there is none but its own name does, or if `also` holds its name.
    """
    found = []
    for model, commit, folder in find.list_snapshots():
        found.append(LocalModel(model, "hub", folder, commit=commit))
    mirror = paths.mirror_folder()
    if mirror:
        for path in mirror.glob("*/*/"):
            found.append(LocalModel(f"{path.parent.name}/{path.name}", "mirror", path))
    found = [each for each in found if each.name in also or _is_flux(each)]
    for path in paths.BUNDLED.iterdir():
        if _read_pipeline(path):
            found.append(LocalModel(f"bundled/{path.name}", "bundled", path))
    for manifest in paths.baked_folder().glob(f"*/{MANIFEST}"):
        path = manifest.parent
        if find.UNFINISHED not in path.name:
            found.append(LocalModel(path.name, "baked", path))
    return sorted(found, key=lambda each: (each.kind, each.name, each.commit))


def _is_flux(model: LocalModel) -> bool:
    return "flux" in (_read_pipeline(model.path) or model.name).lower()


def _read_pipeline(folder: Path) -> str:
    """The class that a model folder's model_index.json names, "" where there is none."""
    with contextlib.suppress(CheckpointError):
        return str(read_json(folder / "model_index.json", "").get("_class_name"))
    return ""


def count_bytes(found: Sequence[LocalModel]) -> int:
    """Bytes on the disk; what several revisions share counts once."""
    # A link in a circle is no error here.
    distinct = {os.path.realpath(path) for each in found for path in each.files}
    return sum(os.path.getsize(path) for path in distinct if os.path.isfile(path))
