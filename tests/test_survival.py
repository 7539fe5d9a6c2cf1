"""Memory that runs out: each phase steps down, pixels unchanged; in the end latents are kept."""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.counting import CARD, Counter
from fluxcli.engine import denoise
from fluxcli.engine import device as hardware
from fluxcli.engine.engine import PHASES, Engine, EnginePhase
from fluxcli.errors import DoesNotFit, ExitCode
from fluxcli.events import Notice
from fluxcli.pictures import latents
from fluxcli.pictures.image import hash_pixels
from fluxcli.plan import placement
from fluxcli.run import lock, margin, session
from fluxcli.run.margin import read_margin
from quant.checkpoint import Checkpoint, inspect
from tests.support.helpers import draw, engine_of, machine, picture_of, plan_for, read_pixels, tiny
from tests.support.invariant import assert_failed, call
from tests.support.simulate import follow, on_card


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def expected(checkpoint) -> np.ndarray:
    return draw(engine_of(checkpoint), tiny())[1]


def rarely(said: str) -> object:
    return pytest.param(RuntimeError(said), marks=pytest.mark.exhaustive)


def simulated(checkpoint: Checkpoint, **options: object) -> Engine:
    here = machine(8)
    _, made = plan_for(tiny(precision="fp32"), [checkpoint], here)
    return on_card(checkpoint, made, here, **options)


def notices(events: list) -> list[str]:
    return [event.message for event in events if isinstance(event, Notice)]


def test_wherever_an_allocation_fails_the_picture_is_the_same(checkpoint, expected):
    counter = Counter()
    follow(simulated(checkpoint), tiny(precision="fp32"), counter)
    total, phases = counter.allocations, set()
    assert total > 500
    for fail_at in sorted({*range(1, total, total // 4), *counter.starts.values(), total - 3}):
        counter = Counter()
        counter.fail_at = fail_at
        events, pixels = follow(simulated(checkpoint), tiny(precision="fp32"), counter)
        said = notices(events)
        assert len(said) == 1 and said[0].startswith("out of memory in "), (fail_at, said)
        phases.add(said[0].split()[4])
        assert np.array_equal(pixels, expected), fail_at
    assert phases == {"encode", "condition", "denoise", "decode"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        # tests/test_hardware.py holds the words of all.
        rarely("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        rarely(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: "
            "you tried"
        ),
        rarely("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        rarely("could not create a primitive"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_what_other_back_ends_call_it_counts(error, checkpoint, expected, monkeypatch):
    real, failed = denoise.take_step, []

    def step(*arguments: object, **inputs: object) -> torch.Tensor:
        if len(failed) < 2:
            failed.append(1)
            raise error
        return real(*arguments, **inputs)

    monkeypatch.setattr(denoise, "take_step", step)
    events, pixels = draw(engine_of(checkpoint), tiny())
    assert len(notices(events)) == 2 and np.array_equal(pixels, expected)


def test_steps_go_down_one_by_one_by_name_and_end(checkpoint):
    """Under a budget that nothing fits, every placement is tried once, each with less memory."""
    engine, said = simulated(checkpoint), []
    with (
        torch.no_grad(),
        Counter(budget=100_000),
        pytest.raises(DoesNotFit, match="no step down is left"),
    ):
        for event in engine.draw([picture_of(engine, tiny(precision="fp32"))]):
            said += notices([event])
    assert [text.partition("once more, ")[2] for text in said] == [
        "nothing else stays",
        "T5 passes block by block",
    ]
    engine, said = simulated(checkpoint, phases=failing("denoise")), []
    with pytest.raises(DoesNotFit):
        for event in engine.draw([picture_of(engine, tiny(precision="fp32"))]):
            said += notices([event])
    found = [text.partition("once more, ")[2] for text in said]
    assert found == [
        "nothing else stays",
        "4 of 7 blocks streamed",
        "6 of 7 blocks streamed",
        "every block from its file",
    ]


def failing(name: str) -> list[EnginePhase]:
    """The engine's phases, of which one never has enough memory."""

    def run(*_: object) -> Iterator[None]:
        raise MemoryError("as if")
        yield

    return [EnginePhase(name, run) if phase.name == name else phase for phase in PHASES]


def test_an_error_that_is_none_of_memory_is_not_tried_again(checkpoint, monkeypatch):
    def step(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(denoise, "take_step", step)
    with pytest.raises(RuntimeError, match="illegal"):
        draw(engine_of(checkpoint), tiny())


# --- the command


@pytest.fixture
def card(monkeypatch) -> None:
    """`flux generate` on the simulated card."""
    here = machine(8)
    monkeypatch.setattr(hardware, "probe", lambda *_, **__: here)
    monkeypatch.setattr(session, "Engine", on_card)


OPTIONS = [
    "-p",
    "tiny",
    "--size",
    "64",
    "--steps",
    "3",
    "--seed",
    "7",
    "--text-tokens",
    "16",
    "--precision",
    "fp32",
]
ARGUMENTS = ("generate", "a red circle on a blue background", *OPTIONS)


def test_a_failing_decode_keeps_the_latents_and_flux_decode_finishes_them(
    card, capsys, monkeypatch, expected
):
    monkeypatch.setattr(session, "Engine", partial(on_card, phases=failing("decode")))
    result = call(capsys, *ARGUMENTS, "-o", "fox.png", "-q")
    message = assert_failed(result, ExitCode.DOES_NOT_FIT)
    assert "needs about" in message and "free" in message
    kept = Path("fox.latents.safetensors")
    assert (
        kept.is_file() and not Path("fox.png").exists() and f"flux decode {kept}" in result.stderr
    )
    assert latents.load(kept).step == 3
    monkeypatch.setattr(session, "Engine", on_card)
    assert call(capsys, "decode", str(kept), "-o", "fox.png").returncode == 0
    assert np.array_equal(read_pixels(Path("fox.png")), expected)


def test_a_step_that_fails_for_good_keeps_what_there_is(card, capsys, monkeypatch, expected):
    real, count = denoise.take_step, []

    def step(*arguments: object, **inputs: object) -> torch.Tensor:
        count.append(1)
        if len(count) > 2:
            raise torch.OutOfMemoryError("as if")
        return real(*arguments, **inputs)

    monkeypatch.setattr(denoise, "take_step", step)
    assert_failed(call(capsys, *ARGUMENTS, "-o", "a.png", "-q"), ExitCode.DOES_NOT_FIT)
    kept = Path("a.latents.safetensors")
    assert latents.load(kept).step == 2
    monkeypatch.setattr(denoise, "take_step", real)
    assert call(capsys, "decode", str(kept), "-o", "a.png").returncode == 0
    assert np.array_equal(read_pixels(Path("a.png")), expected)


def test_what_was_missing_is_left_alone_by_the_next_run_of_this_card(card, capsys, monkeypatch):
    real, failed = denoise.take_step, []

    def step(*arguments: object, **inputs: object) -> torch.Tensor:
        if len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("as if")
        return real(*arguments, **inputs)

    monkeypatch.setattr(denoise, "take_step", step)
    monkeypatch.setattr(placement, "RESIDENT_SHARE", 0.0)
    first = call(capsys, *ARGUMENTS, "-o", "a.png", "--json")
    assert first.stderr.count("out of memory") == 2
    assert json.loads(first.stdout)["plan"]["residency"]["denoise"] == "streamed"
    grown = read_margin(machine(8))
    assert grown >= 2 * margin.LEAST_GROWTH_BYTES
    second = call(capsys, *ARGUMENTS, "-o", "b.png", "--json")
    assert "out of memory" not in second.stderr and read_margin(machine(8)) == grown
    plans = [json.loads(result.stdout)["plan"] for result in (first, second)]
    assert plans[1]["budget_bytes"] == plans[0]["budget_bytes"] - grown
    assert any("ran out here before" in reason for reason in plans[1]["reasons"])
    shas = [json.loads(result.stdout)["images"][0]["pixels_sha256"] for result in (first, second)]
    assert shas[0] == shas[1]


def test_a_margin_is_used_before_a_run_ends_for_want_of_it(card, capsys, monkeypatch, expected):
    """Under a cap that leaves the margin out no placement fits; with the margin one does."""
    margin.grow_margin(machine(8), 1 << 30)
    caps = []
    monkeypatch.setattr(hardware, "cap", lambda _, budget_bytes: caps.append(budget_bytes))
    real = denoise.take_step

    def step(*arguments: object, **inputs: object) -> torch.Tensor:
        if caps[-1] < caps[0] + (1 << 30):
            raise torch.OutOfMemoryError("as if")
        return real(*arguments, **inputs)

    monkeypatch.setattr(denoise, "take_step", step)
    result = call(capsys, *ARGUMENTS, "-o", "a.png")
    assert result.returncode == 0
    assert "once more, with the 1.0 GiB that were left free" in result.stderr
    assert np.array_equal(read_pixels(Path("a.png")), expected)


def test_a_device_that_breaks_is_exit_8(card, capsys, monkeypatch):
    def step(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(denoise, "take_step", step)
    assert "illegal" in assert_failed(
        call(capsys, *ARGUMENTS, "-o", "a.png", "-q"), ExitCode.DEVICE
    )


@contextlib.contextmanager
def held(identity: str) -> Iterator[None]:
    """Another flux computes on the device."""
    held_lock = lock.DeviceLock(identity)
    assert held_lock.acquire()
    yield
    held_lock.release()


def test_a_second_process_waits_for_the_card_or_is_refused(card, capsys):
    with held("test"):
        message = assert_failed(
            call(capsys, *ARGUMENTS, "-o", "a.png", "-q", "--no-wait"), ExitCode.DOES_NOT_FIT
        )
        assert "busy" in message
        assert call(capsys, *ARGUMENTS, "--dry-run").returncode == 0  # plans without waiting
    assert call(capsys, *ARGUMENTS, "-o", "a.png", "--no-wait").returncode == 0


def test_a_card_that_another_flux_fills_is_waited_for_not_planned_for(card, capsys, monkeypatch):
    full = machine(8, free_bytes=1 << 20)
    monkeypatch.setattr(hardware, "probe", lambda *_, **__: full)
    with held("test"):
        message = assert_failed(
            call(capsys, *ARGUMENTS, "-o", "a.png", "-q", "--no-wait"), ExitCode.DOES_NOT_FIT
        )
    assert "busy" in message


def test_modulation_that_was_kept_leaves_when_memory_runs_out(checkpoint, monkeypatch):
    engine, real, failed = simulated(checkpoint), denoise.take_step, []

    def step(*arguments: object, **inputs: object) -> torch.Tensor:
        if not failed:
            failed.append(bool(engine.components.modulation_weights))
            raise torch.OutOfMemoryError("as if")
        return real(*arguments, **inputs)

    monkeypatch.setattr(denoise, "take_step", step)
    draw(engine, tiny(precision="fp32"))
    assert failed == [True] and engine.components.modulation_weights == {}


def test_small_runs_on_the_cpu_need_no_lock(capsys):
    with held("cpu"):
        assert call(capsys, *ARGUMENTS, "-o", "a.png", "--no-wait").returncode == 0


def test_the_pixels_of_the_card_are_those_of_the_cpu(card, capsys, expected):
    result = call(capsys, *ARGUMENTS, "-o", "a.png", "--json")
    assert json.loads(result.stdout)["images"][0]["pixels_sha256"] == hash_pixels(expected)
    assert json.loads(result.stdout)["plan"]["device"] == CARD
