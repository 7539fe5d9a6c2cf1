"""`python -m fluxcli`, and what the console scripts call."""

import signal
from typing import NoReturn


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
