"""What tests of `flux generate --from` share: files of rows, their events and pictures, processes
to kill.
"""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxcli.errors import ExitCode
from fluxcli.pictures.image import read_metadata
from tests.support.invariant import assert_failed, call, files

SMALL = ("-p", "tiny", "--size", "64", "--steps", "2")  # real pictures
FAKE = ("-p", "tiny", "--size", "64")


def write(*rows: dict | str, name: str = "p.jsonl") -> str:
    """A file of these rows, as JSON where they are no text."""
    Path(name).write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8"
    )
    return name


def write_csv(rows: list[dict], name: str = "p.csv") -> str:
    with Path(name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def draw(capsys, source: str, *arguments: str, code: int = 0) -> list[dict]:
    """The events of a batch."""
    result = call(capsys, "generate", "--from", source, "--events", *arguments)
    assert result.returncode == code, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def of(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


def pixels(events: list[dict]) -> dict[int, list[str]]:
    """What is drawn by row."""
    found: dict[int, list[str]] = {}
    for event in of(events, "saved"):
        found.setdefault(event["row"], []).append(event["image"]["pixels_sha256"])
    return found


SINGLE: dict[tuple, list[str]] = {}


def single(capsys, *arguments: str) -> list[str]:
    """What a run of its own draws; known where another test asked."""
    if arguments not in SINGLE:
        result = call(
            capsys, "generate", *SMALL, *arguments, "--json", "-o", "single/", "--no-cache"
        )
        assert result.returncode == 0, result.stderr
        SINGLE[arguments] = [
            image["pixels_sha256"] for image in json.loads(result.stdout)["images"]
        ]
    return SINGLE[arguments]


def hashes(folder: str | Path = ".") -> list[str]:
    """The pixels below a folder, sorted; every picture is whole and says what it is."""
    return sorted(
        read_metadata(path)["pixels_sha256"]
        for path in Path(folder).rglob("*")
        if path.suffix in (".png", ".jpg")
    )


def split(stderr: str) -> tuple[dict[int, str], str, str]:
    """(messages by failed row, what else is said, the error line and its hint)."""
    lines = stderr.splitlines(keepends=True)
    rows = {
        int(m[1]): m[2]
        for line in lines
        if (m := re.fullmatch(r"flux: row (\d+) failed: (.*)\n", line))
    }
    for line in lines:
        alike = re.fullmatch(r"flux: rows? ([\d, to]+) failed as row (\d+) did\n", line)
        if alike:
            first = rows[int(alike[2])]
            rows |= dict.fromkeys(parse_numbers(alike[1]), first)
    is_failure = re.compile(r"flux: (row \d+ failed: |rows? [\d, to]+ failed as row)")
    rest = [line for line in lines if not is_failure.match(line)]
    end = [line for line in rest if line.startswith(("flux: error: ", "hint: "))]
    return rows, "".join(line for line in rest if line not in end), "".join(end)


def parse_numbers(text: str) -> Iterator[int]:
    """The numbers of a text like 2 to 5, 7."""
    for run in text.split(", "):
        first, _, last = run.partition(" to ")
        yield from range(int(first), int(last or first) + 1)


def failed_rows(result: subprocess.CompletedProcess) -> dict[int, str]:
    """Messages by failed row; what is below them keeps the invariant of every error."""
    rows, _, end = split(result.stderr)
    assert_failed(
        subprocess.CompletedProcess((), result.returncode, result.stdout, end), ExitCode.BATCH
    )
    return rows


def resumed(capsys, *arguments: str, source: str = "p.jsonl") -> tuple[list[str], list[str]]:
    """(new pictures, skipped ones) of a batch that goes on."""
    events = draw(capsys, source, *FAKE, "--resume", *arguments)
    return [e["image"]["path"] for e in of(events, "saved")], [
        e["path"] for e in of(events, "skipped")
    ]


PAINTED = """
import sys, pytest
from fluxcli.cli import app
from tests.support.invariant import paint_instead
paint_instead(pytest.MonkeyPatch())
app.main()
"""


def leftovers(folder: str) -> set[str]:
    return {name for name in files(Path(folder)) if name.endswith(".tmp")}


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stream)
