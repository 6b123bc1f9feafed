"""Files of JSON lines as Arrow tables, with errors that name the file and the line."""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from llmrec_peft.data.readers.text_bytes import BLOCK_BYTES, UNREADABLE, check_utf8, open_bytes
from llmrec_peft.data.tables import bool_numpy
from llmrec_peft.documents import MAX_DEPTH, has_surrogates, parse_json
from llmrec_peft.errors import DataError, one_line
from llmrec_peft.messages import quoted

_log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
NEWLINE = b"\n"
_SURROGATES = re.compile(
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2})(\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
# Without a match, all surrogates are in pairs. Matches: a high one without a low one after it, a low one without a high
# one before it, or a preceding backslash, which may change the meaning of the escape.
_SUSPECT = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!" + _LOW + rb")|[c-fC-F][0-9a-fA-F]{2}(?<!" + _HIGH + _LOW + rb")"
    rb"|(?<=\\\\u[dD])[89a-fA-F])"
)
_HALF = rb"\ufffd"
ID_KEYS = ("user_id", "item_id", "parent_asin", "reviewerID", "asin")
"""Keys of ids: two ids that differ only in halves of surrogate pairs must not become one."""


class CheckedLines(io.RawIOBase):
    """The bytes of a file of JSON lines, made safe for Arrow: whole lines, UTF-8, limited depth, surrogates in pairs.

    Arrow's parser recurses without a limit, so that one deep line crashes the process. It accepts bytes that are not
    UTF-8. It fails at half a surrogate pair, as in a cut emoji. Such a half becomes U+FFFD here; in an id it is
    refused, since two users could become one.

    Attributes:
        mended: halves replaced so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_bytes(path)
        self._ready = memoryview(b"")
        self._rest = b""
        self._lines = 0
        self.mended = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer at the end of a chunk; none at the end of the file."""
        if not self._ready:
            self._ready = memoryview(self._next())
        end = len(self._ready) if size < 0 else size
        part, self._ready = self._ready[:end], self._ready[end:]
        return bytes(part)

    def _next(self) -> bytes:
        parts = [self._rest]
        length = len(self._rest)
        while True:
            more = self._file.read(CHUNK_BYTES)
            cut = more.rfind(b"\n") + 1
            if cut or not more:
                break
            parts.append(more)
            length += len(more)
            if length > BLOCK_BYTES:
                raise DataError(
                    f"line {self._lines + 1} of {self._path} has more than {BLOCK_BYTES:,} bytes; "
                    "write one JSON object a line"
                )
        self._rest = more[cut:]
        return self._checked(b"".join([*parts, more[:cut]]))

    def _checked(self, chunk: bytes) -> bytes:
        try:
            chunk.decode("utf-8")
        except UnicodeDecodeError:
            check_utf8(self._path)
            raise
        for number, line in _bracketed(chunk):
            where = f"line {self._lines + number + 1} of {self._path}"
            parse_json(line.strip(), where, advice="write one flat JSON object a line")
        surrogates = b"\\ud" in chunk or b"\\uD" in chunk
        mended = self._in_pairs(chunk) if surrogates else chunk
        self._lines += chunk.count(b"\n")
        return mended

    def _in_pairs(self, chunk: bytes) -> bytes:
        """The chunk with the halves replaced; lines without halves, and all emoji, stay unchanged."""
        parts, done = [], 0
        while found := _SUSPECT.search(chunk, done):
            start = max(chunk.rfind(b"\n", done, found.start()) + 1, done)
            end = chunk.find(b"\n", start)
            end = len(chunk) if end < 0 else end
            line, before = chunk[start:end], self.mended
            mended = _SURROGATES.sub(self._pair, line)
            if self.mended > before:
                self._check_ids(line, f"line {self._lines + chunk.count(NEWLINE, 0, start) + 1} of {self._path}")
            parts += [chunk[done:start], mended]
            done = end
        return b"".join([*parts, chunk[done:]]) if parts else chunk

    def _check_ids(self, line: bytes, where: str) -> None:
        record = parse_json(line.strip(), where, advice="write one JSON object a line")
        for key in ID_KEYS if isinstance(record, dict) else ():
            if isinstance(record.get(key), str) and has_surrogates(record[key]):
                raise DataError(
                    f"{where} has the {key} {quoted(record[key])} with half of a surrogate pair, which is no "
                    "character; correct its escape"
                )

    def _pair(self, match: re.Match[bytes]) -> bytes:
        text, start = match.string, match.start()
        slashes = start
        while slashes and text[slashes - 1] == ord("\\"):
            slashes -= 1
        escaped = (start - slashes) % 2  # `\\ud83d` is a backslash and letters
        if match.group(1) and not escaped:
            return match.group()
        if not match.group(1) and escaped:
            return match.group()
        self.mended += 1
        return match.group(1) + _HALF if match.group(1) else _HALF


def _bracketed(chunk: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines whose number of brackets allows too much depth, with their numbers from 0."""
    data = np.frombuffer(chunk, np.uint8)
    opening = np.flatnonzero((data == ord("[")) | (data == ord("{")))
    if len(opening) <= MAX_DEPTH:
        return
    ends = np.flatnonzero(data == ord("\n"))
    counts = np.bincount(np.searchsorted(ends, opening))
    for number in np.flatnonzero(counts > MAX_DEPTH):
        start = int(ends[number - 1]) + 1 if number else 0
        yield int(number), chunk[start : int(ends[number]) if number < len(ends) else len(chunk)]


def read_jsonl(path: Path) -> pa.Table:
    """A file with one JSON object in each line; ids may be numbers.

    Texts that look like dates stay text, except in `timestamp`; unsigned whole numbers of up to 64 bits stay exact.

    Raises:
        DataError: the file is empty, not UTF-8, or not JSON, or a number of it is beyond any float.
    """
    table, mended = _read(path, None)
    warn_halves(mended, str(path))
    exact = {}
    for field in table.schema:
        if pa.types.is_timestamp(field.type) and field.name != "timestamp":
            exact[field.name] = pa.string()
        elif pa.types.is_floating(field.type):
            largest = pc.max(pc.abs(table.column(field.name).drop_null())).as_py() or 0
            if largest == float("inf"):
                raise _infinite(table.column(field.name), field.name, path)
            if 2**53 <= largest <= 2**64:  # a float: the largest such number is rounded up
                exact[field.name] = pa.uint64()
    if not exact:
        return table
    try:
        return _read(path, pa.schema(list(exact.items())))[0]
    except DataError:  # numbers with a fraction or a sign among large ones
        texts = [(name, kind) for name, kind in exact.items() if kind == pa.string()]
        return _read(path, pa.schema(texts))[0] if texts else table


def _infinite(column: pa.ChunkedArray, name: str, path: Path) -> DataError:
    row = int(np.flatnonzero(bool_numpy(pc.fill_null(pc.is_inf(column), False)))[0])
    return DataError(f"column {name} of {path} has a number in row {row} that is infinite or too large; correct it")


def _read(path: Path, schema: pa.Schema | None) -> tuple[pa.Table, int]:
    options = pajson.ParseOptions(explicit_schema=schema)
    with _checked_lines(path, "correct or write it again") as lines:
        table = pajson.read_json(
            pa.PythonFile(lines, mode="r"), pajson.ReadOptions(block_size=BLOCK_BYTES), parse_options=options
        )
    return table, lines.mended


def open_jsonl(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of a large file of JSON lines; keys that the schema lacks are passed over.

    Raises:
        DataError: as `read_jsonl`, and for a value that does not fit the schema.
    """
    with _checked_lines(path, "download it again") as lines:
        yield from pajson.open_json(
            pa.PythonFile(lines, mode="r"),
            read_options=pajson.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    warn_halves(lines.mended, str(path))


@contextmanager
def _checked_lines(path: Path, advice: str) -> Iterator[CheckedLines]:
    """`CheckedLines` of a file; Arrow's errors in the block become DataErrors that name it."""
    lines = CheckedLines(path)
    try:
        yield lines
    except (pa.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path} is not readable JSON lines: {one_line(error)}; {advice}") from error
    finally:
        lines.close()


def warn_halves(count: int, where: str) -> None:
    """Log how many halves of surrogate pairs became U+FFFD, if any."""
    if count:
        _log.warning("%s: %d halves of surrogate pairs, which are not characters, replaced by U+FFFD", where, count)
