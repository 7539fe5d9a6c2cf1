"""`flux plan`: the table of rungs without weights or torch, and what it shares with `generate`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxcli import paths
from fluxcli.cli.app import app
from fluxcli.cli.plan import format_duration
from fluxcli.cli.replay import restore_order
from fluxcli.engine import device as hardware
from fluxcli.errors import ExitCode
from fluxcli.pictures.image import read_metadata
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, PHASES
from quant.spec import BAKEABLE
from tests.support.helpers import BAKED, ROOT, machine, order
from tests.support.invariant import assert_failed, call

CARD = ("plan", "--card", "12GiB:sm89")
VERDICTS = {"chosen", "fits", "too slow", "does not fit", "not now"}
patient = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, drawn: list):
    """A machine of a test in the place of this one; nothing is computed on it."""

    def to(here: Hardware) -> None:
        monkeypatch.setattr(hardware, "probe", lambda device="auto", **_: here)
        monkeypatch.setattr(hardware, "cap", lambda *_: None)

    return to


def planned(capsys: pytest.CaptureFixture, *arguments: str, code: int = 0) -> dict:
    """The JSON of `flux plan`."""
    result = call(capsys, *arguments, "--json")
    assert result.returncode == code, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def options_of(name: str) -> dict[str, tuple]:
    """(help, whether it is a switch) of every option of a command, by its names."""
    command = typer.main.get_command(app).commands[name]
    shown = [each for each in command.params if each.param_type_name == "option"]
    return {"/".join(each.opts): (each.help, each.is_flag) for each in shown}


# --- what it says


def test_it_needs_no_weights_and_no_torch():
    code = (
        "import sys\nfrom fluxcli.cli.app import run\n"
        f"commands = [[*{CARD}], [*{CARD}, '--json'], ['plan', '--card', '1GiB', '--json']]\n"
        "codes = [run(command) for command in commands]\n"
        "print(*map(int, codes))\nprint(*sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    *_, codes, loaded = result.stdout.splitlines()
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "PIL",
        "safetensors",
        "huggingface_hub",
        "bitsandbytes",
    }
    assert (
        codes == "0 0 5"
        and heavy.isdisjoint(loaded.split())
        and "fluxcli.plan.planner" in loaded.split()
    )


@pytest.mark.parametrize("text", ["6GiB:sm75", "12GiB:sm86", "24GiB:sm89", "96GiB:sm120"])
def test_json_has_every_placement_with_its_peaks_seconds_verdict_and_why(text, capsys):
    found = planned(capsys, "plan", "a fox", "--card", text, "--size", "768")
    assert (
        found["size"] == [768, 768]
        and found["request"]["prompt"] == "a fox"
        and found["download_bytes"] > 30e9
    )
    total = found["hardware"]["total_bytes"]
    errors = {row["precision"]: row["error"] for row in found["candidates"]}
    assert list(errors.values()) == sorted(errors.values()) and min(errors.values()) == 0
    assert set(BAKEABLE) < set(errors)
    for row in found["candidates"]:
        assert row["verdict"] in VERDICTS and row["why"] and not row["folder_is_packed"]
        if row["verdict"] != "does not fit":
            assert tuple(row["plan"]["peak_bytes"]) == PHASES
            assert all(0 < peak < total for peak in row["plan"]["peak_bytes"].values())
            assert {"load", *PHASES} == set(row["plan"]["seconds"]) and min(
                row["plan"]["seconds"].values()
            ) >= 0
            assert row["plan"]["reasons"]
    assert [row["precision"] for row in found["candidates"] if row["verdict"] == "chosen"] == [
        found["chosen"]
    ]


def test_text_and_json_say_the_same(capsys):
    found, text = planned(capsys, *CARD), call(capsys, *CARD).stdout
    lines, words = text.splitlines(), " ".join(text.split())
    for row in found["candidates"]:
        mark = "*" if row["verdict"] == "chosen" else " "
        cells, verdict = [line for line in lines if line.startswith(f"{mark} {row['precision']} ")]
        assert verdict.endswith(f"{row['verdict']}: {row['why']}")
        assert f" {row['error']:.3f} " in cells or (row["error"] == 0 and " 0 " in cells)
        peaks = [f"{peak / GIB:.2f}" for peak in row["plan"]["peak_bytes"].values()]
        assert [cell for cell in cells.split() if cell in peaks] == peaks
    chosen = next(row for row in found["candidates"] if row["verdict"] == "chosen")
    for reason in chosen["plan"]["reasons"]:
        assert reason in words or reason == f"{chosen['precision']}: {chosen['why']}"
    assert words.count(chosen["why"]) == 1
    assert "not downloaded" in text and "12.0 GiB" in text


def test_what_a_card_unpacks_is_said_with_its_reason(capsys):
    arguments = ("plan", "--card", "24GiB:sm86")
    rows = {row["precision"]: row for row in planned(capsys, *arguments)["candidates"]}
    why = "unpacked here, because its products need sm89"
    assert (rows["fp8"]["multiply"], rows["fp8"]["multiply_why"]) == ("dequantize", why)
    assert (rows["int8"]["multiply"], rows["int8"]["multiply_why"]) == ("int_mm", "")
    assert (rows["nf4"]["multiply"], rows["nf4"]["multiply_why"]) == ("dequantize", "")
    assert (rows["bf16"]["multiply"], rows["bf16"]["multiply_why"]) == ("bf16", "")
    for more, prefix in (((), ""), (("--precision", "fp8"), "because ")):
        text = call(capsys, *arguments, *more).stdout
        assert f"{prefix}fp8: {why}" in text and text.count("unpacked") == 1
        assert "by the capability, with torch for Linux" in text


def test_a_card_that_was_asked_is_planned_by_what_it_said(put, capsys):
    """Its fp8 is unpacked although the capability would do: with more memory, and more seconds."""
    native = machine(12, multiply={"fp8": "scaled_mm", "int8": "int_mm"})
    why = {"fp8": "Rowwise scaling is not currently supported"}
    unpacked = {"fp8": "dequantize", "int8": "int_mm"}
    found = {}
    for name, here in (
        ("native", native),
        ("unpacked", replace(native, multiply=unpacked, multiply_why=why)),
    ):
        put(here)
        found[name] = planned(capsys, "plan", "--precision", "fp8", "--size", "512")
    plans = {name: each["candidates"][0]["plan"] for name, each in found.items()}
    peaks = {name: plan["peak_bytes"]["denoise"] for name, plan in plans.items()}
    streamed = {name: len(plan["residency"]["streamed"]) for name, plan in plans.items()}
    assert (streamed["unpacked"], peaks["unpacked"]) > (streamed["native"], peaks["native"])
    assert plans["unpacked"]["seconds"]["denoise"] > plans["native"]["seconds"]["denoise"]
    said = f"fp8: unpacked here, because {why['fp8']}"
    assert said in plans["unpacked"]["reasons"] and said not in plans["native"]["reasons"]
    assert "with torch for Linux" not in call(capsys, "plan").stdout


@pytest.mark.parametrize("card", ["4GiB", "12GiB:sm86", "RTX 4090", "96GiB:sm120", "M4 Max 64GB"])
@pytest.mark.parametrize("size", ["512", "1024"])
def test_no_line_is_longer_than_80_columns(card, size, capsys):
    text = call(capsys, "plan", "--card", card, "--size", size, "-p", "dev").stdout
    assert text and max(map(len, text.splitlines())) <= 80


def test_the_table_has_units_and_times_for_people(capsys):
    text = call(capsys, "plan", "--device", "cpu", "-p", "dev", "--ram", "64GiB").stdout
    assert "peak RAM in GiB" in text and re.search(r"\d+ h \d+ min\n", text)
    assert "peak memory in GiB" in call(capsys, *CARD).stdout


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (59.2, "59 s"), (59.9, "1 min 0 s"), (90, "1 min 30 s"),
     (3599.7, "1 h 0 min"), (29987, "8 h 20 min")],
)  # fmt: skip
def test_seconds_are_minutes_and_hours_where_they_are_many(seconds, text):
    assert format_duration(seconds) == text


def test_the_ram_of_another_machine(capsys):
    def ram(*arguments: str) -> tuple[int, int]:
        found = planned(capsys, *CARD, *arguments)["hardware"]
        return found["ram_bytes"], found["ram_free_bytes"]

    assert ram("--ram", "16GiB") == ram("--ram", "16") == (16 * GIB, 14 * GIB)
    assert ram()[0] == psutil.virtual_memory().total
    on_cpu = planned(capsys, "plan", "--device", "cpu", "-p", "dev", "--ram", "64GiB")["hardware"]
    assert (on_cpu["total_bytes"], on_cpu["free_bytes"]) == (64 * GIB, 56 * GIB)
    for nonsense in ("x", "0", "99999TiB", "1KiB", "-1"):
        message = assert_failed(call(capsys, *CARD, f"--ram={nonsense}"), ExitCode.USAGE)
        assert "--ram" in message


TOO_LARGE = ("--card", "8GiB", "--offload", "none", "--precision", "bf16")


@pytest.mark.parametrize("arguments", [("--card", "1GiB"), TOO_LARGE])
def test_where_nothing_fits_it_is_exit_5_with_the_rungs_and_one_error(arguments, capsys):
    text, as_json = call(capsys, "plan", *arguments), call(capsys, "plan", *arguments, "--json")
    found = json.loads(as_json.stdout)
    assert found["chosen"] is None and all(
        row["verdict"] == "does not fit" for row in found["candidates"]
    )
    for result in (text, as_json):
        message = assert_failed(result, ExitCode.DOES_NOT_FIT)
        assert "GiB" in message and "hint: " in message
    assert found["candidates"][0]["why"] in text.stdout


def test_the_hint_of_what_would_fit_is_right(capsys):
    message = assert_failed(call(capsys, "plan", *TOO_LARGE), ExitCode.DOES_NOT_FIT)
    (hint,) = [
        line.removeprefix("hint: ").split()
        for line in message.splitlines()
        if line.startswith("hint: ")
    ]
    assert hint and all(flag.startswith("--") for flag in hint[::2])
    assert planned(capsys, "plan", *TOO_LARGE, *hint)["chosen"]  # a later flag counts


# --- what it refuses


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ([*CARD, "-m", "somebody/else"], ExitCode.WEIGHTS, "somebody/else"),
        (["plan", "-m", "no-such-folder", "--card", "8GiB"], ExitCode.WEIGHTS, "no-such-folder"),
        (["plan", " ", "--card", "8GiB"], ExitCode.USAGE, "prompt"),
        ([*CARD, "-p", "schnell", "--guidance", "3"], ExitCode.USAGE, "guidance"),
        ([*CARD, "-p", "dev", "--guidance", "none"], ExitCode.USAGE, "guidance"),
        ([*CARD, "-o", "x.gif"], ExitCode.USAGE, "jpg, png, webp"),
        ([*CARD, "--size", "1000"], ExitCode.USAGE, "992 and 1008"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, code, word, capsys):
    result = call(capsys, *arguments)
    assert word in assert_failed(result, code) and result.stdout == ""


NONSENSE = {
    "vram_limit": [
        "much",
        "-1",
        "0",
        "100KiB",
        "8 parsecs",
        "nan",
        "inf",
        "1e3GiB",
        "8GiB2",
        "99999TiB",
    ],
    "offload": ["disk", "", "Stream", "none,stream", "0"],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in NONSENSE.items() for value in values]
)
def test_no_limit_and_no_offload_is_exit_2_wherever_it_stands(
    name, value, capsys, monkeypatch, config_folder
):
    flag, variable = "--" + name.replace("_", "-"), f"FLUX_{name.upper()}"
    for command in ("generate", "plan"):
        assert flag in assert_failed(call(capsys, command, "x", f"{flag}={value}"), ExitCode.USAGE)
    if value:  # an empty variable is none
        monkeypatch.setenv(variable, value)
        assert variable in assert_failed(call(capsys, *CARD), ExitCode.USAGE)
        monkeypatch.delenv(variable)
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text(f'{name} = "{value}"\n')
    assert "config.toml" in assert_failed(call(capsys, *CARD), ExitCode.USAGE)


def test_no_wait_is_a_switch(capsys, drawn):
    assert "--no-wait" in assert_failed(
        call(capsys, "generate", "x", "-p", "tiny", "--no-wait=yes"), ExitCode.USAGE
    )
    assert (
        call(capsys, "generate", "x", "-p", "tiny", "--no-wait").returncode == 0 and len(drawn) == 1
    )


def test_an_offload_on_the_cpu_does_nothing_and_is_refused(capsys, drawn):
    for command in ("generate", "plan"):
        message = assert_failed(
            call(capsys, command, "x", "-p", "tiny", "--offload", "stream"), ExitCode.USAGE
        )
        assert "--offload stream" in message and not drawn


# --- what it shares with generate


def test_it_takes_every_option_of_generate():
    generate, plan = options_of("generate"), options_of("plan")
    own = {"--dry-run", "--from", "--resume", "--fail-fast", "--comments", "--prompt"}
    assert {
        name: shown for name, shown in generate.items() if name not in own
    }.items() <= plan.items()
    assert set(plan) - set(generate) == {"--card", "--ram"} and own <= set(generate)
    assert {"--vram-limit", "--offload", "--no-wait", "--precision"} <= set(options_of("decode"))


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32", *BAKEABLE])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_generate_would_do_what_the_plan_says(precision, device, put, capsys, baked):
    paths.baked_folder().mkdir(parents=True)
    (paths.baked_folder() / "tiny-nf4").symlink_to(baked("nf4", **BAKED["nf4"]))
    put(machine(16, device, bf16=device != "cpu"))
    arguments = ("a fox", "-p", "tiny", "--seed", "5", "--precision", precision)
    found, dry = (
        planned(capsys, "plan", *arguments),
        planned(capsys, "generate", *arguments, "--dry-run"),
    )
    chosen = next(row for row in found["candidates"] if row["verdict"] == "chosen")
    assert chosen["plan"] == dry["plan"] and found["chosen"] == dry["plan"]["precision"]
    assert (found["request"], found["size"]) == (dry["request"], dry["size"]) and found[
        "download_bytes"
    ] == 0
    packed = [row["precision"] for row in found["candidates"] if row["folder_is_packed"]]
    assert packed == ["nf4"] * (precision in ("auto", "nf4"))


@pytest.mark.parametrize("limit", ["1MiB", "64MiB"])
def test_what_generate_would_refuse_the_plan_refuses(limit, put, capsys, drawn):
    put(machine(16))
    for command in (["plan"], ["generate"], ["generate", "--dry-run"]):
        result = call(capsys, *command, "x", "-p", "tiny", "--vram-limit", limit)
        assert "GiB" in assert_failed(result, ExitCode.DOES_NOT_FIT) and not drawn


@pytest.mark.parametrize(
    "text, size",
    [("8GiB", 8 * GIB), ("8 GB", 8 * 10**9), ("8g", 8 * GIB), ("9000000000", 9e9), ("8", 8 * GIB)],
)
def test_a_limit_counts_from_flag_variable_and_settings_file(
    text, size, capsys, monkeypatch, config_folder
):
    def budgets(*arguments: str) -> set[int]:
        found = planned(capsys, "plan", "--card", "24GiB:sm89", "--precision", "nf4", *arguments)
        return {row["plan"]["budget_bytes"] for row in found["candidates"]} | {
            found["request"]["vram_limit"]
        }

    assert size not in budgets() and budgets("--vram-limit", text) == {size}
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text(f'vram_limit = "{text}"\n')
    assert budgets() == {size}
    (config_folder / "config.toml").write_text('vram_limit = "7GiB"\n')
    monkeypatch.setenv("FLUX_VRAM_LIMIT", text)
    assert budgets() == {size} and budgets("--vram-limit", "7GiB") == {7 * GIB}


def test_a_picture_keeps_limit_and_offload_and_a_replay_has_them(put, drawn, capsys):
    put(machine(24))
    made = call(
        capsys,
        "generate",
        "a fox",
        "-p",
        "tiny",
        "--seed",
        "5",
        "--vram-limit",
        "8GiB",
        "--offload",
        "none",
    )
    picture = Path(made.stdout.strip())
    stored = read_metadata(picture)["request"]
    assert (stored["vram_limit"], stored["offload"]) == (8 * GIB, "none")
    assert call(capsys, "replay", str(picture)).returncode == 0
    assert (
        call(capsys, "replay", str(picture), "--vram-limit", "9GiB", "--offload", "auto").returncode
        == 0
    )
    assert [(each.resources.vram_limit, each.resources.offload) for each in drawn] == [
        (8 * GIB, "none")
    ] * 2 + [(9 * GIB, "auto")]
    assert read_metadata(picture) == read_metadata(Path("a-fox-5-2.png"))


@patient
@given(
    st.none() | st.integers(1 << 20, 1 << 50),
    st.sampled_from(["auto", "none", "stream", "sequential"]),
)
def test_any_limit_and_offload_come_back_from_metadata(limit, offload):
    metadata = order("a fox", seed=5, vram_limit=limit, offload=offload).to_json()
    stored = json.loads(json.dumps(metadata))
    assert restore_order(Path("x.png"), stored, given={}).to_json() == metadata


@pytest.mark.parametrize("text", ["1024x768", "1024*768", "1024\u00d7768"])
def test_a_size_of_two_sides_is_taken_and_said(text, drawn, capsys):
    result = call(capsys, "generate", "a fox", "-p", "tiny", "--size", text)
    assert result.returncode == 0 and drawn[0].request.size == (1024, 768)
    assert f"--size {text} is --width 1024 --height 768" in result.stderr
    assert planned(capsys, *CARD, "--size", text)["size"] == [1024, 768]
