"""`python -m fluxcli`."""

from fluxcli.cli.app import main

if __name__ == "__main__":
    main()
