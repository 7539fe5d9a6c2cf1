"""A prompt that was encoded before, with a new seed, against one that is new: with a T5 of the real
size.

    python -m benchmarks.cached_prompt FOLDER [PRECISION]

FOLDER holds text_encoder_2/ and tokenizer_2/ of the published size. The rest is the bundled model,
its transformer with a random projection of T5's width, so the pictures say nothing. Prints seconds
and the peak of RssAnon of each process, and one JSON line. Run it from the repository's root; the
disk cache is dropped for none of them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.processes import to_gib, watch

TINY = Path("presets/tiny")


def assemble_model(folder: Path, *, source: Path) -> Path:
    """The bundled model with the T5 of `source`, in a new folder."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("text_encoder_2", "tokenizer_2"))
    for name in ("text_encoder_2", "tokenizer_2"):
        (folder / name).symlink_to((source / name).resolve())
    width = json.loads((source / "text_encoder_2" / "config.json").read_text())["d_model"]
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"joint_attention_dim": width}))
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    old = tensors["context_embedder.weight"]
    projection = torch.randn(old.shape[0], width) / width**0.5
    tensors["context_embedder.weight"] = projection.to(old.dtype)
    save_file(tensors, weights)
    return folder


def measure(arguments: list[str]) -> dict:
    """Seconds, phases, the peak of RssAnon and the pixels of one `flux ARGUMENTS`."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "fluxcli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = watch(process)
    done = json.loads(process.communicate()[0])
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "rss_anon_gib": to_gib(peaks)["RssAnon"],
        "phases_s": done["timings_s"],
        "pixels": done["images"][0]["pixels_sha256"][:16],
    }


def main() -> None:
    precision = sys.argv[2] if len(sys.argv) > 2 else "auto"
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        model = assemble_model(Path(place) / "model", source=Path(sys.argv[1]))
        call = ["generate", "a fox in the snow", "-p", "tiny", "-m", str(model)]
        call += ["--text-tokens", "256", "--precision", precision]
        call += ["-o", f"{place}/", "--json", "-q", "--no-worker"]
        result = {
            "new": measure([*call, "--seed", "1"]),
            "kept_new_seed": measure([*call, "--seed", "2"]),
            "kept_same_seed": measure([*call, "--seed", "1"]),
        }
    assert result["kept_same_seed"]["pixels"] == result["new"]["pixels"]
    for name, found in result.items():
        print(f"{name:<16}{found['seconds']:>8.2f} s {found['rss_anon_gib']:>8.2f} GiB RssAnon")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
