"""`flux cache`: what is kept of prompts, of pictures without a file, by --compile; and its end.

Sizes in bytes.
"""

import contextlib
import os
import shutil
from typing import Annotated, Any

import typer

from fluxcli import paths
from fluxcli.cli import console
from fluxcli.pictures import kept_inputs

MIB = 1 << 20


def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every entry.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what is kept of earlier prompts and of pictures from stdin, or delete it.

    It saves the load of the text encoders when a prompt comes again, and lets flux replay find
    pictures that came without a file. What --compile made belongs to it, too.
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
    deleted_inputs_bytes = sum(kept.size_bytes for kept in kept_inputs.clear()) if clear else 0
    inputs_bytes = sum(kept.size_bytes for kept in kept_inputs.list_kept())
    deleted_compiled_bytes = _clear_compiled() if clear else 0
    compiled_bytes = _count_compiled()
    shown: dict[str, Any] = {
        "folder": str(prompt_cache.folder()),
        "entries": len(entries),
        "bytes": used_bytes,
        "limit_bytes": limit_bytes,
        "inputs_folder": str(kept_inputs.folder()),
        "inputs_bytes": inputs_bytes,
        "compiled_folder": str(paths.compiled_folder()),
        "compiled_bytes": compiled_bytes,
    }
    if clear:
        shown |= {
            "deleted": len(deleted),
            "deleted_bytes": deleted_bytes,
            "deleted_inputs_bytes": deleted_inputs_bytes,
            "deleted_compiled_bytes": deleted_compiled_bytes,
        }
    used = f"{used_bytes / MIB:.1f} of {limit_bytes / MIB:.0f} MiB"
    rows = [(shown["folder"],), (f"entries {len(entries)}, {used}",)]
    if inputs_bytes:
        rows += [(shown["inputs_folder"],), (f"pictures {inputs_bytes / MIB:.1f} MiB",)]
    if compiled_bytes:
        rows += [(shown["compiled_folder"],), (f"compiled {compiled_bytes / MIB:.1f} MiB",)]
    console.table(rows, shown, as_json=json_output)
    if clear:
        console.say(f"deleted {len(deleted)} entries, {deleted_bytes / MIB:.1f} MiB")
        if deleted_inputs_bytes:
            console.say(f"deleted {deleted_inputs_bytes / MIB:.1f} MiB of pictures")
        if deleted_compiled_bytes:
            console.say(f"deleted {deleted_compiled_bytes / MIB:.1f} MiB that --compile made")


def _count_compiled() -> int:
    """Return the bytes of what compilers keep in our folder, links not followed."""
    folder = paths.compiled_folder()
    if paths.is_linked(folder):
        return 0
    total_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may delete it meanwhile
                total_bytes += os.lstat(os.path.join(parent, name)).st_size
    return total_bytes


def _clear_compiled() -> int:
    """Delete what compilers keep in our folder; returns the bytes that are gone."""
    before_bytes = _count_compiled()
    if not paths.is_linked(paths.compiled_folder()):
        shutil.rmtree(paths.compiled_folder(), ignore_errors=True)
    return before_bytes - _count_compiled()
