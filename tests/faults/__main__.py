"""Run the fault rows and print how many were tried and how many survived.

    python -m tests.faults [NAME ...] [--exhaustive] [--every N] [--workers N] [--cold] [--list]

NAME is a row's name or how it begins. Exits 1 where a row did not survive.
"""

import argparse
import importlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# before torch is imported: the models are too small for more threads
os.environ["OMP_NUM_THREADS"] = "1"

from tests.faults.case import HOMES, ROWS, Row, run_row
from tests.support.server import Interpreters, Server, is_available


def load_rows() -> dict[str, Row]:
    """Import every module of rows beside this one."""
    for path in sorted(Path(__file__).parent.glob("rows_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")
    return ROWS


def clean_environment() -> None:
    """Take out of this process's environment what would reach the commands."""
    for name in list(os.environ):
        if name.startswith(("FLUX_", "HF_", "SSL_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    for name in HOMES:
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"


def take_every(rows: list[Row], count: int) -> list[Row]:
    """The first of each kind, and every n-th after it; the first word of a name is its kind."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.name.partition("-")[0], []).append(row)
    return [row for same in kinds.values() for row in same[::count]]


def main() -> int:
    """Run the rows that were asked for."""
    parser = argparse.ArgumentParser(description="Run the fault rows.")
    parser.add_argument("names", nargs="*", help="rows, or how their names begin; all without")
    parser.add_argument("--exhaustive", action="store_true", help="the slow rows, too")
    parser.add_argument("--every", type=int, default=1, help="only every n-th row of each kind")
    parser.add_argument("--workers", type=int, default=2, help="rows at a time")
    parser.add_argument("--cold", action="store_true", help="a new interpreter for every command")
    parser.add_argument("--list", action="store_true", help="print the rows, run nothing")
    asked = parser.parse_args()
    rows = [
        row
        for row in load_rows().values()
        if (not asked.names and (asked.exhaustive or not row.exhaustive))
        or any(row.name.startswith(name) for name in asked.names)
    ]
    rows = take_every(rows, asked.every)
    if asked.list:
        for row in rows:
            print(f"{row.name}\t{row.title}\t{' or '.join(map(str, row.codes))}")
        return 0
    clean_environment()
    server = Server() if is_available() and not asked.cold else Interpreters()
    began = time.monotonic()
    survived = 0
    with ThreadPoolExecutor(asked.workers) as pool:
        for row, problems in zip(
            rows, pool.map(lambda row: run_row(row, server), rows), strict=True
        ):
            survived += not problems
            if problems:
                print(f"{row.name}: {row.title}", *problems, sep="\n    ", flush=True)
    server.close()
    seconds = time.monotonic() - began
    print(f"fault rows: tried {len(rows)}, survived {survived} ({seconds:.0f} s)")
    return 0 if rows and survived == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
