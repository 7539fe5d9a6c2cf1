"""Where the two parts of Redux are: in the published repository's copy, or where the user says.

Knows nothing of the network: what is not here is an error with the command that gets it. Reads
headers, no weights. Stdlib only.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fluxcli.errors import WeightsUnavailable
from fluxcli.models import find
from fluxcli.models.address import read_address
from quant.checkpoint import Component
from quant.redux import REDUX_PARTS, check_redux, inspect_redux

PUBLISHED_REDUX = "black-forest-labs/FLUX.1-Redux-dev"
LICENCE = "huggingface.co/black-forest-labs/FLUX.1-Redux-dev"
GET_REDUX = (
    f"flux models download redux (1 GB, gated: first accept the licence at {LICENCE}, "
    "then hf auth login)"
)


def find_redux(
    names: Sequence[str],
    transformer: Component,
    *,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Component]:
    """Return SigLIP and the embedder, by the names of their components.

    `names` are folders, files and hub ids that the user named; what they lack is taken from the
    published repository. Raises `WeightsUnavailable`, `UsageError` and `CheckpointError`, also for
    parts that do not fit the transformer.
    """
    found = inspect_redux(_locate(name, environment) for name in names)
    if len(found) < len(REDUX_PARTS):
        found = inspect_redux([_locate(PUBLISHED_REDUX, environment)]) | found
    check_redux(found, transformer)
    return {name: found[name] for name in REDUX_PARTS}


def _locate(name: str, environment: Mapping[str, str]) -> Path:
    """The folder or file of a part, or of both; raises `WeightsUnavailable` and `UsageError`."""
    path = find.find_path(name)
    if path:
        return path
    name = read_address(name)
    if find.HUB_FILE.fullmatch(name):
        return find.locate_file(name, environment)
    copies = []
    if find.HUB_ID.fullmatch(name) and ".." not in name:
        copies = find.list_copies(name, environment)
    for folder in copies:
        parts = [folder, *(folder / part for part in REDUX_PARTS)]
        if any((each / "config.json").is_file() for each in parts):
            return folder
    what = f"the weights of {name.rpartition('/')[2]} are not here"
    hint = GET_REDUX if name == PUBLISHED_REDUX else "--redux-model FOLDER, FILE or ORG/NAME"
    raise WeightsUnavailable(what, which=name[:100], hint=hint)
