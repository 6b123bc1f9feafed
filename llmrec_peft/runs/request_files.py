"""Files of JSON lines: requests to a bank, and its predictions."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.data.readers.json_records import read_records
from llmrec_peft.documents import parse_json
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "domain": (str, "a text"),
    "history": (list, "a list of [event, label]"),
    "candidates": (list, "a list of events"),
    "user": (dict, "a mapping of columns"),
    "id": ((str, int), "a text or a whole number"),
}
OPTIONAL = ("user", "id")
MAX_LINE = 50_000_000
"""Characters of a file's first line that are read to recognise the file."""


@dataclass(frozen=True)
class FileRequest:
    """One line of a file of requests; `id` is its number where the line has none."""

    domain: str
    history: list[Any]
    candidates: list[Any]
    user: dict[str, Any] | None
    id: str | int

    @property
    def for_bank(self) -> tuple[str, list[Any], list[Any], dict[str, Any] | None]:
        """The request as `DomainBank.score` takes it."""
        return self.domain, self.history, self.candidates, self.user


def read_requests(path: str) -> Iterator[FileRequest]:
    """Read the requests of a file one by one.

    Raises:
        DataError: no such file, not JSON lines, or an entry that is missing, unknown or of another type.
    """
    if not Path(path).is_file():
        raise DataError(f"requests {path} is not a file; give a file of JSON lines")
    for number, record in enumerate(read_records(Path(path))):
        unknown = sorted(set(record) - set(KINDS))
        if unknown:
            raise DataError(f"request {number} of {path} has an unknown key {unknown[0]!r}; use {listed(list(KINDS))}")
        for key, (kind, text) in KINDS.items():
            value = record.get(key)
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if not fits and (key in record or key not in OPTIONAL):
                raise DataError(f"request {number} of {path} has {key} {quoted(value)}; it must be {text}")
        yield FileRequest(
            record["domain"], record["history"], record["candidates"], record.get("user"), record.get("id", number)
        )


def prediction_line(request: FileRequest, labels: list[str], probabilities: np.ndarray) -> str:
    """Predictions for one request as JSON: id, domain, labels, and probabilities [candidates][labels]."""
    values = [[round(float(value), 6) for value in row] for row in probabilities]
    return json.dumps({"id": request.id, "domain": request.domain, "labels": labels, "probabilities": values})


def holds_predictions(path: Path) -> bool:
    """Whether the first line of a file is one of `prediction_line`."""
    try:
        with path.open(encoding="utf-8") as file:
            found = parse_json(file.readline(MAX_LINE), str(path))
    except (OSError, ValueError):  # DataError is a ValueError
        return False
    return isinstance(found, dict) and found.keys() == {"id", "domain", "labels", "probabilities"}


def in_batches(requests: Iterable[FileRequest], size: int) -> Iterator[list[FileRequest]]:
    """Lists of `size` requests; the last one may be shorter."""
    batch: list[FileRequest] = []
    for request in requests:
        batch.append(request)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
