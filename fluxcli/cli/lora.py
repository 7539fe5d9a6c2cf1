"""`flux lora`: list adapters, and say what one is."""

from typing import Annotated

import typer

from fluxcli import paths
from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.models import loras as lora
from fluxcli.request.settings import LoraRef

lora_app = typer.Typer(help="List LoRA files, and say what one is.", no_args_is_help=True)


@lora_app.command("list")
def list_command(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List the LoRA files of the user's folder and of the hub's cache, by what --lora takes."""
    rows = []
    described = []
    for name, path in lora.list_loras().items():
        about = {"name": name, **lora.describe(path)}
        described.append(about)
        what = (
            about["problems"][0]
            if about["problems"]
            else f"{about['format']}, rank {about['rank']}"
        )
        rows.append((name, f"{about['bytes'] / 1e6:>8.1f} MB", what))
    console.table(rows, described, as_json=json_output)
    if not rows:
        console.say(
            f"none in {paths.lora_folder()}, none in the hub's cache: flux models download ORG/NAME:FILE"
        )


@lora_app.command()
def info(
    name: Annotated[str, typer.Argument(help="What --lora takes.", show_default=False)],
) -> int:
    """Say as JSON what a LoRA is: format, rank, alpha, layers, base model (exit 4: unusable)."""
    described = lora.describe(lora.locate(LoraRef.parse(name).name))
    console.data_json(described, indent=2)
    return ExitCode.INPUT_FILE if described["problems"] else ExitCode.OK
