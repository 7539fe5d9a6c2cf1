"""Errors that explain themselves, and those of checkpoint files.

ExplainedError           what went wrong, which thing, why, and a hint: what to do next
└── QuantError           what this package raises on purpose
    ├── CheckpointError  a file or folder that is not a usable checkpoint
    ├── MissingLibrary   a library that packing needs cannot be imported
    ├── SpecError        a wish that cannot be: schemes that do not go together, a pattern without a match
    └── WriteError       the destination cannot be written
"""


class ExplainedError(Exception):
    """Base of every error that is not a bug: one line, `what (which): why`, and one hint."""

    def __init__(self, what: str, *, which: object = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.which, self.why, self.hint = what, str(which), why, hint

    def __str__(self) -> str:
        subject = f"{self.what} ({self.which})" if self.which else self.what
        return f"{subject}: {self.why}" if self.why else subject


class QuantError(ExplainedError):
    """Base of everything this package raises on purpose."""


class CheckpointError(QuantError):
    """A file or folder that cannot be read as the checkpoint it claims to be."""


class MissingLibrary(QuantError):
    """A dependency that cannot be imported."""


class SpecError(QuantError):
    """A quantization that cannot be asked for."""


class WriteError(QuantError):
    """A destination that cannot be written."""
