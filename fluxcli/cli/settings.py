"""What the options of a drawing command mean: the request, the job, and how it is shown."""

import sys
import time

from fluxcli.cli import console
from fluxcli.errors import UsageError
from fluxcli.request.settings import SETTINGS

STARTED = time.perf_counter()


def given_settings(options: dict) -> dict:
    """What the command line said of the request, by field name."""
    settings = {k: v for k, v in options.items() if k in SETTINGS and v not in (None, [], ())}
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
    return {"force": options["force"], "no_wait": options["no_wait"], "prompt_cache": not options["no_cache"]}


def reporter_of(options: dict) -> console.Reporter:
    """Shows a run as the command line asks for."""
    shown = {"quiet": options["quiet"], "events": options["events"], "json_output": options["json_output"]}
    return console.Reporter(**shown, started=STARTED)
