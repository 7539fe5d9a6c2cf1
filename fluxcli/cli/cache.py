"""`flux cache`: what is kept of earlier prompts, and its end."""

from typing import Annotated

import typer

from fluxcli.cli import console
from fluxcli.engine import prompt_cache as embeddings
from fluxcli.errors import ExitCode

MIB = 1 << 20


def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every entry.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Show what is kept of earlier prompts, so that they load no text encoder again; or delete it."""
    deleted, deleted_bytes = embeddings.clear() if clear else (0, 0)
    sizes = [size for _, size, _ in embeddings.entries()]
    folder, used, limit = embeddings.folder(), sum(sizes), embeddings.LIMIT_BYTES
    if json_output:
        shown = {"folder": str(folder), "entries": len(sizes), "bytes": used, "limit_bytes": limit}
        console.data_json(shown | {"deleted": deleted, "deleted_bytes": deleted_bytes} if clear else shown)
    else:
        console.data(console.CONTROL.sub("?", str(folder)))
        console.data(f"entries {len(sizes)}, {used / MIB:.1f} of {limit / MIB:.0f} MiB")
    if clear:
        console.say(f"deleted {deleted} entries, {deleted_bytes / MIB:.1f} MiB")
    return ExitCode.OK
