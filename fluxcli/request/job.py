"""A job: rows to draw in one go, and what the command line said beside them.

It is JSON on the worker's wire. Knows nothing of models or devices. Stdlib only.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fluxcli.events import check_types
from fluxcli.request.fields import Order
from fluxcli.request.target import Target
from quant.errors import ExplainedError


@dataclass(frozen=True)
class Row:
    """One order of a run: its number (from 1 in a batch, 0 outside one), and where it stood.

    A row whose line is no order has the error instead. `nth` says which of the equal pictures that
    a batch asks for the row's first one is, from 1. `target` is its parsed output, where that is
    known already; it stays in this process.
    """

    number: int
    order: Order | None
    where: str = ""  # for people: FILE:LINE
    error: ExplainedError | None = None
    nth: int = 1
    target: Target | None = None


@dataclass(frozen=True)
class Job:
    """Rows to draw.

    In a `batch` a row that fails does not end the others. `force` replaces a file that was named,
    `no_wait` fails rather than waits for the device, `prompt_cache` reads and keeps prompt
    embeddings on disk, `resume` leaves out pictures that are there already, and `expected_model` is
    the fingerprint of the model that made the picture to make again.
    """

    rows: tuple[Row, ...]
    batch: bool = False
    force: bool = False
    no_wait: bool = False
    prompt_cache: bool = True
    resume: bool = False
    expected_model: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON types; its rows must have orders."""
        rows = [
            {
                "number": row.number,
                "where": row.where,
                "nth": row.nth,
                "order": row.order.to_json() if row.order else None,
            }
            for row in self.rows
        ]
        return asdict(replace(self, rows=())) | {"rows": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Job":
        """Return the job that `to_json` described.

        Raises TypeError, KeyError, ValueError or `UsageError` for anything else.
        """
        rows = []
        for row in value["rows"]:
            order = Order.from_json(row["order"])
            rows.append(Row(row["number"], order, row["where"], nth=row["nth"]))
            check_types(rows[-1], ("number", "where", "nth"))
        job = cls(**dict(value) | {"rows": tuple(rows)})
        check_types(job, [each.name for each in fields(cls) if each.name != "rows"])
        return job
