"""INT, TERM and HUP end the process by the signal itself, after temporary files are gone.

A shell goes on looping after a child that merely exits 130; it stops after one that died by SIGINT.
Stdlib only.
"""

import os
import signal
import sys
import traceback
from types import FrameType

from fluxcli.errors import Terminated

# Signals that have arrived. An exception of theirs may be swallowed, this list is not.
ARRIVED: list[int] = []

# What a terminal must still be told when the stack is not unwound: the cursor back.
LAST_WORDS: list[bytes] = []


def install_signals() -> None:
    """Make the first signal unwind the stack as `Terminated`; a second one kills at once."""
    numbers = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP"):
        numbers.add(signal.SIGHUP)
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _unwind)
    sys.unraisablehook = _show_unraisable


def check_signals() -> None:
    """Raise `Terminated` if a signal arrived.

    Libraries swallow the first exception of one in a `__del__` or a bare `except`; who runs for
    long asks here between two steps.
    """
    if ARRIVED:
        raise Terminated(ARRIVED[0])


def die_by(number: int) -> None:
    """End this process by the signal; on Windows by the code that a shell would show."""
    if os.name == "nt":
        sys.exit(128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _unwind(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    ARRIVED.append(number)
    if _is_importing(frame):
        # There is nothing to clean up yet, and an exception may be swallowed there, or abort in a
        # library's C++.
        for words in LAST_WORDS:
            os.write(2, words)
        die_by(number)
    raise Terminated(number)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether the signal arrived in the middle of an import."""
    files = [each.f_code.co_filename for each, _ in traceback.walk_stack(frame)]
    return any(file.startswith("<frozen importlib") for file in files)


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Say nothing of a `Terminated` that a `__del__` swallowed: `check_signals` raises it again."""
    if not isinstance(unraisable.exc_value, Terminated):
        sys.__unraisablehook__(unraisable)
