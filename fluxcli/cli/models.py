"""`flux models`: list, download, verify and remove."""

import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli.cli import complete, console
from fluxcli.cli.help import App
from fluxcli.cli.show import describe_bytes
from fluxcli.errors import BadInputFile, UsageError, WeightsUnavailable
from fluxcli.models import controls, find, hub, local, loras
from fluxcli.models.address import read_address
from fluxcli.paths import config_folder
from fluxcli.request import presets
from quant.checkpoint import COMPONENTS, is_complete

models_app = App(help="Get, check and remove the weights of models.")
# Where models are from, in words.
KINDS = {"hub": "hub", "mirror": "mirror", "bundled": "flux itself", "baked": "quantize"}
ONLY = f"Parts, e.g. tokenizers or transformer,vae: {' '.join(hub.PARTS)}."

Name = Annotated[
    str,
    typer.Argument(
        help="A preset, a hub id ORG/NAME, or a name of flux models list.",
        show_default=False,
        autocompletion=complete.offer_local_models,
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON array.")]


@models_app.command("list")
def list_command(json_output: Json = False) -> None:
    """List the models that are here: bundled, of the hub, in FLUX_MIRROR, made by quantize."""
    rows = []
    described = []
    for each in local.list_models(also=_list_lora_repositories()):
        size_bytes = local.count_bytes([each])
        described.append(
            {
                "name": each.name,
                "kind": each.kind,
                "path": str(each.path),
                "commit": each.commit,
                "state": each.state,
                "bytes": size_bytes,
            }
        )
        size = describe_bytes(size_bytes)
        rows.append((each.name, KINDS[each.kind], each.commit[:12] or "-", each.state, size))
    if sys.stdout is not None and sys.stdout.isatty():
        rows.insert(0, ("model", "from", "commit", "state", "size"))
    console.table(rows, described, as_json=json_output)


@models_app.command()
def download(
    name: Annotated[
        str,
        typer.Argument(
            help="A preset, a kind of --control, ORG/NAME[:FILE.safetensors], or an address.",
            show_default=False,
            autocompletion=complete.offer_downloads,
        ),
    ],
    only: Annotated[
        str, typer.Option(help=ONLY, metavar="PARTS", autocompletion=complete.offer(*hub.PARTS))
    ] = "",
    mirror: Annotated[
        Optional[Path],
        typer.Option(metavar="FOLDER", help="Plain files below this folder; see FLUX_MIRROR."),
    ] = None,
    revision: Annotated[
        str, typer.Option(metavar="NAME", help="Branch, tag or commit, by default main.")
    ] = "",
    quiet: Quiet = False,
) -> None:
    """Download a model's weights into the hub's cache and check them; dev has 34 GB.

    dev is gated: first accept the licence at huggingface.co/black-forest-labs/FLUX.1-dev, make a
    read token at huggingface.co/settings/tokens, and give it to: hf auth login

    What was downloaded stays when it is interrupted; the file that was under way begins anew.
    Prints the folder or file.
    """
    model = presets.weights_of(read_address(name), config_folder())
    if model == name:
        model = controls.repository_of(name)
    parts = [part.strip() for part in only.split(",") if part.strip()]
    bundled = model.startswith("bundled/")
    if parts and (bundled or ":" in model):
        why = "it takes parts of a model of the hub, ORG/NAME"
        raise UsageError("--only does not apply", which=name, why=why, hint="leave --only out")
    if bundled:
        console.say(f"{name} comes with flux, there is nothing to download")
        path = controls.locate(name) if model.startswith("bundled/control/") else find.locate(model)
    else:
        say = _say_nothing if quiet else console.say
        with console.Reporter(quiet=quiet, started=time.perf_counter()) as reporter:
            path = hub.download(
                model, say, reporter.show_bytes, only=parts, mirror=mirror, revision=revision
            )
    console.data(str(path))


def _say_nothing(_line: str) -> None:
    """In place of `console.say` for --quiet."""


@models_app.command()
def verify(name: Name, quiet: Quiet = False) -> None:
    """Compare every file of a model with the checksum that the hub publishes.

    Damaged: exit 4, partial: exit 3.
    """
    found = _find(name)
    usable = any(each.state == "complete" for each in found)
    for each in found:
        if not quiet:
            console.say(f"{each.name}: reads {local.count_bytes([each]) / 1e9:.2f} GB")
        damaged, known = hub.verify(each)
        if damaged:
            _refuse_damaged(each, damaged)
        by_checksum = f"{known} by checksum" if known else "no checksum is known"
        checked = f"{len(each.files)} files, {by_checksum}"
        if each.state == "partial" and not usable:
            _refuse_partial(each, checked)
        console.line(f"{each.name} {each.commit[:12]} {each.state}: {checked}")


def _refuse_damaged(model: local.LocalModel, damaged: list[str]) -> None:
    why = "; ".join(damaged[:3])
    if len(damaged) > 3:
        why += f"; and {len(damaged) - 3} more"
    hint = "make a new one"
    if model.kind == "hub":
        hint = f"flux models remove {model.name} --yes, then: flux models download {model.name}"
    raise BadInputFile("damaged", model.name, why=why, hint=hint)


def _refuse_partial(model: local.LocalModel, checked: str) -> None:
    what = "configs or tokenizers"
    if is_complete(model.path, ()):
        lacking = [part for part in COMPONENTS if not is_complete(model.path, (part,))]
        what = f"weights of {', '.join(lacking)}"
    hint = f"flux models download {model.name}"
    if model.kind == "mirror":
        hint += f" --mirror {model.path.parents[1]}"
    elif model.kind == "baked":
        hint = "make a new one"
    why = f"{what} are missing; {checked}"
    raise WeightsUnavailable("not whole", which=model.name, why=why, hint=hint)


@models_app.command()
def remove(
    name: Name, yes: Annotated[bool, typer.Option("--yes", help="Without asking.")] = False
) -> None:
    """Delete a model from the hub's cache, every revision of it, or one that quantize made."""
    found = [each for each in _find(name) if each.kind in ("hub", "baked")]
    if not found:
        why = "it comes with flux, or lies in the mirror"
        hint = "flux models list says where it is; delete it there"
        raise UsageError("not removed", which=name, why=why, hint=hint)
    paths = ", ".join(str(each.path) for each in found)
    console.say(f"{paths}: {local.count_bytes(found) / 1e9:.2f} GB will be deleted")
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        hint = f"flux models remove {name} --yes"
        raise UsageError("not removed", which=name, why="nobody can be asked", hint=hint)
    if yes or console.confirm("delete it?"):
        for each in found:
            hub.remove(each)


def _find(name: str) -> list[local.LocalModel]:
    """The models that have exactly this name, else those of the preset, or kind of control."""
    name = read_address(name).partition("@")[0]
    repository = controls.repository_of(name).partition(":")[0]
    for wanted in (name, presets.weights_of(name, config_folder()), repository):
        found = [each for each in local.list_models(also=[wanted]) if each.name == wanted]
        if found:
            return found
    raise WeightsUnavailable("no such model here", which=name, hint="flux models list")


def _list_lora_repositories() -> set[str]:
    """The hub ids whose repositories in the cache hold a LoRA."""
    return {name.partition(":")[0] for name in loras.list_loras() if ":" in name}
