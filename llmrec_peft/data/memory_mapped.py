"""Memory-mapped tables: record batches are written to a file and mapped, so that a large log takes disk, not memory."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from llmrec_peft.errors import DataError
from llmrec_peft.files import scratch_file

MAPPED_ROWS = 1_000_000
"""Tables with more rows than this are memory-mapped from an Arrow IPC file."""

BATCH_ROWS = 131_072
"""Rows of one record batch in such a file."""


def mapped_directory() -> Path:
    """`$LLMREC_PEFT_CACHE/spool` if that variable is set, else the system's temporary directory."""
    root = os.environ.get("LLMREC_PEFT_CACHE")
    directory = Path(root) / "spool" if root else Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def map_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Write the batches to an Arrow IPC file and return the table that maps it.

    The file is unlinked once it is mapped. The system keeps its pages while a table uses them, and frees the disk space
    when the process ends, even if it is killed.

    Raises:
        DataError: the disk is full or not writable.
    """
    directory = mapped_directory()
    try:
        with scratch_file(directory / "llmrec_peft.arrow") as path:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except OSError as error:
        raise DataError(
            f"cannot keep a large log in {directory}: {error}; set LLMREC_PEFT_CACHE to a directory with free space"
        ) from error


def collect(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The batches as one table: in memory up to `MAPPED_ROWS` rows, else memory-mapped."""
    held: list[pa.RecordBatch] = []
    rows = 0
    source = iter(batches)
    for batch in source:
        held.append(batch)
        rows += batch.num_rows
        if rows > MAPPED_ROWS:
            return map_batches(_chain(held, source), schema)
    return pa.Table.from_batches(held, schema=schema)


def _chain(held: list[pa.RecordBatch], rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    # Pop the batches, so that each is freed as soon as it is written.
    while held:
        yield held.pop(0)
    yield from rest
