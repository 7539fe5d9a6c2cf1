"""`flux lora`: list adapters, and say what one is."""

from typing import Annotated

import typer

from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.models import loras as lora
from fluxcli.request.settings import LoraRef

lora_app = typer.Typer(help="List LoRA files, and say what one is.", no_args_is_help=True)


@lora_app.command("list")
def list_command(json_output: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False) -> None:
    """List the LoRA files of the user's folder and of the hub's cache, by what --lora takes."""
    rows = [{"name": name, **lora.describe(path)} for name, path in lora.listing().items()]
    if json_output:
        console.data_json(rows)
    for row in [] if json_output else rows:
        what = f"{row['format']}, rank {row['rank']}" if "format" in row else row["problems"][0]
        line = f"{row['name']:<56} {row['bytes'] / 1e6:>8.1f} MB  {what}"
        console.data(console.CONTROL.sub("?", line))  # a file may hold a terminal's escapes; --json has them all
    if not rows:
        console.say(f"none in {lora.folder()}, none in the hub's cache: flux models download ORG/NAME:FILE")


@lora_app.command()
def info(name: Annotated[str, typer.Argument(help="What --lora takes.", show_default=False)]) -> int:
    """Say as JSON what a LoRA is: format, rank, alpha, layers, base model (exit 4: unusable)."""
    described = lora.describe(lora.locate(LoraRef.parse(name).name))
    console.data_json(described, indent=2)
    return ExitCode.INPUT_FILE if described["problems"] else ExitCode.OK
