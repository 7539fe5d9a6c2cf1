"""The runner of the fault rows sees what is wrong: a row that it lets pass has survived."""

from pathlib import Path

import pytest

from tests.faults.case import Case, Ended, Row, compare_snapshots, find_problems, run_row
from tests.support.server import Interpreters, Server


def ended(code: int, stderr: str, stdout: str = "") -> Ended:
    return Ended((), code, stdout, stderr, 0.1, 0)


@pytest.mark.parametrize(
    ("code", "stderr", "problem"),
    [
        (1, "flux: error: no.\nhint: x\n", "exit 1"),
        (2, "flux: error: no.\n", "no hint"),
        (2, "", "0 error lines"),
        (2, "flux: error: no.\nflux: error: no.\nhint: x\n", "2 error lines"),
        (2, "flux: error: no.\nhint: x\nhint: y\n", "2 hints"),
        (2, "flux: error: \x1b[31mno.\nhint: x\n", "control characters"),
        (0, "libgomp: Invalid value\n", "not ours"),
        (4, 'Traceback (most recent call last)\nflux: error: no.\nhint: x\n', "a traceback"),
    ],
)  # fmt: skip
def test_what_breaks_the_invariant_is_a_problem(code, stderr, problem):
    assert any(problem in found for found in find_problems(ended(code, stderr)))


@pytest.mark.parametrize(
    ("code", "stderr"),
    [
        (0, ""),
        (2, "flux: error: no.\nhint: x\n"),
        (2, "flux: error: unknown format (--format): 'bmp' is not jpg, png or webp.\n"),
        (-2, ""),
    ],
)
def test_a_good_end_is_none(code, stderr):
    assert not find_problems(ended(code, stderr))


def test_files_that_are_changed_deleted_or_left_are_problems():
    before = {"a": "1", "b": "2", "c/d": "3"}
    after = {"a": "9", "c/d": "4", ".flux-00aa.tmp": "5", "new.png": "6"}
    found = compare_snapshots(before, after, changes=["c"])
    assert found == ["changed a", "deleted b", "left .flux-00aa.tmp"]


def test_a_row_survives_by_its_code_and_its_words(commands: Server | Interpreters):
    def run(case: Case) -> None:
        case.flux("generate", "")

    def survives(codes: list[int], says: str) -> bool:
        return not run_row(Row("x", "an empty prompt", run, codes, says, False), commands)

    assert survives([2], "prompt")
    assert not survives([0], "prompt")
    assert not survives([2], "a fox")


def test_a_row_that_raises_or_runs_nothing_has_not_survived(commands: Server | Interpreters):
    def raises(case: Case) -> None:
        (case.folder / "missing" / "file").write_text("")

    for run in (raises, lambda case: None):
        assert run_row(Row("x", "", run, [0], "", False), commands)


def test_a_command_that_never_ends_is_killed(commands: Server | Interpreters):
    import os

    def hangs(case: Case) -> None:
        os.mkfifo(case.folder / "prompts.txt")
        keep = os.open(case.folder / "prompts.txt", os.O_RDWR)  # a writer that never writes
        case.flux("generate", "--from", Path("prompts.txt"), "-p", "tiny", timeout_s=2)
        os.close(keep)

    problems = run_row(Row("x", "", hangs, [-9], "", False), commands)
    assert any("still running" in problem for problem in problems)
