"""Fuzz what a downloaded folder can hold.

python -m tests.support.fuzz --seconds 60 [--seed N] [--all]

Damages files of tiny model folders and a GGUF (tests/support/fuzz_inputs.py) and asks `inspect`,
`read_header` or, of the GGUF, `inspect_file` what they are. Knows those three functions, nothing
behind them. Input k of a seed depends on the two alone. What `outcome` raises is a finding: its
files go to ./fuzz-findings, the exit code is 1. Limits in seconds and bytes.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter, deque
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

from quant import checkpoint, header, single_file
from quant.errors import CheckpointError
from quant.tensor_info import DTYPE_BITS, TensorInfo
from tests.support.fuzz_inputs import GGUF, OUTSIDE, damage, folders, pack, parse, write

MAX_CPU_S, HANG_S, MAX_PEAK_BYTES = 1, 60, 32 << 20  # CPU time: others may work on this machine too
TRACED = 50  # one input in so many; it is not timed
CODE = (".py", ".pyc", ".so", ".pyd")  # opened by a late import


class Finding(BaseException):
    """A reader took too much, opened what it must not, or accepted what it should refuse.

    No `except Exception` may catch it.
    """


def outcome(path: Path, root: Path, *, traced: bool) -> str:
    """What becomes of a file or folder: "accepted", or the kind of its refusal.

    Raises whatever is a finding.
    """
    _opened().clear()
    signal.alarm(HANG_S)
    began = time.process_time()
    if traced:
        tracemalloc.start()
    try:
        read = single_file.inspect_file if path.name == GGUF else header.read_header
        found = checkpoint.inspect(path) if path.is_dir() else read(path)
        kind = "accepted"
    except CheckpointError as error:
        kind = error.what
    finally:
        cpu_s, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.alarm(0)
    opened = {os.path.realpath(name) for name in _opened() if not isinstance(name, int)}
    if outside := sorted(
        name
        for name in opened
        if not name.startswith(f"{root}{os.sep}") and not name.endswith(CODE)
    ):
        raise Finding(f"opened a file outside: {outside[0]}")
    if peak > MAX_PEAK_BYTES:
        raise Finding(f"took {peak >> 20} MiB")
    if cpu_s > MAX_CPU_S and not traced:
        raise Finding(f"took {cpu_s:.1f} s")
    for name in opened if kind == "accepted" else ():
        if name.endswith(".safetensors"):
            check_tiling(Path(name), header.read_header(Path(name)) if path.is_dir() else found)
    return kind


def check_tiling(path: Path, found: dict[str, TensorInfo]) -> None:
    """Hold an accepted header against the file itself.

    Raises `Finding` unless the tensors tile the data.
    """
    (entries, data), at = parse(path.read_bytes()), 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        size = found[name].numel * DTYPE_BITS[entry["dtype"]] // 8
        if (start, stop) != (at, at + size) or (found[name].start, found[name].stop) != (
            start,
            stop,
        ):
            raise Finding(
                f"accepted {name[:60]!r} at {start}:{stop}, behind {at} and with {size} bytes"
            )
        at = stop
    if at != len(data) or len(entries) != len(found):
        raise Finding(f"accepted {len(found)} of {len(entries)} tensors, {at} of {len(data)} bytes")


def fuzz(seconds: float, seed: int, *, every: bool, root: Path) -> int:
    """Run for so long, print what came of it, and return the exit code.

    With `every` it goes on behind a finding.
    """
    write(root := root.resolve(), {OUTSIDE: pack({"x": ("U8", [1], b"x")})})
    outcomes, findings, kinds = Counter(), set(), folders()
    for kind, files in kinds.items():
        write(root / kind, files)
        path = root / kind / GGUF if GGUF in files else root / kind
        print(f"undamaged {kind}: {outcome(path, root / kind, traced=False)}")
    began = time.monotonic()
    for k in count():
        if time.monotonic() - began > seconds or (findings and not every):
            break
        rng = Random(f"{seed}/{k}")
        kind, whole = rng.choice([*kinds]), rng.random() < 0.5
        whole = whole and GGUF not in kinds[kind]
        folder, changes = root / kind, damage(rng, kinds[kind], whole=whole)
        write(folder, changes)
        try:
            word = outcome(
                folder if whole else folder / next(iter(changes)), folder, traced=k % TRACED == 0
            )
        except (Exception, Finding) as error:  # noqa: BLE001 - that is what is sought
            last = traceback.extract_tb(error.__traceback__)[-1]
            word = f"FINDING {type(error).__name__} in {last.name}:{last.lineno}"
            if word not in findings:
                kept = _keep(folder, f"{seed}-{k}", error)
                print(f"finding: --seed {seed}, input {k}: {error!r:.200}, see {kept}")
            findings.add(word)
        outcomes[f"{'inspect' if whole else 'read_header'}: {word}"] += 1
        write(folder, {path: kinds[kind][path] for path in changes})
    print(f"seed {seed}: {k} executions, {k / (time.monotonic() - began):.0f} executions/s")
    print("\n".join(f"{n:9} {word}" for word, n in outcomes.most_common()))
    return 1 if findings else 0


@cache
def _opened() -> deque:
    """What this process opened last, as Python's audit events tell it."""
    names: deque = deque(maxlen=10_000)
    sys.addaudithook(lambda event, details: names.append(details[0]) if event == "open" else None)
    return names


def _keep(folder: Path, name: str, error: BaseException) -> Path:
    """Copy the folder of a finding, with its traceback, to where it outlives the run."""
    kept = Path(shutil.copytree(folder, Path("fuzz-findings", name), dirs_exist_ok=True))
    (kept / "traceback.txt").write_text(
        "".join(traceback.format_exception(error)), "utf-8", "backslashreplace"
    )
    return kept


def _hang(*_: object) -> None:
    raise Finding(f"not done after {HANG_S} s")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.fuzz", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--all", action="store_true", help="go on behind a finding, keep one of each kind"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        return fuzz(options.seconds, options.seed, every=options.all, root=Path(root))


if __name__ == "__main__":
    sys.exit(main())
