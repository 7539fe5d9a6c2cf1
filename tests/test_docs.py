"""The documents: their examples run, their links lead somewhere, their tables are what the program
says.

A fenced block with `<!-- tested -->` on the line before it is an example that runs on the bundled
model. Those of one document run in order, in one folder, each by bash, which ends at the first
command that fails. `flux` is a small program that hands the command to the tests' server.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fluxcli.cli.reference import write_reference
from fluxcli.engine.cards import describe_card
from fluxcli.models.shapes import read_known_shapes
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB
from fluxcli.plan.planner import find_chosen
from tests.support.helpers import ROOT, order, survey_for
from tests.support.server import Interpreters, Server

DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "training" / "README.md",
]
EXAMPLE = re.compile(r"^<!-- tested -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
README_LINES = 150
DEV = "black-forest-labs/FLUX.1-dev"
# A row of the README's table of cards: memory, name, precision, blocks streamed, peak, seconds.
CARD = re.compile(
    r"^\| (\d+) GB, (RTX [\w ]+) \| (\w+), (\d+|none) streamed \| ([\d.]+) GiB \| ([\d.]+) \|$",
    re.MULTILINE,
)
# A row of a walk through the code: a file, and what is defined there.
STATION = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
SOURCE = re.compile(r"`((?:quant|fluxcli|tests)/[\w/]*\w\.\w+)`")

# Sends its arguments, folder, environment and streams to the test, and ends as the command did.
FLUX = """#!{python} -SE
import json, os, socket, sys
call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [json.dumps(call).encode()], [0, 1, 2])
sys.exit(int(connection.recv(16) or b"1"))
"""


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def examples(document: Path) -> list[str]:
    return EXAMPLE.findall(document.read_text("utf-8"))


def anchor_of(heading: str) -> str:
    """The anchor that a Markdown viewer makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture
def shell(
    commands: Server | Interpreters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], subprocess.CompletedProcess]]:
    """Run a script in bash with a `flux` on its path; homes are those of a user who moved none."""
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name)
    programs = tmp_path / "bin"
    programs.mkdir()
    address = str(tmp_path / "calls")
    program = programs / "flux"
    program.write_text(FLUX.format(python=sys.executable, address=address))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    answering = threading.Thread(target=answer, args=(listener, commands), daemon=True)
    answering.start()

    def run(script: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    yield run
    run("flux worker stop")  # of an example that failed before it did
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def answer(listener: socket.socket, commands: Server | Interpreters) -> None:
    """Run what each connection asks for, one after the other, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            call = json.loads(data)
            changed = {
                name: value
                for name, value in call["environment"].items()
                if os.environ.get(name) != value and name.startswith("FLUX_")
            }
            command = commands.start(
                "-m",
                "fluxcli",
                *call["arguments"],
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                cwd=call["folder"],
                environment=changed,
            )
            for stream in streams:
                os.close(stream)
            connection.sendall(str(command.wait(120)).encode())


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if examples(each)], ids=name_of)
def test_the_examples_run_in_order(document, shell):
    for example in examples(document):
        result = shell(example)
        assert result.returncode == 0, f"{example}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document):
    for link in LINK.findall(FENCED.sub("", document.read_text("utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            headings = HEADING.findall(FENCED.sub("", target.read_text("utf-8")))
            assert anchor in [anchor_of(each) for each in headings], link


def test_the_reference_of_commands_is_made_from_the_application():
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert text == write_reference(), "python -m fluxcli.cli.reference > docs/commands.md"


def test_the_readme_is_a_first_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= README_LINES
    for document in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{document.name}" in text, f"nothing links to {document.name}"


def named_card(name: str, gib: int) -> Hardware:
    """The card of that name with its row of the table of cards, beside 32 GB of RAM."""
    hardware = describe_card(f"{name}:{gib}")
    return replace(hardware, ram_bytes=32 * 10**9, ram_free_bytes=28 * 10**9)


def test_the_table_of_cards_is_what_the_planner_predicts():
    rows = CARD.findall((ROOT / "README.md").read_text("utf-8"))
    assert len(rows) == 8
    for gib, name, precision, streamed, peak_gib, step_s in rows:
        request = order("a fox", steps=28)
        hardware = named_card(name, int(gib))
        plan = find_chosen(survey_for(request, [read_known_shapes(DEV)], hardware)).plan
        assert plan.precision == precision
        assert len(plan.placement.streamed) == int(streamed.replace("none", "0"))
        assert max(plan.peak_bytes.values()) / GIB == pytest.approx(float(peak_gib), abs=0.06)
        assert plan.seconds["denoise"] / 28 == pytest.approx(float(step_s), abs=0.06)


def test_the_walks_pass_through_code_that_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for path in SOURCE.findall(text):
        assert (ROOT / path).is_file(), path
    stations = STATION.findall(text)
    assert len(stations) > 20
    for path, name in stations:
        code = (ROOT / path).read_text("utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", code, re.MULTILINE), f"{path}: {name}"
