"""What a request adds to a model: ControlNets, and what makes tokens of pictures, by its names.

Each becomes a component that is planned, loaded and evicted like the model's own. Reads headers, no
weights. Stdlib only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fluxcli.errors import UsageError
from fluxcli.models import find
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.inputs import ControlRef
from quant.checkpoint import Checkpoint, Component
from quant.controlnet import check_fit, inspect_controlnet


@dataclass(frozen=True)
class Control:
    """What one control picture of a request acts by, and how.

    `part` is the key of a ControlNet in the checkpoint's components; "" stands for the transformer
    itself, which takes the picture in its channels. `start` and `end` are shares of the steps,
    `mode` is the number of what the picture shows, for a union of several ControlNets.
    """

    part: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None


@dataclass(frozen=True)
class Parts:
    """The components that a request adds, by their keys, and a `Control` for each of its pictures.

    Equal control networks of one request are one component.
    """

    components: Mapping[str, Component] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()

    def add_to(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with these components beside its own."""
        if not self.components:
            return checkpoint
        return replace(checkpoint, components=checkpoint.components | dict(self.components))


def resolve_parts(request: GenerationRequest, checkpoint: Checkpoint) -> Parts:
    """Find what a request adds to a model; raises what looking for weights raises."""
    return resolve_controls(request.control, checkpoint)


def resolve_controls(refs: Sequence[ControlRef], checkpoint: Checkpoint) -> Parts:
    """Find the networks of control pictures, and check that they fit the model.

    A kind is the folder, the file or the hub id of one. `WeightsUnavailable` where it is not here,
    `CheckpointError` where it is none, or of another model, `UsageError` for a wrong mode.
    """
    components: dict[str, Component] = {}
    keys: dict[Path, str] = {}
    controls = []
    for ref in refs:
        path = find.locate(ref.kind, components=())
        if path not in keys:
            found = inspect_controlnet(path)
            check_fit(found, checkpoint.components["transformer"])
            keys[path] = "controlnet" if not keys else f"controlnet_{len(keys) + 1}"
            components[keys[path]] = found
        control = Control(
            keys[path],
            scale=1.0 if ref.scale is None else ref.scale,
            start=ref.start or 0.0,
            end=1.0 if ref.end is None else ref.end,
        )
        _check_mode(control, components[control.part], kind=ref.kind)
        controls.append(control)
    return Parts(components, tuple(controls))


def _check_mode(control: Control, network: Component, *, kind: str) -> None:
    """Raise `UsageError` for a union network without a mode, and for a mode that it has not."""
    count = network.config.get("num_mode")
    if count is None and control.mode is not None:
        why = "it is no union of several"
        raise UsageError("a mode without effect", which=kind, why=why, hint="leave mode= out")
    if count is not None and (control.mode is None or control.mode >= count):
        why = f"this network is a union of {count}, and mode is {control.mode}"
        hint = f"--control kind={kind},mode=0,image=FILE"
        raise UsageError("which mode of the control?", which=kind, why=why, hint=hint)
