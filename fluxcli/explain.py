"""What an exception is for the user: the exit code, one line and a hint, also of what libraries raise."""

import errno

from fluxcli.errors import ExitCode, is_out_of_memory
from fluxcli.events import Failed, failed
from quant.errors import ExplainedError


def explained(error: Exception) -> Failed:
    """The exit code, message and hint of whatever ended a job."""
    if isinstance(error, ExplainedError):
        return failed(error)
    text = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    code, what, hint = next(row for applies, *row in (
        (is_out_of_memory(error), ExitCode.DOES_NOT_FIT, "out of memory", "a smaller --size, or --device cpu"),
        (full, ExitCode.OUTPUT, "the disk is full", "free some space and run the command again"),
        ("CUDA error" in text, ExitCode.DEVICE, "the device failed", "run it again; if it stays: flux doctor"),
        (isinstance(error, ImportError), ExitCode.DEVICE, "a dependency cannot be imported",
         "pip install --force-reinstall fluxcli"),
        (True, ExitCode.BUG, "this is a bug", "run it again with --debug and report what it prints"),
    ) if applies)  # fmt: skip
    return Failed(int(code), f"{what}: {text}", hint)
