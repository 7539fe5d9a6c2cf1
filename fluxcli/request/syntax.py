"""What other tools take in a prompt and FLUX.1 does not: found, and named with what does it here.

Such text is neither removed nor changed: the text encoders read it as any other words. Stdlib only.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

# <lora:NAME>, <lora:NAME:0.8>, <lyco:NAME:0.8:0.5>: the first number is the strength.
ADAPTER = re.compile(r"<(?P<kind>lora|lyco):(?P<name>[^<>:]+)(?P<weights>(:[^<>:]*)*)>", re.I)


class _Form(NamedTuple):
    """A form of text of another tool, and what is said of it once."""

    pattern: re.Pattern[str]
    notice: str


FORMS = (
    _Form(
        re.compile(r"<hypernet:[^<>]+>", re.I),
        "<hypernet:...> in a prompt does nothing here but add its words: FLUX.1 has none",
    ),
    _Form(
        re.compile(r"(?<![\w-])embedding:[\w.-]+", re.I),
        "embedding:... in a prompt does nothing here but add its words: --lora takes adapters",
    ),
    _Form(
        re.compile(r"\([^()]+:\s*[\d.]+\s*\)|\(\([^()]+\)\)|(?:\w\w|\))(?:\+\+|--)(?![\w+-])"),
        "weights such as (word:1.3), ((word)) and word++ do nothing here but add their characters",
    ),
    _Form(
        re.compile(r"\[[^\[\]]*[|:][^\[\]]*\]"),
        "[from:to:0.5] and [one|other] do nothing here but add their characters: "
        "every step sees the whole prompt",
    ),
    _Form(
        re.compile(r"\{[^{}]*\|[^{}]*\}|__[\w/*-]+__"),
        "{one|other} and __name__ are not replaced here: --from takes a file of prompts",
    ),
    _Form(
        re.compile(r"(?<!\S)BREAK(?!\S)"),
        "BREAK in a prompt does nothing here but add its word: T5 reads 512 tokens at once",
    ),
    _Form(
        re.compile(r"(?<=[a-z,.)] )AND(?= [a-z(])"),
        "AND in a prompt does nothing here but add its word: prompts are not combined",
    ),
    _Form(
        re.compile(r"\bNegative prompt:", re.I),
        "a negative prompt in the prompt is read as something to draw: --negative-prompt takes it",
    ),
)


def list_notices(prompt: str) -> Iterator[str]:
    """Yield what to say of the forms of other tools in a prompt, each once."""
    for found in ADAPTER.finditer(prompt):
        name = found["name"].strip()
        strength = found["weights"].lstrip(":").partition(":")[0] or "1"
        option = shlex.quote(f"{name}:{strength}")
        yield f"{found[0]} in a prompt does nothing here but add its words; use --lora {option}"
    for form in FORMS:
        if form.pattern.search(prompt):
            yield form.notice


def remove_forms(prompt: str) -> str:
    """Return the prompt without tags of other tools, for who looks at its words."""
    for pattern in (ADAPTER, *(form.pattern for form in FORMS[:2])):
        prompt = pattern.sub(" ", prompt)
    return prompt
