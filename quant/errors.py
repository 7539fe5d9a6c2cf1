"""Errors of checkpoint files.

    QuantError
    └── CheckpointError      a file or folder that is not a usable checkpoint

Every error carries `what` went wrong, `which` file and `why`, and a `hint` that says what to do next.
"""


class QuantError(Exception):
    """Base of everything this package raises on purpose."""

    def __init__(self, what: str, *, which: object = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.which, self.why, self.hint = what, str(which), why, hint

    def __str__(self) -> str:
        subject = f"{self.what} ({self.which})" if self.which else self.what
        return f"{subject}: {self.why}" if self.why else subject


class CheckpointError(QuantError):
    """A file or folder that cannot be read as the checkpoint it claims to be."""
