"""comfy-kitchen as a card might have it: which of its back ends have which functions.

What a back end computes is what the library's eager one does, or what a test puts in its place.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# As of 0.2.40: the functions and the least capability of each.
CUDA = {"int8_linear": (7, 5), "w4a8_int8_linear": (8, 0), "adaln": None, "rms_rope": None}
TRITON = {"int8_linear": (8, 0), "w4a8_int8_linear": (8, 0), "adaln": None, "rms_rope": None}


class Registry:
    """The library's registry of back ends."""

    def __init__(self, **backends: dict[str, tuple[int, int] | None] | str) -> None:
        """By name: the least capability of each function, or why it is not available."""
        self.backends = backends
        self.called: list[tuple[str, str]] = []  # functions and back ends

    def list_backends(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "available": not isinstance(has, str),
                "unavailable_reason": has if isinstance(has, str) else None,
                "capabilities": [] if isinstance(has, str) else sorted(has),
            }
            for name, has in self.backends.items()
        }

    def get_constraints(self, backend: str, function: str) -> SimpleNamespace:
        return SimpleNamespace(min_compute_capability=self.backends[backend][function])

    def get_implementation(self, name: str, *, backend: str) -> Callable[..., Any]:
        from comfy_kitchen.backends import eager

        self.called.append((name, backend))
        return getattr(eager, name)
