"""What the README has people type to install: the files are there, the versions are those that were
tested, and an installed build of torch for a GPU stays.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.helpers import ROOT

USERS = ROOT / "constraints.txt"
OURS = ROOT / "constraints-torch.txt"
PYTORCH = re.compile(r"https://download\.pytorch\.org/whl/(cpu|cu\d{3})")
# The newest build of CUDA beside the plain index's torch: what somebody has installed already.
INSTALLED = "2.99.0+cu130"


def read_pins(path: Path) -> dict[str, str]:
    """The versions of a file of constraints, by the package's name; all are pinned."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def find_commands() -> list[list[str]]:
    """The arguments of every `pip install` in the README's blocks."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"^pip install (.+)$", text, re.MULTILINE)
    return [line.split() for line in found]


def test_constraints_pin_everything_but_torch_and_torch_by_itself():
    users, ours = read_pins(USERS), read_pins(OURS)
    assert set(ours) == {"torch"} and not {"torch", "torchvision", "triton"} & set(users)
    assert not [name for name in users if name.startswith(("nvidia", "cuda"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in project["dependencies"] + extras:
        wanted = Requirement(line)
        pins = {name.lower().replace("_", "-"): pin for name, pin in (users | ours).items()}
        assert wanted.specifier.contains(pins[wanted.name.lower()]), line


def test_the_commands_of_the_readme_name_what_is_there():
    commands = find_commands()
    torch = f"torch=={read_pins(OURS)['torch']}"
    indexed = [each for each in commands if "--index-url" in each]
    assert len(indexed) == 2 and all(each[0] == torch for each in indexed)
    assert all(PYTORCH.fullmatch(each[each.index("--index-url") + 1]) for each in indexed)
    plain = [each for each in commands if each not in indexed]
    assert len(plain) == 3 and all(each[-1] == "." for each in plain)
    for each in plain:
        files = [ROOT / each[i + 1] for i, word in enumerate(each) if word == "-c"]
        assert USERS in files and set(files) <= {USERS, OURS}


def test_this_projects_own_environment_has_the_pinned_torch():
    import torch

    makefile = (ROOT / "Makefile").read_text()
    assert "PIP = " in makefile and f"-c {USERS.name} -c {OURS.name}\n" in makefile
    assert torch.__version__.split("+")[0] == read_pins(OURS)["torch"]


@pytest.mark.parametrize("files", [[USERS], [USERS, OURS]], ids=["users", "ours"])
def test_an_installed_torch_for_a_gpu_stays_unless_its_pin_is_asked_for(files, tmp_path):
    """pip's dry run beside such a torch, without an index: nothing can be put in its place."""
    metadata = tmp_path / "site" / "torch-2.99.0+cu130.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {INSTALLED}\n")
    (metadata.parent / "RECORD").write_text("")
    (metadata.parent / "INSTALLER").write_text("pip")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("\n".join(project["dependencies"]))
    report = tmp_path / "report.json"
    constraints = [word for file in files for word in ("-c", str(file))]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-q"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "PIP_CONFIG_FILE": os.devnull}
    run = subprocess.run(
        [*command, *constraints, "-r", str(wanted), "--report", str(report)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if OURS in files:
        assert run.returncode and "Cannot install torch" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        assert json.loads(report.read_text())["install"] == []
