"""What the options of a drawing command mean: the prompt, what was said, how a run is shown."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxcli.cli import console
from fluxcli.cli.inline import choose_show
from fluxcli.errors import UsageError
from fluxcli.paths import config_folder
from fluxcli.pictures import kept_inputs, normalize
from fluxcli.request import presets
from fluxcli.request.inputs import PICTURE_SETTINGS, STDIN, list_pictures, rename_pictures
from fluxcli.request.settings import SETTINGS, coerce, flag
from fluxcli.request.sizes import parse_size

CHUNK_BYTES = 1 << 20
MAX_STDIN_BYTES = 1 << 16  # of a prompt with the blanks around it
STARTED = time.perf_counter()  # about when the command did


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the command line gave, by field name."""
    given = {
        name: value
        for name, value in options.items()
        if name in SETTINGS and value not in (None, [], ()) and value is not False
    }
    if options["no_metadata"]:
        given["metadata"] = False
    return given


def say_what_is_meant(given: Mapping[str, Any]) -> None:
    """Say what a size of two sides is here, and which settings of config.toml a preset hides."""
    sides = parse_size(given.get("image_size", ""))
    if sides:
        console.say(f"--size {given['image_size']} is --width {sides[0]} --height {sides[1]}")
    hidden = presets.find_hidden(given, config_folder())
    if hidden:
        console.say(
            f"config.toml's {', '.join(hidden)}: the preset that was asked for says another value;"
            " what shall hold with it belongs in a preset of your own, or in an option"
        )


def check_there(path: Path) -> None:
    """Raise `UsageError` for a file that a command is about and that is not there."""
    if not os.path.lexists(path):
        raise UsageError("no such file", which=path, hint="ls lists what is there")


def read_prompt(text: str) -> str:
    """Return the prompt: `text` itself, or all of stdin for '-'.

    Raises `UsageError` where stdin is a terminal or closed, and for bytes that are no UTF-8.
    """
    if text == "-":
        return _decode(_read_stdin()).strip()
    return _decode(text.encode("utf-8", "surrogateescape"))


def take_stdin(
    given: Mapping[str, Any], *, prompt: str | None = None, source: str | None = None
) -> dict[str, Any]:
    """Return the settings of the command line; a picture of stdin among them is in a file then.

    `prompt` and `source` are what else may be read from stdin. Raises `UsageError` where it is to
    be read twice, and for a terminal; `BadInputFile` for what is no picture.
    """
    pictures = {
        name: coerce(name, given[name], where=flag(name))
        for name in PICTURE_SETTINGS
        if name in given
    }
    count = list_pictures(pictures).count(STDIN)
    if not count:
        return dict(given)
    if count > 1 or STDIN in (prompt, source):
        why = "a picture is read from it, and something else"
        hint = "give one of them as a file, or as text"
        raise UsageError("stdin cannot be read twice", which=STDIN, why=why, hint=hint)
    path = _keep_picture_of_stdin()
    return dict(given) | rename_pictures(pictures, lambda name: path if name == STDIN else name)


def _keep_picture_of_stdin() -> str:
    """Return the file of the picture on stdin."""
    hint = "cat photo.jpg | flux generate 'a red circle' --image -"
    if sys.stdin is None or sys.stdin.isatty():
        why = "it is a terminal" if sys.stdin else "it is closed"
        raise UsageError("no picture on stdin", which=STDIN, why=why, hint=hint)
    data = bytearray()
    for chunk in iter(lambda: sys.stdin.buffer.read(CHUNK_BYTES), b""):
        data += chunk
        if len(data) > normalize.MAX_FILE_BYTES:
            limit = normalize.MAX_FILE_BYTES / 1e6
            raise normalize.refuse("stdin", f"it is larger than {limit:.0f} MB")
    normalize.measure(bytes(data), "stdin")
    return str(kept_inputs.keep(bytes(data)))


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "no prompt on stdin",
            which="-",
            why="it is a terminal" if sys.stdin else "it is closed",
            hint="echo 'a red circle' | flux generate - -p tiny",
        )
    data: bytes = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError(
            "the prompt is too long",
            which="-",
            why=f"more than {MAX_STDIN_BYTES:,} bytes are on stdin",
            hint="many prompts, one a line: flux generate --from -",
        )
    return data


def _decode(raw: bytes) -> str:
    """Return the text of UTF-8 bytes, without a byte order mark and with \\n as the line end."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"byte {error.start}"
        hint = "save it as UTF-8"
        raise UsageError("the prompt is not valid UTF-8", why=why, hint=hint) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def check_stdout(options: Mapping[str, Any], *, picture: bool) -> None:
    """Raise `UsageError` where several want stdout; `picture` says that -o - wants it."""
    wanted = [options["json_output"], options["events"], picture]
    if wanted.count(True) > 1:
        raise UsageError(
            "--json, --events and -o - exclude each other",
            why="each needs stdout for itself",
            hint="one of them alone",
        )


def job_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a job takes of the command line beside its rows."""
    return {
        "force": options["force"],
        "no_wait": options["no_wait"],
        "prompt_cache": not options["no_cache"],
    }


def reporter_of(options: Mapping[str, Any]) -> console.Reporter:
    """Return what shows a run in the way that the command line asks for."""
    return console.Reporter(
        quiet=options["quiet"],
        events=options["events"],
        json_output=options["json_output"],
        started=STARTED,
        show_picture=choose_show(options),
    )
