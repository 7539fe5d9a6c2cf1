"""The application: its commands, and the one boundary at which a process ends.

Whatever ends a command arrives here, and becomes one error line, one hint and an exit code, or the
death by a signal. Loads nothing but the standard library, typer and rich: heavy libraries are
imported by the functions that need them.
"""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, NamedTuple, NoReturn, Optional

import typer

import fluxcli
from fluxcli import paths, signals
from fluxcli.cli import (
    cache,
    console,
    doctor,
    gallery,
    generate,
    hints,
    inspect,
    lora,
    models,
    plan,
    presets,
    quantize,
    replay,
    shells,
    streams,
    worker,
)
from fluxcli.cli.help import App, write_examples
from fluxcli.errors import ExitCode, OutputError, Terminated, UsageError
from fluxcli.events import Failed, explain, to_json

shells.use_own_installer()
# What OpenMP takes of the variables that it complains of.
OPENMP = {
    "OMP_NUM_THREADS": r"0*[1-9][0-9]{0,4}(,0*[1-9][0-9]{0,4})*",
    "OMP_THREAD_LIMIT": r"0*[1-9][0-9]{0,8}",
    "OMP_DYNAMIC": r"true|false",
    "OMP_NESTED": r"true|false",
    "OMP_STACKSIZE": r"[0-9]{1,9} *[bkmg]?",
    "OMP_SCHEDULE": r"(static|dynamic|guided|auto)( *, *[0-9]{1,9})?",
    "OMP_PROC_BIND": r"true|false|((primary|master|close|spread)(,|$))+",
    "OMP_WAIT_POLICY": r"active|passive",
    "OMP_MAX_ACTIVE_LEVELS": r"[0-9]{1,9}",
    "GOMP_CPU_AFFINITY": r"([0-9]+(-[0-9]+(:[0-9]+)?)?([ ,]+|$))+",
    "GOMP_STACKSIZE": r"[0-9]{1,9} *[bkmg]?",
    "GOMP_SPINCOUNT": r"infinity|infinite|[0-9]{1,9} *[kmg]?",
}

app = App(name="flux")
DRAWING = "Pictures"
WEIGHTS = "Weights"
HERE = "This computer"
GENERATE_EXAMPLES = write_examples(
    'flux generate "a red circle on a blue background" -p tiny -o circle.png',
    'flux generate "a fox in the snow" --ar 16:9 -n 4 -o foxes/',
    "flux generate --from prompts.txt -o 'out/{row}-{seed}.png' --resume",
)
REPLAY_EXAMPLES = write_examples(
    "flux replay circle.png --seed 2",
    "flux replay draft.jpg -p quality -o final.png",
    "flux replay circle.png --check",
)
GALLERY_EXAMPLES = write_examples("flux gallery pictures", "flux gallery foxes -o foxes.html")
PLAN_EXAMPLES = write_examples(
    "flux plan",
    "flux plan --ar 16:9 --size 1536 --vram-limit 8GiB",
    "flux plan -p schnell --card 12GiB --json",
)
QUANTIZE_EXAMPLES = write_examples(
    "flux quantize dev --to fp8",
    "flux quantize dev models/dev-nf4 --to nf4 --lora ink.safetensors:0.8",
    "flux quantize flux1-dev.safetensors --to fp8 --layout comfy",
)

_draws = partial(app.command, rich_help_panel=DRAWING)
_weighs = partial(app.command, rich_help_panel=WEIGHTS)
_looks = partial(app.command, rich_help_panel=HERE)
_draws("generate", epilog=GENERATE_EXAMPLES)(generate.generate)
_draws("replay", epilog=REPLAY_EXAMPLES)(replay.replay)
_draws("decode")(replay.decode)
_draws("gallery", epilog=GALLERY_EXAMPLES)(gallery.gallery_command)
_draws("plan", epilog=PLAN_EXAMPLES)(plan.plan_command)
_draws("presets")(presets.presets_command)
_draws("inspect")(inspect.inspect_command)
app.add_typer(models.models_app, name="models", rich_help_panel=WEIGHTS)
app.add_typer(lora.lora_app, name="lora", rich_help_panel=WEIGHTS)
_weighs("quantize", epilog=QUANTIZE_EXAMPLES)(quantize.quantize)
_looks("doctor")(doctor.doctor_command)
app.add_typer(worker.worker_app, name="worker", rich_help_panel=HERE)
_looks("cache")(cache.cache_command)


@app.command("help", hidden=True)
def help_command(
    words: Annotated[Optional[list[str]], typer.Argument(help="A command.")] = None,
) -> int:
    """Show the page of a command, or of all."""
    return _call([*(words or []), "--help"])


@app.command("version", hidden=True)
def version_command() -> None:
    """Print the version."""
    _print_version(True)


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

    "flux COMMAND --help" has the options of a command, and examples.
    """
    try:
        os.getcwd()
    except OSError as error:  # MKL would end the process with words of its own
        why = "somebody deleted it"
        raise UsageError("the current folder is gone", why=why, hint="cd to another one") from error


def main() -> NoReturn:
    """Run the command line and end the process: by an exit code, or by the signal that ended it."""
    signals.install_signals()
    streams.open_streams()
    paths.forget_relative_folders(os.environ)
    try:
        code = run(sys.argv[1:])
        signals.check_signals()
    except Terminated as stop:
        signals.die_by(*stop.args)
    except BrokenPipeError:
        # Nobody reads stdout any more: no message, and the death that a shell expects.
        if hasattr(signal, "SIGPIPE"):
            signals.die_by(signal.SIGPIPE)
        code = ExitCode.OUTPUT
    # Everything is written and closed; to take torch down would last a second, and what an
    # interpreter writes at its end may fail.
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
        code = _call(arguments)
        streams.flush_streams()
        return code
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer makes an exit 1 of it
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else ExitCode.OK  # a shell's completion
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever arrives here ends the process
        signals.check_signals()  # the error may be what a library made of a signal
        if is_debug:
            for line in traceback.format_exc().splitlines():
                sys.stderr.write(f"{console.spell_out(line)}\n")
        failed = explain_end(error, arguments)
    if "--events" in options:
        with contextlib.suppress(OutputError, OSError):  # stdout itself may be what failed
            console.data_json(to_json(failed))
    console.error(failed.message, failed.hint)
    return failed.exit_code


def _call(arguments: Sequence[str]) -> int:
    """Run one command; whatever ends it is raised."""
    shells.check_request()
    code = app(args=list(arguments), standalone_mode=False, prog_name=shells.name_program())
    return int(code or ExitCode.OK)


def explain_end(error: Exception, arguments: Sequence[str] = ()) -> Failed:
    """Return the exit code, the message and the hint of whatever ended a command."""
    if isinstance(error, typer.TyperException):
        said = _explain_usage(error, arguments)
        failed = Failed(int(ExitCode.USAGE), said.message, said.hint)
    else:
        failed = explain(error)
    if failed.exit_code == ExitCode.USAGE and "--count" in failed.message:
        return replace(failed, hint=hints.find_for_count(arguments) or failed.hint)
    return failed


class _Said(NamedTuple):
    message: str
    hint: str


def _explain_usage(error: typer.TyperException, arguments: Sequence[str]) -> _Said:
    """What typer says of a wrong command line, and what to do about it.

    Its classes of errors are private, so they are told apart by their attributes and names.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "flux"
    option = getattr(error, "option_name", None) or ""
    possible = getattr(error, "possibilities", None) or []
    message = error.message if possible else error.format_message()
    message, _, near = message.partition(" Did you mean ")  # of a command that is near
    if possible:
        near = f"{' or '.join(possible[:2])}?"
    hint = f"{path} --help"
    if option:
        hint = _explain_option(option, path, arguments) or hint
    elif "No such command" in message:
        hint = _explain_command(arguments) or hint
    elif "unexpected extra argument" in message:
        words = message.rpartition("(")[2].rstrip(").").split()
        hint = _explain_words(words, context) or hint
    if near and hint == f"{path} --help":
        hint = f"did you mean {near}"
    return _Said(message, hint)


def _explain_option(option: str, path: str, arguments: Sequence[str]) -> str:
    """What to type instead of an option that a command has not, "" if nobody knows."""
    words = [word for word in arguments if word.startswith(option) and " " in word.strip()]
    if words:
        return f"a prompt that begins with - goes after --: {path} -- {shlex.quote(words[0])}"
    found = hints.find_hint(path.rpartition(" ")[2], option)
    if not found and path in ("flux", "fluxcli"):
        return f'options follow a command: {path} generate "a red circle" {option} ...'
    return found


def _explain_words(words: Sequence[str], context: Any) -> str:
    """What to type instead of words that a command does not take, "" if nobody knows."""
    parameters = context.command.params
    if any(parameter.name == "prompt" for parameter in parameters):
        return hints.find_for_words(words)
    option = f"--{words[0]}"
    if any(option in parameter.opts for parameter in parameters):
        return f"{context.command_path} {option}"
    return ""


def _explain_command(arguments: Sequence[str]) -> str:
    """The hint for words that are no command: several words are a prompt."""
    prompts = [word for word in arguments if " " in word.strip()]
    return f"flux generate {shlex.quote(prompts[0])}" if prompts else ""


def quieten_libraries(*, is_debug: bool) -> None:
    """Send the chatter of libraries nowhere, and let none of them run a model's own code."""
    settings = {"DIFFUSERS_DISABLE_REMOTE_CODE": "true", "TOKENIZERS_PARALLELISM": "false"}
    if is_debug:
        logging.basicConfig()
        logging.getLogger("fluxcli").setLevel(logging.DEBUG)  # tracebacks of rows that failed
    else:
        for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
            settings[f"{library}_VERBOSITY"] = "error"
        warnings.simplefilter("ignore")
        for library in ("bitsandbytes", "PIL"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    _drop_wrong_variables()


def _drop_wrong_variables() -> None:
    """Take from the environment what OpenMP would complain of in its own words, or hang at."""
    for name, pattern in OPENMP.items():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(pattern, value.strip(), re.IGNORECASE):
            del os.environ[name]
            console.say(f"{name} is ignored: {value[:40]!r} is nothing that OpenMP takes")
