"""Fault rows of pictures under way: runs that end early, disks that fill, clocks, learned margins,
kept latents that are none.
"""

import json
import os
import resource
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.faults.case import PROMPT, QUICK, Case, Watched, fault

FOUR = ("generate", PROMPT, "-p", "tiny", *QUICK, "-n", "4", "-o", "out/")
LONG = ("generate", PROMPT, "-p", "tiny", *QUICK, "--steps", "40", "--events", "-o", "out/")
ROWS = "".join(f"a {colour} circle\n" for colour in ("red", "green", "blue", "white"))
LATENTS = "x.latents.safetensors"
SITE = """
import time
real, began = time.time, time.perf_counter()
def jump():
    return real() - (3600 if time.perf_counter() - began > {after_s} else 0)
time.time = jump
"""


@contextmanager
def under_way(
    case: Case, *arguments: str, word: str, nth: int = 1, **options: object
) -> Iterator[Watched]:
    """Start a command, and go on when `word` is in its nth line on stdout with it."""
    process = case.start(*arguments, **options)
    with case.watch(process, arguments, changes=("out",)) as watched:
        seen = 0
        while seen < nth:
            line = process.stdout.readline()
            assert line, process.communicate()
            seen += word in line
        yield watched
        watched.end()


def count_pictures(case: Case) -> int:
    return len(list((case.folder / "out").glob("*.png")))


# --- signals in mid-run

SIGNALS = {"int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}

for name, number in SIGNALS.items():

    @fault(
        f"early-{name}-count", f"SIG{name.upper()} after 2 of 4 pictures", codes=[-number],
        says="of 4 pictures are written; the others: the same command with --seed",
    )  # fmt: skip
    def early_count(case: Case, number: int = number) -> None:
        with under_way(case, *LONG, "-n", "4", word='"saved"', nth=2) as run:
            run.process.send_signal(number)
        assert count_pictures(case) >= 2

    @fault(
        f"early-{name}-rows", f"SIG{name.upper()} after 1 of 4 rows", codes=[-number],
        says="of 4 pictures are written; the others: the same command with --resume",
    )  # fmt: skip
    def early_rows(case: Case, number: int = number) -> None:
        case.write("rows.txt", ROWS)
        rows = ("generate", "--from", "rows.txt", *LONG[2:])
        with under_way(case, *rows, word='"saved"') as run:
            run.process.send_signal(number)
        assert count_pictures(case) >= 1

    @fault(f"early-{name}-one", f"SIG{name.upper()} in mid-picture", codes=[-number])
    def early_one(case: Case, number: int = number) -> None:
        with under_way(case, *LONG, word='"step"', nth=2) as run:
            run.process.send_signal(number)
        assert not (case.folder / "out").exists()


@fault("early-kill-resume", "kill -9 after one row, then --resume", codes=[0], says="is there")
def early_kill_resume(case: Case) -> None:
    case.write("rows.jsonl", "".join(f'{{"prompt": "a circle", "seed": {k}}}\n' for k in range(3)))
    rows = ("generate", "--from", "rows.jsonl", *LONG[2:6], *QUICK[:4], "-o", "out/", "--no-cache")
    with under_way(case, *rows, word="out/") as run:
        run.process.kill()
    case.flux(*rows, "--resume", changes=("out",))
    assert count_pictures(case) == 3


# --- the clock


@fault("clock-pictures-of-tomorrow", "--resume where pictures are dated tomorrow", codes=[0])
def clock_tomorrow(case: Case) -> None:
    _resume_after(case, time.time() + 86_400)


@fault("clock-pictures-of-1970", "--resume where pictures are dated 1970", codes=[0])
def clock_1970(case: Case) -> None:
    _resume_after(case, 0.0)


@fault("clock-pictures-of-2500", "--resume where pictures are dated 2200", codes=[0])
def clock_2200(case: Case) -> None:
    _resume_after(case, 7_258_118_400.0)


def _resume_after(case: Case, when: float) -> None:
    """Draw rows, date their pictures, and see that none is drawn again."""
    case.write("rows.txt", ROWS)
    rows = ("generate", "--from", "rows.txt", "-p", "tiny", *QUICK, "-o", "out/")
    case.flux(*rows)
    for path in (case.folder / "out").iterdir():
        os.utime(path, (when, when))
    again = case.flux(*rows, "--resume", "--json")
    assert [json.loads(line) for line in again.stdout.splitlines()][-1]["skipped"] == 4


@fault("clock-jumps-back", "the clock jumps back an hour in a batch", codes=[0], exhaustive=True)
def clock_jumps_back(case: Case) -> None:
    case.write("site/sitecustomize.py", SITE.format(after_s=3))
    case.write("rows.txt", ROWS * 3)
    rows = ("generate", "--from", "rows.txt", "-p", "tiny", *QUICK[:-1], "-o", "out/")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([str(case.folder / "site"), root])
    case.flux(*rows, cold=True, environment={"PYTHONPATH": path})


# --- memory and disks in mid-run


@fault("limit-as-in-mid-run", "RLIMIT_AS is reached in mid-run", codes=[0, 5], exhaustive=True)
def limit_as(case: Case) -> None:
    with under_way(case, *LONG, "--size", "256", word='"step"', nth=2, cold=True) as run:
        text = Path(f"/proc/{run.process.pid}/status").read_text()
        size_bytes = int(text.partition("VmSize:")[2].split()[0]) * 1024
        resource.prlimit(run.process.pid, resource.RLIMIT_AS, (size_bytes, size_bytes))


@fault(
    "disk-full-of-events", "300 steps' events into a file that cannot grow", codes=[6],
    says="stdout",
)  # fmt: skip
def disk_events(case: Case) -> None:
    with (case.root / "events.jsonl").open("wb") as file:
        limits = {resource.RLIMIT_FSIZE: 5_000}
        arguments = ("generate", PROMPT, "-p", "tiny", *QUICK, "--steps", "300", "--events")
        process = case.start(*arguments, limits=limits, stdout=file)
        with case.watch(process, arguments) as watched:
            watched.end()


@fault(
    "disk-full-at-the-picture", "the picture does not fit, its latents do", codes=[0, 6],
    exhaustive=True,
)  # fmt: skip
def disk_picture(case: Case) -> None:
    case.draw("-o", "x.png", "--size", "128", limits={resource.RLIMIT_FSIZE: 24_000})
    if case.ended[-1].code == 6:
        assert "flux decode x.latents.safetensors" in case.ended[-1].stderr
        case.flux("decode", "x.latents.safetensors")


@fault("folder-vanishes", "the output folder becomes a file in mid-run", codes=[6], says="decode")
def folder_vanishes(case: Case) -> None:
    out = case.folder / "out"
    with under_way(case, *LONG, word='"step"', nth=2):
        out.write_text("in the way")
    assert list((case.home / "XDG_DATA_HOME/flux/latents").glob("*.safetensors"))


# --- metadata


@fault("metadata-over-64k-jpg", "adapters whose paths are over a jpg's 64 KB", codes=[6])
def metadata_jpg(case: Case) -> None:
    adapter = _make_adapter()
    deep = "/".join(["d" * 200] * 14)
    arguments = []
    for k in range(24):
        name = f"{deep}/{k:02}{'a' * 150}.safetensors"
        case.write(name, adapter)
        arguments += ["--lora", name]
    ended = case.draw(*arguments, "-o", "x.jpg")
    assert "into a jpg" in ended.stderr, ended.stderr[:300]
    assert not (case.folder / "x.jpg").exists()


def _make_adapter() -> bytes:
    """An adapter of one layer, rank 1, for the bundled model."""
    tensors = {
        "transformer.proj_out.lora_A.weight": [1, 128],
        "transformer.proj_out.lora_B.weight": [64, 1],
    }
    header, at = {}, 0
    for name, shape in tensors.items():
        size_bytes = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


# --- margins

CPU = f"cpu, {psutil.virtual_memory().total / 2**30:.1f} GiB"  # as run/margin.py calls it
MARGINS = {
    "huge": json.dumps({CPU: 1 << 60}),
    "half": json.dumps({CPU: 8 << 30}),
    "negative": json.dumps({CPU: -1}),
    "text": json.dumps({CPU: "much"}),
    "list": "[1, 2]",
    "deep": "[" * 100_000,
    "no-text": "\x00\x01",
}

for name, content in MARGINS.items():

    @fault(f"margin-{name}", f"the margins' file: {name}", codes=[0])
    def margin_file(case: Case, content: str = content) -> None:
        path = case.home / "XDG_CACHE_HOME/flux/margin.json"
        path.parent.mkdir()
        path.write_text(content)
        case.draw()


@fault("margin-fifo", "the margins' file is a FIFO", codes=[0])
def margin_fifo(case: Case) -> None:
    folder = case.home / "XDG_CACHE_HOME/flux"
    folder.mkdir()
    os.mkfifo(folder / "margin.json")
    case.draw()


@fault("margin-folder", "the margins' file is a folder", codes=[0])
def margin_folder(case: Case) -> None:
    (case.home / "XDG_CACHE_HOME/flux/margin.json").mkdir(parents=True)
    case.draw()


# --- kept latents that are none


@fault("latents-fifo", "flux decode of a FIFO", codes=[4])
def latents_fifo(case: Case) -> None:
    os.mkfifo(case.folder / LATENTS)
    case.flux("decode", LATENTS)


@fault("latents-absent", "flux decode of nothing", codes=[2, 3, 4])
def latents_absent(case: Case) -> None:
    case.flux("decode", LATENTS)


@fault("latents-one-of-two", "flux decode of a file and of nothing", codes=[2, 3, 4])
def latents_one_of_two(case: Case) -> None:
    case.write(LATENTS, b"x" * 100)
    case.flux("decode", "absent.safetensors", LATENTS)


@fault("latents-folder", "flux decode of a folder", codes=[4])
def latents_folder(case: Case) -> None:
    (case.folder / LATENTS).mkdir()
    case.flux("decode", LATENTS)


for size in (0, 7, 8, 100):

    @fault(f"latents-cut-{size}", f"kept latents are {size} bytes", codes=[4])
    def latents_cut(case: Case, size: int = size) -> None:
        case.write(LATENTS, struct.pack("<Q", 90)[:size] + b"{" * max(0, size - 8))
        case.flux("decode", LATENTS)


@fault("latents-of-weights", "flux decode of a model's weights", codes=[4])
def latents_of_weights(case: Case) -> None:
    case.flux("decode", case.model() / "vae/diffusion_pytorch_model.safetensors")


@fault("latents-beside-are-a-fifo", "--resume where a FIFO has the name of latents", codes=[0])
def latents_beside(case: Case) -> None:
    case.write("rows.jsonl", '{"prompt": "a circle", "seed": 1}\n')
    (case.folder / "out").mkdir()
    os.mkfifo(case.folder / "out/a-circle-1.latents.safetensors")
    rows = ("generate", "--from", "rows.jsonl", "-p", "tiny", *QUICK[:4], "-o", "out/")
    case.flux(*rows, "--resume")


@fault("latents-beside-are-damaged", "--resume where latents are damaged", codes=[0])
def latents_damaged(case: Case) -> None:
    case.write("rows.jsonl", '{"prompt": "a circle", "seed": 1}\n')
    case.write("out/a-circle-1.latents.safetensors", b"\xff" * 50)
    rows = ("generate", "--from", "rows.jsonl", "-p", "tiny", *QUICK[:4], "-o", "out/")
    case.flux(*rows, "--resume")


@fault("stdout-closed-early", "head -1 of four pictures", codes=[-signal.SIGPIPE])
def stdout_closed(case: Case) -> None:
    process = case.start(*FOUR, stdout=subprocess.PIPE)
    with case.watch(process, FOUR) as watched:
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        watched.end()


# --- kept latents of somebody else

REQUEST = {"prompt": PROMPT, "model": "bundled/tiny", "preset": "tiny", "width": 64, "height": 64}
REQUEST |= {"steps": 2, "seed": 1, "text_tokens": 24, "format": "png"}
HOSTILE = {
    "a-step-in-words": {"step": "two"},
    "a-step-beyond": {"step": 1 << 40},
    "a-step-below": {"step": -1},
    "no-request": {"request": None},
    "a-request-in-a-list": {"request": [REQUEST]},
    "no-prompt": {"request": {"seed": 1}},
    "a-huge-size": {"request": REQUEST | {"width": 1 << 20}},
    "another-size": {"request": REQUEST | {"width": 128}},
    "an-unknown-setting": {"request": REQUEST | {"run": "rm"}},
    "a-seed-that-is-none": {"request": REQUEST | {"seed": 0.5}},
    "a-huge-prompt": {"request": REQUEST | {"prompt": "x" * 100_000}},
}


def _make_latents(value: float, **changes: object) -> bytes:
    """A file of kept latents at the last step of `REQUEST`, but for some of what it says."""
    described = {"request": REQUEST, "step": 2, "model": "", "request_hash": ""} | changes
    data = struct.pack("<f", value) * (16 * 64)
    info = {"dtype": "F32", "shape": [1, 16, 64], "data_offsets": [0, len(data)]}
    header = {"__metadata__": {"flux_latents": json.dumps(described)}, "latents": info}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@fault("latents-whole", "kept latents that are right", codes=[0])
def latents_whole(case: Case) -> None:
    case.write(LATENTS, _make_latents(0.1))
    case.flux("decode", LATENTS)
    assert (case.folder / "x.png").exists()


@fault("latents-nan", "kept latents that are not finite", codes=[9])
def latents_nan(case: Case) -> None:
    case.write(LATENTS, _make_latents(float("nan")))
    case.flux("decode", LATENTS)


for name, changes in HOSTILE.items():

    @fault(f"latents-of-{name}", f"kept latents of {name}", codes=[4], says="flux decode")
    def latents_hostile(case: Case, changes: dict = changes) -> None:
        case.write(LATENTS, _make_latents(0.1, **changes))
        case.flux("decode", LATENTS)


@fault("latents-of-a-path-outside", "kept latents whose request names a path", codes=[0])
def latents_path(case: Case) -> None:
    outside = str(case.root / "owned.png")
    case.write(LATENTS, _make_latents(0.1, request=REQUEST | {"output": outside, "count": 9}))
    case.flux("decode", LATENTS)
    assert not Path(outside).exists() and len(list(case.folder.glob("*.png"))) == 1


@fault("latents-to-a-full-device", "flux decode into /dev/full", codes=[6], says="flux decode")
def latents_full(case: Case) -> None:
    case.write(LATENTS, _make_latents(0.1))
    with Path("/dev/full").open("wb") as full:
        arguments = ("decode", LATENTS, "-o", "-")
        process = case.start(*arguments, stdout=full)
        with case.watch(process, arguments) as watched:
            watched.end()


# --- places that take no picture


@fault("place-proc", "a folder in /proc", codes=[6])
def place_proc(case: Case) -> None:
    case.draw("-o", "/proc/pictures/")


@fault("place-below-a-file", "a folder below a file", codes=[6])
def place_file(case: Case) -> None:
    case.write("file", "x")
    case.draw("-o", "file/x.png")


@fault("place-a-loop", "a folder that is a loop of links", codes=[6])
def place_loop(case: Case) -> None:
    (case.folder / "loop").symlink_to("loop")
    case.draw("-o", "loop/x.png")


@fault("place-data-folder-is-a-file", "the user's data folder is a file", codes=[6], says="decode")
def place_data(case: Case) -> None:
    data = case.root / "data"
    data.write_text("in the way")
    environment = {"XDG_DATA_HOME": str(data), "TMPDIR": str(case.root)}
    with under_way(case, *LONG, word='"step"', nth=2, environment=environment):
        (case.folder / "out").write_text("in the way")
    assert list(case.root.glob("*.latents.safetensors"))


@fault("rows-some-bad", "three bad rows of five", codes=[7], says="3 of 5 rows failed")
def rows_bad(case: Case) -> None:
    rows = ['{"prompt": "a circle"}', "{", '{"prompt": ""}', '{"prompt": "x", "size": 7}']
    case.write("rows.jsonl", "\n".join([*rows, '{"prompt": "a square"}']))
    case.flux("generate", "--from", "rows.jsonl", "-p", "tiny", *QUICK[:4], "-o", "out/")
    assert count_pictures(case) == 2


@fault("rows-fail-fast", "a bad row with --fail-fast", codes=[7])
def rows_fail_fast(case: Case) -> None:
    case.write("rows.jsonl", '{\n{"prompt": "a square"}\n')
    rows = ("generate", "--from", "rows.jsonl", "-p", "tiny", *QUICK[:4], "-o", "out/")
    case.flux(*rows, "--fail-fast")


@fault("early-two-signals", "two signals in a row", codes=[-signal.SIGINT, -signal.SIGTERM])
def early_two(case: Case) -> None:
    with under_way(case, *LONG, "-n", "4", word='"saved"') as run:
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGTERM)
