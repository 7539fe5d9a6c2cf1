"""Fault rows of settings: values on the command line, in variables, config.toml and presets."""

from tests.faults.case import Case, fault

# --- options

OPTIONS = {
    "size-word": (["--size", "big"], "size is 'big'"),
    "size-zero": (["--size", "0"], "nearest"),
    "size-odd": (["--size", "1000x700"], "nearest"),
    "size-three": (["--size", "64x64x64"], "--size 1024"),
    "size-negative": (["--size=-64"], "nearest"),
    "size-huge": (["--size", "99999x99999"], "nearest"),
    "size-and-width": (["--size", "64x64", "--width", "64"], "exclude"),
    "size-and-ratio": (["--size", "64x64", "--ar", "1:1"], "exclude"),
    "sides-and-ratio": (["--width", "64", "--height", "64", "--ar", "1:1"], "exclude"),
    "too-many-pixels": (["--width", "4096", "--height", "4096"], "largest"),
    "ratio-zero": (["--ar", "0:9"], "not W:H"),
    "ratio-steep": (["--ar", "1:99999"], "beyond"),
    "ratio-words": (["--ar", "wide"], "not W:H"),
    "seed-word": (["--seed", "abc"], "whole number"),
    "seed-huge": (["--seed", str(2**64)], "is not in"),
    "seed-digits": (["--seed", "9" * 5000], "seed"),
    "steps-zero": (["--steps", "0"], "is not in"),
    "steps-half": (["--steps", "1.5"], "whole number"),
    "guidance-nan": (["--guidance", "nan"], "is not in"),
    "guidance-word": (["--guidance", "much"], "a number"),
    "count-huge": (["-n", "1000000000"], "is not in"),
    "vram-word": (["--vram-limit", "lots"], "8GiB"),
    "vram-bare": (["--vram-limit", "4090"], "4090 bytes are not in 1 MiB to 1024 TiB"),
    "preset-path": (["-p", "../../etc/passwd"], "unknown preset"),
    "format-bmp": (["--format", "bmp"], "jpg, png or webp"),
}
for _name, _option in OPTIONS.items():

    @fault(f"option-{_name}", " ".join(_option[0])[:60], codes=[2], says=_option[1])
    def option(case: Case, arguments: list[str] = _option[0]) -> None:
        preset = [] if "-p" in arguments else ["-p", "tiny"]
        case.flux("generate", "a fox", *preset, *arguments)


SIZES = {
    "x": ["--size", "128x64"],
    "star": ["--size", "128*64"],
    "sign": ["--size", "128\u00d764"],
    "width-alone": ["--width", "64"],
    "height-alone": ["--height", "64"],
    "width-by-ratio": ["--width", "128", "--ar", "2:1"],
}
for _name, _arguments in SIZES.items():

    @fault(f"size-taken-{_name}", " ".join(_arguments), codes=[0])
    def size_taken(case: Case, arguments: list[str] = _arguments) -> None:
        case.flux(
            "generate",
            "a fox",
            "-p",
            "tiny",
            "--steps",
            "1",
            "--no-cache",
            "-o",
            "x.png",
            *arguments,
        )


# --- files

CONFIGS = {
    "malformed": ("steps = = 3\n", "malformed"),
    "key": ("stesp = 3\n", "'steps'"),
    "key-of-rows": ('prompt = "a fox"\n', "no setting"),
    "type": ('steps = "many"\n', "whole number"),
    "list": ("steps = [1]\n", "whole number"),
    "table": ("[steps]\na = 1\n", "whole number"),
    "range": ("steps = 100000\n", "is not in"),
    "template": ('output = "{seed:c}.png"\n', "only a width"),
    "out": ('output = "{seed}/../../x"\n', "leads out"),
    "control": ('output = "a\\u001b.png"\n', "unknown output"),
    "two-sizes": ('size = "64x64"\nwidth = 64\n', "exclude"),
    "preset": ('preset = "nope"\n', "unknown preset"),
}
for _name, _config in CONFIGS.items():

    @fault(f"config-{_name}", f"config.toml: {_config[0][:40]!r}", codes=[2], says=_config[1])
    def config(case: Case, text: str = _config[0]) -> None:
        (case.config / "config.toml").write_text(text)
        case.flux("generate", "a fox")


PRESETS = {
    "key": ("stesp = 3\n", "'steps'"),
    "circle": ('extends = "other"\n', "extend each other"),
    "absent": ('extends = "nope"\n', "unknown preset"),
    "description": ("description = 5\n", "texts"),
    "preset": ('preset = "tiny"\n', "extends"),
}
for _name, _preset in PRESETS.items():

    @fault(f"preset-{_name}", f"a preset: {_preset[0][:40]!r}", codes=[2], says=_preset[1])
    def preset(case: Case, text: str = _preset[0]) -> None:
        folder = case.config / "presets"
        folder.mkdir()
        (folder / "mine.toml").write_text(text)
        (folder / "other.toml").write_text('extends = "mine"\n')
        case.flux("generate", "a fox", "-p", "mine")


@fault("config-hidden", "config.toml beside a preset that was asked for", codes=[0], says="steps")
def config_hidden(case: Case) -> None:
    (case.config / "config.toml").write_text("text_tokens = 24\nsteps = 2\n")
    case.flux("generate", "a fox", "-p", "tiny", "--size", "64", "-o", "x.png", "--no-cache")


VARIABLES = {
    "FLUX_STEPS": ("abc", "whole number"),
    "FLUX_SIZE": ("0x0", "nearest"),
    "FLUX_SEED": ("-5", "is not in"),
    "FLUX_OUTPUT": ("{seed!r}.png", "only a width"),
    "FLUX_STESP": ("3", "FLUX_STEPS"),
}
for _name, _variable in VARIABLES.items():

    @fault(f"variable-{_name}", f"{_name}={_variable[0]}", codes=[2], says=_variable[1])
    def variable(case: Case, name: str = _name, value: str = _variable[0]) -> None:
        case.flux("generate", "a fox", "-p", "tiny", environment={name: value})


# The longest that Linux hands to a program.
LONG = "9" * 130_000
for _name in (
    "STEPS",
    "GUIDANCE",
    "SIZE",
    "AR",
    "OUTPUT",
    "SEED",
    "FORMAT",
    "DEVICE",
    "VRAM_LIMIT",
):

    @fault(f"variable-long-{_name}", f"FLUX_{_name} of 130,000 digits", codes=[2], says=_name)
    def long_variable(case: Case, name: str = f"FLUX_{_name}") -> None:
        ended = case.flux("generate", "a fox", "-p", "tiny", environment={name: LONG})
        assert len(ended.stderr) < 1000, "the error says all of it"


# --- files that are not there

for _command in ("inspect", "replay", "decode"):

    @fault(f"absent-{_command}", f"{_command} of no file", codes=[2], says="no such file")
    def absent(case: Case, command: str = _command) -> None:
        case.flux(command, "nowhere.png")
