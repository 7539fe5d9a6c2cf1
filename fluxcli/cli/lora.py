"""`flux lora`: list adapters, and say what one is."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fluxcli.cli import complete, console, show
from fluxcli.cli.help import App
from fluxcli.errors import ExitCode
from fluxcli.models import loras
from fluxcli.request.settings import LoraRef

lora_app = App(help="List LoRA files, and say what one is.")


@lora_app.command("list")
def list_command(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List the LoRA files that are here, yours and the bundled ones too, by what --lora takes."""
    rows = []
    described = []
    for name, path in loras.list_loras().items():
        about = {"name": name, **loras.describe(path)}
        described.append(about)
        rows.append((name, f"{about['bytes'] / 1e6:>8.1f} MB", _summarize(about)))
    console.table(rows, described, as_json=json_output)


def _summarize(about: Mapping[str, Any]) -> str:
    """The format and rank of an adapter, or why it cannot be used."""
    if not about["usable"]:
        return about["problems"][0]
    return f"{about['format']}, rank {about['rank']}"


@lora_app.command()
def info(
    name: Annotated[
        str,
        typer.Argument(
            help="What --lora takes.",
            show_default=False,
            autocompletion=complete.offer_loras,
        ),
    ],
    json_output: Annotated[
        bool, typer.Option("--json", help="JSON on a terminal, too; elsewhere it always is.")
    ] = False,
) -> int:
    """Say what a LoRA is: format, rank, alpha, layers, base model (exit 4: unusable).

    A short table on a terminal, JSON for programs.
    """
    described = loras.describe(loras.locate(LoraRef.parse(name).name))
    show.show_weights(described, as_json=json_output)
    return ExitCode.OK if described["usable"] else ExitCode.INPUT_FILE
