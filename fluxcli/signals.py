"""A signal that asks for the end of the process ends it as itself, after temporary files are gone.

A shell goes on looping after a child that merely exits 130; it stops after one that died by SIGINT.
SIGXFSZ stays ignored, as Python has it: the write that met the limit fails instead. Stdlib only.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from fluxcli.errors import Terminated

# Those that end a process that does not handle them, and may be meant to; Windows has a few.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
# How long what the first signal began may still take after a second one.
GRACE_S = 1.0
AGAIN_S = 0.05  # between two looks at whether an import is over

# Signals that have arrived. An exception of theirs may be swallowed, this list is not.
ARRIVED: list[int] = []

# What a terminal must still be told when the stack is not unwound: the cursor back.
LAST_WORDS: list[bytes] = []


def install_signals() -> None:
    """Make the first signal unwind the stack as `Terminated`.

    After a second one that takes `GRACE_S` at most, so that nothing is left behind; one that comes
    again after that kills at once.
    """
    for name in NAMES:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _unwind)
    sys.unraisablehook = _show_unraisable


def check_signals() -> None:
    """Raise `Terminated` if a signal arrived.

    Libraries swallow the first exception of one in a `__del__` or a bare `except`; who runs for
    long asks here between two steps.
    """
    if not ARRIVED:
        return
    if len(ARRIVED) == 1:
        # The stack unwinds once: an alarm that waits for the end of an import would raise again,
        # in the middle of what is being deleted then.
        _stop_alarm()
    raise Terminated(ARRIVED[0])


def die_by(number: int) -> None:
    """End this process by the signal; on Windows by the code that a shell would show."""
    if os.name == "nt":
        sys.exit(128 + number)
    import resource  # only POSIX has it

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGQUIT and SIGXCPU would leave a core
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _unwind(number: int, frame: FrameType | None) -> None:
    """Handle a signal: the first raises `Terminated`, later ones set a limit to the unwinding."""
    ARRIVED.append(number)
    if len(ARRIVED) > 1:
        signal.signal(number, signal.SIG_DFL)
        _set_alarm(GRACE_S, lambda *_: _die_now())
    elif _is_importing(frame):
        # An exception may be swallowed there, or abort in a library's C++.
        _wait_for_import(time.monotonic() + GRACE_S)
    else:
        raise Terminated(number)


def _wait_for_import(until_s: float) -> None:
    """Raise `Terminated` when the import under way is over, or die where it takes too long."""

    def look(_: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise Terminated(ARRIVED[0])
        if time.monotonic() > until_s:
            _die_now()
        _wait_for_import(until_s)

    _set_alarm(AGAIN_S, look)


def _set_alarm(after_s: float, then: Callable[[int, FrameType | None], None]) -> None:
    """Call `then` after so many seconds; without such alarms (on Windows) die at once."""
    if not hasattr(signal, "setitimer"):
        _die_now()
    signal.signal(signal.SIGALRM, then)
    signal.setitimer(signal.ITIMER_REAL, after_s)


def _stop_alarm() -> None:
    """Let no alarm come any more."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _die_now() -> None:
    """Die by the first signal without unwinding the stack."""
    for words in LAST_WORDS:
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, words)
    die_by(ARRIVED[0])


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether the signal arrived in the middle of an import."""
    files = [each.f_code.co_filename for each, _ in traceback.walk_stack(frame)]
    return any(file.startswith("<frozen importlib") for file in files)


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Say nothing of a `Terminated` that a `__del__` swallowed: `check_signals` raises it again."""
    if not isinstance(unraisable.exc_value, Terminated):
        sys.__unraisablehook__(unraisable)
