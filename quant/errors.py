"""The errors of this package. Each says what went wrong, with which thing, why, and what to do.

ExplainedError
└── QuantError
    ├── CheckpointError
    │   └── ForeignFile
    ├── MissingLibrary
    ├── SpecError
    └── WriteError
"""

import errno
import re

OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot) allocate memory"
    r"|alloc(ation)? failed|ALLOC_FAILED|insufficient (memory|resources)"
    r"|Invalid buffer size|hipErrorMemoryAllocation|OUT_OF_(DEVICE|HOST|RESOURCES)"
    r"|(BLAS|DNN)_STATUS_NOT_INITIALIZED"
    r"|could not create a (primitive|memory)$"
    r"|failed to map segment|cannot allocate memory in static TLS",
    re.IGNORECASE,
)
# cuDNN's words where it has no kernel for a convolution, and where none had room for its workspace.
NO_ENGINE = "unable to find an engine"


class ExplainedError(Exception):
    """Base of every error that a user or a file can cause; any other exception is a bug.

    Its text is one line, `what (which): why`, without the parts that are empty. `hint` tells the
    user what to do next and is not part of the text.
    """

    def __init__(self, what: str, which: object = "", *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.which = str(which)
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        text = self.what
        if self.which:
            text += f" ({self.which})"
        if self.why:
            text += f": {self.why}"
        return text


class QuantError(ExplainedError):
    """Base of everything this package raises on purpose."""


class CheckpointError(QuantError):
    """A file or folder that cannot be read as the checkpoint it claims to be."""

    USUAL_HINT = "download it again, or name another file or model"

    def __init__(self, what: str, which: object = "", *, why: str = "", hint: str = "") -> None:
        super().__init__(what, which, why=why, hint=hint or self.USUAL_HINT)


class ForeignFile(CheckpointError):
    """A sound weight file that holds nothing of FLUX.1; `why` says what it seems to be instead."""

    USUAL_HINT = "name files of FLUX.1 [dev] or [schnell]; flux inspect says what a file is"


class MissingLibrary(QuantError):
    """A dependency that cannot be imported."""


class SpecError(QuantError):
    """Schemes that cannot be combined, a pattern that matches no tensor, a variable's nonsense."""


class WriteError(QuantError):
    """A destination that cannot be written."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was made of, means that memory ran out.

    Some back ends (ROCm, MPS, cuDNN) report that as a mere RuntimeError, and a library that does
    not fit into the address space is an ImportError or an OSError, so the words decide.
    """
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError | ImportError | OSError | SystemError):
        if OUT_OF_MEMORY.search(str(error)):
            return True
        return error.__cause__ is not None and is_out_of_memory(error.__cause__)
    return False
