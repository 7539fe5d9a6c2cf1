"""The application: its commands, and the one boundary at which a process ends.

Whatever ends a command arrives here, and becomes one error line, one hint and an exit code, or the
death by a signal. Loads nothing but the standard library, typer and rich: heavy libraries are
imported by the functions that need them.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import typer

import fluxcli
from fluxcli import signals
from fluxcli.cli import (
    cache,
    console,
    doctor,
    generate,
    inspect,
    lora,
    models,
    plan,
    presets,
    quantize,
    replay,
    worker,
)
from fluxcli.errors import ExitCode, OutputError, Terminated
from fluxcli.events import Failed, explain, to_json

app = typer.Typer(
    name="flux",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("replay")(replay.replay)
app.command("plan")(plan.plan_command)
app.command("decode")(replay.decode)
app.command("quantize")(quantize.quantize)
app.command("doctor")(doctor.doctor_command)
app.command("presets")(presets.presets_command)
app.command("inspect")(inspect.inspect_command)
app.command("cache")(cache.cache_command)
app.add_typer(worker.worker_app, name="worker")
app.add_typer(models.models_app, name="models")
app.add_typer(lora.lora_app, name="lora")


def _print_version(wanted: bool) -> None:
    if wanted:
        console.data(f"flux {fluxcli.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Pictures by FLUX.1, on the card you have.

    Try: flux generate "a red circle on a blue background" -p tiny
    """


def main() -> NoReturn:
    """Run the command line and end the process: by an exit code, or by the signal that ended it."""
    signals.install_signals()
    if sys.stderr is None:  # started with 2>&-
        sys.stderr = io.StringIO()
    try:
        code = run(sys.argv[1:])
        signals.check_signals()
        if sys.stdout is not None:
            sys.stdout.flush()
    except Terminated as stop:
        signals.die_by(*stop.args)
    except BrokenPipeError:
        # Nobody reads stdout any more: no message, and the death that a shell expects.
        if hasattr(signal, "SIGPIPE"):
            signals.die_by(signal.SIGPIPE)
        os._exit(ExitCode.OUTPUT)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    # Everything is written and closed; to take torch down would last a second.
    os._exit(int(code))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what went wrong is said on stderr.

    Raises `Terminated` for a signal and BrokenPipeError where nobody reads stdout any more.
    """
    options = list(arguments)
    if "--" in options:
        options = options[: options.index("--")]
    is_debug = "--debug" in options
    quieten_libraries(is_debug=is_debug)
    try:
        code = app(args=list(arguments), standalone_mode=False, prog_name="flux")
        return int(code or ExitCode.OK)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer makes an exit 1 of it
            raise stop.__context__ from None
        raise
    except Exception as error:  # noqa: BLE001 - whatever arrives here ends the process
        signals.check_signals()  # the error may be what a library made of a signal
        if is_debug:
            traceback.print_exc()
        failed = explain_end(error)
    if "--events" in options:
        with contextlib.suppress(OutputError, OSError):  # stdout itself may be what failed
            console.data_json(to_json(failed))
    console.error(failed.message, failed.hint)
    return failed.exit_code


def explain_end(error: Exception) -> Failed:
    """Return the exit code, the message and the hint of whatever ended a command."""
    if isinstance(error, typer.TyperException):
        said = _explain_usage(error)
        return Failed(int(ExitCode.USAGE), said.message, said.hint)
    return explain(error)


class _Said(NamedTuple):
    message: str
    hint: str


def _explain_usage(error: typer.TyperException) -> _Said:
    """What typer says of a wrong command line, and what to do about it.

    Its classes of errors are private, so they are told apart by their attributes and names.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "flux"
    if type(error).__name__ == "NoArgsIsHelpError":
        return _Said("no command given", f"{command} --help")
    option = getattr(error, "option_name", None) or ""
    possible = getattr(error, "possibilities", None) or []
    message = error.message if possible else error.format_message()
    message, _, near = message.partition(" Did you mean ")  # of a command that is near
    if possible:
        near = f"{' or '.join(possible[:2])}?"
    if option.startswith("-") and not option.startswith("--"):
        hint = f"a prompt that begins with - goes after --: {command} -- PROMPT"
    elif "unexpected extra argument" in message:
        hint = 'quote a prompt of several words: flux generate "a red circle"'
    elif near:
        hint = f"did you mean {near}"
    else:
        hint = f"{command} --help"
    return _Said(message, hint)


def quieten_libraries(*, is_debug: bool) -> None:
    """Send the chatter of libraries nowhere, and let none of them run a model's own code."""
    settings = {"DIFFUSERS_DISABLE_REMOTE_CODE": "true", "TOKENIZERS_PARALLELISM": "false"}
    if not is_debug:
        for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
            settings[f"{library}_VERBOSITY"] = "error"
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
