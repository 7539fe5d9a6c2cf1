"""Ctrl-C at many moments of `-n 4`, of a batch and of `quantize`: what is kept, left over and said.

    python -m tests.interrupts --moments 20

prints a table for each command. The moments are spread over the run: by its events, where it has
some, else by the seconds that an uninterrupted one takes. Each run is a process of its own.
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxcli.errors import FluxError
from fluxcli.pictures.image import read_metadata
from quant.checkpoint import inspect
from quant.errors import ExplainedError
from tests.support.server import Command, Server

PICTURES = ("-p", "tiny", "--size", "64", "--steps", "6", "--no-cache", "--events", "-o", "out/")
COMMANDS = {
    "-n 4": ("generate", "a red circle", "-n", "4", "--seed", "1", *PICTURES),
    "--from": ("generate", "--from", "rows.txt", *PICTURES),
    "quantize": ("quantize", "tiny", "out", "--to", "fp8"),
}
ROWS = "a red circle\na blue square\na green star\na white circle\n"
END_S = 60.0


@dataclass(frozen=True)
class Ended:
    """A run that was interrupted: what was there then, and what it said."""

    moment: str
    exit_code: int
    told: int  # pictures that it had said before
    kept: int  # whole pictures, or checkpoints
    latents: int
    broken: int  # pictures or checkpoints that are not whole
    left_over: tuple[str, ...]  # temporary files
    said: str


def interrupt(server: Server, name: str, moment: float) -> Ended:
    """Run one of `COMMANDS` in a new folder up to a share of it, and send SIGINT then."""
    with tempfile.TemporaryDirectory(prefix="flux-interrupt-") as folder:
        Path(folder, "rows.txt").write_text(ROWS)
        environment = make_homes(folder)
        events = measure(server, name)
        process = start(server, name, folder, environment)
        lines: list[str] = []
        if events.lines:
            before = int(moment * len(events.lines))
            while len(lines) < before:
                lines.append(process.stdout.readline())
            at = f"{before} of {len(events.lines)} events"
        else:
            time.sleep(moment * events.seconds)
            at = f"{moment * events.seconds:.2f} of {events.seconds:.2f} s"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=END_S)
        told = sum('"saved"' in line for line in [*lines, *out.splitlines()])
        return describe(Path(folder), at, process.returncode, told=told, said=err)


def describe(folder: Path, at: str, exit_code: int, *, told: int, said: str) -> Ended:
    """Look at what an interrupted run has left in its folder."""
    kept = broken = 0
    pictures = sorted(folder.glob("out/*.png"))
    checkpoints = sorted(folder.glob("out/flux-manifest.json"))
    for path in [*pictures, *checkpoints]:
        try:
            read_metadata(path) if path.suffix == ".png" else inspect(path.parent)
            kept += 1
        except (ExplainedError, FluxError, OSError):
            broken += 1
    whole = {*pictures, *folder.glob("out/*.latents.safetensors")}
    files = [path for path in folder.rglob("*") if path.is_file() and ".home" not in path.parts]
    others = [path for path in files if path not in whole and path.name != "rows.txt"]
    if checkpoints:
        others = [path for path in others if path.parts[len(folder.parts)] != "out"]
    words = [line for line in said.splitlines() if "written" in line or "error" in line]
    return Ended(
        moment=at,
        exit_code=exit_code,
        told=told,
        kept=kept,
        latents=len(whole) - len(pictures),
        broken=broken,
        left_over=tuple(str(path.relative_to(folder)) for path in others),
        said=" ".join(words).removeprefix("flux: "),
    )


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    lines: list[str]
    seconds: float


WHOLE: dict[str, Whole] = {}


def measure(server: Server, name: str) -> Whole:
    """Run a command to its end, once in this process."""
    if name not in WHOLE:
        with tempfile.TemporaryDirectory(prefix="flux-interrupt-") as folder:
            Path(folder, "rows.txt").write_text(ROWS)
            began = time.monotonic()
            process = start(server, name, folder, make_homes(folder))
            out, err = process.communicate(timeout=END_S)
            assert process.returncode == 0, err
            lines = [line for line in out.splitlines() if line.startswith("{")]
            WHOLE[name] = Whole(lines, time.monotonic() - began)
    return WHOLE[name]


def make_homes(folder: str) -> dict[str, str]:
    """Make empty folders for the user's settings, data and caches."""
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    homes = {name: str(Path(folder, ".home", name)) for name in names}
    for home in homes.values():
        os.makedirs(home)
    return homes | {"FLUX_WORKER": "off"}


def start(server: Server, name: str, folder: str, environment: dict[str, str]) -> Command:
    command = ("-m", "fluxcli", *COMMANDS[name])
    return server.start(*command, cwd=folder, environment=environment)


def print_table(name: str, rows: Sequence[Ended]) -> None:
    """Print what became of a command's runs, as a table of Markdown."""
    print(f"\n`flux {' '.join(COMMANDS[name])}`\n")
    print("| interrupted after | exit | kept | latents kept | left over | said |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        kept = f"{row.kept}" if not row.broken else f"{row.kept}, {row.broken} BROKEN"
        left_over = ", ".join(row.left_over) or "nothing"
        cells = (row.moment, row.exit_code, kept, row.latents, left_over, row.said or "nothing")
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    """Print the tables of all commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    count = parser.parse_args().moments
    os.environ["OMP_NUM_THREADS"] = "1"  # a process of several threads cannot be forked
    server = Server()
    for name in COMMANDS:
        print_table(name, [interrupt(server, name, (k + 0.5) / count) for k in range(count)])
    server.close()


if __name__ == "__main__":
    main()
