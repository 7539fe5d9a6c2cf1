"""Lists of the tensors in published files: names, dtypes and shapes, at real size, each with its
sources.

They come from other projects' code and from files' own headers, never from this project's table of
names. In a name "{n}" stands for 0 to n-1 and "{a|b}" for either; "include" adds another list under
a prefix.
"""

import itertools
import json
import pathlib
import re

HERE = pathlib.Path(__file__).parent


def names(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    fills = [part.split("|") if "|" in part else map(str, range(int(part))) for part in parts[1::2]]
    return [
        parts[0] + "".join(fill + rest for fill, rest in zip(chosen, parts[2::2], strict=True))
        for chosen in itertools.product(*fills)
    ]


def fixture(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def tensors(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the file: name to (dtype, shape)."""
    stored = fixture(name)
    found = {
        prefix + inner: value
        for prefix, other in stored.get("include", {}).items()
        for inner, value in tensors(other).items()
    }
    for pattern, (dtype, shape) in stored["tensors"].items():
        for full in names(pattern):
            if full in found:
                raise ValueError(f"{name}: {full} is listed twice")
            found[full] = (dtype, tuple(shape))
    return found


def metadata(name: str) -> dict:
    """The header's own entries as far as they are known; empty where the file has none."""
    return fixture(name).get("metadata", {})
