"""flux: FLUX.1 [dev] on the cards that people own, from the command line and from Python.

Importing this package loads nothing heavy: the names of its face are found when they are used.
"""

import importlib

TYPE_CHECKING = False  # typing would be the current folder's typing.py with python -m fluxcli
if TYPE_CHECKING:
    from typing import Any

    from fluxcli import errors as errors
    from fluxcli import events as events
    from fluxcli.api import Flux as Flux
    from fluxcli.api import ImageReady as ImageReady
    from fluxcli.api import PreviewReady as PreviewReady
    from fluxcli.api import generate as generate
    from fluxcli.errors import FluxError as FluxError
    from quant.errors import ExplainedError as ExplainedError

__version__ = "0.2.0"

FACE = {  # where each name comes from
    "Flux": "fluxcli.api",
    "ImageReady": "fluxcli.api",
    "PreviewReady": "fluxcli.api",
    "generate": "fluxcli.api",
    "FluxError": "fluxcli.errors",
    "ExplainedError": "quant.errors",
}
MODULES = ("errors", "events")  # whose contents are part of the face

__all__ = [
    "ExplainedError",
    "Flux",
    "FluxError",
    "ImageReady",
    "PreviewReady",
    "errors",
    "events",
    "generate",
]


def __getattr__(name: str) -> "Any":
    """Import a name of the face when it is first used."""
    if name in MODULES:
        return importlib.import_module(f"fluxcli.{name}")
    if name in FACE:
        return getattr(importlib.import_module(FACE[name]), name)
    raise AttributeError(f"module 'fluxcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def versions() -> dict[str, str]:
    """Return the versions of what decides pixels: flux, Python, torch, diffusers, transformers."""
    import platform
    from importlib.metadata import version

    found = {"flux": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        found[name] = version(name)
    return found
