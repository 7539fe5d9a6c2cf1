"""Names of a batch's pictures, and what can be no batch at all."""

from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.errors import ExitCode
from fluxcli.pictures.image import read_metadata
from tests.support.batches import FAKE, draw, failed_rows, of, write
from tests.support.invariant import assert_failed, call, files


def test_templates_know_the_row(drawn, capsys):
    source = write({"prompt": "a", "seed": 1}, "{", {"prompt": "b", "seed": 1, "count": 2})
    result = call(capsys, "generate", "--from", source, *FAKE, "-o", "o/{row:03d}-{slug}-{n}")
    assert (
        result.stdout.split()
        == ["o/001-a-1.png", "o/003-b-1.png", "o/003-b-2.png"]
        == [f"o/{name}" for name in files(Path("o"))]
    )


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_one_name_for_all_rows_is_refused_before_anything_is_drawn(options, drawn, capsys):
    source = write(
        *({"prompt": f"p{k}", "seed": k} for k in range(1, 3)),
        {"prompt": "c", "seed": 3, "output": "c.png"},
    )
    failed = of(draw(capsys, source, *FAKE, *options, "-o", "x.png", code=7), "failed")[:-1]
    assert [(each["row"], each["exit_code"]) for each in failed] == [(1, 2), (2, 2)] and len(
        drawn
    ) == 1
    assert "one file name for several" in failed[0]["message"] and sorted(files(Path())) == [
        "c.png",
        "p.jsonl",
    ]


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_rows_that_name_the_same_file_lose_no_picture(options, drawn, capsys):
    rows = [{"prompt": f"p{k}", "seed": k, "output": "x.png"} for k in (1, 2)]
    failed = of(draw(capsys, write(*rows), *FAKE, *options, code=7), "failed")[0]
    assert (failed["row"], failed["exit_code"]) == (2, 2) and len(drawn) == 1
    assert sorted(files(Path())) == ["p.jsonl", "x.png"]
    assert read_metadata(Path("x.png"))["request"]["seed"] == 1
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE)
    # nothing is computed for a name that is taken
    assert set(failed_rows(result)) == {1, 2} and len(drawn) == 1


@pytest.mark.parametrize("where", ["variable", "settings"])
def test_stdout_is_refused_wherever_it_is_asked_for(where, drawn, capsys, monkeypatch):
    if where == "variable":
        monkeypatch.setenv("FLUX_OUTPUT", "-")
    else:
        config = paths.config_folder() / "config.toml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text('output = "-"\n')
    result = call(capsys, "generate", "--from", write("a", "b", name="p.txt"), *FAKE)
    assert "takes one picture" in assert_failed(result, ExitCode.USAGE) and not drawn


def test_no_home_and_a_field_said_twice_are_errors(drawn, capsys):
    said = assert_failed(call(capsys, "generate", "--from", "~nobody-here/x"), ExitCode.USAGE)
    assert "cannot read the rows" in said
    result = call(
        capsys, "generate", "--from", write({"prompt": "a", "size": 64, "image_size": 128}), *FAKE
    )
    assert "the same field twice" in failed_rows(result)[1] and not drawn
    result = call(
        capsys, "generate", "--from", write({"prompt": "a", "lora": {"x.safetensors": 0.5}}), *FAKE
    )
    assert "lora" in failed_rows(result)[1] and not drawn


def test_a_utf_16_file_draws_nothing(drawn, capsys):
    Path("p.txt").write_text("a fox\na dog\n", "utf-16")
    result = call(capsys, "generate", "--from", "p.txt", *FAKE)
    assert "UTF-16" in assert_failed(result, ExitCode.USAGE) and not drawn


@pytest.mark.parametrize("row", [{"prompt": "a", "count": 2}, {"prompt": "a", "n": 2}])
def test_one_name_for_a_row_of_several_fails_that_row(row, drawn, capsys):
    result = call(capsys, "generate", "--from", write(row), *FAKE, "-o", "x.png")
    assert list(failed_rows(result)) == [1] and not drawn


REFUSED = {
    "stdout": (["--from", "p.txt", "-o", "-"], "-o FOLDER/"),
    "dry run": (["--from", "p.txt", "--dry-run"], "flux plan"),
    "json and events": (["--from", "p.txt", "--json", "--events"], "exclude"),
    "resume alone": (["x", "--resume"], "--resume needs --from"),
    "fail-fast alone": (["x", "--fail-fast"], "--fail-fast needs --from"),
    "stdin twice": (["-", "--from", "-"], "cannot be read twice"),
    "no file": (["--from", "nope.txt"], "No such file"),
    "NUL": (["--from", "a\0b"], "cannot read the rows"),
    "a folder": (["--from", "."], "directory"),
    "an empty file": (["--from", "empty.csv"], "no prompts (empty.csv)"),
    "a bad header": (["--from", "bad.csv"], "no usable header (bad.csv:1)"),
}


@pytest.mark.parametrize("arguments, word", REFUSED.values(), ids=REFUSED)
def test_what_can_be_no_batch_is_a_usage_error_and_draws_nothing(arguments, word, drawn, capsys):
    for name, text in {"p.txt": "a\n", "empty.csv": "prompt\n", "bad.csv": "prompt,,\na\n"}.items():
        Path(name).write_text(text)
    result = call(capsys, "generate", *arguments, "-p", "tiny")
    assert word in assert_failed(result, ExitCode.USAGE)
    assert not drawn and len(files(Path())) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ("--steps", "0"),
        ("-p", "tinyy"),
        ("-o", "s/{sed}"),
        ("-o", "noext"),
        ("--format", "gif"),
        ("-o", "-"),
    ],
)
def test_what_is_wrong_for_every_row_is_said_once(wrong, drawn, capsys):
    result = call(capsys, "generate", "--from", write("a", "b", name="p.txt"), *FAKE, *wrong)
    assert_failed(result, ExitCode.USAGE)
    assert not drawn
