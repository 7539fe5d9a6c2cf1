"""The invariant of every failure; a k-th call that fails; an engine without weights."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from fluxcli import events
from fluxcli.cli import app
from fluxcli.engine import device as hardware
from tests.support.helpers import machine

WRITE_CALLS = ("open", "fdopen", "fsync", "link", "replace", "unlink", "mkdir", "close")


def call(capsys: pytest.CaptureFixture, *arguments: str) -> CompletedProcess:
    """Run `flux ARGUMENTS` in this process."""
    capsys.readouterr()
    code = app.run(list(arguments))
    captured = capsys.readouterr()
    return CompletedProcess(arguments, int(code), captured.out, captured.err)


def assert_failed(result: CompletedProcess, code: int) -> str:
    """Check the invariant of an error and return stderr.

    It has its code, one error line, at most one hint, and says nothing else.
    """
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("flux: error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert result.returncode == code, result.stderr
    assert len(errors) == 1 and len(hints) <= 1 and len(lines) == len(errors) + len(hints), (
        result.stderr
    )
    assert (
        errors[0].endswith(".") and "\x1b" not in result.stderr and "Traceback" not in result.stderr
    )
    return result.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def paint_instead(monkeypatch: pytest.MonkeyPatch, drawn: list | None = None) -> None:
    """Pictures come from their seed alone, without weights; `drawn` collects the orders."""
    import numpy as np

    from fluxcli.engine.engine import Engine, EnginePhase
    from fluxcli.run import saving, session

    def paint(_: object, pictures: list) -> Iterator[events.Event]:
        for picture in pictures:
            request = picture.request
            yield events.Phase("denoise")
            yield events.Step(1, 1, picture.position, picture.total)
            width, height = request.size
            painter = np.random.default_rng(request.seed)
            picture.pixels = painter.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def hand_over(_: object, pictures: list) -> Iterator[events.Event]:
        yield from ()

    real = saving.save_picture

    def save(picture: object, destination: object, engine: object) -> events.GeneratedImage:
        if drawn is not None:
            drawn.append(destination.order)
        return real(picture, destination, engine)

    here = machine(64, "cpu", bf16=False)
    phases = (EnginePhase("denoise", paint), EnginePhase("decode", hand_over))
    monkeypatch.setattr(session, "Engine", partial(Engine, phases=phases))
    monkeypatch.setattr(saving, "save_picture", save)
    monkeypatch.setattr(hardware, "probe", lambda device="auto", **_: here)
    monkeypatch.setattr(hardware, "begin_phase", lambda _: None)  # of whatever is pretended to be


class Fault:
    """Counts the calls that write files, and does `what` before the k-th (from 1).

    Hook it in with `install`.
    """

    def __init__(self, k: int, what: Callable[[str], None]) -> None:
        self.k, self.what, self.count, self.names = k, what, 0, []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Fault":
        for name in WRITE_CALLS:
            monkeypatch.setattr(os, name, self._hooked(name, getattr(os, name)))
        return self

    def _hooked(self, name: str, real: Callable) -> Callable:
        def hooked(*arguments: object, **options: object) -> object:
            self._tick(name)
            result = real(*arguments, **options)
            is_written = name == "fdopen" and "wb" in arguments
            return _File(result, self._tick) if is_written else result

        return hooked

    def _tick(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.k:
            self.what(name)


class _File:
    """A binary file whose every write is two, each counted by the fault."""

    def __init__(self, file: object, tick: Callable[[str], None]) -> None:
        self._file, self._tick = file, tick

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data: bytes) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._tick("write")
            self._file.write(part)
            self._file.flush()

    def flush(self) -> None:
        self._tick("flush")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._tick("close")
