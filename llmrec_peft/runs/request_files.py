"""Requests to a bank from a file of JSON lines, and its answers into one."""

import json
from collections.abc import Iterable, Iterator
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
"""Characters that are read of the first line of a file to tell what it is."""


def read_requests(path: str) -> Iterator[tuple[Any, ...]]:
    """(domain, history, candidates, user) of each line, and the line's id or its number as a fifth part.

    Raises:
        DataError: no such file, not JSON lines, or an entry that is missing, unknown or of another type.
    """
    if not Path(path).is_file():
        raise DataError(f"requests {path} is no file; give a file of JSON lines")
    for number, record in enumerate(read_records(Path(path))):
        unknown = sorted(set(record) - set(KINDS))
        if unknown:
            raise DataError(f"request {number} of {path} has an unknown key {unknown[0]!r}; use {listed(list(KINDS))}")
        for key, (kind, text) in KINDS.items():
            value = record.get(key)
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if not fits and (key in record or key not in OPTIONAL):
                raise DataError(f"request {number} of {path} has {key} {quoted(value)}; it must be {text}")
        yield (record["domain"], record["history"], record["candidates"], record.get("user"), record.get("id", number))


def answer_line(request: tuple[Any, ...], labels: list[str], probabilities: np.ndarray) -> str:
    """One answer as JSON: id, domain, labels, and the probabilities of each candidate in the labels' order."""
    values = [[round(float(value), 6) for value in row] for row in probabilities]
    return json.dumps({"id": request[4], "domain": request[0], "labels": labels, "probabilities": values})


def are_answers(path: Path) -> bool:
    """Whether the first line of a file is an answer by `answer_line`."""
    try:
        with path.open(encoding="utf-8") as file:
            found = parse_json(file.readline(MAX_LINE), str(path))
    except (OSError, ValueError):  # DataError is a ValueError
        return False
    return isinstance(found, dict) and found.keys() == {"id", "domain", "labels", "probabilities"}


def in_batches(requests: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Lists of `size` requests; the last may be shorter."""
    batch: list[tuple[Any, ...]] = []
    for request in requests:
        batch.append(request)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
