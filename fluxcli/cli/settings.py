"""What the options of a drawing command mean: the request, the job, and how it is shown."""

import sys
import time

from fluxcli.cli import console
from fluxcli.errors import UsageError
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from fluxcli.paths import config_folder
from fluxcli.pictures import names as output
from fluxcli.request import presets
from fluxcli.request.fields import KEYS, GenerationRequest, from_settings

STARTED = time.perf_counter()


def requested(prompt: str, options: dict) -> tuple[GenerationRequest, dict]:
    """(the request, what the command line said of it by field name)."""
    given = given_settings(options)
    return settled(read_prompt(prompt), presets.merge(given, config_folder()).values, given), given


def settled(prompt: str, values: dict, given: dict) -> GenerationRequest:
    """The request of merged settings: a file name decides the format, a model folder is stored absolute."""
    if "\0" in prompt:
        raise UsageError("the prompt holds NUL", why="is it of a UTF-16 file?", hint="save it as UTF-8")
    decided = output.format_of(values["output"], given=given.get("format") and values["format"])
    settled = {"format": decided or values["format"], "model": models.absolute(values["model"])}
    settled |= {"vae": values["vae"] and models.absolute(values["vae"]), "lora": lora.settled(values["lora"])}
    settled |= {"text_encoders": tuple(map(models.absolute, values["text_encoders"]))}
    return from_settings(prompt, values | settled)


def given_settings(options: dict) -> dict:
    """What the command line said of the request, by field name."""
    settings = {k: v for k, v in options.items() if k in KEYS and v not in (None, [], ())}
    return settings | ({"metadata": False} if options["no_metadata"] else {})


def read_prompt(text: str) -> str:
    """The prompt: `text`, or all of stdin for '-'; raises `UsageError` on a terminal, for bad UTF-8 or none."""
    if text == "-" and (sys.stdin is None or sys.stdin.isatty()):
        why, hint = "it is a terminal" if sys.stdin else "it is closed", "echo 'a red circle' | flux generate - -p tiny"
        raise UsageError("no prompt on stdin", which="-", why=why, hint=hint)
    try:
        raw = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
        prompt = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeError as error:
        raise UsageError("the prompt is not valid UTF-8", why=f"byte {error.start}", hint="save it as UTF-8") from error
    return prompt.strip() if text == "-" else prompt


def check_stdout(options: dict, stdout: bool) -> None:
    """Raise `UsageError` where several want stdout for themselves."""
    if sum((options["json_output"], options["events"], stdout)) > 1:
        raise UsageError("--json, --events and -o - exclude each other", why="each needs stdout for itself")


def job_options(options: dict) -> dict:
    """What a job takes of the command line, beside requests."""
    return {"force": options["force"], "no_wait": options["no_wait"], "cache": not options["no_cache"]}


def reporter_of(options: dict) -> console.Reporter:
    """Shows a run as the command line asks for."""
    shown = {"quiet": options["quiet"], "events": options["events"], "json_output": options["json_output"]}
    return console.Reporter(**shown, started=STARTED)
