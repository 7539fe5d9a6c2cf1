"""What every test has: a home of its own, no settings of the user, no network, a `flux` to run."""

import functools
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.server import Interpreters, Server, is_available

# before torch is imported: the models are too small for more threads
os.environ["OMP_NUM_THREADS"] = "1"

# Whatever started the tests may ignore signals (nohup, a job in the background); what they start
# must not.
for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) is signal.SIG_IGN:
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(number, usual)

# hypothesis: other work shares the CPU
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parents[1]
# The files that take longest begin first, so that no core is left alone with one of them.
LONG = ("test_reserved.py", "test_survival.py", "test_memory.py", "test_bake_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the long files to the front."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no text in captured output: a lone surrogate cannot travel to xdist's main
    process, and ends the worker that sends it.
    """
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode("utf-8"))
        for title, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Give the log its level back, which `--debug` changes for the whole process."""
    logger = logging.getLogger("fluxcli")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with empty homes and caches, offline."""
    for name in [name for name in os.environ if name.startswith("FLUX_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME"):
        folder = tmp_path / ".home" / name
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def config_folder() -> Path:
    """The user's settings folder (absent until a test makes it)."""
    return Path(os.environ["XDG_CONFIG_HOME"]) / "flux"


@pytest.fixture(scope="session")
def commands() -> Iterator[Server | Interpreters]:
    """Runs commands in processes of their own; forks, where that is safe."""
    running = Server() if is_available() else Interpreters()
    yield running
    running.close()


@pytest.fixture
def flux(commands: Server | Interpreters) -> Callable[..., subprocess.CompletedProcess]:
    """Run `flux` as a process of its own in the current folder."""

    def run(
        *arguments: str, stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        return commands.run("-m", "fluxcli", *arguments, stdin=stdin, environment=environment)

    return run


@pytest.fixture
def flux_cold() -> Callable[..., subprocess.CompletedProcess]:
    """Run `flux` in a new interpreter: for what depends on imports, or on variables that are read
    then.
    """

    def run(
        *arguments: str, stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        return Interpreters().run("-m", "fluxcli", *arguments, stdin=stdin, environment=environment)

    return run


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The bundled model."""
    return ROOT / "presets" / "tiny"


@pytest.fixture(scope="session")
def baked(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders with the bundled model, each packed once: `baked("nf4", modulation="nf4")`. Copy
    before changing one.
    """

    from quant import bake, checkpoint, recipe, spec

    @functools.cache
    def folder(wanted: spec.QuantSpec) -> Path:
        path = tmp_path_factory.mktemp("baked") / wanted.to
        made = recipe.make_recipe(checkpoint.inspect(tiny_folder), wanted)
        assert list(bake.bake(made, path, origin={"model": "bundled/tiny"}))
        return path

    return lambda to, **options: folder(spec.QuantSpec(to, **options))


@pytest.fixture(scope="session")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with ControlNets of tests/support/controlnets.py, by kind: `controlnet("union")`."""
    from tests.support.controlnets import write_controlnet

    folder = tmp_path_factory.mktemp("controlnets")
    return functools.cache(lambda kind: write_controlnet(kind, folder / kind))


@pytest.fixture(scope="session")
def exported(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict]]:
    """The bundled transformer in a dialect of tests/support/exports.py.

    Returns (file, its float32 values by diffusers' names).
    """
    from tests.support import exports

    folder = tmp_path_factory.mktemp("exported")
    bfl = exports.bfl_tensors(tiny_folder, folder / "source.safetensors")

    @functools.cache
    def export(dialect: str) -> tuple[Path, dict]:
        write, suffix, _ = exports.DIALECTS[dialect]
        path = folder / f"{dialect.replace(' ', '_')}.{suffix}"
        return path, exports.to_diffusers(write(bfl, path))

    return export


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The requests that a fake engine was given."""
    from tests.support.invariant import paint_instead

    requests: list = []
    paint_instead(monkeypatch, requests)
    return requests


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model cut down to a few tensors."""
    from tests.support.bakes import make_micro

    return make_micro(ROOT / "presets" / "tiny", tmp_path_factory.mktemp("micro"))


@pytest.fixture
def copy(micro: Path, tmp_path: Path) -> Path:
    """A micro model that a test may change."""
    return Path(shutil.copytree(micro, tmp_path / "copy"))


@pytest.fixture
def ram(micro: Path) -> Iterator[Path]:
    """A folder in memory, where fsync and rmdir are quick, with the micro model in it; on the disk
    elsewhere.
    """
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as folder:
        shutil.copytree(micro, Path(folder) / "micro")
        yield Path(folder)
