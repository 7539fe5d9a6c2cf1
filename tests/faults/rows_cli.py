"""Fault rows of the command line and of what is around it: options, variables, settings files."""

import os
from functools import partial

from tests.faults.case import Case, Ended, fault

SENTENCE = "a red circle on a blue background"

# Wrong command lines: what is typed, and a word that the error or its hint must have.
TYPED: dict[str, tuple[list[str], str]] = {
    "no-prompt": (["generate"], "no prompt"),
    "blank-prompt": (["generate", " \n\t"], "prompt"),
    "prompt-nul-bytes": (["generate", "ab\udcffc"], "byte 2"),
    "two-prompts": (["generate", "a", "--prompt", "b"], "two prompts"),
    "words": (["generate", "a", "red", "circle"], "quote"),
    "unknown-command": (["generat", "x"], "did you mean 'generate'"),
    "sentence-command": ([SENTENCE], "flux generate 'a red"),
    "sentence-after-dashes": (["--", SENTENCE], "flux generate 'a red"),
    "option-first": (["-p", "tiny", SENTENCE], "options follow a command"),
    "unknown-subcommand": (["models", "downlod", "dev"], "did you mean 'download'"),
    "dash-prompt": (["generate", "-5 degrees"], "after --"),
    "near-option": (["generate", "x", "--stps", "4"], "did you mean --steps"),
    "far-option": (["generate", "x", "--zzz"], "--help"),
    "short-width": (["generate", "x", "-W", "512"], "--width"),
    "glued-width": (["generate", "x", "-W512"], "--width"),
    "steps-letter": (["generate", "x", "-s", "5"], "--steps"),
    "cfg-scale": (["generate", "x", "--cfg-scale=3"], "--guidance"),
    "underscores": (["generate", "x", "--num_inference_steps", "5"], "--steps"),
    "negative": (["generate", "x", "--negative", "ugly"], "--negative-prompt TEXT"),
    "negative-n": (["generate", "x", "-n", "ugly hands"], "--negative-prompt TEXT"),
    "init-image": (["generate", "x", "--init-image", "a.png"], "--image FILE"),
    "quantize-8": (["generate", "x", "-q", "8"], "--precision int8"),
    "verbose": (["generate", "x", "-v"], "--debug"),
    "lora-scales": (["generate", "x", "--lora-scales", "1"], "--lora FILE"),
    "quantize-model": (["quantize", "-m", "dev", "--to", "fp8"], "flux quantize dev"),
    "quantize-no-to": (["quantize", "dev"], "--to"),
    "value-missing": (["generate", "x", "--steps"], "--steps"),
    "steps-text": (["generate", "x", "--steps", "many"], "--steps"),
    "steps-0": (["generate", "x", "--steps", "0"], "--steps"),
    "steps-huge": (["generate", "x", "--steps", "9" * 5000], "--steps"),
    "seed-text": (["generate", "x", "--seed", "abc"], "--seed"),
    "seed-too-big": (["generate", "x", "--seed", str(2**64)], "--seed"),
    "guidance-nan": (["generate", "x", "--guidance", "nan"], "--guidance"),
    "guidance-inf": (["generate", "x", "--guidance", "1e400"], "--guidance"),
    "size-text": (["generate", "x", "--size", "big"], "--size"),
    "size-odd": (["generate", "x", "--size", "1000"], "992"),
    "ratio-zero": (["generate", "x", "--ar", "0:9"], "--ar"),
    "ratio-long": (["generate", "x", "--ar", "9" * 100_000 + ":1"], "--ar"),
    "precision": (["generate", "x", "--precision", "fp5"], "fp8"),
    "device": (["generate", "x", "--device", "tpu"], "cpu"),
    "format": (["generate", "x", "--format", "bmp"], "png"),
    "quality-0": (["generate", "x", "--quality", "0"], "--quality"),
    "count-0": (["generate", "x", "-n", "0"], "--count"),
    "json-and-events": (["generate", "x", "--json", "--events"], "exclude"),
    "resume-alone": (["generate", "x", "--resume"], "--from"),
    "preset-unknown": (["generate", "x", "-p", "drafft"], "did you mean 'draft'"),
    "preset-shown": (["presets", "drafft"], "did you mean 'draft'"),
    "preset-slash": (["presets", "../../etc/passwd"], "unknown preset"),
    "escape-codes": (["generate", "x", "--ar", "\x1b[31m\u202e"], "--ar"),
    "help-unknown": (["help", "generat"], "did you mean 'generate'"),
    "idle-text": (["worker", "start", "--idle", "soon"], "30s"),
}


def type_words(case: Case, words: list[str]) -> Ended:
    return case.flux(*words)


for name, (words, says) in TYPED.items():
    fault(f"cli-{name}", f"flux {' '.join(words)[:60]!r}", codes=[2], says=says)(
        partial(type_words, words=words)
    )


# Pages: none may fail, whatever is broken beside them.
PAGES = ("", "generate", "quantize", "models", "worker", "plan")


def show_page(case: Case, page: str) -> Ended:
    broken = case.folder / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libtorch.so')")
    (case.config / "config.toml").write_text("steps = = 3")
    path = f"{broken.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ended = case.flux(*page.split(), "--help", cold=True, environment={"PYTHONPATH": path})
    if "Usage: flux" not in ended.stdout:
        case.problems.append("no page")
    return ended


for page in PAGES:
    fault(
        f"cli-page-{page or 'flux'}",
        f"flux {page} --help with a broken torch and broken settings",
        codes=[0],
    )(partial(show_page, page=page))


# A file that is not there is 2, and 3 where it would be weights that can be got.
ABSENT = {
    "inspect": (["inspect", "nofile.png"], [2]),
    "inspect-weights": (["inspect", "nofile.safetensors"], [2]),
    "replay": (["replay", "nofile.png"], [2]),
    "decode": (["decode", "nofile.latents.safetensors"], [2]),
    "rows": (["generate", "--from", "nofile.txt"], [2]),
    "model": (["generate", "x", "-m", "nofile"], [3]),
    "lora": (["lora", "info", "nofile"], [3]),
}
for name, (words, codes) in ABSENT.items():
    fault(f"cli-absent-{name}", f"flux {' '.join(words)}", codes=codes, says="nofile")(
        partial(type_words, words=words)
    )


@fault("cli-alone", "flux alone shows its page", codes=[0])
def flux_alone(case: Case) -> None:
    if "Usage: flux" not in case.flux().stdout:
        case.problems.append("no page")


@fault("cli-prompt-on-stdin-unread", "a prompt on stdin, and no -", codes=[2], says="generate -")
def prompt_unread(case: Case) -> None:
    case.flux("generate", "-p", "tiny", stdin=SENTENCE)


@fault("cli-prompt-empty-stdin", "- and an empty stdin", codes=[2], says="empty")
def prompt_empty_stdin(case: Case) -> None:
    case.flux("generate", "-", "-p", "tiny", stdin="")


@fault("cli-prompt-no-utf8", "a prompt that is no UTF-8", codes=[2], says="UTF-8")
def prompt_no_utf8(case: Case) -> None:
    case.flux("generate", b"caf\xe9".decode("utf-8", "surrogateescape"), "-p", "tiny")


@fault("cli-prompt-huge", "a prompt of 100 KB", codes=[2], says="too long")
def prompt_huge(case: Case) -> None:
    case.draw(prompt="red " * 25_000)


@fault("cli-prompt-endless", "64 MB of prompt on stdin", codes=[2], says="too long")
def prompt_endless(case: Case) -> None:
    case.flux("generate", "-", "-p", "tiny", stdin="a" * (64 << 20), memory_bytes=1 << 30)


# Variables: the name, its value, right codes, a word of the error.
VARIABLES = {
    "steps": ("FLUX_STEPS", "many", [2], "FLUX_STEPS"),
    "size": ("FLUX_SIZE", "1000", [2], "FLUX_SIZE"),
    "near": ("FLUX_STPES", "3", [2], "FLUX_STEPS"),
    "worker": ("FLUX_WORKER", "maybe", [2], "FLUX_WORKER"),
    "kernels": ("FLUX_KERNELS", "maybe", [2], "FLUX_KERNELS"),
    "other": ("FLUX_WHATEVER", "1", [0], ""),
    "no-color": ("NO_COLOR", "1", [0], ""),
    "force-color": ("FORCE_COLOR", "1", [0], ""),
    "term": ("TERM", "\x1b[31m", [0], ""),
    "columns": ("COLUMNS", "x", [0], ""),
    "columns-0": ("COLUMNS", "0", [0], ""),
    "lang": ("LC_ALL", "nonsense", [0], ""),
    "cuda": ("CUDA_VISIBLE_DEVICES", "nonsense", [0], ""),
    "mirror": ("FLUX_MIRROR", "/dev/null", [0], ""),
    "temporary": ("TMPDIR", "/dev/null", [0], ""),
}


def set_variable(case: Case, variable: str, value: str) -> Ended:
    return case.draw(environment={variable: value})


for name, (variable, value, codes, says) in VARIABLES.items():
    fault(f"env-{name}", f"{variable}={value!r}", codes=codes, says=says)(
        partial(set_variable, variable=variable, value=value)
    )


@fault("env-no-home", "a home that is no folder", codes=[0])
def no_home(case: Case) -> None:
    file = str(case.write("file", ""))
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    case.draw(environment=dict.fromkeys(names, file))


# Settings files: what config.toml has, right codes, a word of the error.
SETTINGS = {
    "malformed": ("steps == 3", [2], "line 1"),
    "unknown-key": ("stepz = 3", [2], "did you mean 'steps'"),
    "wrong-type": ("steps = 'many'", [2], "steps"),
    "date": ("seed = 2020-01-01", [2], "seed"),
    "table": ("[steps]\na = 1", [2], "steps"),
    "nan": ("guidance = nan", [2], "guidance"),
    "deep": ("a = " + "[" * 100_000, [2], "config.toml"),
    "digits": ("seed = " + "9" * 100_000, [2], "config.toml"),
    "no-utf8": (b"steps = 3 # \xff", [2], "config.toml"),
    "bom": ("\ufeffsteps = 3", [0, 2], ""),
    "empty": ("", [0], ""),
}


def put_settings(case: Case, content: str | bytes) -> Ended:
    data = content.encode() if isinstance(content, str) else content
    (case.config / "config.toml").write_bytes(data)
    return case.draw()


for name, (content, codes, says) in SETTINGS.items():
    fault(f"env-config-{name}", f"config.toml: {name}", codes=codes, says=says)(
        partial(put_settings, content=content)
    )


@fault("env-preset-circle", "two presets that extend each other", codes=[2], says="each other")
def preset_circle(case: Case) -> None:
    folder = case.config / "presets"
    folder.mkdir()
    (folder / "a.toml").write_text('extends = "b"')
    (folder / "b.toml").write_text('extends = "a"')
    case.flux("generate", SENTENCE, "-p", "a")


@fault("env-preset-broken-beside", "a broken preset beside others: the list", codes=[0], says="own")
def preset_broken(case: Case) -> None:
    (case.config / "presets").mkdir()
    (case.config / "presets" / "own.toml").write_text("steps = = 3")
    case.flux("presets")


# What the shell asks for.
ASKED = ("generate x -p ", "generate x -m nothing", "models verify ", "nonsense ", "generate -")


def ask_completion(case: Case, line: str) -> Ended:
    """Completion, with broken settings and presets: never an error line in what is typed."""
    (case.config / "config.toml").write_text("steps = = 3")
    (case.config / "presets").mkdir()
    (case.config / "presets" / "own.toml").write_text("steps = = 3")
    words = f"flux {line}"
    asking = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_FLUX_COMPLETE": "complete_bash",
    }
    ended = case.flux(cold=True, environment=asking)
    if ended.stderr:
        case.problems.append("it said something")
    return ended


for line in ASKED:
    fault(f"env-complete-{line.strip()}", f"completion of {line!r}", codes=[0])(
        partial(ask_completion, line=line)
    )


@fault("env-complete-unknown-shell", "completion for a shell that is none", codes=[2])
def unknown_shell(case: Case) -> None:
    case.flux(cold=True, environment={"_FLUX_COMPLETE": "complete_nosh"})


@fault("env-preset-variable", "FLUX_PRESET names no preset", codes=[2], says="nope")
def preset_variable(case: Case) -> None:
    case.flux("generate", SENTENCE, environment={"FLUX_PRESET": "nope"})
