"""Fault rows of the process itself: its streams, signals, limits, folder and variables."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.case import Case, fault

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
FULL = "/dev/full"

# --- streams

OUTPUTS = {
    "presets": ("presets",),
    "help": ("--help",),
    "version": ("--version",),
    "generate-help": ("generate", "--help"),
    "plan": ("plan", "-p", "tiny", "--json"),
    "doctor": ("doctor",),
    "models": ("models", "list"),
    "cache": ("cache",),
    "show-completion": ("--show-completion", "bash"),
}
for name, arguments in OUTPUTS.items():

    @fault(f"stdout-full-{name}", f"flux {' '.join(arguments)} >/dev/full", codes=[6], says="full")
    def stdout_full(case: Case, arguments: tuple[str, ...] = arguments) -> None:
        with open(FULL, "w") as full:
            run_with(case, arguments, stdout=full)


DRAWN = ("generate", "x", "-p", "tiny", "--size", "64", "--steps", "1", "--seed", "1", "--no-cache")
WAYS = {
    "path": ("-o", "x.png"),
    "json": ("--json", "-o", "x.png"),
    "events": ("--events", "-o", "x.png"),
    "picture": ("-o", "-"),
}
for name, arguments in WAYS.items():

    @fault(f"stdout-full-draw-{name}", f"{' '.join(arguments)} >/dev/full", codes=[6], says="full")
    def draw_full(case: Case, arguments: tuple[str, ...] = arguments) -> None:
        with open(FULL, "w") as full:
            run_with(case, (*DRAWN, *arguments), stdout=full)


@fault("stderr-full-draw", "a picture with 2>/dev/full", codes=[0])
def stderr_full(case: Case) -> None:
    with open(FULL, "w") as full:
        run_with(case, (*DRAWN, "-o", "x.png"), stderr=full)
    assert (case.folder / "x.png").stat().st_size > 100


def run_with(case: Case, arguments: tuple[str, ...], **streams: object) -> None:
    """Run a command whose streams are the row's."""
    process = case.start(*arguments, **streams)
    with case.watch(process, arguments) as watched:
        watched.end()


# In bash, since Python has no way to start a process with a stream closed.
SHELL = {
    "stdout-closed": ("presets >&-", [6]),
    "stdout-closed-draw": ("DRAW -o - >&-", [6]),
    "stdin-closed": ("DRAW -o x.png <&-", [0]),
    "stdin-closed-prompt": ("generate - -p tiny <&-", [2]),
    "stdin-closed-rows": ("generate --from - -p tiny <&-", [2]),
    "stderr-closed": ("DRAW -o x.png 2>&-", [0]),
    "stderr-gone": ("DRAW -o x.png 2> >(true)", [0]),
}
for name, (words, codes) in SHELL.items():

    @fault(f"streams-{name}", f"flux {words}", codes=codes, exhaustive="DRAW" in words)
    def shell(case: Case, words: str = words) -> None:
        run_shell(case, words)


def run_shell(case: Case, words: str, before: str = "") -> None:
    """Run `flux WORDS` by bash, in a new interpreter; DRAW in it is a picture."""
    words = words.replace("DRAW", " ".join(DRAWN))
    text = f"{before} {sys.executable} -m fluxcli {words}"
    known = {name: str(case.home / name) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    process = subprocess.Popen(
        ["bash", "-c", text],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=case.folder,
        env=os.environ | known | {"PYTHONPATH": str(ROOT), "FLUX_WORKER": "off"},
    )
    with case.watch(process, tuple(words.split())) as watched:
        watched.end()


@fault("folder-gone", "the current folder is deleted", codes=[2], says="gone")
def folder_gone(case: Case) -> None:
    run_shell(case, "presets", before="mkdir gone; cd gone; rmdir ../gone;")


for module in ("torch", "json", "typing", "signal", "numpy", "PIL"):

    @fault(f"shadow-{module}", f"a {module}.py in the current folder", codes=[0], exhaustive=True)
    def shadow(case: Case, module: str = module) -> None:
        case.write(f"{module}.py", "raise SystemExit('the wrong file')")
        case.draw("-o", "x.png", cold=True)


# --- signals

NUMBERS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
LONG = ("generate", "x", "-p", "tiny", "--size", "64", "--steps", "1000", "--events", "-o", "out/")
for name in NUMBERS:
    number = int(getattr(signal, name))

    @fault(f"signal-{name}", f"{name} in the middle of a picture", codes=[-number])
    def one_signal(case: Case, number: int = number) -> None:
        send_in_mid_run(case, [number])


for first, second in (("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGHUP")):
    pair = [int(getattr(signal, first)), int(getattr(signal, second))]

    @fault(f"signals-{first}-{second}", f"{first} and {second} in a row", codes=[-n for n in pair])
    def two_signals(case: Case, pair: list[int] = pair) -> None:
        send_in_mid_run(case, pair)


def send_in_mid_run(case: Case, numbers: list[int]) -> None:
    process = case.start(*LONG)
    with case.watch(process, LONG) as watched:
        for line in process.stdout:
            if '"step"' in line:
                break
        for number in numbers:
            process.send_signal(number)
        watched.end()
    left = [path.name for path in case.folder.rglob("*") if not path.name.endswith(".safetensors")]
    assert set(left) <= {"out"}, left


for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    for after_s in (0.5, 1.0):
        number = int(getattr(signal, name))

        @fault(
            f"signal-{name}-after-{after_s}",
            f"{name} {after_s} s after the start",
            codes=[-number],
            exhaustive=True,
        )
        def early_signal(case: Case, number: int = number, after_s: float = after_s) -> None:
            process = case.start(*LONG, cold=True)
            with case.watch(process, LONG) as watched:
                time.sleep(after_s)
                process.send_signal(number)
                watched.end()


# --- limits

for limit, sizes in {"RLIMIT_AS": (300, 550, 700, 1000), "RLIMIT_DATA": (100, 300, 500)}.items():
    for size in sizes:

        @fault(f"{limit}-{size}", f"{limit} of {size} MiB", codes=[5], says="ulimit")
        def small_limit(case: Case, limit: str = limit, size: int = size) -> None:
            case.draw(limits={getattr(resource, limit): size * MIB})


for command in ("replay x.png", "inspect model", "quantize model q --to int8", "plan -p tiny"):

    @fault(
        f"RLIMIT_AS-{command.split()[0]}",
        f"flux {command} in 550 MiB",
        codes=[0, 5, 8],  # inspect needs no more
        exhaustive=True,
    )
    def small_limit_elsewhere(case: Case, command: str = command) -> None:
        case.model()
        case.draw("-o", "x.png")
        case.flux(*command.split(), limits={resource.RLIMIT_AS: 550 * MIB})


for size in (1200, 1500, 2000, 3000):

    @fault(f"RLIMIT_AS-{size}", f"RLIMIT_AS of {size} MiB", codes=[0, 5, 8], exhaustive=True)
    def larger_limit(case: Case, size: int = size) -> None:
        case.draw(limits={resource.RLIMIT_AS: size * MIB})


for count in (8, 16, 24, 40):

    @fault(f"RLIMIT_NOFILE-{count}", f"only {count} descriptors", codes=[0, 5, 8], exhaustive=True)
    def few_descriptors(case: Case, count: int = count) -> None:
        case.draw("-o", "x.png", limits={resource.RLIMIT_NOFILE: count})


for size in (0, 100):

    @fault(f"RLIMIT_FSIZE-{size}", f"files of at most {size} bytes", codes=[4, 6], exhaustive=True)
    def small_files(case: Case, size: int = size) -> None:
        case.draw("-o", "x.png", limits={resource.RLIMIT_FSIZE: size})


@fault("RLIMIT_CPU", "four seconds of CPU", codes=[-signal.SIGXCPU], exhaustive=True)
def little_cpu(case: Case) -> None:
    case.flux(*LONG, limits={resource.RLIMIT_CPU: 4})


# --- variables that libraries read

VARIABLES = {
    "OMP_NUM_THREADS": ("abc", "-1", "0", "", "99999999999999999999", "1.5"),
    "MKL_NUM_THREADS": ("abc",),
    "OPENBLAS_NUM_THREADS": ("abc", "-3"),
    "OMP_STACKSIZE": ("abc",),
    "OMP_SCHEDULE": ("abc",),
    "KMP_AFFINITY": ("abc",),
    "GOMP_CPU_AFFINITY": ("abc",),
    "LANG": ("xx_YY.nonsense",),
    "COLUMNS": ("abc", "0", "-5"),
    "TERM": ("", "nonsense"),
    "LOCAL_RANK": ("abc",),
    "WORLD_SIZE": ("abc", "-1"),
}
for variable, values in VARIABLES.items():
    for value in values:

        @fault(
            f"env-{variable}-{value[:8]}", f"{variable}={value}", codes=[0, 2, 8], exhaustive=True
        )
        def wrong_variable(case: Case, variable: str = variable, value: str = value) -> None:
            case.draw("-o", "x.png", cold=True, environment={variable: value})
