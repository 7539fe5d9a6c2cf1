"""Where the weights of controls are, and what a control of a request comes to.

Knows nothing of the network: what is not here is an error with the command that gets it. Stdlib
only.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.models import find
from fluxcli.models.address import read_address
from fluxcli.models.shapes import read_known_controlnet
from fluxcli.paths import BUNDLED, config_folder
from fluxcli.request import controls
from fluxcli.request.inputs import ControlRef

BUNDLED_CONTROL = re.compile(r"bundled/control/([\w-]+)")
# The files of a repository that holds one network in diffusers' layout.
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model*.safetensors"
# What is computed where the picture is a photo, by the last word of a kind's name.
COMPUTED = {"canny": "canny", "edges": "canny", "depth": "depth"}


@dataclass(frozen=True)
class ResolvedControl:
    """A control with everything that its kind's preset says where the request does not."""

    path: Path | None  # a folder with config.json, or a file; None where it is not here
    scale: float
    start: float
    end: float
    mode: int | None


def resolve_control(ref: ControlRef, *, planned: bool = False) -> ResolvedControl:
    """Return what a control of a request comes to.

    Raises `UsageError` for an unknown kind or mode, and `WeightsUnavailable`; not for a published
    network where it is only `planned`.
    """
    kind = controls.find_kind(ref.kind, config_folder())
    start = ref.start
    end = ref.end
    scale = ref.scale
    if kind:
        start = kind.start if start is None else start
        end = kind.end if end is None else end
        scale = kind.scale if scale is None else scale
    path = None
    try:
        path = locate(ref.kind)
    except WeightsUnavailable:
        if not planned or read_known_controlnet(repository_of(ref.kind)) is None:
            raise
    resolved = ResolvedControl(
        path,
        scale=1.0 if scale is None else scale,
        start=0.0 if start is None else start,
        end=1.0 if end is None else end,
        mode=controls.choose_mode(ref, kind),
    )
    if not resolved.start < resolved.end:
        why = f"{resolved.start:g}-{resolved.end:g} are no shares of the steps"
        hint = f"{ref.kind}:{ref.image}:{resolved.scale:g}:0-1"
        raise UsageError("no control", which=ref.kind, why=why, hint=f"--control {hint}")
    return resolved


def locate(kind: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder or file of the weights of a kind: a preset's, a path, or ORG/NAME[:FILE].

    Raises `UsageError` for what can be none, `WeightsUnavailable` naming the command that gets it.
    """
    preset = controls.find_kind(kind, config_folder(environment))
    name = preset.repository if preset else kind
    bundled = BUNDLED_CONTROL.fullmatch(name)
    if bundled:
        folder = BUNDLED / "control" / bundled[1]
        if folder.is_dir():
            return folder
        raise WeightsUnavailable("no such bundled control", which=name, hint="flux presets")
    path = find.find_path(name)
    if path:
        return path
    name = read_address(name)
    wanted = kind if preset else name
    hint = f"flux models download {wanted}"
    if find.HUB_FILE.fullmatch(name) and ".." not in name:
        model, _, file = name.partition(":")
        for folder in find.list_copies(model, environment):
            if (folder / file).is_file():
                return folder / file
        raise WeightsUnavailable("that control is not here", which=wanted, hint=hint)
    if not find.HUB_ID.fullmatch(name) or ".." in name or name.startswith("bundled/"):
        raise _refuse_unknown(kind, environment)
    for folder in find.list_copies(name, environment):
        if (folder / CONFIG).is_file() and any(folder.glob(WEIGHTS)):
            return folder
    raise WeightsUnavailable("that control is not here", which=wanted, hint=hint)


def make_absolute(kind: str) -> str:
    """Return a kind that means the same in any working folder: a file's or folder's whole path."""
    if kind in controls.list_kinds(config_folder()):
        return kind
    return find.make_absolute(kind)


def _refuse_unknown(kind: str, environment: Mapping[str, str]) -> UsageError:
    known = list(controls.list_kinds(config_folder(environment)))
    near = get_close_matches(kind, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "flux presets; or a file, or ORG/NAME"
    return UsageError(
        "no such control", which=kind[:100], why=f"known are {' '.join(known)}", hint=hint
    )


def repository_of(name: str) -> str:
    """Return the repository of the control of that name; any other name is returned as it is."""
    kind = controls.find_kind(name, config_folder())
    return kind.repository if kind else name


def computed_map(kind: str) -> str:
    """Return what is computed of a photo for a kind of control: "canny", "depth" or ""."""
    if not re.fullmatch(r"[\w-]+", kind):
        return ""  # a path or a hub id: what it was trained on nobody says
    return COMPUTED.get(kind.rpartition("-")[2], "")
