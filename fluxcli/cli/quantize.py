"""`flux quantize`: a 16-bit model becomes an nf4, fp8 or int8 checkpoint."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

import fluxcli
from fluxcli import paths
from fluxcli.cli import console
from fluxcli.engine import device as hardware
from fluxcli.engine.cards import read_cards
from fluxcli.errors import ExitCode, UsageError, WeightsUnavailable
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from fluxcli.paths import config_folder
from fluxcli.request import presets
from fluxcli.request.settings import LoraRef, coerce
from quant.checkpoint import MANIFEST, Checkpoint, Component, inspect
from quant.errors import WriteError
from quant.gguf_header import is_gguf
from quant.recipe import LAYOUTS, Recipe, check_disk, make_file_recipe, make_recipe
from quant.single_file import assemble_checkpoint, inspect_file, inspect_transformer
from quant.spec import SCHEMES, QuantSpec, is_modulation

GB = 1e9


def quantize(  # noqa: PLR0917 - typer's options
    source: Annotated[str, typer.Argument(help="Preset, model folder, hub id or BFL file.", show_default=False)],
    target: Annotated[Optional[str], typer.Argument(help="Folder, or .safetensors file.", show_default=False)] = None,
    to: Annotated[str, typer.Option("--to", help="nf4, fp8 or int8.", show_default=False)] = ...,
    text_encoder: Annotated[Optional[str], typer.Option(help="T5: nf4, fp8, keep; nf4 with nf4, else keep.")] = None,
    modulation: Annotated[str, typer.Option(help="keep, nf4 (with nf4) or fp8 (with fp8).")] = "keep",
    scales: Annotated[str, typer.Option(help="nf4's: search (least error) or absmax.")] = "search",
    keep: Annotated[Optional[list[str]], typer.Option(help="Tensors or layers left in 16 bit; repeatable.")] = None,
    loras: Annotated[Optional[list[str]], typer.Option("--lora", help="PATH[:SCALE] to merge; repeatable.")] = None,
    kind: Annotated[str, typer.Option("--layout", help="diffusers, or for fp8 bfl or comfy: one file.")] = "diffusers",
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda[:n].")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, in bytes, and stop.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the result back.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and library warnings.")] = False,
) -> int:
    """Make a quantized checkpoint once, instead of quantizing at every start."""
    if kind not in LAYOUTS:
        raise UsageError("unknown layout", which=kind, why=f"known are {', '.join(LAYOUTS)}", hint="--layout bfl")
    whole = kind == "diffusers"
    if not whole and text_encoder not in (None, "keep"):
        raise UsageError("the file has no T5", which=f"--layout {kind}", hint="leave --text-encoder out")
    if text_encoder is None:
        text_encoder = "keep"
        if whole and to in SCHEMES:
            text_encoder = SCHEMES[to].text_encoder
    spec = QuantSpec(to, text_encoder, modulation, scales, tuple(keep or ()))
    model, parts, folder = _find(source, whole=whole)
    adapters = lora.resolve_loras(
        lora.make_absolute([LoraRef.parse(text) for text in loras or ()]),
        parts.components if whole else {"transformer": parts},
    )
    make = partial(make_recipe, parts) if whole else partial(make_file_recipe, parts, kind=kind)
    recipe = (make := partial(make, adapters=adapters))(spec)
    for said in lora.describe_unmatched(adapters):
        console.say(said)
    if adapters:  # another name: it is no variant of the plain model
        model = "+".join((model.removesuffix(".safetensors"), *(each.path.stem for each in adapters)))
    path = _target(target, model, spec, kind=kind, source=folder, force=force)
    if not quiet:
        _say_choices(recipe, make)
    if dry_run:
        check_disk(recipe, path)
        return _show(recipe, path, {}, json_output=json_output)
    from quant.bake import bake

    hardware.check_torch()
    device = hardware.probe(coerce("device", device, where="--device")).device  # raises for one that is not there
    merged = [{"path": str(a.path), "scale": a.scale, "sha256": hashlib.sha256(a.path.read_bytes()).hexdigest()}
              for a in adapters]  # fmt: skip
    origin = {"model": model, "flux": fluxcli.__version__} | ({"lora": merged} if merged else {})
    with console.Reporter(quiet=quiet, started=time.perf_counter()) as reporter:
        for progress in bake(recipe, path, origin=origin, device=device, verify=not no_verify):
            reporter.show_bytes(progress.done, progress.total, f"quantize {progress.tensor}")
    seconds, size = reporter.timings_s["total"], progress.total / GB
    if not quiet:
        console.say(f"{size:.2f} GB in {seconds:.0f} s, {size / seconds:.2f} GB/s")
    return _show(recipe, path, {"seconds": round(seconds, 2), "verified": not no_verify}, json_output=json_output)


def _find(source: str, *, whole: bool) -> tuple[str, Checkpoint | Component, Path]:
    """(the model's name, the folder's parts or the transformer alone, where it lies)."""
    model = presets.model_of(source, config_folder())
    path = models.locate(model)
    name = str(path) if models.find_path(model) else model
    if path.is_dir():
        checkpoint = inspect(path)
        return name, checkpoint if whole else checkpoint.components["transformer"], path
    if whole and len(inspect_file(path)) > 1:
        why = "its own encoders and VAE would be lost"
        raise UsageError("an all-in-one file is no source", which=path, why=why, hint="the model's folder")
    transformer = inspect_transformer(path)
    if is_gguf(path):
        raise UsageError("GGUF is no source", which=path, hint="quantize the 16-bit model")
    return name, _with_parts_of_preset(transformer, path) if whole else transformer, path


def _with_parts_of_preset(transformer: Component, path: Path) -> Checkpoint:
    """A lone transformer with the encoders and VAE of the model that it is a variant of."""
    name = "dev" if transformer.config["guidance_embeds"] else "schnell"
    model = str(presets.load(name, config_folder(), bundled=True).settings["model"])
    try:
        return assemble_checkpoint(path, lambda lacking: models.locate(model, components=lacking))
    except WeightsUnavailable as error:
        why = f"a single file has no encoders and VAE, and {model} is not here"
        hint = f"flux models download {name} --only tokenizers,text_encoder,text_encoder_2,vae; or --layout bfl"
        raise WeightsUnavailable("not a whole model", which=path, why=why, hint=hint) from error


def _target(given: str | None, model: str, spec: QuantSpec, *, kind: str, source: Path, force: bool) -> Path:
    """Where the result goes, by default the user's model folder; raises for what is there and must not be replaced."""
    whole = kind == "diffusers"
    name = f"{Path(model).name.removesuffix('.safetensors')}-{spec.to}" + "-small" * (spec.modulation != "keep")
    automatic = paths.baked_folder() / (name if whole else f"{name}-{kind}.safetensors")
    path = automatic if given is None else Path(given).expanduser().absolute()
    if not whole and path.suffix != ".safetensors":
        why = f"--layout {kind} writes one .safetensors file"
        raise UsageError("not a file name", which=given, why=why, hint=f"{path.name or 'x'}.safetensors")
    real, origin, cache = path.resolve(), source.resolve(), paths.hub_cache_folder().resolve()
    for other, what in ((origin, "the source"), (cache, "the hub's cache")):
        if real == other or other in real.parents or real in origin.parents:
            why = f"it is, or lies inside, or holds {what}"
            raise UsageError("DST cannot be there", which=path, why=why, hint="another DST, or none")
    if not os.path.lexists(path):
        return path
    made = (path / MANIFEST if whole else Path(f"{path}.json")).is_file()
    if not made and not (whole and path.is_dir() and not any(path.iterdir())):
        raise WriteError("not replaced", which=path, why="flux quantize did not make it", hint="another DST, or none")
    if not force:
        raise WriteError("the destination exists", which=path, hint="--force replaces it")
    return path


def _say_choices(recipe: Recipe, make: Callable[[QuantSpec], Recipe]) -> None:
    """Size of the transformer and seconds of the condition pass for each --modulation."""
    speed = read_cards().disk_bytes
    for choice in ("keep",) if recipe.spec.to == "int8" else ("keep", recipe.spec.to):
        tensors = make(replace(recipe.spec, modulation=choice)).tensors
        size, read = {}, 0
        for tensor in tensors:
            if "text_encoder" not in tensor.file:
                size[tensor.name] = sum(info.nbytes for info in tensor.stored)
                if is_modulation(tensor.sources[0].name):
                    read += size[tensor.name]
        chosen = " (chosen)" if choice == recipe.spec.modulation else ""
        reads = f"each new prompt reads {read / GB:.2f} GB of it, {read / speed:.1f} s at {speed / GB:.0f} GB/s"
        console.say(f"--modulation {choice}{chosen}: transformer {sum(size.values()) / GB:.2f} GB; {reads}")


def _show(recipe: Recipe, path: Path, more: dict, *, json_output: bool) -> int:
    sizes, total = {file or path.name: size for file, size in recipe.sizes.items()}, sum(recipe.sizes.values())
    if json_output:
        kept = [tensor.name for tensor in recipe.tensors if not tensor.scheme and len(tensor.info.shape) == 2]
        packed = {tensor.name: tensor.scheme for tensor in recipe.tensors if tensor.scheme}
        made = {"recipe": recipe.spec.to_json(), "layout": recipe.layout, "packed": packed, "kept": kept}
        console.data_json({"path": str(path), "bytes": sizes, "total_bytes": total} | made | more)
    elif more:
        console.data(str(path))
    else:
        for file, size in sizes.items():
            console.data(f"{size:>14,} {file}")
        console.data(f"{total:>14,} bytes to write to {path}; {len(recipe.links)} files linked or copied")
    return ExitCode.OK
