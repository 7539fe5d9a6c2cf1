"""The fuzzer finds nothing in two seconds, and finds every kind of bug that is planted."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from quant import checkpoint, header
from quant.errors import CheckpointError
from quant.tensor_info import TensorInfo
from tests.support import fuzz, fuzz_inputs

pytestmark = pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the fuzzer's clock is POSIX")
real, real_files = header._parse, checkpoint._find_files


def run(capsys: pytest.CaptureFixture, seconds: int) -> tuple[int, str]:
    code = fuzz.main(["--seed", "1", "--seconds", str(seconds)])
    return code, capsys.readouterr().out


def test_two_seconds_find_nothing(capsys):
    code, out = run(capsys, 2)
    assert code == 0 and not Path("fuzz-findings").exists(), out
    assert re.search(r"^seed 1: \d+ executions, \d+ executions/s$", out, re.M)
    for word in (
        *(f"undamaged {kind}: " for kind in fuzz_inputs.folders()),
        "read_header: accepted",
        "inspect: corrupt",
    ):
        assert word in out


def unguarded(path: Path, name: str, value: dict) -> TensorInfo:
    return TensorInfo(name, value["dtype"], tuple(value["shape"]), value["data_offsets"][0])


def gaps(path: Path, text: bytes, data_bytes: int) -> header.Header:
    try:
        return real(path, text, data_bytes)
    except CheckpointError as error:
        if "gap" not in error.why and "data" not in error.why:
            raise
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    tensors = {name: header._make_tensor(path, name, value) for name, value in entries.items()}
    return header.Header(tensors, metadata={}, is_gguf=False)


def any_path(folder: Path) -> checkpoint._Files:
    outside = folder / ".." / ".." / fuzz_inputs.OUTSIDE
    index = next(folder.glob("*.index.json"), None)
    if index and f'"../../{fuzz_inputs.OUTSIDE}"' in index.read_text(errors="replace"):
        return checkpoint._Files([outside], {})
    try:
        return real_files(folder)
    except OSError as error:  # a bug of its own is not what is sought here
        raise CheckpointError("missing shard") from error


def memory(path: Path, text: bytes, data_bytes: int) -> header.Header:
    bytearray(33 << 20)
    return real(path, text, data_bytes)


def slow(path: Path, text: bytes, data_bytes: int) -> header.Header:
    until = time.process_time() + 0.1
    while len(text) > 10_000 and time.process_time() < until:
        pass
    return real(path, text, data_bytes)


def endless(path: Path, text: bytes, data_bytes: int) -> header.Header:
    while len(text) > 10_000:
        pass
    return real(path, text, data_bytes)


PLANTED = [
    (header, "_make_tensor", unguarded, r"(Key|Type|Value)Error\("),
    (header, "_parse", gaps, r"Finding\(.accepted "),
    (
        checkpoint,
        "_find_files",
        any_path,
        r"Finding\('opened a file outside: /.*/outside\.safetensors",
    ),
    (header, "_parse", memory, r"Finding\('took 33 MiB'\)"),
    (header, "_parse", slow, r"Finding\('took \d\.\d s'\)"),
    (header, "_parse", endless, r"Finding\('not done after 1 s'\)"),
]


@pytest.mark.parametrize(
    "module, name, bug, found", PLANTED, ids=[bug.__name__ for *_, bug, _ in PLANTED]
)
def test_a_planted_bug_is_found_and_kept(module, name, bug, found, capsys, monkeypatch):
    monkeypatch.setattr(module, name, bug)
    monkeypatch.setattr(fuzz, "MAX_CPU_S", 0.05 if bug is slow else 1)
    if bug is endless:  # of the others a busy machine must not be said to hang
        monkeypatch.setattr(fuzz, "HANG_S", 1)
    code, out = run(capsys, 30)
    assert code == 1 and re.search(rf"^finding: --seed 1, input \d+: {found}", out, re.M), out
    (kept,) = Path("fuzz-findings").iterdir()
    assert (kept / "traceback.txt").stat().st_size and (
        kept / "scheduler" / "scheduler_config.json"
    ).is_file()


def test_a_seed_gives_the_same_inputs():
    def inputs() -> list:
        kinds = fuzz_inputs.folders()
        return [
            fuzz_inputs.damage(fuzz.Random(f"3/{k}"), kinds["nf4"], whole=k % 2 > 0)
            for k in range(200)
        ]

    assert inputs() == inputs()
