"""The application: its commands, and the one boundary where errors and signals become an end of the process."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from typing import NoReturn

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
    name="flux", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
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
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Pictures by FLUX.1, on the card you have. Try: flux generate "a red circle on a blue background" -p tiny"""


def main() -> NoReturn:
    """Run the command line and end the process with a documented exit code, or by the signal that ended it."""
    signals.install_signals()
    sys.stderr = sys.stderr or io.StringIO()  # started with 2>&-
    try:
        code = _run(sys.argv[1:])
        signals.check_signals()
        if sys.stdout is not None:
            sys.stdout.flush()
    except Terminated as stop:
        signals.die_by(*stop.args)
    except BrokenPipeError:  # stdout was closed: no message, and the death that a shell expects
        if hasattr(signal, "SIGPIPE"):
            signals.die_by(signal.SIGPIPE)
        os._exit(ExitCode.OUTPUT)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(int(code or 0))  # everything is written and closed; tearing torch down would take a second


def _run(arguments: list[str]) -> int:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    _quieten_libraries(debug)
    try:
        return app(args=arguments, standalone_mode=False, prog_name="flux") or ExitCode.OK
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer makes an exit 1 of it
            raise stop.__context__ from None
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: whatever arrives here ends the process
        signals.check_signals()  # what a library made of it
        if debug:
            traceback.print_exc()
        ended = _explained(error)
    if "--events" in options:
        with contextlib.suppress(OutputError, OSError):  # stdout itself may be what failed
            console.data_json(to_json(ended))
    console.error(ended.message, ended.hint)
    return ended.exit_code


def _explained(error: Exception) -> Failed:
    """Exit code, message and hint of whatever ended a command."""
    if isinstance(error, typer.TyperException):
        return Failed(int(ExitCode.USAGE), *_usage_error(error))
    return explain(error)


def _usage_error(error: typer.TyperException) -> tuple[str, str]:
    """(message, hint) of what typer says of the command line."""
    command, possible = (
        getattr(getattr(error, "ctx", None), "command_path", "flux"),
        getattr(error, "possibilities", []),
    )
    if type(error).__name__ == "NoArgsIsHelpError":
        return "no command given", f"{command} --help"
    message, _, near = (error.message if possible else error.format_message()).partition(" Did you mean ")
    near = f"{' or '.join(possible[:2])}?" if possible else near
    if re.match("No such option: -[^-]", message):
        return message, f"a prompt that begins with - goes after --: {command} -- PROMPT"
    if "unexpected extra argument" in message:
        return message, 'quote a prompt of several words: flux generate "a red circle"'
    return message, f"did you mean {near}" if near else f"{command} --help"


def _quieten_libraries(debug: bool) -> None:
    """Library chatter goes nowhere; no library runs a model's own code."""
    settings = {"DIFFUSERS_DISABLE_REMOTE_CODE": "true", "TOKENIZERS_PARALLELISM": "false"}
    if not debug:
        settings |= {f"{name}_VERBOSITY": "error" for name in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB")}
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
