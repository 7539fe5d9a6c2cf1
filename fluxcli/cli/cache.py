"""`flux cache`: what is kept of earlier prompts, and its end."""

from typing import Annotated

import typer

from fluxcli.cli import console
from fluxcli.errors import ExitCode

MIB = 1 << 20


def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every entry.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Show what is kept of earlier prompts, so that they load no text encoder again;
    or delete it."""
    from fluxcli.engine import prompt_cache

    deleted = prompt_cache.clear() if clear else []
    deleted_bytes = sum(entry.size_bytes for entry in deleted)
    entries = prompt_cache.list_entries()
    used_bytes = sum(entry.size_bytes for entry in entries)
    folder = str(prompt_cache.folder())
    limit_bytes = prompt_cache.LIMIT_BYTES
    if json_output:
        shown = {
            "folder": folder,
            "entries": len(entries),
            "bytes": used_bytes,
            "limit_bytes": limit_bytes,
        }
        if clear:
            shown |= {"deleted": len(deleted), "deleted_bytes": deleted_bytes}
        console.data_json(shown)
    else:
        console.data(console.CONTROL.sub("?", folder))
        used = f"{used_bytes / MIB:.1f} of {limit_bytes / MIB:.0f} MiB"
        console.data(f"entries {len(entries)}, {used}")
    if clear:
        console.say(f"deleted {len(deleted)} entries, {deleted_bytes / MIB:.1f} MiB")
    return ExitCode.OK
