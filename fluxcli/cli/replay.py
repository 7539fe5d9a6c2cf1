"""`flux replay` and `flux decode`: pictures from what an earlier run has left.

`replay` makes a picture again from its own metadata, `decode` finishes pictures from the latents
that a run has kept.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fluxcli.cli import console
from fluxcli.cli.draw import draw, draw_by
from fluxcli.cli.help import PICTURE
from fluxcli.cli.options import with_request_options
from fluxcli.cli.settings import STARTED, check_there, given_settings, read_prompt, take_stdin
from fluxcli.engine.check import check_torch
from fluxcli.errors import BadInputFile, ExitCode, FluxError, UsageError, WeightsUnavailable
from fluxcli.events import Notice
from fluxcli.models import controls, loras
from fluxcli.paths import config_folder, lora_folder
from fluxcli.pictures import kept_inputs
from fluxcli.pictures.inputs import hash_file, list_hashes
from fluxcli.request import presets
from fluxcli.request.fields import Order
from fluxcli.request.inputs import PICTURE_SETTINGS, list_pictures, rename_pictures
from fluxcli.request.settings import LORA_NONE, LoraRef, coerce, flag, to_json_value
from fluxcli.resolve import build_order
from fluxcli.run.dispatch import Dispatcher
from quant.controlnet import inspect_controlnet
from quant.errors import ExplainedError
from quant.kinds import CONTROLNET
from quant.lora import compute_identity

Metadata = Mapping[str, Any]
Values = Mapping[str, Any]  # settings by their field names

# What to do about metadata that flux does not write.
OTHER_PICTURE = "name a picture as flux made it"
# Settings of `decode`: they say how and where, not what is drawn.
DECODE_SETTINGS = {
    "output",
    "format",
    "quality",
    "metadata",
    "device",
    "vram_limit",
    "offload",
}
# Settings that only matter for a file that is written.
FILE_SETTINGS = ("output", "format", "quality", "count", "metadata", "preview_every")
# What the metadata say of how a picture was computed, by group and key, as --check says that it is
# another here. Of adapters the keys are names of files.
DIFFERENCES = {
    "model": {
        "fingerprint": "made with the model {then}, here it is {here}",
        "parts": "ControlNets and the like were {then}, here {here}",
    },
    "compute": {
        "device": "made on {then}, here is {here}",
        "precision": "made in {then}, here it is {here}",
        "multiply": "matrices were multiplied as {then}, here as {here}",
        "kernels": "norms and rotations were by {then}, here by {here}",
        "dtypes": "the parts had the dtypes {then}, here {here}",
        "compiled": "compiled then: {then}, here: {here}",
        "tiled": "decoded in tiles: {then}, here: {here}",
        "tiled_inputs": "input pictures encoded in tiles: {then}, here: {here}",
    },
    "versions": {
        "flux": "made with flux {then}, here is {here}",
        "python": "made with Python {then}, here is {here}",
        "torch": "made with torch {then}, here is {here}",
        "diffusers": "made with diffusers {then}, here is {here}",
        "transformers": "made with transformers {then}, here is {here}",
    },
}
ABSENT = {
    "compiled": False,
    "kernels": "torch",
    "tiled_inputs": False,
    "parts": "none",
}  # what it means that a key is not there
MAX_SAID = 60  # characters of a value that a picture says


@with_request_options
def replay(
    picture: Annotated[Path, typer.Argument(help="A picture made by flux.", show_default=False)],
    prompt: Annotated[
        Optional[str],
        typer.Option("--prompt", help="Another prompt.", metavar="TEXT", rich_help_panel=PICTURE),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing; say whether the pixels are identical (exit 1: different).",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and stop.")
    ] = False,
    **options: Any,
) -> int:
    """Make a picture again from its own metadata.

    What is not given is as it was then; any option overrides it, e.g. -p quality.
    """
    from fluxcli.pictures import image

    check_there(picture)
    metadata = image.read_metadata(picture)
    given = take_stdin(given_settings(options), prompt=prompt)
    text = None if prompt is None else read_prompt(prompt)
    tell = Teller(quiet=options["quiet"], says_changed=not check)
    stored = _find_inputs(picture, metadata, given=given, tell=tell)
    order = restore_order(picture, stored, given=given, prompt=text)
    order = _find_adapters(order, picture, metadata=metadata, tell=tell)
    if check:
        _refuse_inert(given, options, dry_run=dry_run)
        return _check(picture, order, metadata=metadata, options=options)
    if "control" not in given:
        _compare_networks(order, metadata, tell)
    model = _get_group(metadata, "model").get("fingerprint", "")
    return draw(order, options, given=given, dry_run=dry_run, expected_model=model)


@with_request_options
def decode(
    paths: Annotated[
        list[Path], typer.Argument(help=".latents.safetensors files.", show_default=False)
    ],
    **options: Any,
) -> int:
    """Finish pictures of a run that ended early, from their kept latents.

    Each goes beside its latents, which stay. Options say how and where, not what.
    """
    from fluxcli.pictures import latents

    given = given_settings(options)
    refused = sorted(set(given) - DECODE_SETTINGS)
    if refused:
        hint = "flux generate draws another"
        raise UsageError("the latents say what is drawn", which=flag(refused[0]), hint=hint)
    tell = Teller(quiet=options["quiet"])
    found = []
    for path in paths:
        check_there(path)
        kept = latents.load(path)
        made = {"request": kept.order.to_json(), "inputs": kept.inputs}
        there = Order.from_json(_find_inputs(path, made, given=given, tell=tell))
        stored = there.settings() | {"output": None, "count": 1}
        order = build_order(kept.order.request.prompt, presets.overlay(stored, given), given)
        found.append(replace(kept, order=order))
    with Dispatcher(alone=True) as dispatcher:
        for path, kept in zip(paths, found, strict=True):
            draw_by(
                dispatcher,
                kept.order,
                options,
                given=given,
                expected_model=kept.model,
                kept=kept,
                target=None if "output" in given else latents.aim_beside(path),
            )
    return ExitCode.OK


# --- what is drawn again


@dataclass(frozen=True)
class Teller:
    """Says what became of the files that a picture was made with, unless it is to be `quiet`.

    Where what has changed is said later, with the rest, `says_changed` is off.
    """

    quiet: bool
    says_changed: bool = True

    def say_moved(self, text: str) -> None:
        """Say where a file is now."""
        if not self.quiet:
            console.say(text)

    def say_changed(self, text: str) -> None:
        """Say that another file took the place of one."""
        if self.says_changed and not self.quiet:
            console.say(text)


def restore_order(
    picture: Path, stored: Metadata, *, given: Values, prompt: str | None = None
) -> Order:
    """Return the order in a picture's metadata, with what the command line gives on top.

    Raises `BadInputFile` for an order that flux does not write, and `UsageError`.
    """
    made = _read_order(picture, stored)
    text = made.request.prompt if prompt is None else prompt
    return build_order(text, _override(made, given), given)


def _read_order(picture: Path, stored: Metadata) -> Order:
    """The order in a picture's metadata; raises `BadInputFile` for one that flux does not write."""
    for key in ("prompt", "preset"):
        if key not in stored:
            why = f"it has no {key!r}"
            raise BadInputFile("damaged metadata", which=picture, why=why, hint=OTHER_PICTURE)
    try:
        return Order.from_json(stored)
    except UsageError as error:
        why = str(error)
        raise BadInputFile(
            "damaged metadata", which=picture, why=why, hint=OTHER_PICTURE
        ) from error


def _override(made: Order, given: Values) -> Values:
    """Return the settings of a picture, with those that the command line gives on top.

    Where it goes, and how many there are, is never taken from the picture.
    """
    values = made.settings()
    del values["output"], values["count"]
    if "preset" in given:
        return _override_preset(values, made, given)
    folder = config_folder()
    here = presets.read_config(folder) | presets.read_environment()
    values["output"] = here.get("output")
    return presets.overlay(values, given)


def _override_preset(values: dict[str, Any], made: Order, given: Values) -> Values:
    """Return a picture's settings under another preset.

    What the picture's own preset says goes with it; what was said beside that preset, when the
    picture was made, stays.
    """
    own = _read_preset(made.preset)
    values["lora"] = _find_said_loras(values["lora"], loras.make_absolute(own.get("lora", ())))
    del values["preset"]
    if made.request.width:  # the size was said in pixels, so that by ratio is a default
        del values["aspect_ratio"], values["image_size"]
    said = {name: value for name, value in values.items() if name not in own or own[name] != value}
    base = presets.merge({"preset": given["preset"]}, config_folder()).values
    return presets.overlay(presets.overlay(base, said), given)


def _read_preset(name: str) -> Values:
    """What a preset says without the user's variables; nothing if it is gone."""
    try:
        return presets.merge({"preset": name}, config_folder(), {}).values
    except UsageError:
        return {}


def _find_said_loras(stored: Sequence[LoraRef], own: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
    """The adapters that were said beside those of the picture's preset.

    "none", which drops a preset's, comes first where one of the preset's own was dropped.
    """
    said = tuple(ref for ref in stored if ref not in own)
    if set(own) <= set(stored):
        return said
    return (LoraRef(LORA_NONE), *said)


def _find_adapters(order: Order, picture: Path, *, metadata: Metadata, tell: Teller) -> Order:
    """Return the order with the adapters of the picture where they are now.

    One that is not where it was, or has other bytes there, is looked for by its identity: beside
    the picture, here, and in the user's folder. Raises `WeightsUnavailable` for one that is
    nowhere.
    """
    made = _get_group(metadata, "lora")
    refs = []
    for ref in order.request.lora:
        identity = str(made.get(ref.name, "")).partition(" ")[0]
        found = _find_adapter(ref, identity, picture) if identity else ref
        if found.name != ref.name:
            tell.say_moved(f"{Path(ref.name).name} is now {found.name}")
        elif identity and not _is_same(ref.name, identity):
            tell.say_changed(f"{ref.name} is another file than the picture was made with")
        refs.append(found)
    return replace(order, request=replace(order.request, lora=tuple(refs)))


def _compare_networks(order: Order, metadata: Metadata, tell: Teller) -> None:
    """Say which ControlNets are others than those that the picture was made with."""
    made = _get_group(_get_group(metadata, "model"), "parts")
    if not any(name.startswith(CONTROLNET) for name in made):
        return
    for kind in dict.fromkeys(ref.kind for ref in order.request.control):
        with contextlib.suppress(ExplainedError):  # which drawing it will say
            network = inspect_controlnet(controls.locate(kind))
            if network.fingerprint not in made.values():
                what = f"the ControlNet {kind} is not the one that made the picture"
                tell.say_changed(f"{what}: expect another")


def _find_adapter(ref: LoraRef, identity: str, picture: Path) -> LoraRef:
    """Return an adapter of a picture, by the path that the same bytes have now."""
    if _is_same(ref.name, identity):
        return ref
    # Not `Path.cwd`: it may have been deleted.
    moved = loras.find_moved(ref.name, identity, [picture.parent, Path(), lora_folder()])
    if moved:
        return LoraRef(str(moved), ref.scale)
    # Of the hub's files the error that follows says how to get them.
    if loras.find_path(ref.name) or not Path(ref.name).is_absolute():
        return ref
    why = "it is neither there, nor beside the picture, here or among the user's adapters"
    hint = "--lora none --lora PATH"
    raise WeightsUnavailable("an adapter of the picture has moved", ref.name, why=why, hint=hint)


def _find_inputs(picture: Path, metadata: Metadata, *, given: Values, tell: Teller) -> Metadata:
    """Return the request of a picture, with the pictures that it was made from where they are now.

    One that is not where it was, or has other bytes there, is looked for by its hash: beside the
    picture and here under its name, and among those that came from stdin. Raises `BadInputFile` for
    one that is nowhere.
    """
    request = metadata["request"]
    hashes = list_hashes(_get_group(metadata, "inputs"))
    try:
        named = {
            name: coerce(name, request[name], where="metadata")
            for name in PICTURE_SETTINGS
            if name in request
        }
    except UsageError:  # `restore_order` says what is wrong
        return request
    names = list_pictures(named)
    if not hashes or len(hashes) != len(names):
        return request
    replaced = list_pictures({name: value for name, value in named.items() if name in given})
    made = dict(zip(names, hashes, strict=True))

    def find(name: str) -> str:
        if name in replaced:
            return name
        return _find_input(name, made[name], picture=picture, tell=tell)

    found = rename_pictures(named, find)
    return request | {name: to_json_value(value) for name, value in found.items()}


def _find_input(name: str, sha256: str, *, picture: Path, tell: Teller) -> str:
    """Return the path of a picture of that hash, which was called so."""
    path = Path(name)
    if hash_file(path) == sha256:
        return name
    kept = kept_inputs.find(sha256)
    candidates = [picture.parent / path.name, Path(path.name), *([kept] if kept else [])]
    for candidate in candidates:
        if hash_file(candidate) == sha256:
            found = str(candidate.absolute())
            tell.say_moved(f"{path.name} is now {found}")
            return found
    if not path.exists():
        why = "it is neither there, nor beside the picture or here"
        hint = "name it again, with the option that named it: --image FILE"
        raise BadInputFile("an input of the picture has moved", name, why=why, hint=hint)
    tell.say_changed(f"{name} is another picture than then: expect another one")
    return name


def _is_same(name: str, identity: str) -> bool:
    """Whether an adapter's file is there with these bytes."""
    try:
        return compute_identity(loras.locate(name)) == identity
    except (FluxError, OSError):
        return False


# --- --check


def _refuse_inert(given: Values, options: Mapping[str, Any], *, dry_run: bool) -> None:
    """Raise `UsageError` for options that say how to write a picture: --check writes none."""
    inert = [flag(name) for name in FILE_SETTINGS if name in given]
    switches = {
        "--force": options["force"],
        "--json": options["json_output"],
        "--events": options["events"],
        "--show": options["show"],
        "--dry-run": dry_run,
    }
    inert += [name for name, is_on in switches.items() if is_on]
    if inert:
        why = "it writes nothing, it only says whether"
        hint = "leave --check or the others out"
        raise UsageError(f"--check excludes {', '.join(inert)}", why=why, hint=hint)


def _check(picture: Path, order: Order, *, metadata: Metadata, options: Mapping[str, Any]) -> int:
    """Draw the order and say whether its pixels are those of the picture; returns the exit code."""
    expected = metadata.get("pixels_sha256")
    if not isinstance(expected, str):
        why = "it has no pixels_sha256"
        raise BadInputFile("damaged metadata", which=picture, why=why, hint=OTHER_PICTURE)
    found = _draw_and_hash(order, metadata=metadata, options=options)
    is_identical = found == expected
    console.line(f"{picture}: {'identical' if is_identical else 'different'}")
    return ExitCode.OK if is_identical else ExitCode.BUG


def _draw_and_hash(order: Order, *, metadata: Metadata, options: Mapping[str, Any]) -> str:
    """Draw an order here and return the sha256 of its pixels; say what differs from `metadata`."""
    check_torch()
    from fluxcli.engine.engine import Denoised, Drawn
    from fluxcli.engine.preview import Estimated
    from fluxcli.pictures.image import hash_pixels
    from fluxcli.run.saving import make_metadata
    from fluxcli.run.session import Session, draw_pictures

    with (
        Session() as session,
        console.Reporter(quiet=options["quiet"], started=STARTED) as reporter,
    ):
        prepared = reporter.result(session.prepare(order, no_wait=options["no_wait"]))
        engine = session.open_engine(prepared)
        here = make_metadata(engine, order, prepared)
        for line in _list_differences(metadata, here):
            reporter.show(Notice(line))
        picture = prepared.make_picture(order.request)
        for event in draw_pictures(engine, [picture]):
            assert not isinstance(event, Estimated), "nobody watches it"
            if not isinstance(event, Denoised | Drawn):
                reporter.show(event)
        assert picture.pixels is not None
        return hash_pixels(picture.pixels)


def _list_differences(made: Metadata, here: Metadata) -> Iterator[str]:
    """Yield what may change the pixels: another model, device, precision or version than then."""
    for group, sentences in DIFFERENCES.items():
        then = _get_group(made, group)
        for key, sentence in sentences.items():
            before = then.get(key, ABSENT.get(key))
            now = here[group].get(key, ABSENT.get(key))
            if before != now:
                yield sentence.format(then=_name_value(before), here=_name_value(now))
    parts = _get_group(_get_group(made, "model"), "parts")
    for name, fingerprint in here["model"].get("parts", {}).items():
        if parts.get(name) != fingerprint:
            before = _name_value(parts.get(name, "not there"))
            yield f"made with the {name} {before}, here it is {fingerprint}"

    adapters = _get_group(made, "lora")
    for name, identity in here["lora"].items():
        # An adapter is the same wherever it is.
        if identity not in adapters.values():
            before = _name_value(adapters.get(name, "not there"))
            yield f"the adapter {Path(name).name} was {before}, here it is {identity}"

    inputs = _get_group(made, "inputs")
    for name, hashes in here.get("inputs", {}).items():
        if inputs.get(name) != hashes:
            yield f"made from another picture ({name}) than is here"


def _name_value(value: object) -> str:
    """Return a value of the metadata as people say it, which in a stranger's may be anything."""
    if value is None:
        return "something unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = ", ".join(f"{key} {each}" for key, each in value.items())
    return f"{value!s:.{MAX_SAID}}"


def _get_group(metadata: Metadata, name: str) -> dict[str, Any]:
    """A group of a picture's metadata, empty where a stranger wrote something else."""
    found = metadata.get(name)
    return found if isinstance(found, dict) else {}
