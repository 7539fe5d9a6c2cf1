"""`flux quantize`: a 16-bit model becomes a smaller checkpoint.

It is a folder in diffusers' layout, or one file in that of BFL or ComfyUI. Sizes are in bytes.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import fluxcli
from fluxcli import paths
from fluxcli.cli import complete, console
from fluxcli.cli.ending import explain_early_end
from fluxcli.cli.plan import format_duration
from fluxcli.engine.check import check_torch
from fluxcli.errors import ExitCode, UsageError, WeightsUnavailable
from fluxcli.models import controls, find, loras
from fluxcli.plan.costs import make_workload
from fluxcli.plan.planner import choose_bake
from fluxcli.request import presets
from fluxcli.request.controls import find_kind
from fluxcli.request.settings import LoraRef, coerce
from fluxcli.resolve import resolve_order
from quant.checkpoint import (
    MANIFEST,
    Checkpoint,
    Component,
    check_components,
    find_kind_of,
    inspect,
)
from quant.config import read_json
from quant.controlnet import inspect_controlnet, is_controlnet
from quant.gguf_header import is_gguf
from quant.kinds import CONTROLNET
from quant.lora import Adapter
from quant.placing import FOLDER_LAYOUT, check_place, describe_path, remove_remains
from quant.recipe import (
    FILE_SCHEMES,
    LAYOUTS,
    Recipe,
    check_disk,
    make_controlnet_recipe,
    make_file_recipe,
    make_recipe,
)
from quant.single_file import assemble_checkpoint, inspect_file, inspect_transformer
from quant.spec import BAKEABLE, SCHEMES, QuantSpec, is_modulation

GB = 1e9
SAID_S = 20  # a bake that takes less is not announced
SCHEMES_HELP = "; ".join(f"{name}: {SCHEMES[name].words}" for name in BAKEABLE) + "."


@dataclass(frozen=True)
class Source:
    """A model or a ControlNet to quantize: what it is called, where it lies, its parts."""

    name: str
    path: Path
    part: Component  # the transformer, or the ControlNet
    checkpoint: Checkpoint | None  # None where that part alone is wanted

    @property
    def is_controlnet(self) -> bool:
        """Whether it is a ControlNet, and no model."""
        return self.part.name == CONTROLNET

    @property
    def components(self) -> Mapping[str, Component]:
        """The parts that are read."""
        if self.checkpoint:
            return self.checkpoint.components
        return {self.part.name: self.part}

    @property
    def kind(self) -> str:
        """Which kind of FLUX.1 it is, or "controlnet"."""
        if self.is_controlnet:
            return CONTROLNET
        return self.checkpoint.kind if self.checkpoint else find_kind_of(self.part).kind


def quantize(  # noqa: PLR0917 - typer's options
    source: Annotated[
        str,
        typer.Argument(
            help="Preset, kind of --control, folder, hub id or file.",
            show_default=False,
            autocompletion=complete.offer_sources,
        ),
    ],
    target: Annotated[
        Optional[str], typer.Argument(help="Folder, or .safetensors file.", show_default=False)
    ] = None,
    to: Annotated[
        Optional[str],
        typer.Option(
            "--to",
            help=f"{SCHEMES_HELP} Without it: what a plan for this machine's device takes.",
            show_default=False,
            metavar="SCHEME",
            autocompletion=complete.offer(*BAKEABLE),
        ),
    ] = None,
    text_encoder: Annotated[
        Optional[str],
        typer.Option(
            help="T5: nf4, fp8, int8, keep; nf4 with nf4, keep with fp8, else int8.",
            metavar="SCHEME",
            autocompletion=complete.offer("nf4", "fp8", "int8", "keep"),
        ),
    ] = None,
    modulation: Annotated[
        str,
        typer.Option(
            help="keep, nf4 (with nf4) or fp8 (with fp8).",
            metavar="SCHEME",
            autocompletion=complete.offer("keep", "nf4", "fp8"),
        ),
    ] = "keep",
    scales: Annotated[
        str,
        typer.Option(
            help="nf4's: search (least error) or absmax.",
            metavar="NAME",
            autocompletion=complete.offer("search", "absmax"),
        ),
    ] = "search",
    keep: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME", help="Tensors or layers left in 16 bit; repeatable."),
    ] = None,
    lora: Annotated[
        Optional[list[str]],
        typer.Option(
            "--lora",
            help="PATH[:SCALE] to merge; repeatable.",
            metavar="FILE[:SCALE]",
            autocompletion=complete.offer_loras,
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="diffusers; or one file: comfy, not of nf4, or bfl, of fp8.",
            metavar="NAME",
            autocompletion=complete.offer(*LAYOUTS),
        ),
    ] = FOLDER_LAYOUT,
    device: Annotated[
        str,
        typer.Option(
            help="Where to compute: cpu or cuda[:n].",
            metavar="NAME",
            autocompletion=complete.offer("cpu", "cuda"),
        ),
    ] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, in bytes, and stop.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not read the result back.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Tracebacks and library warnings.")
    ] = False,
) -> int:
    """Make a quantized checkpoint once, instead of quantizing at every start."""
    _check_layout(layout)
    make_spec = partial(
        _make_spec,
        layout=layout,
        text_encoder=text_encoder,
        modulation=modulation,
        scales=scales,
        keep=tuple(keep or ()),
    )
    if to:  # what cannot be asked for is said before the model is looked for
        make_spec(to)
    found = _find_source(source, layout=layout)
    if found.is_controlnet:
        _check_options_of_controlnet(layout, text_encoder=text_encoder, lora=lora, to=to)
        make_spec = partial(make_spec, text_encoder="keep")
    spec = make_spec(to or _choose_scheme(source, found, layout=layout))
    refs = loras.make_absolute(LoraRef.parse(text) for text in lora or ())
    adapters = loras.resolve_loras(refs, found.components)
    for line in loras.describe_unmatched(adapters):
        console.say(line)
    make = partial(_make_recipe, found, adapters=adapters, layout=layout)
    recipe = make(spec)
    name = _name_result(found, adapters)
    path = _choose_target(target, name, recipe=recipe, source=found.path)
    if not dry_run:
        for folder in remove_remains(path):
            console.say(f"left beside it: {folder}; delete it if no other flux quantize runs")
    check_place(path, layout, force=force)
    if not quiet:
        _say_choices(recipe, make, what="ControlNet" if found.is_controlnet else "transformer")
        _say_time(recipe)
    if dry_run:
        check_disk(recipe, path)
        _show_plan(recipe, path, as_json=json_output)
        return ExitCode.OK
    origin = {"model": name, "kind": found.kind, "flux": fluxcli.__version__}
    verify = not no_verify
    with explain_early_end(_Placed(path), quiet=quiet):
        seconds = _bake(
            recipe, path, origin=origin, device=device, verify=verify, force=force, quiet=quiet
        )
    arrivals = _read_arrivals(path, layout)
    if not quiet:
        _say_arrivals(arrivals)
    if json_output:
        about = {"seconds": round(seconds, 2), "verified": verify}
        merged = {"lora": arrivals} if arrivals else {}
        console.data_json(_describe(recipe, path) | about | merged)
    else:
        console.data(str(path))
    return ExitCode.OK


# --- what is wanted


def _check_layout(layout: str) -> None:
    """Raise `UsageError` for a layout that is none."""
    if layout not in LAYOUTS:
        why = f"known are {', '.join(LAYOUTS)}"
        raise UsageError("unknown layout", which=layout, why=why, hint="--layout comfy")


def _check_options_of_controlnet(
    layout: str, *, text_encoder: str | None, lora: Sequence[str] | None, to: str | None
) -> None:
    """Raise `UsageError` for what a ControlNet has none of, and where no scheme is named."""
    which = ""
    if layout != FOLDER_LAYOUT:
        which = f"--layout {layout}"
    elif text_encoder not in (None, "keep"):
        which = f"--text-encoder {text_encoder}"
    elif lora:
        which = f"--lora {lora[0]}"
    if which:
        why = "a ControlNet becomes a folder of its own, without encoders and adapters"
        raise UsageError("not of a ControlNet", which=which, why=why, hint="leave it out")
    if not to:
        why = "nothing is planned for a ControlNet by itself"
        hint = "--to int8, or what its model has"
        raise UsageError("--to is missing", why=why, hint=hint)


def _make_spec(to: str, *, layout: str, text_encoder: str | None, **choices: Any) -> QuantSpec:
    """The schemes of the transformer and T5, and `QuantSpec`'s other choices.

    Raises `UsageError` for T5 in a file without it.
    """
    if layout != FOLDER_LAYOUT:
        if text_encoder not in (None, "keep"):
            hint = "leave --text-encoder out"
            raise UsageError("the file has no T5", which=f"--layout {layout}", hint=hint)
        return QuantSpec(to, **choices)
    if text_encoder is None:
        # QuantSpec refuses a `to` that is no scheme.
        text_encoder = SCHEMES[to].text_encoder if to in SCHEMES else "keep"
    return QuantSpec(to, text_encoder, **choices)


def _find_source(named: str, *, layout: str) -> Source:
    """The model of a preset, folder, hub id or file, with what the layout needs of it."""
    model = presets.model_of(named, paths.config_folder())
    if model == named and find_kind(named, paths.config_folder()):
        model = controls.repository_of(named)
        path = controls.locate(named)
    else:
        path = find.locate(model)
    name = str(path) if find.find_path(model) else model
    is_whole = layout == FOLDER_LAYOUT
    if is_controlnet(path):
        return Source(name, path, inspect_controlnet(path), checkpoint=None)
    if path.is_dir():
        checkpoint = inspect(path)
        transformer = checkpoint.components["transformer"]
        return Source(name, path, transformer, checkpoint=checkpoint if is_whole else None)
    if is_whole and len(inspect_file(path)) > 1:
        why = "its own encoders and VAE would be lost"
        hint = "the model's folder"
        raise UsageError("an all-in-one file is no source", which=path, why=why, hint=hint)
    transformer = inspect_transformer(path)
    if is_gguf(path):
        raise UsageError("GGUF is no source", which=path, hint="quantize the 16-bit model")
    if not is_whole:
        return Source(name, path, transformer, checkpoint=None)
    return Source(name, path, transformer, checkpoint=_add_other_parts(transformer, path))


def _choose_scheme(named: str, source: Source, *, layout: str) -> str:
    """The scheme that a plan for this machine takes, which is said with the reason.

    `named` is the source as it was given. Raises `UsageError` where that is no scheme, and where
    nothing can be planned.
    """
    if layout == "bfl":
        return FILE_SCHEMES[layout][0]
    checkpoint = source.checkpoint
    if checkpoint is None and source.path.is_dir():
        checkpoint = inspect(source.path)
    if checkpoint is None:
        why = "a single file has no text encoders to plan with"
        raise UsageError("--to is missing", which=named, why=why, hint="--to int8")
    check_components(checkpoint.components)
    check_torch()
    from fluxcli.engine import device as devices

    is_preset = presets.model_of(named, paths.config_folder()) != named
    order = resolve_order("a plan", {"preset" if is_preset else "model": named})
    hardware = devices.probe(order.resources.device)
    workload = make_workload(order.request)
    candidate = choose_bake(workload, order.resources, checkpoint, hardware=hardware)
    if candidate.precision not in BAKEABLE:
        why = f"{hardware.name} takes {candidate.precision}, {candidate.why}"
        raise UsageError("no scheme is chosen by itself", which=named, why=why, hint="--to int8")
    console.say(f"--to {candidate.precision}, as {hardware.name} would take it: {candidate.why}")
    return candidate.precision


def _add_other_parts(transformer: Component, path: Path) -> Checkpoint:
    """A lone transformer with the text encoders and VAE of the model that it is a variant of."""
    preset = "dev" if transformer.config["guidance_embeds"] else "schnell"
    model = str(presets.load(preset, paths.config_folder(), bundled=True).settings["model"])
    try:
        return assemble_checkpoint(path, lambda lacking: find.locate(model, components=lacking))
    except WeightsUnavailable as error:
        why = f"a single file has no encoders and VAE, and {model} is not here"
        parts = "tokenizers,text_encoder,text_encoder_2,vae"
        hint = f"flux models download {preset} --only {parts}; or --layout bfl"
        raise WeightsUnavailable("not a whole model", which=path, why=why, hint=hint) from error


def _make_recipe(
    source: Source, spec: QuantSpec, *, adapters: tuple[Adapter, ...], layout: str
) -> Recipe:
    if source.is_controlnet:
        return make_controlnet_recipe(source.part, spec)
    if source.checkpoint:
        return make_recipe(source.checkpoint, spec, adapters=adapters)
    return make_file_recipe(source.part, spec, kind=layout, adapters=adapters)


# --- where it goes


def _name_result(source: Source, adapters: Sequence[Adapter]) -> str:
    """The name of the model that is made: with adapters it is no variant of the plain one."""
    if not adapters:
        return source.name
    stems = [adapter.path.stem for adapter in adapters]
    return "+".join([source.name.removesuffix(".safetensors"), *stems])


def _choose_target(given: str | None, name: str, *, recipe: Recipe, source: Path) -> Path:
    """Where the result goes, by default into the user's model folder.

    Raises `UsageError` for a place in, at or around the source or the hub's cache.
    """
    is_file = recipe.layout != FOLDER_LAYOUT
    if given is None:
        file_name = f"{Path(name).name.removesuffix('.safetensors')}-{recipe.spec.to}"
        if recipe.spec.modulation != "keep":
            file_name += "-small"
        if is_file:
            file_name += f"-{recipe.layout}.safetensors"
        path = paths.baked_folder() / file_name
    else:
        path = Path(given).expanduser().absolute()
    if is_file and path.suffix != ".safetensors":
        why = f"--layout {recipe.layout} writes one .safetensors file"
        hint = f"{path.name or 'x'}.safetensors"
        raise UsageError("not a file name", which=given, why=why, hint=hint)
    real = path.resolve()
    places = {"the source": source.resolve(), "the hub's cache": paths.hub_cache_folder().resolve()}
    for what, place in places.items():
        if real == place or place in real.parents or real in place.parents:
            why = f"it is, or lies inside, or holds {what}"
            hint = "another DST, or none"
            raise UsageError("DST cannot be there", which=path, why=why, hint=hint)
    return path


# --- doing and saying


class _Placed:
    """Whether a checkpoint has got its name: what is there is another file or folder than before.

    A bake writes beside it, so that all is lost up to then.
    """

    has_begun = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        if not os.path.lexists(self._path):
            return None
        status = self._path.lstat()
        return status.st_dev, status.st_ino

    def describe(self) -> str:
        """Return that nothing was written; "" where it is."""
        if self._identify() != self._before:
            return ""
        return f"nothing was written to {self._path}; the same command starts again"


def _bake(
    recipe: Recipe,
    path: Path,
    *,
    origin: Mapping[str, Any],
    device: str,
    verify: bool,
    force: bool,
    quiet: bool,
) -> float:
    """Write the checkpoint; returns the seconds it took."""
    check_torch()
    from fluxcli.engine import device as devices
    from quant.bake import bake

    # Raises for one that is not there.
    device = devices.probe(coerce("device", device, where="--device")).device
    steps = bake(recipe, path, origin=origin, device=device, verify=verify, force=force)
    # Closed here, however this ends: the staging folder is deleted when the steps are.
    with (
        closing(steps),
        console.Reporter(quiet=quiet, started=time.perf_counter()) as reporter,
    ):
        for progress in steps:
            what = f"quantize {progress.tensor}"
            reporter.show_bytes(progress.done_bytes, progress.total_bytes, what)
    seconds = reporter.timings_s["total"]
    if not quiet:
        size = progress.total_bytes / GB
        console.say(f"{size:.2f} GB in {seconds:.0f} s, {size / seconds:.2f} GB/s")
    return seconds


def _say_choices(recipe: Recipe, make: Callable[[QuantSpec], Recipe], *, what: str) -> None:
    """Say the size of the transformer (`what`), or of the ControlNet, for each --modulation.

    And the seconds of the condition phase.
    """
    from fluxcli.engine.cards import read_cards

    speed = read_cards().disk_bytes
    changed_bytes = recipe.changed_bytes
    if changed_bytes:
        console.say(
            f"--lora: {changed_bytes / GB:.2f} GB of layers are quantized once more, "
            "to measure how much of their change arrives"
        )
    choices = ["keep"]
    if SCHEMES[recipe.spec.to].can_bake_modulation:
        choices.append(recipe.spec.to)
    for choice in choices:
        size_bytes = 0
        modulation_bytes = 0
        for tensor in make(replace(recipe.spec, modulation=choice)).tensors:
            if "text_encoder" in tensor.file:
                continue
            tensor_bytes = sum(info.nbytes for info in tensor.stored)
            size_bytes += tensor_bytes
            if is_modulation(tensor.sources[0].name):
                modulation_bytes += tensor_bytes
        chosen = " (chosen)" if choice == recipe.spec.modulation else ""
        console.say(
            f"--modulation {choice}{chosen}: {what} {size_bytes / GB:.2f} GB; "
            f"each new prompt reads {modulation_bytes / GB:.2f} GB of it, "
            f"{modulation_bytes / speed:.1f} s at {speed / GB:.0f} GB/s"
        )


def _say_time(recipe: Recipe) -> None:
    """Say how long the bake takes, where that is worth a word."""
    if recipe.bake_s >= SAID_S:
        console.say(f"about {format_duration(recipe.bake_s)} on two CPU cores")


def _read_arrivals(path: Path, layout: str) -> list[dict[str, Any]]:
    """How much of each adapter arrived in a new checkpoint, by its manifest."""
    described = path / MANIFEST if layout == FOLDER_LAYOUT else describe_path(path)
    found: list[dict[str, Any]] = read_json(described, "no manifest").get("lora", [])
    return found


def _say_arrivals(arrivals: Sequence[Mapping[str, Any]]) -> None:
    """Say how much of each adapter arrived, and warn where it is lost among the rounding."""
    for arrival in arrivals:
        name = Path(arrival["path"]).name
        if arrival["noise"] is None:
            console.say(f"{name}: it changes nothing")
            continue
        console.say(
            f"{name}: {arrival['projection']:z.1%} of its change arrived, "
            f"rounding beside it is {arrival['noise']:.2f} times as large"
        )
        if arrival["noise"] >= 1:
            drowned = [layer for layer, noise in arrival["worst_layers"].items() if noise >= 1]
            more = arrival["drowned_layers"] - len(drowned)
            named = ", ".join(drowned) + (f" and {more} more" if more else "")
            console.say(
                f"warning: {name} drowns in rounding ({named}); "
                f"apply it to the picture instead: flux generate --lora {arrival['path']}"
            )


def _show_plan(recipe: Recipe, path: Path, *, as_json: bool) -> None:
    """Say what would be written, by file."""
    about = _describe(recipe, path)
    if as_json:
        console.data_json(about)
        return
    for file, size_bytes in about["bytes"].items():
        console.line(f"{size_bytes:>14,} {file}")
    copied = f"{len(recipe.copies)} files of {recipe.copied_bytes:,} bytes are copied"
    console.line(f"{about['total_bytes']:>14,} bytes to write to {path}; {copied}")


def _describe(recipe: Recipe, path: Path) -> dict[str, Any]:
    """What the recipe makes, as --json has it."""
    quantized = {tensor.name: tensor.scheme for tensor in recipe.tensors if tensor.scheme}
    matrices = [tensor for tensor in recipe.tensors if len(tensor.info.shape) == 2]
    return {
        "path": str(path),
        "bytes": {file or path.name: size_bytes for file, size_bytes in recipe.sizes.items()},
        "total_bytes": sum(recipe.sizes.values()),
        "recipe": recipe.spec.to_json(),
        "layout": recipe.layout,
        "packed": quantized,
        "kept": [tensor.name for tensor in matrices if not tensor.scheme],
    }
