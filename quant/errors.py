"""Errors that explain themselves: what went wrong, which thing, why, and a hint that says what to do next.

ExplainedError <- QuantError <- CheckpointError, MissingLibrary, SpecError, WriteError
"""


class ExplainedError(Exception):
    """Base of every error that is not a bug: one line, `what (which): why`, and one hint."""

    def __init__(self, what: str, which: object = "", *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.which, self.why, self.hint = what, str(which), why, hint

    def __str__(self) -> str:
        return self.what + f" ({self.which})" * bool(self.which) + f": {self.why}" * bool(self.why)


class QuantError(ExplainedError):
    """Base of everything this package raises on purpose."""


class CheckpointError(QuantError):
    """A file or folder that cannot be read as the checkpoint it claims to be."""


class MissingLibrary(QuantError):
    """A dependency that cannot be imported."""


class SpecError(QuantError):
    """A wish that cannot be: schemes that do not go together, a pattern without a match."""


class WriteError(QuantError):
    """A destination that cannot be written."""
