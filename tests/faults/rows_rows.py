"""Fault rows of `--from`, of prompts on stdin, and of the names that pictures get."""

import contextlib
import json
import os
import threading
from pathlib import Path

from tests.faults.case import PROMPT, QUICK, Case, Ended, fault

UNBOUNDED = 1 << 27  # bytes: far more than is taken


def draw_rows(case: Case, source: str | Path, *arguments: str, **options: object) -> Ended:
    """Run a batch of small pictures into out/."""
    return case.flux(
        "generate", "--from", source, "-p", "tiny", *QUICK, "-o", "out/", *arguments, **options
    )


def expect_pictures(case: Case, count: int) -> None:
    assert len(list(case.folder.glob("out/*.png"))) == count


# --- rows that are drawn

TAKEN = {
    "semicolons": ("r.csv", f"prompt;seed\r\n{PROMPT};1\r\n", 1),
    "semicolons-said": ("r.csv", f"sep=;\r\nprompt;seed\r\n{PROMPT};1\r\n", 1),
    "tabs": ("r.tsv", f"prompt\tseed\n{PROMPT}\t1\n", 1),
    "tabs-in-csv": ("r.csv", f"prompt\tseed\n{PROMPT}\t1\n", 1),
    "empty-records": ("r.csv", f"prompt,seed\r\n{PROMPT},1\r\n,\r\n,\r\n", 1),
    "empty-cells-more": ("r.csv", f"prompt,seed\r\n{PROMPT},1,,\r\n", 1),
    "whole-floats": ("r.csv", f"prompt,seed,steps\n{PROMPT},4.0,1.0\n", 1),
    "whole-floats-json": ("r.jsonl", json.dumps({"prompt": PROMPT, "seed": 4.0}), 1),
    "null": ("r.jsonl", json.dumps({"prompt": PROMPT, "output": None, "steps": None}), 1),
    "list": ("r.json", json.dumps([{"prompt": PROMPT, "seed": k} for k in (1, 2)], indent=1), 2),
    "object": ("r.json", json.dumps({"prompt": PROMPT, "seed": 1}, indent=1), 1),
    "old-mac": ("r.csv", f"prompt,seed\r{PROMPT},1\r{PROMPT},2\r", 2),
    "mark": ("r.csv", f"\ufeffprompt,seed\n{PROMPT},1\n", 1),
    "kohya": ("r.txt", f"{PROMPT} --n blurry --w 64 --h 64 --s 1 --d 42 --l 7\n", 1),
    "a1111": ("r.txt", f'--prompt "{PROMPT}" --steps 20\n', 1),
    "size-of-a-row": ("r.csv", f"prompt,width,height\n{PROMPT},128,64\n", 1),
}
for _name, _taken in TAKEN.items():

    @fault(f"rows-taken-{_name}", f"rows with {_name}", codes=[0])
    def rows_taken(case: Case, taken: tuple[str, str, int] = _taken) -> None:
        name, content, count = taken
        draw_rows(case, case.write(name, content))
        expect_pictures(case, count)


@fault("rows-comments", "notes among prompts, asked for", codes=[0])
def rows_comments(case: Case) -> None:
    draw_rows(case, case.write("r.txt", f"# a note\n{PROMPT}\n"), "--comments")
    expect_pictures(case, 1)


@fault(
    "rows-notes", "notes among prompts, not asked for: drawn, and said", codes=[0], says="--comm"
)
def rows_notes(case: Case) -> None:
    draw_rows(case, case.write("r.txt", f"# a note\n{PROMPT}\n"))


# --- rows that end the batch

ENDING: dict[str, tuple[str, str | bytes, str]] = {
    "utf-16": ("r.csv", f"prompt\n{PROMPT}\n".encode("utf-16"), "UTF-16"),
    "utf-16-text": ("r.txt", f"{PROMPT}\n".encode("utf-16"), "UTF-16"),
    "utf-32": ("r.jsonl", f"{PROMPT}\n".encode("utf-32"), "UTF-32"),
    "empty": ("r.txt", "", "no prompts"),
    "header-alone": ("r.csv", "prompt,seed\n", "no prompts"),
    "column-twice": ("r.csv", f"prompt,prompt\n{PROMPT},{PROMPT}\n", "repeated column"),
    "column-unknown": ("r.csv", f"promt,seed\n{PROMPT},1\n", "'prompt'"),
    "no-header": ("r.csv", f"{PROMPT},1\n", "no setting"),
    "list-cut": ("r.json", '[{"prompt": "a"},\n', "not JSON"),
    "line-too-long": ("r.txt", b"a" * (1 << 25), "no rows"),
}
for _name, _ending in ENDING.items():

    @fault(f"rows-end-{_name}", f"rows: {_name}", codes=[2], says=_ending[2])
    def rows_end(case: Case, ending: tuple[str, str | bytes, str] = _ending) -> None:
        draw_rows(case, case.write(ending[0], ending[1]))


@fault("rows-huge-file", "a sparse file of 1 TB", codes=[2], says="MiB")
def rows_huge_file(case: Case) -> None:
    path = case.write("r.txt", "")
    os.truncate(path, 1 << 40)
    try:
        draw_rows(case, path)
    finally:
        os.truncate(path, 0)  # or its hash takes for ever


@fault("rows-folder", "--from a folder", codes=[2])
def rows_folder(case: Case) -> None:
    draw_rows(case, case.folder)


@fault("rows-absent", "--from a file that is not there", codes=[2])
def rows_absent(case: Case) -> None:
    draw_rows(case, "nowhere.txt")


for _device in ("zero", "urandom"):

    @fault(f"rows-{_device}", f"--from /dev/{_device}", codes=[2])
    def rows_device(case: Case, device: str = _device) -> None:
        draw_rows(case, f"/dev/{device}", memory_bytes=2 << 30)


@fault("rows-null", "--from /dev/null", codes=[2], says="no prompts")
def rows_null(case: Case) -> None:
    draw_rows(case, "/dev/null")


@fault("rows-stdin-blank", "blank lines without an end on stdin", codes=[2], says="no end")
def rows_stdin_blank(case: Case) -> None:
    draw_rows(case, "-", stdin="\n" * UNBOUNDED)


@fault("rows-stdin-many", "more rows on stdin than are taken", codes=[2], says="no end")
def rows_stdin_many(case: Case) -> None:
    draw_rows(case, "-", stdin="{\n" * (UNBOUNDED >> 1))


@fault("rows-fifo-field", "a field of 64 MB by a FIFO", codes=[2])
def rows_fifo_field(case: Case) -> None:
    path = case.folder / "r.jsonl"
    os.mkfifo(path)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads to the end
            path.write_bytes(b'{"prompt": "' + b"a" * (64 << 20) + b'"}\n')

    threading.Thread(target=write, daemon=True).start()
    draw_rows(case, path)


@fault("rows-no-weights", "forty rows without weights: one error", codes=[3], says="not here")
def rows_no_weights(case: Case) -> None:
    path = case.write("r.txt", f"{PROMPT}\n" * 40)
    ended = case.flux("generate", "--from", path, "-p", "dev", "-o", "out/")
    assert len(ended.stderr.splitlines()) == 2


# --- rows that fail

FAILING = {
    "key-unknown": ({"promt": PROMPT}, "'prompt'"),
    "no-prompt": ({"seed": 1}, "prompt is empty"),
    "prompt-number": ({"prompt": 5}, "no text"),
    "prompt-nul": ({"prompt": "a\0b"}, "NUL"),
    "prompt-huge": ({"prompt": "a" * 100_000}, "too long"),
    "seed-text": ({"prompt": PROMPT, "seed": "x"}, "whole number"),
    "seed-half": ({"prompt": PROMPT, "seed": 1.5}, "whole number"),
    "steps-list": ({"prompt": PROMPT, "steps": [1]}, "whole number"),
    "two-names": ({"prompt": PROMPT, "ar": "1:1", "aspect_ratio": "1:1"}, "same field twice"),
    "output-width": ({"prompt": PROMPT, "output": "{n:99999999999}.png"}, "only a width"),
    "output-nested": ({"prompt": PROMPT, "output": "{seed:{n}}.png"}, "only a width"),
    "output-attribute": ({"prompt": PROMPT, "output": "{seed.real}.png"}, "bad template"),
    "output-out": ({"prompt": PROMPT, "output": "{seed}/../../x"}, "leads out"),
    "output-nul": ({"prompt": PROMPT, "output": "a\0b.png"}, "unknown output"),
    "output-escape": ({"prompt": PROMPT, "output": "a\x1b[31m.png"}, "unknown output"),
    "output-long": ({"prompt": PROMPT, "output": "a" * 300 + ".png"}, "cannot write"),
}
for _name, _failing in FAILING.items():

    @fault(f"rows-fail-{_name}", f"a row of several: {_name}", codes=[7], says=_failing[1])
    def rows_fail(case: Case, row: dict[str, object] = _failing[0]) -> None:
        good = {"prompt": PROMPT, "seed": 1}
        lines = [json.dumps(each) for each in (row, good)]
        draw_rows(case, case.write("r.jsonl", "\n".join(lines)))
        expect_pictures(case, 1)


# --- prompts on stdin

PROMPTS = {
    "endless": ("y\n" * UNBOUNDED, "too long"),
    "zeros": ("\0" * UNBOUNDED, "too long"),
    "empty": ("", "empty"),
    "blank": (" \n\t\n", "empty"),
    "nul": ("a\0b", "NUL"),
    "long": ("a" * 9000, "too long"),
}
for _name, _prompt in PROMPTS.items():

    @fault(f"prompt-stdin-{_name}", f"a prompt on stdin: {_name}", codes=[2], says=_prompt[1])
    def prompt_stdin(case: Case, stdin: str = _prompt[0]) -> None:
        case.draw(prompt="-", stdin=stdin)


@fault("prompt-zero-device", "no prompt, but a stdin", codes=[2], says="flux generate -")
def prompt_unread(case: Case) -> None:
    case.flux("generate", "-p", "tiny", stdin=PROMPT)


# --- names of pictures

NAMES = {
    "out": ("{seed}/../../x", 2, "leads out"),
    "out-folder": ("{slug}/../", 2, "leads out"),
    "character": ("{seed:c}.png", 2, "only a width"),
    "nested": ("{seed:{n}}.png", 2, "only a width"),
    "attribute": ("{seed.real}.png", 2, "fields are"),
    "index": ("{seed[0]}.png", 2, "fields are"),
    "conversion": ("{seed!r}.png", 2, "only a width"),
    "huge-width": ("{n:99999999999}.png", 2, "only a width"),
    "precision": ("{slug:.3}.png", 2, "only a width"),
    "model": ("{model}.png", 2, "fields are"),
    "brace": ("{seed.png", 2, "bad template"),
    "newline": ("a\nb.png", 2, "unknown output"),
    "escape": ("a\x1b[2J.png", 2, "unknown output"),
    "long": ("a" * 300 + ".png", 6, "too long"),
    "no-extension": ("picture", 2, "extension"),
}
for _name, _asked in NAMES.items():

    @fault(f"name-{_name}", f"-o {_asked[0][:40]!r}", codes=[_asked[1]], says=_asked[2])
    def name_refused(case: Case, output: str = _asked[0]) -> None:
        case.draw("-o", output)
        assert not list(case.folder.glob("**/*.png"))


@fault("name-parents", "-o missing/../x.png is x.png, and printed so", codes=[0])
def name_parents(case: Case) -> None:
    ended = case.draw("-o", "missing/../x.png")
    assert Path(ended.stdout.strip()) == Path(os.path.realpath(case.folder / "x.png"))
    assert not (case.folder / "missing").exists()


@fault(
    "name-link", "a link in the output folder that leads out", codes=[6], says="leaves its folder"
)
def name_link(case: Case) -> None:
    (case.folder / "far").mkdir()
    (case.folder / "out").mkdir()
    (case.folder / "out/tiny").symlink_to("../far")
    case.draw("-o", "out/{preset}/{seed}")
    assert not list((case.folder / "far").iterdir())


@fault("name-dangling", "a dangling link has an automatic name", codes=[0])
def name_dangling(case: Case) -> None:
    (case.folder / "1.png").symlink_to("nowhere.png")
    ended = case.draw("-o", "{seed}.png")
    assert ended.stdout.strip() == "1-2.png" and not (case.folder / "nowhere.png").exists()
