"""Fault rows of tokenizers, schedulers, broken libraries and of what is printed."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.faults.case import Case, fault

EVIL = "\x1b]0;x\x07\u202e\u2066\u200b\u2028\x9b31m"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # a socket's path must be short
    os.close(folder)


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def make_array(path: Path) -> None:
    path.write_text("[]")


def make_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def make_huge_number(path: Path) -> None:
    path.write_text('{"a": ' + "9" * 100_000 + "}")


MAKERS: dict[str, Callable[[Path], None]] = {
    "fifo": make_fifo,
    "dangling": make_dangling,
    "loop": make_loop,
    "folder": make_folder,
    "socket": make_socket,
    "empty": make_empty,
    "deep": make_deep,
    "array": make_array,
    "binary": make_binary,
    "number": make_huge_number,
}
KEY_FILES = (
    "tokenizer/vocab.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)


def replace_file(case: Case, file: str, make: Callable[[Path], None]) -> Path:
    """A model in which a file is something else."""
    model = case.model()
    (model / file).unlink(missing_ok=True)
    make(model / file)
    return model


for kind, make in MAKERS.items():
    for file in KEY_FILES:

        @fault(f"text-{kind}-{file}", f"{file} is {kind}", codes=[4], says=Path(file).name)
        def odd_file(case: Case, file: str = file, make: Callable = make) -> None:
            case.draw("-m", replace_file(case, file, make))


for kind in ("fifo", "socket", "loop", "empty"):

    @fault(f"text-merges-{kind}", f"merges.txt is {kind}", codes=[4], says="merges.txt")
    def odd_merges(case: Case, make: Callable = MAKERS[kind]) -> None:
        case.draw("-m", replace_file(case, "tokenizer/merges.txt", make))

    @fault(f"text-inspect-{kind}", f"inspect: vocab.json is {kind}", codes=[4])
    def inspected(case: Case, make: Callable = MAKERS[kind]) -> None:
        ended = case.flux("inspect", replace_file(case, "tokenizer/vocab.json", make))
        assert "vocab.json" in str(json.loads(ended.stdout)["problems"])


for kind in ("fifo", "socket", "dangling", "loop", "folder"):

    @fault(f"text-beside-{kind}", f"a stray {kind} in both tokenizers' folders", codes=[0])
    def stray(case: Case, make: Callable = MAKERS[kind]) -> None:
        model = case.model()
        make(model / "tokenizer" / ".ipynb_checkpoints")
        make(model / "tokenizer_2" / "README.md")
        case.draw("-m", model)


for missing in (
    ("tokenizer_2/tokenizer.json",),
    ("tokenizer/vocab.json",),
    ("tokenizer/merges.txt",),
    ("tokenizer/vocab.json", "tokenizer/merges.txt"),
):

    @fault(f"text-no-{'-'.join(missing)}", f"without {' and '.join(missing)}", codes=[4])
    def no_vocabulary(case: Case, missing: tuple[str, ...] = missing) -> None:
        model = case.model()
        for file in missing:
            (model / file).unlink()
        ended = case.flux("inspect", model)
        assert ended.code == 4 and json.loads(ended.stdout)["problems"]
        case.draw("-m", model)


@fault("text-ids-beyond", "T5's tokenizer gives ids beyond the embedding", codes=[4], says="token")
def ids_beyond(case: Case) -> None:
    model = case.model()
    path = model / "tokenizer_2/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] += [[f"x{number}", -20.0] for number in range(2000)]
    tokenizer["model"]["vocab"].append(["▁circle,", -0.1])
    path.write_text(json.dumps(tokenizer))
    case.draw("-m", model, prompt="a red circle, on a blue background")


@fault("text-ids-clip", "CLIP's vocabulary has ids beyond the embedding", codes=[4], says="token")
def clip_ids_beyond(case: Case) -> None:
    model = case.model()
    path = model / "tokenizer/vocab.json"
    moved = {word: number + 100_000 for word, number in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(moved))
    case.draw("-m", model)


for key, value in (
    ("fast_tokenizer_files", ["../../x.json"]),
    ("model_max_length", "x"),
    ("extra_ids", -5),
    ("added_tokens_decoder", {"x": 1}),
    ("tokenizer_class", 5),
    ("pad_token", {"a": 1}),
    ("eos_token", 7),
):

    @fault(f"text-config-{key}", f"T5's tokenizer_config: {key} is {value!r}", codes=[0, 4])
    def tokenizer_config(case: Case, key: str = key, value: object = value) -> None:
        model = case.model()
        path = model / "tokenizer_2/tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        case.draw("-m", model)


LIBRARIES = ("diffusers", "transformers", "PIL", "tokenizers", "safetensors", "psutil")
for library in LIBRARIES:
    for raised in ("ImportError", "RuntimeError", "OSError"):
        said = library if library != "PIL" else "pillow"

        @fault(
            f"text-{library}-{raised}",
            f"{library} raises {raised} at import",
            codes=[8],
            says=said,
            exhaustive=(library, raised) != ("transformers", "RuntimeError"),
        )
        def broken(case: Case, library: str = library, raised: str = raised) -> None:
            path = case.write(f"broken/{library}/__init__.py", f"raise {raised}('no')\n")
            environment = {"PYTHONPATH": find_path(path)}
            case.draw(cold=True, environment=environment)


def find_path(init: Path) -> str:
    """PYTHONPATH with a library of that __init__.py, and what it has now."""
    return os.pathsep.join([str(init.parents[1]), os.environ.get("PYTHONPATH", "")])


for library in ("torchvision", "xformers", "flash_attn", "torchaudio", "peft", "onnxruntime"):

    @fault(
        f"text-unused-{library}",
        f"{library} was built for another torch",
        codes=[0],
        exhaustive=library != "torchvision",
    )
    def unused(case: Case, library: str = library) -> None:
        path = case.write(f"other/{library}/__init__.py", "raise RuntimeError('another torch')\n")
        version = f"Metadata-Version: 2.1\nName: {library}\nVersion: 1.0.0\n"
        case.write(f"other/{library}-1.0.0.dist-info/METADATA", version)
        case.draw(cold=True, environment={"PYTHONPATH": find_path(path)})


@fault(
    "text-optimized",
    "PYTHONOPTIMIZE=2, which takes assertions and docstrings away",
    codes=[0],
    exhaustive=True,
)
def optimized(case: Case) -> None:
    case.draw(
        cold=True,
        environment={"PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=240,
    )


@fault("text-optimized-help", "PYTHONOPTIMIZE=2: the help", codes=[0])
def optimized_help(case: Case) -> None:
    variables = {"PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = case.flux("generate", "--help", cold=True, environment=variables)
    assert "--steps" in ended.stdout


def holds_hidden(text: str) -> bool:
    return any(character in text for character in EVIL if not character.isprintable())


@fault("text-evil-preset", "a preset's description with escapes", codes=[0])
def evil_preset(case: Case) -> None:
    (case.config / "presets").mkdir()
    (case.config / "presets/x.toml").write_text(f"description = {json.dumps(EVIL)}\n")
    ended = case.flux("presets")
    assert "\\x1b" in ended.stdout and not holds_hidden(ended.stdout)


@fault("text-evil-names", "a preset and a model whose names have escapes", codes=[2, 3])
def evil_names(case: Case) -> None:
    (case.config / "presets").mkdir()
    (case.config / f"presets/{EVIL.replace('/', '')}.toml").write_text("x = 1\n")
    ended = case.flux("presets")
    assert not holds_hidden(ended.stdout + ended.stderr)
    ended = case.draw("-m", f"nowhere{EVIL}")
    assert not holds_hidden(ended.stderr)


@fault("text-evil-variable", "a variable with escapes in its value", codes=[2])
def evil_variable(case: Case) -> None:
    ended = case.draw(environment={"FLUX_STEPS": EVIL})
    assert not holds_hidden(ended.stderr)


@fault("text-evil-prompt", "escapes in a prompt, in metadata, in inspect and replay", codes=[0])
def evil_prompt(case: Case) -> None:
    ended = case.draw("-o", "x.png", prompt=f"a red circle {EVIL}")
    assert not holds_hidden(ended.stderr)
    ended = case.flux("inspect", "x.png")
    assert not holds_hidden(ended.stdout.replace("\n", ""))
    ended = case.flux("replay", "x.png", "-o", "y.png", "--no-cache")
    assert not holds_hidden(ended.stderr)
