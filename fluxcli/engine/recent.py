"""What was used last, up to a limit: so the engine remembers prompts and tables."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def count_one(_: object) -> int:
    """The weight of a value where values are counted."""
    return 1


class Recent(Generic[Key, Value]):
    """Values by key. Beyond `limit` (the sum of their weights) the least recently used ones go.

    The last value that was kept stays, even if it alone is beyond the limit.
    """

    def __init__(self, limit: int, *, weigh: Callable[[Value], int] = count_one) -> None:
        self._limit = limit
        self._weigh = weigh
        self._values: dict[Key, Value] = {}  # the most recently used last

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def get(self, key: Key) -> Value | None:
        """The value, which counts as used now; None if there is none."""
        if key not in self._values:
            return None
        value = self._values.pop(key)
        self._values[key] = value
        return value

    def keep(self, key: Key, value: Value) -> None:
        """Keep the value, and let others go for it."""
        self._values.pop(key, None)
        self._values[key] = value
        total = sum(map(self._weigh, self._values.values()))
        while total > self._limit and len(self._values) > 1:
            oldest = next(iter(self._values))
            total -= self._weigh(self._values.pop(oldest))
