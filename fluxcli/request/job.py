"""What a run is asked for: rows of requests, and what the command line said beside them. As JSON on a worker's wire.

Knows nothing of models or devices. Stdlib only.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fluxcli.request.fields import GenerationRequest
from quant.errors import ExplainedError


@dataclass(frozen=True)
class Row:
    """One request of a run: its number (from 1 in a batch, 0 outside one), and where it stood or what is wrong."""

    number: int
    request: GenerationRequest | None
    where: str = ""  # for people: FILE:LINE
    error: ExplainedError | None = None  # instead of a request
    nth: int = 1  # of the equal pictures that the batch asks for, its first one is the n-th


@dataclass(frozen=True)
class Job:
    """Rows to draw. In a `batch` a row that fails does not end the others."""

    rows: tuple[Row, ...]
    batch: bool = False
    force: bool = False  # replace a file that was named
    no_wait: bool = False  # rather fail than wait for the device
    cache: bool = True  # prompt embeddings on disk
    resume: bool = False  # leave out pictures that are there already
    made: str | None = None  # the fingerprint of the model that made the picture to make again

    def to_json(self) -> dict:
        rows = [[row.number, row.where, row.nth, row.request.to_json()] for row in self.rows]
        return asdict(self) | {"rows": rows}

    @classmethod
    def from_json(cls, value: Mapping) -> "Job":
        """What `to_json` gave; raises TypeError, ValueError or `UsageError` for anything else."""
        rows = tuple(
            Row(number, GenerationRequest(**request), where, nth=nth)
            for number, where, nth, request in value["rows"]
        )
        return cls(**dict(value) | {"rows": rows})
