"""Fault rows of `flux quantize`, `flux cache` and completion: what is not theirs stays."""

import json
import os
import resource
import time
from functools import partial
from pathlib import Path

from tests.faults.case import Case, Ended, fault
from tests.faults.rows_lora import pack

DAY_S = 24 * 3600
FAST = ("--to", "nf4", "--scales", "absmax", "-q")
FILE = ("--to", "w4a8", "--layout", "comfy", "-q")


def quantize(case: Case, *arguments: str | Path, **options: object) -> Ended:
    """Run `flux quantize` of the bundled model into `x`, unless told otherwise."""
    target = arguments or ("x", *FAST)
    return case.flux("quantize", "tiny", *target, **options)


def put_manifest(case: Case, **changes: object) -> None:
    """Put a manifest that looks like one of a bake into the folder x."""
    manifest = {"format": 1, "recipe": {}, "layout": "diffusers", "files": {}} | changes
    case.write("x/flux-manifest.json", json.dumps(manifest))


@fault("quantize-lost-bias", "an adapter's bias for a layer without one", codes=[4], says="no bias")
def lost_bias(case: Case) -> None:
    name = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.diff_b"
    adapter = case.write("x.safetensors", pack({name: ((128,), 1)}))
    quantize(case, "x", *FAST, "--lora", adapter)


@fault("quantize-no-scheme", "no --to where 16 bit is best", codes=[2], says="--to int8")
def no_scheme(case: Case) -> None:
    quantize(case, "x")


# --- what is there


THERE = {
    "folder": lambda case: case.write("x/mine.txt", "mine"),
    "file": lambda case: case.write("x", "mine"),
    "link": lambda case: (case.folder / "x").symlink_to("elsewhere"),
    "link to a folder": lambda case: (
        case.write("theirs/mine.txt", "mine"),
        (case.folder / "x").symlink_to("theirs"),
    ),
    "fifo": lambda case: os.mkfifo(case.folder / "x"),
    "empty manifest": lambda case: (
        case.write("x/mine.txt", "mine"),
        case.write("x/flux-manifest.json", ""),
    ),
    "any manifest": lambda case: (
        case.write("x/mine.txt", "mine"),
        case.write("x/flux-manifest.json", "{}"),
    ),
    "manifest of a list": lambda case: case.write("x/flux-manifest.json", "[]"),
    "manifest of deep JSON": lambda case: case.write(
        "x/flux-manifest.json", "[" * 100_000 + "]" * 100_000
    ),
    "manifest that is a FIFO": lambda case: (
        (case.folder / "x").mkdir(),
        os.mkfifo(case.folder / "x/flux-manifest.json"),
    ),
    "manifest that is a link": lambda case: (
        case.write("m", json.dumps({"format": 1, "recipe": {}, "layout": "diffusers"})),
        (case.folder / "x").mkdir(),
        (case.folder / "x/flux-manifest.json").symlink_to("../m"),
    ),
    "foreign file": lambda case: (put_manifest(case), case.write("x/mine.txt", "mine")),
    "foreign folder": lambda case: (put_manifest(case), (case.folder / "x/mine").mkdir()),
    "another size": lambda case: (
        put_manifest(case, files={"vae/a.safetensors": 3}),
        case.write("x/vae/a.safetensors", "mine"),
    ),
    "a name outside": lambda case: (
        put_manifest(case, files={"../mine.txt": 4}),
        case.write("mine.txt", "mine"),
        case.write("x/also.txt", "mine"),
    ),
    "a link inside": lambda case: (
        case.write("theirs/a.safetensors", "mine"),
        put_manifest(case, files={"vae/a.safetensors": 4}),
        (case.folder / "x/vae").symlink_to("../theirs"),
    ),
}


for name, put in THERE.items():

    @fault(
        f"quantize-force-{name.replace(' ', '-')}",
        f"--force over a {name}",
        codes=[6],
        says="did not make",
    )
    def force(case: Case, put: object = put) -> None:
        put(case)
        quantize(case, "x", *FAST, "--force")


@fault("quantize-foreign-json", "a file's manifest is somebody's JSON", codes=[6], says="not make")
def foreign_json(case: Case) -> None:
    case.write("x.safetensors.json", '{"mine": 1}')
    quantize(case, "x.safetensors", *FILE)
    quantize(case, "x.safetensors", *FILE, "--force")


@fault(
    "quantize-foreign-weights",
    "a file with a bake's manifest beside it",
    codes=[6],
    exhaustive=True,
)
def foreign_weights(case: Case) -> None:
    quantize(case, "x.safetensors", *FILE)
    case.write("x.safetensors", "mine")
    quantize(case, "x.safetensors", *FILE, "--force")


@fault("quantize-bake-and-notes", "notes in a folder of ours", codes=[6], says="notes.txt")
def bake_and_notes(case: Case) -> None:
    quantize(case)
    case.write("x/vae/notes.txt", "mine")
    quantize(case, "x", *FAST, "--force")


@fault(
    "quantize-edited-config",
    "a config of ours was edited",
    codes=[6],
    says="config.json",
    exhaustive=True,
)
def edited_config(case: Case) -> None:
    quantize(case)
    config = case.folder / "x/vae/config.json"
    config.write_text(config.read_text() + "\n")
    quantize(case, "x", *FAST, "--force")


@fault("quantize-twice", "a bake is replaced with --force alone", codes=[0])
def twice(case: Case) -> None:
    quantize(case)
    quantize(case)
    assert case.ended[-1].code == 6
    quantize(case, "x", *FAST, "--force", changes=["x"])


@fault("quantize-copies", "an edit of what was kept does not reach the source", codes=[0])
def copies(case: Case) -> None:
    model = case.model()
    case.flux("quantize", model, "x", *FAST)
    for path in (case.folder / "x").rglob("*"):
        assert not path.is_file() or path.stat().st_nlink == 1


# --- remains


def leave(case: Case, name: str, *, seconds: float) -> Path:
    """What a killed bake of x leaves, so old."""
    left = case.folder / name
    case.write(f"{name}/new/a.safetensors", "a")
    case.write(f"{name}/lock", "")
    for path in (*left.rglob("*"), left):
        os.utime(path, (time.time() - seconds,) * 2)
    return left


@fault(
    "quantize-young-remains",
    "another container's bake goes on",
    codes=[0],
    says="left beside",
    exhaustive=True,
)
def young_remains(case: Case) -> None:
    leave(case, "x.tmp-99999-01234567", seconds=DAY_S / 2)
    quantize(case)


@fault("quantize-old-remains", "a killed bake left its files two days ago", codes=[0])
def old_remains(case: Case) -> None:
    left = leave(case, "x.tmp-99999-01234567", seconds=2 * DAY_S)
    quantize(case, changes=[left.name])
    assert not left.exists()


@fault("quantize-like-remains", "folders with names like remains", codes=[0], exhaustive=True)
def like_remains(case: Case) -> None:
    for name in ("x.tmp-1", "x.tmp-mine", "y.tmp-1-01234567", "x.tmp-1-01234567.bak"):
        leave(case, name, seconds=2 * DAY_S)
    quantize(case)


# --- the source and the disk


@fault("quantize-nan", "a source with a NaN", codes=[4], says="not finite")
def nan(case: Case) -> None:
    model = case.model()
    (path,) = (model / "transformer").glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\xff\xff")
    case.flux("quantize", model, "x", *FAST)


@fault("quantize-unreadable", "weights that may not be read", codes=[0, 4])
def unreadable(case: Case) -> None:
    model = case.model()
    (path,) = (model / "vae").glob("*.safetensors")
    path.chmod(0)  # which root does not feel
    case.flux("quantize", model, "x", *FAST)


@fault("quantize-source-fifo", "a kept config is a FIFO", codes=[0, 4])
def source_fifo(case: Case) -> None:
    model = case.model()
    os.mkfifo(model / "vae" / "notes.json")
    case.flux("quantize", model, "x", *FAST)


def limit_file(case: Case, size_bytes: int) -> None:
    limits = {resource.RLIMIT_FSIZE: size_bytes}
    quantize(case, "out/x", *FAST, cold=True, limits=limits)
    assert list((case.folder / "out").iterdir()) == []


for size in (1, 1000, 1_000_000):
    fault(
        f"quantize-file-limit-{size}",
        f"no file may be larger than {size} bytes",
        codes=[6],
        says="too large",
        exhaustive=size > 1,
    )(partial(limit_file, size_bytes=size))


@fault("quantize-folder-read-only", "the parent of DST is a file", codes=[6])
def parent_is_file(case: Case) -> None:
    case.write("out", "mine")
    quantize(case, "out/x", *FAST)


@fault("quantize-dst-long", "a DST longer than a name may be", codes=[2, 6])
def long_name(case: Case) -> None:
    quantize(case, "x" * 250, *FAST)


@fault("quantize-dst-longest", "a DST of 5000 letters", codes=[2, 6], exhaustive=True)
def longest_name(case: Case) -> None:
    quantize(case, "x" * 5000, *FAST)


# --- the cache of prompts


for level in ("flux", "flux/embeddings"):

    @fault(
        f"cache-link-{level.rpartition('/')[2]}",
        f"the cache's {level} is a link",
        codes=[0],
        says="is a link",
    )
    def cache_link(case: Case, level: str = level) -> None:
        place = "theirs" if level == "flux/embeddings" else "theirs/embeddings"
        case.write(f"{place}/{'a' * 64}.safetensors", "mine")
        case.write(f"{place}/.flux-0123.tmp", "mine")
        link = case.home / "XDG_CACHE_HOME" / level
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(case.folder / "theirs")
        case.flux("cache", "--clear")
        case.flux("generate", "x", "-p", "tiny", "--size", "64", "--steps", "1", "-o", "x.png")
        case.flux("cache", "--clear")


@fault("cache-file", "the cache's folder is a file", codes=[0])
def cache_file(case: Case) -> None:
    folder = case.home / "XDG_CACHE_HOME" / "flux"
    folder.mkdir()
    (folder / "embeddings").write_text("mine")
    case.flux("cache", "--clear")
    assert (folder / "embeddings").read_text() == "mine"


# --- completion


@fault("completion-limit", "no byte may be written to ~/.bashrc", codes=[2, 6])
def completion_limit(case: Case) -> None:
    start = case.home / "HOME" / ".bashrc"
    start.write_text("alias mine\n")
    case.flux("--install-completion", cold=True, limits={resource.RLIMIT_FSIZE: 0})
    assert start.read_text() == "alias mine\n"


def misshape(model: Path) -> None:
    """Turn the sides of the transformer's last matrix in the header: the bytes stay as many."""
    path = model / "transformer/diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["proj_out.weight"]["shape"].reverse()
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


for to, options in {"folder": FAST, "file": FILE}.items():

    @fault(
        f"quantize-misshapen-{to}",
        f"a matrix of the source has its sides turned; to a {to}",
        codes=[4],
        says="misshapen",
    )
    def misshapen(case: Case, options: tuple[str, ...] = options) -> None:
        model = case.model()
        misshape(model)
        case.flux("quantize", model, "x.safetensors" if options is FILE else "x", *options)
        assert not list(case.folder.glob("x*"))
