"""What the bundled model was taught, so that it is said where a prompt or a size goes beyond it.

It draws one flat shape from sentences of some forty words; training/README.md says how it was made
and what it scores. Sizes are in pixels.
"""

import contextlib
import filecmp
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fluxcli.paths import BUNDLED
from fluxcli.request import syntax
from fluxcli.request.fields import GenerationRequest

# Every word of the sentences that it was trained on, see training/data.py.
SENTENCES = """
a an the at in of on with
black blue green orange purple red white yellow
circle square star triangle
big huge large little small tiny
background bottom center corner edge left lower middle right side top upper
drawing image photo picture
"""
WORDS = frozenset(SENTENCES.split())
CAPITALIZED = frozenset(word.capitalize() for word in WORDS)
EXAMPLE = "a small red circle at the top left on a blue background"
LARGEST_PX = 256
BEST_PX = 128
MAX_WORDS = 12
VOCABULARY = Path("tokenizer_2", "tokenizer.json")
# A run of letters, or of other characters than ASCII's.
WORD = re.compile(r"[^\W\d_]+|[^\x00-\x7f\s]+")


def is_bundled(folder: Path) -> bool:
    """Return whether a model's folder is the bundled one, a copy of it or a bake of it."""
    with contextlib.suppress(OSError):
        return filecmp.cmp(folder / VOCABULARY, BUNDLED / "tiny" / VOCABULARY, shallow=False)
    return False


def find_unknown_words(prompt: str) -> list[str]:
    """Return the words of a prompt that the bundled model was not taught, each once.

    Its T5 has a token for each of `WORDS`, in lower case and with a capital; others are spelled.
    """
    found = dict.fromkeys(WORD.findall(prompt))
    return [word for word in found if word not in WORDS and word not in CAPITALIZED]


def list_remarks(requests: Sequence[GenerationRequest]) -> Iterator[str]:
    """Yield what of these requests goes beyond the bundled model: words, and sizes."""
    unknown: dict[str, None] = {}
    for request in requests:
        unknown |= dict.fromkeys(find_unknown_words(syntax.remove_forms(request.prompt)))
    if unknown:
        words = ", ".join([*unknown][:MAX_WORDS])
        if len(unknown) > MAX_WORDS:
            words += f" and {len(unknown) - MAX_WORDS} more"
        yield f"the bundled model does not know these words: {words}"
        yield f'the bundled model knows only sentences such as "{EXAMPLE}"'
    largest = max(requests, key=lambda request: max(request.size), default=None)
    if largest and max(largest.size) > LARGEST_PX:
        width, height = largest.size
        yield (
            f"the bundled model was trained up to {LARGEST_PX} px and is best at {BEST_PX}: "
            f"{width}x{height} is beyond"
        )
