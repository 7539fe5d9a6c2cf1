"""`flux cache`: what is kept of earlier prompts, and its end. Sizes are in bytes."""

from typing import Annotated, Any

import typer

from fluxcli.cli import console

MIB = 1 << 20


def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every entry.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what is kept of earlier prompts, or delete it.

    It saves the load of the text encoders when a prompt comes again.
    """
    from fluxcli.engine import prompt_cache

    if prompt_cache.is_linked():
        console.say(
            "its folder is a link: nothing is kept or deleted there; XDG_CACHE_HOME moves it"
        )
    deleted = prompt_cache.clear() if clear else []
    deleted_bytes = sum(entry.size_bytes for entry in deleted)
    entries = prompt_cache.list_entries()
    used_bytes = sum(entry.size_bytes for entry in entries)
    limit_bytes = prompt_cache.LIMIT_BYTES
    shown: dict[str, Any] = {
        "folder": str(prompt_cache.folder()),
        "entries": len(entries),
        "bytes": used_bytes,
        "limit_bytes": limit_bytes,
    }
    if clear:
        shown |= {"deleted": len(deleted), "deleted_bytes": deleted_bytes}
    used = f"{used_bytes / MIB:.1f} of {limit_bytes / MIB:.0f} MiB"
    rows = [(shown["folder"],), (f"entries {len(entries)}, {used}",)]
    console.table(rows, shown, as_json=json_output)
    if clear:
        console.say(f"deleted {len(deleted)} entries, {deleted_bytes / MIB:.1f} MiB")
