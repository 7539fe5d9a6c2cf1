"""`python -m fluxcli`, and what the console scripts call."""

import os
import sys


def leave_current_folder() -> None:
    """Let no file of the current folder be imported, which `python -m` puts first on the path.

    Where the package itself was found there, the folder comes last instead.
    """
    if sys.flags.safe_path or not sys.path:
        return
    first = sys.path.pop(0)
    package = os.path.dirname(os.path.abspath(__file__))
    if os.path.abspath(first) == os.path.dirname(package):
        sys.path.append(first)


if __name__ == "__main__":  # before anything that a folder could hold a namesake of
    leave_current_folder()

import signal  # noqa: E402
from typing import NoReturn  # noqa: E402


def main() -> NoReturn:
    """Run the command line.

    A Ctrl-C while it is still imported ends the process at once, without a traceback.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fluxcli.cli import app

    app.main()


if __name__ == "__main__":
    main()
