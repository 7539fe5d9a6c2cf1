"""The errors a user can meet, and the exit code of each. Stdlib only.

FluxError
├── UsageError            2   arguments, settings, presets, prompts
├── WeightsUnavailable    3   missing, gated, offline
├── BadInputFile          4   corrupt or unsafe input
├── DoesNotFit            5   VRAM or RAM
├── OutputError           6   the picture cannot be written
├── BatchFailed           7   some rows of a batch
├── DeviceUnusable        8   device or dependency
└── NotFinite             9   NaN or Inf in the result
"""

import errno
import os
import re
import traceback
from enum import IntEnum

from quant.errors import ExplainedError, MissingLibrary, SpecError, WriteError

# What ran out beside memory and disks, and what gives more of it.
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
NO_THREADS = re.compile(r"can't start new thread|thread creation failed", re.IGNORECASE)

# Why a write fails, where the system's own words leave it open.
WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would be larger than is allowed (ulimit -f)",
}
OUR_PACKAGES = ("fluxcli", "quant", "__main__", "")


class ExitCode(IntEnum):
    """Documented exit codes of every command."""

    OK = 0
    BUG = 1
    USAGE = 2
    WEIGHTS = 3
    INPUT_FILE = 4
    DOES_NOT_FIT = 5
    OUTPUT = 6
    BATCH = 7
    DEVICE = 8
    NOT_FINITE = 9


class FluxError(ExplainedError):
    """Base of the errors of `fluxcli`. For those of `quant` see `exit_code_of`."""

    exit_code = ExitCode.BUG


class UsageError(FluxError):
    exit_code = ExitCode.USAGE


class WeightsUnavailable(FluxError):
    exit_code = ExitCode.WEIGHTS


class BadInputFile(FluxError):
    exit_code = ExitCode.INPUT_FILE


class DoesNotFit(FluxError):
    exit_code = ExitCode.DOES_NOT_FIT


class OutputError(FluxError):
    exit_code = ExitCode.OUTPUT


class BatchFailed(FluxError):
    exit_code = ExitCode.BATCH


class DeviceUnusable(FluxError):
    exit_code = ExitCode.DEVICE


class NoSuchDevice(DeviceUnusable):
    """The device that was asked for is not here; nothing is broken."""


class NotFinite(FluxError):
    exit_code = ExitCode.NOT_FINITE


class Terminated(BaseException):
    """A signal arrived; its number is the only argument.

    It unwinds the stack as KeyboardInterrupt does, so that temporary files are deleted.
    """


def exit_code_of(error: ExplainedError) -> ExitCode:
    """Return the exit code that an error ends the process with.

    An error may have an `exit_code` of its own. Those of `quant` have none: a spec that cannot be
    is exit 2, a write that fails 6, a library that is missing 8, and everything else is about an
    input file.
    """
    if isinstance(error, FluxError):
        return error.exit_code
    codes: dict[type[ExplainedError], ExitCode] = {
        SpecError: ExitCode.USAGE,
        MissingLibrary: ExitCode.DEVICE,
        WriteError: ExitCode.OUTPUT,
    }
    own = getattr(error, "exit_code", None)
    return own or codes.get(type(error), ExitCode.INPUT_FILE)


def find_broken_library(error: BaseException) -> str:
    """Return the library whose import failed with this error, "" where it was no import.

    A broken installation raises anything: an ImportError, an OSError of the loader, a RuntimeError
    for a build against another torch. That a module was being imported is in the traceback of the
    error, or of one behind it.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        frames = [frame for frame, _ in traceback.walk_tb(current.__traceback__)]
        modules = [
            str(frame.f_globals.get("__name__"))
            for frame in frames
            if frame.f_code.co_name == "<module>"  # the code at the top of one
        ]
        name = modules[-1] if modules else ""
        if isinstance(current, ImportError) and current.name:
            name = current.name
        library = name.partition(".")[0]
        if library not in OUR_PACKAGES:
            return library
        current = current.__cause__ or current.__context__
    return ""


def name_package(library: str) -> str:
    """Return what pip calls a library."""
    return {"PIL": "pillow"}.get(library, library)


def explain_write(error: OSError) -> str:
    """Return in a few words why something could not be written."""
    own = WRITE_ERRORS.get(error.errno or 0)
    return own or (error.strerror or str(error)).lower()


def explain_stdout(error: OSError) -> OutputError:
    """Return the error of a stdout that takes no more."""
    hint = "send stdout elsewhere: > FILE"
    return OutputError("cannot write to stdout", why=explain_write(error), hint=hint)


def hint_for_memory() -> str:
    """Return what to try where memory ran out: it may be a limit of the shell."""
    if os.name != "nt":
        import resource  # only POSIX has it

        for flag, number in (("-v", resource.RLIMIT_AS), ("-d", resource.RLIMIT_DATA)):
            if resource.getrlimit(number)[0] != resource.RLIM_INFINITY:
                return f"ulimit {flag} unlimited, or a smaller --size"
    return "a smaller --size, or --device cpu"
