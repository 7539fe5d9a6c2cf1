"""Where the pictures of a row go, as parsed from its -o. Stdlib only.

What an -o means depends on which folders exist: `pictures.names` parses it.
"""

import string
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Where the pictures of a row go.

    `pattern` is a template without an extension, and its names never lead out of `folder`; of an
    `exact` target it is the one file name that the user gave, which only `force` replaces.
    """

    folder: Path
    pattern: str
    exact: bool = False
    force: bool = False
    stdout: bool = False

    def has_field(self, *names: str) -> bool:
        """Return whether its names are made with one of these template fields."""
        return not self.exact and not find_fields(self.pattern).isdisjoint(names)


def find_fields(pattern: str) -> set[str]:
    """Return the names of a template's fields; raises ValueError for stray braces."""
    return {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
