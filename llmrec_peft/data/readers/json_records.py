"""JSON records one at a time, from JSON lines or from one JSON array, plain or gzipped."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from llmrec_peft.data.readers.text_bytes import UNREADABLE, check_utf8, open_text
from llmrec_peft.documents import MAX_DEPTH, MAX_JSON_BYTES, check_tree, parse_json
from llmrec_peft.errors import DataError, one_line
from llmrec_peft.messages import quoted

CHUNK = 1 << 20
BATCH_RECORDS = 10_000
OPEN_END = "the array has no end"
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def is_json(path: Path) -> bool:
    """Whether the name is that of a JSON file."""
    return path.is_file() and path.name.lower().endswith(JSON_SUFFIXES)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines or of one JSON array, never all at once.

    Raises:
        DataError: the file is empty, not UTF-8 or not JSON, or an entry is not an object; the message names it.
    """
    number = 0
    try:
        with open_text(path) as file:
            entries = tqdm(_entries(file, path), unit="record", desc=f"reading {path.name}", delay=2)
            for number, record in entries:
                if not isinstance(record, dict):
                    raise DataError(f"record {number} of {path} is {quoted(record)}; each must be a JSON object")
                yield record
    except UnicodeDecodeError as error:
        check_utf8(path)
        raise DataError(f"{path} is not UTF-8; save the file as UTF-8") from error
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read after record {number}: {one_line(error)}; write it again") from error


def record_batches(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows as record batches of `BATCH_RECORDS`, so that few of them are Python objects at one time."""
    source = iter(rows)
    while part := list(islice(source, BATCH_RECORDS)):
        yield pa.RecordBatch.from_pylist(part, schema=schema)


def first_keys(path: Path) -> frozenset[str]:
    """The keys of a file's first record, or none if it has no readable first record.

    Bytes that are not UTF-8 are passed over here, so that reading the file, and not its detection, tells of them.
    """
    try:
        with open_text(path, errors="replace") as file:
            _, record = next(_entries(file, path), (0, None))
    except (DataError, *UNREADABLE):
        return frozenset()
    return frozenset(record) if isinstance(record, dict) else frozenset()


def check_first_record(path: Path) -> None:
    """Raise DataError if a JSON file, there or in a directory, has a first record that cannot be read."""
    for file in [path] if is_json(path) else sorted(filter(is_json, path.glob("*"))) if path.is_dir() else []:
        next(read_records(file), None)


def _entries(file: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered entries of either form, which the first character tells."""
    head = file.read(CHUNK)
    if not head.strip():
        raise DataError(f"{path} is empty; write one JSON object a line")
    file.seek(0)
    yield from _array(file, path) if head.lstrip("\ufeff \t\r\n").startswith("[") else _lines(file, path)


def _lines(file: Any, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        advice = "write one JSON object a line"
        if line.lstrip().startswith("{'"):  # Amazon's metadata of 2014
            advice = "it is a Python literal: convert each line by json.dumps(ast.literal_eval(line))"
        yield number, parse_json(line, f"line {number} of {path}", advice=advice)


def _array(file: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """Entries of a JSON array, decoded from a sliding buffer."""
    decoder = json.JSONDecoder()
    buffer = file.read(CHUNK).lstrip()[1:]
    number = 0
    while True:
        buffer = buffer.lstrip(", \t\r\n")
        if buffer.startswith("]"):
            return
        try:
            entry, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            # Doubling keeps the cost of decoding a very long entry again linear in its length.
            more = file.read(max(CHUNK, len(buffer))) if len(buffer) < MAX_JSON_BYTES else ""
            if not more:
                message = error.msg if buffer.strip() else OPEN_END
                raise DataError(
                    f"entry {number + 1} of the array in {path} is not JSON: {message}; write the file again"
                ) from error
            buffer += more
            continue
        except (RecursionError, ValueError) as error:  # ValueError: a whole number of more than 4,300 digits
            reason = f"nests deeper than {MAX_DEPTH} levels" if isinstance(error, RecursionError) else one_line(error)
            raise DataError(f"entry {number + 1} of the array in {path} cannot be read: {reason}; correct it") from None
        number += 1
        check_tree(entry, f"entry {number} of the array in {path}")
        buffer = buffer[end:]
        yield number, entry
