"""INT, TERM and HUP end the process by the signal itself, after temporary files are gone.

A shell goes on looping after a child that merely exits 130; it stops after one that died by SIGINT. Stdlib only.
"""

import os
import signal
import sys
import traceback
from types import FrameType

from fluxcli.errors import Terminated

ARRIVED: list[int] = []
LAST_WORDS: list[bytes] = []  # what a terminal must still be told when the stack is not unwound: the cursor back


def install_signals() -> None:
    """Make the first signal unwind the stack as `Terminated`; a second one of the kind kills at once."""
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _unwind)
    sys.unraisablehook = lambda it: isinstance(it.exc_value, Terminated) or sys.__unraisablehook__(it)


def check_signals() -> None:
    """Raise `Terminated` if a signal arrived: libraries swallow the first one in a `__del__` or a bare `except`."""
    if ARRIVED:
        raise Terminated(ARRIVED[0])


def _unwind(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    ARRIVED.append(number)
    if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
        # nothing to clean up, and there an exception may be swallowed, or abort in a library's C++
        for words in LAST_WORDS:
            os.write(2, words)
        die_by(number)
    raise Terminated(number)


def die_by(number: int) -> None:
    """End this process by the signal; on Windows by the code that a shell would show."""
    if os.name == "nt":
        sys.exit(128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
