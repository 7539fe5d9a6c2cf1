"""A prompt that was encoded before, with a new seed, against one that is new: with T5 of the published size.

    python benchmarks/cached_prompt.py FOLDER [PRECISION]

FOLDER holds text_encoder_2/ and tokenizer_2/ of the published size. The rest is the bundled model, its transformer with
a random projection of T5's width, so the pictures say nothing. Prints seconds and the peak of RssAnon of each process,
and one JSON line. Run it from the repository's root; a day-old disk cache is dropped from neither.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TINY = Path("presets/tiny")


def assembled(folder: Path, source: Path) -> Path:
    """The bundled model with the text encoder of `source`."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("text_encoder_2", "tokenizer_2"))
    for name in ("text_encoder_2", "tokenizer_2"):
        (folder / name).symlink_to((source / name).resolve())
    config = folder / "transformer" / "config.json"
    described = json.loads(config.read_text())
    described["joint_attention_dim"] = json.loads((source / "text_encoder_2" / "config.json").read_text())["d_model"]
    config.write_text(json.dumps(described))
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    old = tensors["context_embedder.weight"]
    width = described["joint_attention_dim"]
    tensors["context_embedder.weight"] = (torch.randn(old.shape[0], width) / width**0.5).to(old.dtype)
    save_file(tensors, weights)
    return folder


def measured(arguments: list[str]) -> dict:
    """Seconds, phases, the peak of RssAnon and the pixels of one process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fluxcli", *arguments], stdout=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
            peak[0] = max(peak[0], *(int(kib) * 1024 for kib in found), 0)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = json.loads(process.communicate()[0])
    watcher.join()
    return {
        "seconds": round(time.perf_counter() - started, 2), "rss_anon_gib": round(peak[0] / 2**30, 2),
        "phases_s": done["timings_s"], "pixels": done["images"][0]["pixels_sha256"][:16],
    }  # fmt: skip


def main() -> None:
    precision = sys.argv[2] if len(sys.argv) > 2 else "auto"
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        model = assembled(Path(place) / "model", Path(sys.argv[1]))
        call = ["generate", "a fox in the snow", "-p", "tiny", "-m", str(model), "--text-tokens", "256", "--precision"]
        call += [precision, "-o", f"{place}/", "--json", "-q", "--no-worker"]
        result = {"new": measured([*call, "--seed", "1"]), "kept_new_seed": measured([*call, "--seed", "2"])}
        result["kept_same_seed"] = measured([*call, "--seed", "1"])
        assert result["kept_same_seed"]["pixels"] == result["new"]["pixels"]
    for name, found in result.items():
        print(f"{name:<16}{found['seconds']:>8.2f} s {found['rss_anon_gib']:>8.2f} GiB RssAnon")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
