"""The options that the drawing commands share, declared once.

Those of the settings come from `request.settings`; the others say how a command runs and what it
prints. Knows their names, help and groups, not what they do.
"""

import inspect
from collections.abc import Callable, Collection
from copy import copy
from typing import Annotated, Any, NamedTuple, Optional

import typer

from fluxcli.cli import complete
from fluxcli.cli.help import MACHINE, MANY, OTHER, OUTPUT, PICTURE, PICTURES
from fluxcli.request.fields import DEFAULT_STRENGTH, DEFAULTS
from fluxcli.request.settings import SETTINGS

# Settings that presets say, each another value.
PRESET_SETTINGS = ("image_size", "steps", "guidance", "text_tokens", "format", "strength")
# Defaults that are no value.
_DEFAULT_WORDS = {
    "model": "the preset's",
    "seed": "a new one",
    "output": "named by prompt and seed",
    "strength": f"the preset's; {DEFAULT_STRENGTH} in dev",
}


class _Shown(NamedTuple):
    """How the option of a setting is shown: its group, what stands for a value, what is offered."""

    panel: str
    metavar: str
    offer: complete.Offer | None = None


_SHOWN = {
    "preset": _Shown(PICTURE, "NAME", complete.offer_presets),
    "model": _Shown(PICTURE, "MODEL", complete.offer_models),
    "text_encoders": _Shown(PICTURE, "FILE"),
    "vae": _Shown(PICTURE, "FILE"),
    "lora": _Shown(PICTURE, "FILE[:SCALE]", complete.offer_loras),
    "aspect_ratio": _Shown(PICTURE, "W:H", complete.offer_ratios),
    "image_size": _Shown(PICTURE, "PX"),
    "width": _Shown(PICTURE, "PX"),
    "height": _Shown(PICTURE, "PX"),
    "image": _Shown(PICTURES, "FILE"),
    "strength": _Shown(PICTURES, "X"),
    "mask": _Shown(PICTURES, "FILE"),
    "mask_invert": _Shown(PICTURES, ""),
    "mask_feather": _Shown(PICTURES, "PX"),
    "expand": _Shown(PICTURES, "L,T,R,B"),
    "reference": _Shown(PICTURES, "FILE"),
    "redux": _Shown(PICTURES, "FILE[:X]"),
    "redux_model": _Shown(PICTURES, "MODEL"),
    "control": _Shown(PICTURES, "KIND:FILE", complete.offer_controls),
    "negative_prompt": _Shown(PICTURE, "TEXT"),
    "true_cfg": _Shown(PICTURE, "X"),
    "kind": _Shown(PICTURE, "KIND", complete.offer_values("kind")),
    "preview_every": _Shown(OUTPUT, "N"),
    "steps": _Shown(PICTURE, "N"),
    "guidance": _Shown(PICTURE, "X"),
    "seed": _Shown(PICTURE, "N"),
    "count": _Shown(MANY, "N"),
    "text_tokens": _Shown(PICTURE, "N"),
    "output": _Shown(OUTPUT, "FILE"),
    "format": _Shown(OUTPUT, "NAME", complete.offer_values("format")),
    "quality": _Shown(OUTPUT, "N"),
    "metadata": _Shown(OUTPUT, ""),
    "precision": _Shown(MACHINE, "NAME", complete.offer_values("precision")),
    "vram_limit": _Shown(MACHINE, "SIZE"),
    "offload": _Shown(MACHINE, "NAME", complete.offer_values("offload")),
    "device": _Shown(MACHINE, "NAME", complete.offer_devices),
    "compile": _Shown(MACHINE, ""),
}


def describe_default(setting: str) -> str:
    """Return what holds for a setting that is not given, in words; "" where there is nothing."""
    value = DEFAULTS.get(setting)
    if setting in _DEFAULT_WORDS:
        return _DEFAULT_WORDS[setting]
    if value is None or isinstance(value, bool) or value == ():
        return ""
    if setting in PRESET_SETTINGS:
        return f"the preset's; {value} in dev"
    return str(value)


def _declare_option(kind: Any, *flags: str, text: str, panel: str, **shown: Any) -> Any:
    """Return the annotation of an option: a bool is a switch, others may be left out."""
    option = typer.Option(*flags, help=text, show_default=False, rich_help_panel=panel, **shown)
    if kind is bool:
        return Annotated[bool, option]
    return Annotated[Optional[kind], option]


def _declare_settings() -> dict[str, Any]:
    """Return the annotations of the settings' options by the names of their parameters.

    A setting that is a switch has one flag: --NAME where it is off by default, else --no-NAME.
    """
    found = {}
    for setting in SETTINGS.values():
        kind = setting.kind.option_type
        name = f"no_{setting.name}" if DEFAULTS[setting.name] is True else setting.name
        shown = _SHOWN[setting.name]
        default = describe_default(setting.name)
        text = f"{setting.help} [default: {default}]" if default else setting.help
        found[name] = _declare_option(
            kind,
            *setting.flags,
            text=text,
            panel=shown.panel,
            metavar=shown.metavar or None,
            autocompletion=shown.offer,
        )
    return found


REQUEST_OPTIONS: dict[str, Any] = {
    **_declare_settings(),
    "force": _declare_option(bool, "--force", text="Replace an existing -o file.", panel=OUTPUT),
    "no_wait": _declare_option(
        bool,
        "--no-wait",
        text="Fail (exit 5) where another flux has the device, instead of waiting.",
        panel=MACHINE,
    ),
    "no_worker": _declare_option(
        bool, "--no-worker", text="Run here, even where flux worker is up.", panel=MACHINE
    ),
    "no_cache": _declare_option(
        bool,
        "--no-cache",
        text="Neither read nor keep encoded prompts on disk: see flux cache.",
        panel=MACHINE,
    ),
    "show": _declare_option(
        bool, "--show", text="Draw the finished picture in the terminal.", panel=OUTPUT
    ),
    "json_output": _declare_option(
        bool, "--json", text="One JSON object on stdout instead of paths.", panel=OUTPUT
    ),
    "events": _declare_option(
        bool, "--events", text="One JSON object a line while it goes on.", panel=OUTPUT
    ),
    "quiet": _declare_option(bool, "-q", "--quiet", text="Only errors on stderr.", panel=OUTPUT),
    "debug": _declare_option(bool, "--debug", text="Tracebacks and library warnings.", panel=OTHER),
}
# The parameters that only matter where pictures are written.
_WRITING = (
    "output",
    "format",
    "preview_every",
    "quality",
    "no_metadata",
    "force",
    "show",
    "events",
    "quiet",
)
# Those that change nothing in a plan. They are taken, so that "generate" can become "plan" in a
# command line, but not shown.
IDLE_IN_PLAN = (*_WRITING, "seed", "count", "no_wait", "no_worker", "no_cache")
# Those that kept latents say themselves. They are refused, with a reason.
IDLE_IN_DECODE = (
    "preset", "model", "text_encoders", "vae", "lora", "aspect_ratio", "image_size", "width",
    "height", "steps", "guidance", "seed", "count", "text_tokens", "precision", "compile",
    "no_cache", "image", "strength", "mask", "mask_invert", "mask_feather", "expand", "reference",
    "redux", "redux_model", "control", "negative_prompt", "true_cfg", "kind", "preview_every",
)  # fmt: skip
_IDLE = {"plan_command": IDLE_IN_PLAN, "decode": IDLE_IN_DECODE}
# Commands where what is not given is as it was in the picture: no default is shown.
_AS_BEFORE = ("replay", "decode")


def with_request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command whose last parameter is `**options` every shared option as a real parameter.

    typer reads signatures, so the options are written into the command's own. Those that mean
    nothing to it are hidden from its help, and so are defaults that do not hold there.
    """
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    idle = _IDLE.get(command.__name__, ())
    annotations = _adapt(idle, shows_defaults=command.__name__ not in _AS_BEFORE)
    shared = []
    for name, annotation in annotations.items():
        is_switch = annotation.__origin__ is bool
        shared.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=annotation,
                default=False if is_switch else None,
            )
        )
    command.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    own_annotations = {parameter.name: parameter.annotation for parameter in own}
    command.__annotations__ = own_annotations | annotations
    return command


def _adapt(idle: Collection[str], *, shows_defaults: bool) -> dict[str, Any]:
    """The shared options as one command has them: with those of the names in `idle` hidden."""
    annotations = {}
    for name, annotation in REQUEST_OPTIONS.items():
        (shared,) = annotation.__metadata__
        option = copy(shared)
        option.hidden = name in idle
        if name in SETTINGS and not shows_defaults:
            option.help = SETTINGS[name].help
        annotations[name] = Annotated[annotation.__origin__, option]
    return annotations
