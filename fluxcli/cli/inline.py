"""`--show`: finished pictures are drawn in the terminal, as well as it can.

textual-image, an extra, asks the terminal what it knows: sixel, kitty's protocol, or else two
colours in each cell. It is imported where pictures are to be shown, and nowhere else.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fluxcli.cli import console
from fluxcli.errors import UsageError
from quant.errors import MissingLibrary

WIDEST = 100  # cells; a picture that fills a large terminal is larger than it is
LINES_BELOW = 4  # of the terminal's height: for its path and what the shell says next

Show = Callable[[str], None]  # takes the path of a picture


def choose_show(options: Mapping[str, Any]) -> Show | None:
    """Return what shows the picture of a path, None where none is asked for or nothing can.

    Raises `UsageError` where stdout is for programs, and `MissingLibrary` without the extra.
    """
    if not options["show"]:
        return None
    for name, flag in (("json_output", "--json"), ("events", "--events")):
        if options[name]:
            why = "both write on stdout"
            raise UsageError(f"--show and {flag} exclude each other", why=why)
    if not console.is_terminal(sys.stdout) or os.environ.get("TERM", "dumb") == "dumb":
        if not options["quiet"]:
            console.say("--show does nothing here: stdout is no terminal that can show a picture")
        return None
    try:
        with _without_stdin():
            from textual_image.renderable import Image
    except ImportError as error:
        what = "--show needs textual-image"
        hint = "pip install 'fluxcli[show]'"
        raise MissingLibrary(what, why="it is not installed", hint=hint) from error
    return lambda path: _show(Image, Path(path))


def _show(renderable: Callable[..., Any], path: Path) -> None:
    """Draw a picture on stdout; that it cannot be drawn is said, and ends nothing."""
    from rich.console import Console

    from fluxcli.pictures.image import open_picture

    try:
        image = open_picture(path).convert("RGB")
        # Colours are what was asked for, whatever NO_COLOR says of others.
        terminal = Console(file=sys.stdout, no_color=False)
        terminal.width = min(terminal.width, WIDEST)
        with _without_stdin():
            drawn = renderable(image, width="auto", height="auto")
            terminal.print(drawn, height=max(1, terminal.height - LINES_BELOW))
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the picture is written, which is what counts
        said = str(error) or type(error).__name__
        console.say(f"{path} cannot be shown: {said[:200]}")


@contextlib.contextmanager
def _without_stdin() -> Iterator[None]:
    """Keep textual-image from asking where nobody answers: it takes stdin for the terminal."""
    stdin = sys.__stdin__
    if not console.is_terminal(stdin):
        sys.__stdin__ = None  # type: ignore[misc]
    try:
        yield
    finally:
        sys.__stdin__ = stdin  # type: ignore[misc]
