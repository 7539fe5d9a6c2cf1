"""From a prompt and settings to an order: layers are merged, formats and paths are decided.

The command line and the Python face both go through here, so that the same words mean the same
picture. Knows nothing of options or how text reaches it.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.models import controls, find, loras
from fluxcli.paths import config_folder
from fluxcli.pictures import canvas, inputs, names
from fluxcli.request import presets
from fluxcli.request.fields import DEFAULT_STRENGTH, DEFAULTS, Order
from fluxcli.request.inputs import STDIN, rename_pictures
from fluxcli.request.settings import flag
from fluxcli.request.sizes import MAX_RATIO, add_other_side, fit_kontext, size_like, size_of

# What says how large a picture is; without them one that starts from another has its ratio.
SIZES = ("aspect_ratio", "image_size", "width", "height")
# What says which ratio it has; without them one that Kontext edits has that of its first reference.
SHAPES = ("aspect_ratio", "width", "height")
# The presets of kinds of models that take other settings than dev.
PRESETS = {"fill": "fill", "kontext": "kontext", "canny": "canny-dev", "depth": "depth-dev"}
# What a setting does nothing without, whatever the model: one of the others.
NEEDED = {
    "mask": ("image", "reference"),
    "mask_invert": ("mask",),
    "mask_feather": ("mask", "expand"),
    "expand": ("image",),
    "strength": ("image", "mask"),
    "true_cfg": ("negative_prompt",),
    "redux_model": ("redux",),
}


def resolve_order(prompt: str, given: Mapping[str, Any]) -> Order:
    """Return the order of a prompt and of what was said, by field name.

    What was not said comes from variables, presets, config.toml and the defaults. Raises
    `UsageError`, and `BadInputFile` for a picture whose size is asked for and cannot be read.
    """
    merged = presets.merge(given, config_folder())
    preset = find_preset(merged)
    if preset:
        merged = presets.merge({**given, "preset": preset}, config_folder())
    values = merged.values
    if values["image"] or values["reference"]:
        values = values | follow_picture(values, given)
    return build_order(prompt, values, given)


def find_preset(merged: presets.Settings) -> str:
    """Return the preset that a model comes with, "" where there is none or one was asked for.

    Models of the kinds in `PRESETS` draw nothing good with the settings of dev. They are known by
    name, or by what is in their files.
    """
    is_named = merged.origins["model"] in (flag("model"), "FLUX_MODEL")
    if merged.origins["preset"] != "default" or not is_named:
        return ""
    model = presets.model_of(find.make_absolute(merged.values["model"]), config_folder())
    for preset in PRESETS.values():
        if model == presets.model_of(preset, config_folder()):
            return preset
    kind = merged.values["kind"]
    if kind == "auto":
        kind = find.read_kind(model)
    return PRESETS.get(kind, "")


def follow_picture(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sides of a picture that starts from another, as far as nobody said them.

    They have the ratio of that one, grown by `expand`, unless a ratio is given. Raises `UsageError`
    for a picture that is beyond 4:1.
    """
    said = {name for name in SIZES if given.get(name)}
    if "aspect_ratio" in said or (said and values["width"] and values["height"]):
        return {}
    path = _make_absolute(values["image"] or values["reference"][0])
    size = inputs.measure_picture(path)
    if values["reference"] and not said & set(SHAPES):
        width, height = fit_kontext(size, values["image_size"] ** 2)
    else:
        grown = canvas.grow(size, values["expand"])
        _check_ratio(path, grown)
        width, height = _keep_ratio(grown, values, by_longest="image_size" in said)
    return {"width": width, "height": height}


def _check_ratio(path: str, size: tuple[int, int]) -> None:
    if max(size) > MAX_RATIO * min(size):
        which = f"{path}, {size[0]}x{size[1]}"
        why = f"the picture is beyond {MAX_RATIO}:1"
        hint = "crop it, or squeeze it: --ar 4:1 or 1:4"
        raise UsageError("size not possible", which=which, why=why, hint=hint)


def _keep_ratio(
    size: tuple[int, int], values: Mapping[str, Any], *, by_longest: bool
) -> tuple[int, int]:
    """Return (width, height) in the ratio of a picture's size.

    One side or, with `by_longest`, the longest one is what the settings say; else there are about
    as many pixels as they say.
    """
    ratio = f"{size[0]}:{size[1]}"
    width, height = values["width"], values["height"]
    if (width is None) != (height is None):
        return add_other_side(ratio, width=width, height=height)
    if by_longest:
        return size_of(ratio, values["image_size"])
    if not width:
        width, height = size_of(values["aspect_ratio"], values["image_size"])
    return size_like(*size, area_px=width * height)


def build_order(prompt: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> Order:
    """Return the order of settings that are merged already; `given` are those that were said.

    A file name decides the format, and the ratio a side of which the other is given. Folders and
    files are stored with absolute paths, so that the order means the same in a worker, which has
    another working folder. Raises `UsageError`.
    """
    if "\0" in prompt:
        raise UsageError(
            "the prompt holds NUL", why="is it of a UTF-16 file?", hint="save it as UTF-8"
        )
    format_given = values["format"] if given.get("format") else None
    format_of_name = names.read_format(values["output"], given=format_given)
    resolved = _drop_idle(values, given)
    if format_of_name:
        resolved["format"] = format_of_name
    # A preset's name stands for its model, as in `flux models download`, unless it is a folder's.
    named = find.make_absolute(values["model"])
    resolved["model"] = presets.model_of(named, config_folder())
    if values["vae"]:
        resolved["vae"] = find.make_absolute(values["vae"])
    resolved["text_encoders"] = tuple(find.make_absolute(each) for each in values["text_encoders"])
    resolved["lora"] = loras.make_absolute(values["lora"])
    resolved["redux_model"] = tuple(find.make_absolute(each) for each in values["redux_model"])
    resolved |= rename_pictures(resolved, _make_absolute)
    resolved["control"] = tuple(
        replace(each, kind=controls.make_absolute(each.kind)) for each in resolved["control"]
    )
    if resolved["image"] and resolved["strength"] is None and not resolved["reference"]:
        resolved["strength"] = DEFAULT_STRENGTH
    width, height = values["width"], values["height"]
    if (width is None) != (height is None):
        sides = add_other_side(values["aspect_ratio"], width=width, height=height)
        resolved["width"], resolved["height"] = sides
    return Order.from_settings(prompt, resolved)


def _drop_idle(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that do nothing here; they get their defaults.

    Such as a strength that config.toml says, of a picture that starts from none. Raises
    `UsageError` for one that was said.
    """
    found = dict(values)
    for name, needed in NEEDED.items():
        is_idle = all(found[other] == DEFAULTS[other] for other in needed)
        if not is_idle or found[name] == DEFAULTS[name]:
            continue
        if name in given:
            flags = " or ".join(flag(other) for other in needed)
            hint = f"{flag(needed[0])} beside it, or neither"
            raise UsageError(f"{flag(name)} does nothing here", why=f"it needs {flags}", hint=hint)
        found[name] = DEFAULTS[name]
    return found


def _make_absolute(name: str) -> str:
    """Return the name of a picture that holds in any working folder."""
    if name == STDIN:
        why = "a picture from stdin is an option's, of a single picture"
        raise UsageError("no file of a picture", which=name, why=why, hint="give a file")
    return str(Path(os.path.expanduser(name)).absolute())
