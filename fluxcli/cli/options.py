"""The options that several commands share, declared once. Knows their names and help, not what they do."""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxcli.errors import UsageError
from fluxcli.request import ASPECT_RATIOS

SIZE, OUT, RUN = "Picture", "Output", "Run"

REQUEST_OPTIONS: dict[str, object] = {
    "preset": Annotated[
        Optional[str], typer.Option("-p", "--preset", help="Named settings (see flux presets).", show_default="dev")
    ],
    "model": Annotated[
        Optional[str], typer.Option("-m", "--model", help="Model folder or hub id.", show_default="of the preset")
    ],
    "aspect_ratio": Annotated[
        Optional[str], typer.Option("--ar", help=f"W:H, e.g. {' '.join(ASPECT_RATIOS)}.", rich_help_panel=SIZE)
    ],
    "image_size": Annotated[
        Optional[int], typer.Option("--size", help="Longest side in pixels, a multiple of 16.", rich_help_panel=SIZE)
    ],
    "width": Annotated[Optional[int], typer.Option("--width", help="Pixels; with --height.", rich_help_panel=SIZE)],
    "height": Annotated[Optional[int], typer.Option("--height", help="Pixels; with --width.", rich_help_panel=SIZE)],
    "steps": Annotated[Optional[int], typer.Option("--steps", help="Denoising steps.", rich_help_panel=SIZE)],
    "guidance": Annotated[
        Optional[str],
        typer.Option("--guidance", help="How closely to follow the prompt; none for schnell.", rich_help_panel=SIZE),
    ],
    "seed": Annotated[
        Optional[int], typer.Option("--seed", help="-1 picks one; it is always reported.", rich_help_panel=SIZE)
    ],
    "count": Annotated[
        Optional[int], typer.Option("-n", "--count", help="Pictures; number k uses seed+k.", rich_help_panel=SIZE)
    ],
    "text_tokens": Annotated[
        Optional[int],
        typer.Option("--text-tokens", help="T5 length; padding counts: it changes the picture.", rich_help_panel=SIZE),
    ],
    "output": Annotated[
        Optional[str],
        typer.Option(
            "-o", "--output", rich_help_panel=OUT,
            help="File, folder/, template of {seed} {n} {slug} {preset} {width} {height} {date}, or - for stdout.",
        ),
    ],
    "format": Annotated[Optional[str], typer.Option("--format", help="jpg, png or webp.", rich_help_panel=OUT)],
    "quality": Annotated[
        Optional[int], typer.Option("--quality", help="1 to 100, for jpg and webp.", rich_help_panel=OUT)
    ],
    "no_metadata": Annotated[
        bool, typer.Option("--no-metadata", help="Write the bare picture.", rich_help_panel=OUT)
    ],
    "force": Annotated[bool, typer.Option("--force", help="Replace an existing -o file.", rich_help_panel=OUT)],
    "device": Annotated[
        Optional[str], typer.Option("--device", help="auto, cpu, cuda[:n], mps or xpu[:n].", rich_help_panel=RUN)
    ],
    "json_output": Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of paths.", rich_help_panel=RUN)
    ],
    "events": Annotated[
        bool, typer.Option("--events", help="One JSON object a line while it goes on.", rich_help_panel=RUN)
    ],
    "quiet": Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.", rich_help_panel=RUN)],
    "debug": Annotated[bool, typer.Option("--debug", help="Tracebacks and library warnings.", rich_help_panel=RUN)],
}  # fmt: skip


def with_request_options(command: Callable) -> Callable:
    """Give a command whose last parameter is `**options` every option of the table as a real parameter."""

    @functools.wraps(command)
    def wrapper(**arguments: object) -> object:
        return command(**arguments)

    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(name, kind, annotation=hint, default=False if hint.__origin__ is bool else None)
        for name, hint in REQUEST_OPTIONS.items()
    ]
    wrapper.__signature__ = inspect.Signature([p.replace(kind=kind) for p in own] + shared)
    wrapper.__annotations__ = {p.name: p.annotation for p in own} | REQUEST_OPTIONS
    return wrapper


RUN_OPTIONS = ("force", "json_output", "events", "quiet", "debug", "no_metadata")


def given_settings(options: dict) -> dict:
    """What the command line said of the request, by field name."""
    settings = {k: v for k, v in options.items() if k not in RUN_OPTIONS and v is not None}
    return settings | ({"metadata": False} if options["no_metadata"] else {})


def config_folder() -> Path:
    """The user's folder of settings and presets."""
    return Path(typer.get_app_dir("flux"))


def read_prompt(text: str) -> str:
    """The prompt: `text`, or all of stdin for '-'; raises `UsageError` on a terminal, for bad UTF-8 or none."""
    if text != "-":
        try:
            raw = text.encode("utf-8", "surrogateescape")
            return _decode(raw)
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is not valid text", why=str(error)[:80]) from error
    if sys.stdin is None or sys.stdin.isatty():
        hint, why = "echo 'a red circle' | flux generate - -p tiny", "it is a terminal" if sys.stdin else "it is closed"
        raise UsageError("no prompt on stdin", which="-", why=why, hint=hint)
    return _decode(sys.stdin.buffer.read()).strip()


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not valid UTF-8", why=f"byte {error.start}", hint="save it as UTF-8") from error
