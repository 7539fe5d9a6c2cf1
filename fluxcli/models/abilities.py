"""Which settings a kind of FLUX.1 honours: what it cannot honour is an error, never ignored.

Knows kinds and settings, no files. What a setting needs beside it, whatever the model, is looked at
in `fluxcli.resolve`. Stdlib only.
"""

from dataclasses import replace
from typing import NamedTuple

from fluxcli.errors import UsageError
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.settings import flag
from quant.checkpoint import Checkpoint
from quant.kinds import CHANNELS_OF, KINDS

WORDS = {
    "dev": "a dev model, which draws from text",
    "schnell": "a schnell model, which draws from text in few steps",
    "fill": "a Fill model, which paints into a picture",
    "kontext": "a Kontext model, which edits its reference",
    "canny": "a Canny model, which follows edges",
    "depth": "a Depth model, which follows a depth map",
}
TAKE_CONTROL = ("canny", "depth")
PRESETS = {"canny": "canny-dev", "depth": "depth-dev"}  # of kinds that are called otherwise


class Ability(NamedTuple):
    """A setting that some kinds do not honour: those that do, and what to type with the others."""

    setting: str
    kinds: tuple[str, ...]
    hint: str


ABILITIES = (
    Ability("expand", ("fill",), "-p fill paints around a picture"),
    Ability(
        "image",
        ("dev", "schnell", "fill", *TAKE_CONTROL),
        "--reference FILE with this model, or -p dev",
    ),
    Ability("reference", ("kontext",), "-p kontext edits a picture as the prompt says"),
    Ability("control", ("dev", "schnell", *TAKE_CONTROL), "-p dev follows control pictures"),
    Ability("negative_prompt", ("dev", "schnell", "kontext"), "-p dev takes one"),
    Ability("true_cfg", ("dev", "schnell", "kontext"), "-p dev takes it"),
)


def apply_kind(request: GenerationRequest, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as what --kind says that it is.

    Raises `UsageError` for a kind that the transformer's channels or its guidance input rule out.
    """
    if request.kind == "auto":
        return checkpoint
    channels = checkpoint.components["transformer"].config["in_channels"]
    fitting = [kind for kind in KINDS if CHANNELS_OF[kind] == channels]
    why = f"{request.model} takes {channels} channels"
    why += f", a {request.kind} model {CHANNELS_OF[request.kind]}"
    if checkpoint.takes_guidance and "schnell" in fitting:
        fitting.remove("schnell")
        if request.kind == "schnell":
            why = f"{request.model} has a guidance input, a schnell model has none"
    if request.kind not in fitting:
        preset = PRESETS.get(request.kind, request.kind)
        hint = f"--kind {' or '.join(fitting)}, or none; -p {preset} is one"
        raise UsageError("the model is of another kind", which="--kind", why=why, hint=hint)
    return replace(checkpoint, said_kind=request.kind)


def check_abilities(request: GenerationRequest, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for what a model cannot honour, and for what it lacks."""
    kind = checkpoint.kind
    why = f"{request.model} is {WORDS[kind]}"
    for ability in ABILITIES:
        is_set = getattr(request, ability.setting) not in (None, ())
        if is_set and kind not in ability.kinds:
            which = flag(ability.setting)
            raise UsageError("the model cannot do this", which=which, why=why, hint=ability.hint)
    if request.negative_prompt is not None and request.control and request.image:
        why = "diffusers' pipelines of --control beside --image take none"
        hint = "leave one of the three out"
        raise UsageError("no negative prompt here", which="--negative-prompt", why=why, hint=hint)
    _check_pictures(request, kind, why=why)
    _check_guidance(request, checkpoint)


def _check_pictures(request: GenerationRequest, kind: str, *, why: str) -> None:
    """Raise `UsageError` for a model without the pictures that it works on."""
    what = "this model needs a picture"
    if kind == "fill" and not request.image:
        hint = "--image FILE --mask FILE, or --expand 0,0,256,0; -p dev draws from text"
        raise UsageError(what, which="--image", why=why, hint=hint)
    if kind == "fill" and not (request.mask or request.expand):
        hint = "--mask FILE, or --expand 0,0,256,0; -p dev draws all of --image anew"
        raise UsageError("this model needs a mask", which="--mask", why=why, hint=hint)
    if kind in TAKE_CONTROL and not request.control:
        hint = f"--control {kind}:FILE; -p dev draws from text"
        raise UsageError(what, which="--control", why=why, hint=hint)


def _check_guidance(request: GenerationRequest, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for a guidance that the model does not take, or one that is missing."""
    if checkpoint.takes_guidance and request.guidance is None:
        hint = "--guidance 3.5"
        raise UsageError("this model needs a guidance", which=request.model, hint=hint)
    if not checkpoint.takes_guidance and request.guidance is not None:
        why = "it has no guidance input, the value would do nothing"
        hint = "-p schnell, or --guidance none"
        raise UsageError("guidance without effect", which=request.model, why=why, hint=hint)
