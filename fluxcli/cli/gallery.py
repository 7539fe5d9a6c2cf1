"""`flux gallery`: a folder's pictures on one page, for a browser."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli.cli import console
from fluxcli.errors import BadInputFile, ExitCode, OutputError, UsageError, explain_write
from fluxcli.paths import config_folder
from quant.files import move_if_free, write_atomically

NAME = "gallery.html"


def gallery_command(
    folder: Annotated[Path, typer.Argument(help="Of pictures.", show_default=False)],
    output: Annotated[
        Optional[Path],
        typer.Option("-o", "--output", help=f"The page; FOLDER/{NAME} without.", metavar="FILE"),
    ] = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is no gallery.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")] = False,
) -> int:
    """Show a folder's pictures on one page, with their prompts, settings and commands.

    Pictures that only their seeds make another stand side by side. The page is one file of HTML: it
    needs no other, and asks no address. Folders below are looked through, too.
    """
    from fluxcli.pictures import gallery

    if not folder.is_dir():
        raise UsageError("no such folder", which=folder, hint="flux gallery FOLDER")
    path = output or folder / NAME
    _check_free(path, force=force)
    entries, left_out = [], []
    try:
        for found, entry in gallery.read_entries(gallery.list_pictures(folder), config_folder()):
            if isinstance(entry, BadInputFile):
                left_out.append(str(found))
            else:
                entries.append(entry)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise BadInputFile("cannot read the folder", which=folder, why=why, hint="ls -l") from error
    if not entries:
        why = f"{len(left_out)} files without flux metadata" if left_out else "it holds none"
        hint = f"flux generate ... -o {folder}/"
        raise BadInputFile("no pictures of flux", which=folder, why=why, hint=hint)
    title = folder.resolve().name or str(folder)
    page = gallery.make_page(entries, title=title, folder=path.absolute().parent)
    _write(page, path, force=force or gallery.is_own_page(path))
    if left_out and not quiet:
        files = console.count(len(left_out), "file")
        console.say(f"{files} without flux metadata left out: {', '.join(left_out[:5])[:300]}")
    if json_output:
        shown = {"path": str(path), "pictures": len(entries), "left_out": left_out}
        console.data_json(shown | {"bytes": len(page)})
    else:
        console.data(str(path))
    return ExitCode.OK


def _check_free(path: Path, *, force: bool) -> None:
    """Raise `OutputError` for a file that is there and is no gallery, unless with `force`."""
    from fluxcli.pictures.gallery import is_own_page

    is_replaceable = path.is_file() and (force or is_own_page(path))
    if os.path.lexists(path) and not is_replaceable:
        hint = "--force replaces it" if path.is_file() else "-o FILE.html"
        raise OutputError("it is there, and no gallery", which=path, hint=hint)


def _write(page: bytes, path: Path, *, force: bool) -> None:
    """Write the page, whole or not at all; raises `OutputError`."""
    real = Path(os.path.realpath(path))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(real, page, place=os.replace if force else move_if_free)
    except OSError as error:
        why = explain_write(error)
        raise OutputError("cannot write the page", which=path, why=why, hint="-o FILE") from error
