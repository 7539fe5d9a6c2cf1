"""`flux models`: list, download, verify and remove."""

import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli.cli import console
from fluxcli.errors import BadInputFile, UsageError, WeightsUnavailable
from fluxcli.models import find as models
from fluxcli.models import hub
from fluxcli.paths import config_folder
from fluxcli.request import presets
from quant.checkpoint import COMPONENTS, is_complete

models_app = typer.Typer(help="Get, check and remove the weights of models.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A preset, a hub id ORG/NAME, or a name of flux models list.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]


@models_app.command("list")
def list_command(json_output: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False) -> None:
    """List the models that are here: bundled, in the hub's cache, in FLUX_MIRROR, and made by quantize."""
    rows = [vars(each) | {"path": str(each.path), "state": each.state, "bytes": hub.nbytes([each])}
            for each in hub.listing()]  # fmt: skip
    if json_output:
        console.data_json(rows)
    for row in [] if json_output else rows:
        size = f"{row['bytes'] / 1e9:>7.2f} GB"
        line = f"{row['name']:<36} {row['kind']:<8} {row['commit'][:12]:<12} {row['state']:<8} {size}"
        console.data(console.CONTROL.sub("?", line))


@models_app.command()
def download(
    name: Annotated[str, typer.Argument(help="A preset, ORG/NAME, or ORG/NAME:FILE.safetensors.", show_default=False)],
    only: Annotated[str, typer.Option(help=f"Parts, e.g. tokenizers or transformer,vae: {' '.join(hub.PARTS)}.")] = "",
    mirror: Annotated[Optional[Path], typer.Option(help="Plain files below this folder; see FLUX_MIRROR.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    quiet: Quiet = False,
) -> None:
    """Download a model's weights into the hub's cache (34 GB for dev) and check them; prints the folder or file."""
    model = presets.model_of(name, config_folder())
    parts, bundled = [part.strip() for part in only.split(",") if part.strip()], model.startswith("bundled/")
    if parts and (bundled or ":" in model):
        raise UsageError("--only does not apply", which=name, why="it takes parts of a model of the hub, ORG/NAME")
    if bundled:
        console.say(f"{name} comes with flux, there is nothing to download")
    options = {"only": parts, "folder": mirror, "revision": revision}
    with console.Reporter(quiet=quiet, started=time.perf_counter()) as reporter:
        say = (lambda _: None) if quiet else console.say
        path = models.locate(model) if bundled else hub.download(model, say, reporter.show_bytes, **options)
    console.data(str(path))


@models_app.command()
def verify(name: Name, quiet: Quiet = False) -> None:
    """Compare every file of a model with its published checksum; needs no network. Damaged: exit 4, partial: exit 3."""
    found = _found(name)
    usable = any(each.state == "complete" for each in found)
    for each in found:
        with console.Reporter(quiet=quiet, started=time.perf_counter()) as reporter:
            damaged, known = hub.verify(each, reporter.show_bytes)
        if damaged:
            why = "; ".join(damaged[:3]) + f"; and {len(damaged) - 3} more" * (len(damaged) > 3)
            hint = f"flux models remove {each.name} --yes, then: flux models download {each.name}"
            raise BadInputFile("damaged", each.name, why=why, hint=hint if each.kind == "hub" else "make a new one")
        checked = f"{len(each.files)} files, " + (f"{known} by checksum" if known else "no checksum is known")
        if each.state == "partial" and not usable:
            lacking = [part for part in COMPONENTS if not is_complete(each.path, (part,))]
            what = f"weights of {', '.join(lacking)}" if is_complete(each.path, ()) else "configs or tokenizers"
            hint = f"flux models download {each.name}" + f" --mirror {each.path.parents[1]}" * (each.kind == "mirror")
            hint = "make a new one" if each.kind == "baked" else hint
            raise WeightsUnavailable("not whole", which=each.name, why=f"{what} are missing; {checked}", hint=hint)
        console.data(f"{each.name} {each.commit[:12]} {each.state}: {checked}")


@models_app.command()
def remove(name: Name, yes: Annotated[bool, typer.Option("--yes", help="Without asking.")] = False) -> None:
    """Delete a model from the hub's cache, every revision of it, or one that quantize made."""
    found = [each for each in _found(name) if each.kind in ("hub", "baked")]
    if not found:
        raise UsageError("not removed", which=name, why="it comes with flux, or lies in the mirror")
    console.say(f"{', '.join(str(each.path) for each in found)}: {hub.nbytes(found) / 1e9:.2f} GB will be deleted")
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise UsageError("not removed", which=name, why="nobody can be asked", hint=f"flux models remove {name} --yes")
    for each in found if yes or console.confirmed("delete it?") else ():
        hub.remove(each)


def _found(name: str) -> list[hub.Here]:
    """What has exactly this name, else the model of the preset."""
    for wanted in (name, presets.model_of(name, config_folder())):
        if found := [each for each in hub.listing(wanted) if each.name == wanted]:
            return found
    raise WeightsUnavailable("no such model here", which=name, hint="flux models list")
