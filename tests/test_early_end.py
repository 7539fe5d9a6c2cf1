"""A run that ends early: what is finished is a file, what is denoised is kept, and what draws the
rest is said.
"""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fluxcli.cli import console
from fluxcli.engine import denoise
from fluxcli.engine.engine import Engine
from fluxcli.errors import ExitCode, OutputError, Terminated
from fluxcli.events import Event, Phase
from fluxcli.pictures import names
from fluxcli.run import saving
from tests.support.batches import SMALL, draw, of, pixels, single, write
from tests.support.helpers import read_pixels
from tests.support.invariant import assert_failed, call, files

FOUR = ("generate", "a red circle", *SMALL, "-n", "4", "--seed", "1", "-o", "out/")


@pytest.fixture
def apart(monkeypatch) -> None:
    """The VAE does not fit beside the transformer, and loading both again would take long."""
    monkeypatch.setattr(Engine, "_decodes_at_once", lambda _: False)


@contextmanager
def ending_at_step(nth: int, error: BaseException) -> Iterator[None]:
    """Let the n-th step of a run (from 1) end in an error."""
    real, steps = denoise.take_step, []

    def step(*arguments: object, **inputs: object) -> object:
        steps.append(1)
        if len(steps) == nth:
            raise error
        return real(*arguments, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoise, "take_step", step)
        yield


def end_at_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive when it is shown that a picture is being saved."""
    real = console.Reporter.show

    def show(reporter: console.Reporter, event: Event) -> None:
        real(reporter, event)
        if event == Phase("save"):
            raise Terminated(2)

    monkeypatch.setattr(console.Reporter, "show", show)


def interrupted(capsys, *arguments: str) -> list[str]:
    """What a command that a signal ends says."""
    with pytest.raises(Terminated):
        call(capsys, *arguments)
    return capsys.readouterr().err.splitlines()


def stems(folder: str, ending: str) -> list[str]:
    return sorted(path.name.removesuffix(ending) for path in Path(folder).glob(f"*{ending}"))


def test_every_finished_picture_is_a_file_before_the_next_one_begins(capsys):
    with ending_at_step(6, Terminated(2)):  # of picture 3
        said = interrupted(capsys, *FOUR)
    assert stems("out", ".png") == ["a-red-circle-1", "a-red-circle-2"]
    assert said[-1].endswith(
        "2 of 4 pictures are written; the others: the same command with --seed 3 -n 2"
    )


def test_paths_and_events_come_while_the_run_goes_on(capsys):
    with ending_at_step(6, Terminated(2)), pytest.raises(Terminated):
        call(capsys, *FOUR, "--events", "-q")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in told if event["event"] in ("step", "saved")]
    assert kinds == ["step", "step", "saved"] * 2 + ["step"]
    assert all(event["seconds"] > 0 for event in of(told, "saved"))


def test_where_pictures_wait_for_their_decoder_their_latents_are_files(apart, capsys):
    expected = single(capsys, "a red circle", "-n", "4", "--seed", "1")
    with ending_at_step(6, Terminated(15)):
        said = interrupted(capsys, *FOUR)
    kept = ["a-red-circle-1", "a-red-circle-2"]
    assert stems("out", ".png") == [] and stems("out", ".latents.safetensors") == kept
    words = said[-1].removeprefix("flux: 0 of 4 pictures are written, the latents of 2 are kept")
    command, _, rest = words.removeprefix("; the others: ").partition(", and ")
    assert rest == "the same command with --seed 3 -n 2"
    finished = call(capsys, *shlex.split(command)[1:], "--json", "-q")
    images = [json.loads(line)["images"][0] for line in finished.stdout.splitlines()]
    assert [image["pixels_sha256"] for image in images] == expected[:2]
    assert stems("out", ".png") == kept  # beside the latents


def test_one_picture_says_what_finishes_it(apart, capsys, monkeypatch):
    """Without counting to one, and without "the others"."""
    end_at_save(monkeypatch)
    said = interrupted(capsys, "generate", "a red circle", *SMALL, "-o", "one.png")
    command = "flux decode one.latents.safetensors"
    assert said[-1].endswith(f"the picture's latents are kept; what finishes it: {command}")


def test_latents_leave_when_their_picture_is_written(apart, capsys):
    assert call(capsys, *FOUR, "-q").returncode == 0
    assert len(files(Path("out"))) == 4 and stems("out", ".latents.safetensors") == []


def test_a_denoised_picture_is_kept_when_the_signal_arrives_between_two_events(capsys, monkeypatch):
    """The run is closed then, instead of being thrown at."""
    end_at_save(monkeypatch)
    said = interrupted(capsys, *FOUR)
    kept = "out/a-red-circle-1.latents.safetensors"
    assert (
        f"0 of 4 pictures are written, the latents of 1 are kept; the others: flux decode {kept}"
        in said[-1]
    )
    assert Path(kept).exists()


@pytest.mark.parametrize("seeded", [True, False])
def test_a_batch_goes_on_from_kept_latents(seeded, apart, capsys):
    rows = [{"prompt": "a red circle"} | ({"seed": seed} if seeded else {}) for seed in range(1, 5)]
    source = write(*rows)
    batch = ("generate", "--from", source, *SMALL, "-o", "out/")
    with ending_at_step(6, Terminated(2)):
        said = interrupted(capsys, *batch)
    assert said[-1].endswith(
        "0 of 4 pictures are written; the others: the same command with --resume"
    )
    assert len(stems("out", ".latents.safetensors")) == 2
    events = draw(capsys, source, *SMALL, "-o", "out/", "--resume")
    assert len(of(events, "step")) == 4 and len(of(events, "saved")) == 4
    for event in of(events, "saved"):
        seed = str(event["image"]["seed"])
        alone = single(capsys, "a red circle", "--seed", seed)
        assert [event["image"]["pixels_sha256"]] == alone
    assert stems("out", ".latents.safetensors") == [] and len(files(Path("out"))) == 4
    assert len(of(draw(capsys, source, *SMALL, "-o", "out/", "--resume"), "skipped")) == 4


def test_a_picture_that_cannot_be_written_leaves_its_latents(capsys, monkeypatch):
    def save(*_: object) -> str:
        raise OutputError("cannot write the picture", which="x.png", why="the disk is full")

    one = ("generate", "a red circle", *SMALL, "--seed", "1", "-q", "-o", "x.png")
    with monkeypatch.context() as patch:
        patch.setattr(names, "save", save)
        message = assert_failed(call(capsys, *one), ExitCode.OUTPUT)
    assert "hint: flux decode x.latents.safetensors" in message
    assert call(capsys, "decode", "x.latents.safetensors", "-q").stdout == "x.png\n"
    alone = call(capsys, *one[:-1], "y.png")
    assert alone.returncode == 0
    assert np.array_equal(read_pixels(Path("x.png")), read_pixels(Path("y.png")))


def test_latents_go_elsewhere_where_the_pictures_folder_takes_nothing(capsys, monkeypatch):
    def save(*_: object) -> str:
        Path("out").rmdir()
        Path("out").write_text("no folder any more")
        raise OutputError("cannot write the picture", which="out", why="it vanished")

    Path("out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(names, "save", save)
        result = call(capsys, *FOUR, "-q")
    message = assert_failed(result, ExitCode.OUTPUT)
    command = message.splitlines()[-1].removeprefix("hint: flux ").removesuffix(" -o FOLDER/")
    found = call(capsys, *shlex.split(command), "-o", "new/", "-q")
    assert found.stdout == "new/a-red-circle-1.png\n"


def test_a_bug_in_one_row_ends_that_row_alone(capsys, monkeypatch):
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in (1, 2, 3)))
    expected = {row: single(capsys, "a red circle", "--seed", str(row)) for row in (1, 3)}
    real = names.save

    def save(data: bytes, destination: names.Destination) -> str:
        if destination.order.request.seed == 2:
            raise ZeroDivisionError("as if")
        return real(data, destination)

    with monkeypatch.context() as patch:
        patch.setattr(names, "save", save)
        events = draw(capsys, source, *SMALL, "-o", "out/", code=7)
    assert pixels(events) == expected
    (row, _) = of(events, "failed")
    assert (row["row"], row["exit_code"]) == (2, 1)
    assert "this is a bug: ZeroDivisionError: as if" in row["message"]
    assert len(of(draw(capsys, source, *SMALL, "-o", "out/", "--resume"), "step")) == 0


def test_a_device_that_breaks_ends_the_batch(capsys):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in (1, 2, 3)))
    with ending_at_step(3, error):
        result = call(capsys, "generate", "--from", source, *SMALL, "-o", "out/")
    assert result.returncode == ExitCode.DEVICE and "1 of 3 pictures are written" in result.stderr
    assert stems("out", ".png") == ["a-red-circle-1"]


def test_metadata_that_the_format_does_not_hold_are_refused_before_the_compute(capsys, monkeypatch):
    monkeypatch.setattr(saving.loras, "name_identities", lambda *_: ["x" * 70_000])
    one = ("generate", "a red circle", *SMALL, "-q")
    with ending_at_step(1, AssertionError("computed")):
        message = assert_failed(call(capsys, *one, "-o", "x.jpg"), ExitCode.OUTPUT)
    assert "into a jpg" in message and "--format png" in message and not list(Path().iterdir())
    assert call(capsys, *one, "-o", "x.png").returncode == 0
    assert call(capsys, *one, "-o", "x.jpg", "--no-metadata").returncode == 0
