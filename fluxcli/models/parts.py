"""What a request adds to a model: ControlNets, and what makes tokens of pictures, by its names.

Each becomes a component that is planned, loaded and evicted like the model's own. Reads headers, no
weights. Stdlib only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.models import redux
from fluxcli.models.controls import computed_map, repository_of, resolve_control
from fluxcli.models.loras import names_control_lora
from fluxcli.models.shapes import read_known_controlnet, read_known_redux
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.inputs import ControlRef, acts_in_step
from quant.checkpoint import Checkpoint, Component
from quant.controlnet import check_fit, inspect_controlnet
from quant.kinds import CONTROL_CHANNELS
from quant.lora import Adapter


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


def resolve_parts(
    request: GenerationRequest,
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter] = (),
    *,
    planned: bool = False,
) -> Parts:
    """Find what a request adds to a model with its adapters.

    Where it is only `planned`, the shapes of what is published stand for what is not here, and the
    names of BFL's control LoRAs for these. Raises `UsageError` for controls that the model cannot
    take or that would do nothing, and what looking for weights raises.
    """
    parts = Parts()
    transformer = checkpoint.components["transformer"]
    in_channels = takes_control_channels(checkpoint, adapters)
    if planned and not adapters:
        in_channels = in_channels or names_control_lora(request.lora)
    if request.control and in_channels:
        parts = Parts(controls=(_take_in_channels(request, checkpoint),))
    elif request.control:
        parts = resolve_controls(request.control, checkpoint, planned=planned)
        for ref, control in zip(request.control, parts.controls, strict=True):
            _check_span(control, ref, steps=request.steps_taken)
    if request.redux:
        looking = _find_redux(request, transformer, planned=planned)
        parts = replace(parts, components=dict(parts.components) | looking)
    return parts


def _find_redux(
    request: GenerationRequest, transformer: Component, *, planned: bool
) -> dict[str, Component]:
    """SigLIP and Redux' embedder, or the shapes of the published ones where that is enough."""
    try:
        return redux.find_redux(request.redux_model, transformer)
    except WeightsUnavailable:
        if not planned or not set(request.redux_model) <= {redux.PUBLISHED_REDUX}:
            raise
        return read_known_redux()


def takes_control_channels(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> bool:
    """Whether the transformer itself takes a control picture: BFL's, or by one of their LoRAs."""
    channels = checkpoint.components["transformer"].config["in_channels"]
    return CONTROL_CHANNELS in (channels, *(each.input_channels for each in adapters))


def _take_in_channels(request: GenerationRequest, checkpoint: Checkpoint) -> Control:
    """The control of a model that takes one picture in its channels, and acts by it fully."""
    ref = request.control[0]
    if len(request.control) > 1:
        why = "the model takes one control picture, in its channels"
        hint = "one --control; ControlNets on -p dev take several"
        raise UsageError("too many controls", which=request.model, why=why, hint=hint)
    own = checkpoint.kind
    if own in ("canny", "depth") and computed_map(ref.kind) != own:
        why = f"{request.model} follows a {own} map"
        hint = f"--control {own}:{ref.image}, or -p dev --control {ref.kind}:{ref.image}"
        raise UsageError("the model has no such control", which=ref.kind, why=why, hint=hint)
    if not computed_map(ref.kind):
        why = "the model takes a canny or depth map itself, and no ControlNet"
        hint = f"--control canny:{ref.image}, or leave out the LoRA that takes one"
        raise UsageError("the model has no such control", which=ref.kind, why=why, hint=hint)
    if (ref.scale, ref.start, ref.end, ref.mode) != (None, None, None, None):
        why = "it would do nothing: the model takes the picture in its channels, in every step"
        hint = f"--control {ref.kind}:{ref.image}"
        raise UsageError("a scale without effect", which=str(ref), why=why, hint=hint)
    if request.true_scale != 1:
        why = "the model takes a control picture in its channels, and no negative prompt"
        hint = "a ControlNet on -p dev takes both: --control, --negative-prompt"
        raise UsageError("the model cannot do this", which="--negative-prompt", why=why, hint=hint)
    return Control("")


def resolve_controls(
    refs: Sequence[ControlRef], checkpoint: Checkpoint, *, planned: bool = False
) -> Parts:
    """Find the networks of control pictures, and check that they fit the model.

    `WeightsUnavailable` where one is not here, `CheckpointError` where it is none, or of another
    model, `UsageError` for an unknown kind and a wrong mode.
    """
    components: dict[str, Component] = {}
    keys: dict[Path | str, str] = {}
    controls = []
    for ref in refs:
        resolved = resolve_control(ref, planned=planned)
        place = resolved.path or repository_of(ref.kind)
        if place not in keys:
            found = read_known_controlnet(repository_of(ref.kind))
            if resolved.path:
                found = inspect_controlnet(resolved.path)
            assert found, "else it was missing"
            check_fit(found, checkpoint.components["transformer"], name=str(place))
            keys[place] = "controlnet" if not keys else f"controlnet_{len(keys) + 1}"
            components[keys[place]] = found
        control = Control(
            keys[place],
            scale=resolved.scale,
            start=resolved.start,
            end=resolved.end,
            mode=resolved.mode,
        )
        _check_mode(control, components[control.part], kind=ref.kind)
        controls.append(control)
    return Parts(components, tuple(controls))


def _check_span(control: Control, ref: ControlRef, *, steps: int) -> None:
    """Raise `UsageError` where a control would do nothing: no step lies within its shares."""
    span = (control.start, control.end)
    if any(acts_in_step(index, steps, span=span) for index in range(steps)):
        return
    why = f"none of the steps, {steps}, lies within {control.start:g}-{control.end:g} of them"
    hint = f"--control {ref.kind}:{ref.image}:{control.scale:g}:0-1"
    raise UsageError("a control without effect", which=ref.kind, why=why, hint=hint)


def _check_mode(control: Control, network: Component, *, kind: str) -> None:
    """Raise `UsageError` for a union network without a mode, and for a mode that it has not."""
    count = network.config.get("num_mode")
    if count is None and control.mode is not None:
        why = "it is no union of several"
        raise UsageError("a mode without effect", which=kind, why=why, hint="leave mode= out")
    if count is not None and (control.mode is None or control.mode >= count):
        said = "none is named" if control.mode is None else f"{control.mode} is none"
        why = f"its modes are 0 to {count - 1}, and {said}"
        hint = f"--control kind={kind},mode=0,image=FILE"
        raise UsageError("which mode of the control?", which=kind, why=why, hint=hint)
