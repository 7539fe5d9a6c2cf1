"""INT, TERM and HUP end the process by the signal itself, after temporary files are gone. Stdlib only.

A shell goes on looping after a child that merely exits 130; it stops after one that died by SIGINT.
"""

import os
import signal
import sys

from fluxcli.errors import Terminated

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


def install() -> None:
    """Make the first signal unwind the stack as `Terminated`; a second one of the kind kills at once."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _unwind)


def _unwind(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(number)


def die_by(number: int) -> None:
    """End this process by the signal; on Windows by the code that a shell would show."""
    if os.name == "nt":
        sys.exit(128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
