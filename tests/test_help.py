"""Help pages, hints for what users of other tools type, and what the shell offers for values."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import typer

from fluxcli.cli import app, complete, hints
from fluxcli.cli.options import PRESET_SETTINGS
from fluxcli.errors import ExitCode
from fluxcli.paths import BUNDLED
from fluxcli.request.settings import SETTINGS
from tests.support.helpers import ROOT
from tests.support.invariant import assert_failed, call

PROGRAM = typer.main.get_command(app.app)


def find(path: str):
    command = PROGRAM
    for word in path.split():
        command = command.commands[word]
    return command


def flags(path: str) -> set[str]:
    return {flag for each in find(path).params for flag in (*each.opts, *each.secondary_opts)}


def pages(command=PROGRAM, path="") -> list[str]:
    found = [path.strip()]
    for name, below in getattr(command, "commands", {}).items():
        found += [] if below.hidden else pages(below, f"{path} {name}")
    return found


@pytest.mark.parametrize("path", pages())
def test_a_page_is_whole_in_80_columns(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = call(capsys, *path.split(), "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert (
        "..." not in re.sub(r"(ARGS\]|[A-Z])\.\.\.", "", result.stdout) and "<" not in result.stdout
    )
    assert call(capsys, "help", *path.split()).stdout == result.stdout


@pytest.mark.parametrize("path", ["", "models", "lora", "worker"])
def test_a_group_alone_shows_its_page(path, capsys):
    result = call(capsys, *path.split())
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == call(capsys, *path.split(), "--help").stdout


def test_pages_have_groups_defaults_and_examples(capsys):
    text = " ".join(call(capsys, "generate", "--help").stdout.split())
    for group in ("Picture:", "Output:", "Many pictures:", "Machine:", "Examples:"):
        assert group in text
    assert (
        "[default: the preset's; 28 in dev]" in text
        and "seed+k. [default: 1]" in text
        and "[default: a new one]" in text
    )
    assert "--ar W:H" in text and "-n, --count N" in text


def test_plan_and_decode_show_what_means_something_there(capsys):
    plan = call(capsys, "plan", "--help").stdout
    assert "--size" in plan and not re.search(r"--(seed|output|count|events|quality)\b", plan)
    assert "[default" not in call(capsys, "replay", "--help").stdout
    decode = call(capsys, "decode", "--help").stdout
    assert "--output" in decode and not re.search(r"--(seed|steps|lora|preset)\b", decode)


def test_settings_that_presets_decide_are_those_that_differ_between_presets():
    said = [tomllib.loads(path.read_text("utf-8")) for path in BUNDLED.glob("*.toml")]
    decided = {name for each in said for name in each if name in SETTINGS}
    assert decided - {"model", "lora", "redux_model"} == set(PRESET_SETTINGS)


@pytest.mark.parametrize("path", ["generate", "replay", "plan", "quantize"])
def test_examples_can_be_typed(path):
    lines = find(path).epilog.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert_exists(line)


def assert_exists(text: str) -> None:
    """The command of a line is one of ours, and its options are the command's."""
    _, name, *rest = shlex.split(text)
    known = flags(name) if name in PROGRAM.commands else set()
    assert name in PROGRAM.commands, text
    for word in rest:
        if word.startswith("-") and word != "-":
            assert word in known, text


SENTENCES = ("draws", "has", "plans")  # "flux draws ..." is no command


@pytest.mark.parametrize("command", hints.BY_COMMAND)
def test_what_hints_name_exists_and_what_they_are_for_does_not(command):
    path = {"download": "models download", "flux": ""}.get(command, command)
    own = flags(path) | {"-h", "--help"}
    for hint, options in hints.BY_COMMAND[command].items():
        assert not set(options) & own, (command, set(options) & own)
        known = set(own)
        for name in re.findall(r"flux ([a-z]+)\b", hint):
            if name not in SENTENCES:
                assert name in PROGRAM.commands, hint
                known |= flags(name)
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", hint))
        assert named <= known, (hint, named - known)
    everything = [option for options in hints.BY_COMMAND[command].values() for option in options]
    assert len(everything) == len(set(everything)), "an option with two hints"


TYPED = {
    "-W 1024": "--width",
    "-H 768": "--height",
    "-w 512": "--width",
    "-s 20": "--steps",
    "--cfg-scale 3": "--guidance",
    "--num-inference-steps 20": "--steps",
    "--num_inference_steps 20": "--steps",
    "--neg ugly": "--negative-prompt",
    "-n ugly": "--negative-prompt",
    "-i a.png": "--image FILE",
    "--init-image a.png": "--image FILE",
    "--quantize 8": "--precision int8",
    "-q 8": "--precision int8",
    "--out x.png": "-o FILE",
    "--open": "path that is printed",
    "-v": "--debug",
    "--verbose": "--debug",
    "--low-ram": "--offload",
    "--lora-paths x": "--lora FILE",
    "--lora-scales 1": "--lora FILE",
    "--batch-size 4": "-n 4",
    "--num-images 4": "-n 4",
    "--fp8": "--precision fp8",
    "--cpu-offload": "--offload",
    "--stps 4": "did you mean --steps",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_users_of_other_tools_type_is_understood(typed, capsys):
    message = assert_failed(call(capsys, "generate", "a fox", *typed.split()), ExitCode.USAGE)
    assert TYPED[typed] in message and "after --" not in message


@pytest.mark.parametrize(
    "typed, hint",
    [
        (["a red circle"], "flux generate 'a red circle'"),
        (["--", "a red circle"], "flux generate 'a red circle'"),
        (["-v"], "flux --version"),
        (["-p", "tiny", "a fox"], "options follow a command"),
        (["generate", "-5 degrees"], "generate -- '-5 degrees'"),
        (["quantize", "-m", "dev"], "flux quantize dev --to fp8"),
        (["quantize", "dev", "-o", "x", "--to", "fp8"], "flux quantize dev out/"),
        (["models", "download", "dev", "--local-dir", "x"], "--mirror"),
        (["help", "generat"], "did you mean 'generate'"),
        (["cache", "clear"], "hint: flux cache --clear"),
        (["doctor", "now"], "hint: flux doctor --help"),
        (["generate", "a", "red", "circle"], "quote a prompt"),
    ],
)
def test_a_wrong_command_line_says_what_to_type(typed, hint, capsys):
    assert hint in assert_failed(call(capsys, *typed), ExitCode.USAGE)


@pytest.mark.parametrize(
    "typed, hint",
    [
        (["generate", "x", "-m", "nofile"], "a folder, a file or ORG/NAME"),
        (["quantize", "nofile", "--to", "fp8"], "a folder, a file or ORG/NAME"),
    ],
)
def test_a_model_that_is_none_says_what_may_stand_there(typed, hint, capsys):
    message = assert_failed(call(capsys, *typed), ExitCode.WEIGHTS)
    assert hint in message and "-m FOLDER" not in message


def test_the_prompt_may_be_an_option(drawn, capsys):
    assert call(capsys, "generate", "--prompt", "a fox", "-p", "tiny").returncode == 0
    assert drawn[0].request.prompt == "a fox"
    both = call(capsys, "generate", "a fox", "--prompt", "a dog")
    assert "two prompts" in assert_failed(both, ExitCode.USAGE)


# --- completion


def offered(line: str, program: str = "flux", **environment: str) -> list[str]:
    """What bash offers at the end of a line."""
    words = line.split(" ")
    asking = {
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        f"_{program.upper()}_COMPLETE": "complete_bash",
    }
    code = f"import sys; sys.argv = [{program!r}]\nfrom fluxcli.__main__ import main\nmain()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | asking | environment,
    )
    assert result.stderr == ""
    return result.stdout.split()


OFFERED = {
    "generate x -p d": ["depth-dev", "depth-lora", "dev", "draft"],
    "generate x --control po": ["pose:"],
    "generate x --preset ti": ["tiny"],
    "generate x --precision f": ["fp16", "fp32", "fp8"],
    "generate x --ar 9": ["9:16", "9:21"],
    "generate x --format ": ["jpg", "png", "webp"],
    "generate x --device c": ["cpu", "cuda"],
    "generate x --offload s": ["stream", "sequential"],
    "generate x -m black-forest-labs/FLUX.1-s": ["black-forest-labs/FLUX.1-schnell"],
    "generate x --lora n": ["none"],
    "presets sch": ["schnell"],
    "models verify bun": ["bundled/tiny"],
    "models download sch": ["schnell"],
    "quantize dev --to n": ["nf4"],
    "models download dev --only va": ["vae"],
    "generate x -o ": [],
    "generate --from ": [],
    "inspect ": [],
}


@pytest.mark.parametrize("line", OFFERED)
def test_values_are_offered(line):
    assert offered(f"flux {line}") == OFFERED[line]


def test_both_names_complete_and_a_broken_file_offers_nothing(config_folder):
    assert offered("fluxcli presets ti", "fluxcli") == ["tiny"]
    assert offered("fluxcli presets ti", "fluxcli", _FLUX_COMPLETE="complete_bash") == ["tiny"]
    config_folder.mkdir(parents=True)
    (config_folder / "presets").mkdir()
    (config_folder / "presets" / "own.toml").write_text("steps = = 3")
    assert offered("flux presets o") == ["own"]
    assert offered("flux generate x -m nothing") == []


def test_completion_loads_nothing_heavy():
    code = "import sys; from fluxcli.cli import complete as c\n"
    code += "[f() for f in (c.offer_models, c.offer_loras, c.offer_sources)]\n"
    code += "print(*sys.modules, sep=chr(10))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert {"torch", "diffusers", "transformers", "numpy"}.isdisjoint(result.stdout.split())
    assert complete.offer_values("format")() == ["jpg", "png", "webp"]
