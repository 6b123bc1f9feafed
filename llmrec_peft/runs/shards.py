"""A batch job in shards on disk, so that an interrupted job can be resumed.

A shard holds the recommendations of consecutive users of the input. It is one parquet file, written completely or not
at all, with a digest of everything that the recommendations depend on. When all shards are there, they are checked,
concatenated and removed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec_peft.checkpoints.checksum import digest
from llmrec_peft.documents import parse_json, read_mapping
from llmrec_peft.errors import ConfigError, LLMRecError
from llmrec_peft.files import replacing, sweep, write_json, writing
from llmrec_peft.messages import quoted
from llmrec_peft.runs.output_paths import is_plain

# The names on disk are those of version 0.1.0, whose unfinished jobs can so be recognised.
RESULT, ERRORS, DIRECTORY = "recommendations.parquet", "errors.jsonl", "parts"
NOTE = b"llmrec_peft"
ROWS_AT_ONCE = 1 << 17


class JobShards:
    """Shards of one job in an output directory.

    Args:
        out: the output directory.
        metadata: everything that the recommendations depend on, by the names that messages use.
        ids: ids of the users, Arrow large strings [n].
        size: users of a shard; the last one may have fewer.
    """

    def __init__(self, out: Path, metadata: Mapping[str, str], ids: pa.Array, size: int) -> None:
        self.out, self._metadata, self._ids, self._size = out, dict(metadata), ids, size
        self.directory = out / DIRECTORY
        self.settings = self.directory / "settings.json"
        self._digest = digest(self._metadata)
        self._stop = self.directory / "stop"
        self._done = out / f".{DIRECTORY}.done"

    def __len__(self) -> int:
        return -(-len(self._ids) // self._size)

    def rows(self, number: int) -> range:
        """Rows of the input whose users are in a shard."""
        return range(number * self._size, min((number + 1) * self._size, len(self._ids)))

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}.parquet"

    # -- starting and resuming -----------------------------------------------------------------

    def prepare(self) -> None:
        """Make the directory, or check that its shards belong to this job; remove unfinished files of an earlier end.

        Raises:
            ConfigError: the shards there were made with other settings or data, or the files are not shards.
        """
        with self._writing():
            shutil.rmtree(self._done, ignore_errors=True)
            sweep(self.out)
            sweep(self.directory)
            if self.directory.is_dir():
                self._check_settings()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._stop.unlink(missing_ok=True)
            write_json(self._metadata, self.settings)

    def _check_settings(self) -> None:
        own = (self.settings.name, self._stop.name)
        found = [path.name for path in self.directory.iterdir() if path.name not in own and path.suffix != ".partial"]
        if not found:
            return
        try:
            old = read_mapping(self.settings)
        except LLMRecError:
            raise ConfigError(
                f"{self.directory} holds {min(found)} and no {self.settings.name} of a recommend job; choose "
                "another output_dir, or remove it"
            ) from None
        for name in sorted(old.keys() | self._metadata.keys()):
            if old.get(name) != self._metadata.get(name):
                raise ConfigError(
                    f"the shards in {self.directory} were made with {name} {quoted(old.get(name))}, and now it is "
                    f"{quoted(self._metadata.get(name))}; use the same to resume, or remove {self.directory} to start "
                    "again"
                )

    def pending(self, *, errors: bool) -> list[int]:
        """Numbers of the shards that are still to be written; without `errors`, also of those that left users out."""
        return [number for number in range(len(self)) if not self._complete(number, errors)]

    def _complete(self, number: int, errors: bool) -> bool:
        try:
            note = _note(pq.read_schema(self._path(number)))
        except (OSError, pa.ArrowException, ValueError):
            return False
        return note.get("digest") == self._digest and note.get("part") == number and (errors or not note["errors"])

    def write(self, number: int, table: pa.Table, errors: Sequence[Mapping[str, Any]]) -> None:
        """Write the recommendations of a shard, and the users that it left out."""
        note = json.dumps({"digest": self._digest, "part": number, "errors": list(errors)})
        with self._writing(), replacing(self._path(number)) as partial:
            pq.write_table(table.replace_schema_metadata({NOTE: note.encode()}), partial, write_page_checksum=True)

    def stop(self) -> None:
        """Let no process start another shard."""
        with self._writing():
            self._stop.touch()

    @property
    def stopped(self) -> bool:
        """Whether a process has stopped the job."""
        return self._stop.exists()

    # -- the end -------------------------------------------------------------------------------

    def concatenate(self, schema: pa.Schema) -> tuple[int, list[dict[str, Any]]]:
        """Write all recommendations as one file and the users left out as another; then remove the shards.

        Returns:
            Number of rows of the file, and the entries for users left out.

        Raises:
            ConfigError: a shard is missing, or does not hold each of its users once and in order.
        """
        errors: list[dict[str, Any]] = []
        rows = 0
        with self._writing():
            with replacing(self.out / RESULT) as partial:
                with pq.ParquetWriter(partial, schema) as writer:
                    waiting: list[pa.Table] = []
                    for number in range(len(self)):
                        table, left_out = self._read(number)
                        errors += left_out
                        rows += len(table)
                        waiting.append(table)
                        if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                            writer.write_table(pa.concat_tables(waiting).combine_chunks())
                            waiting = []
                    if waiting:
                        writer.write_table(pa.concat_tables(waiting).combine_chunks())
                self._write_errors(errors)
            os.replace(self.directory, self._done)
            shutil.rmtree(self._done, ignore_errors=True)
        return rows, errors

    def _read(self, number: int) -> tuple[pa.Table, list[dict[str, Any]]]:
        path = self._path(number)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            errors = _note(table.schema)["errors"]
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(f"shard {path} cannot be read ({reason}); remove it, and start again to resume") from None
        out = {entry["row"] for entry in errors}
        expected = self._ids.take(pa.array([row for row in self.rows(number) if row not in out], pa.int64()))
        if not _holds_users(table, expected):
            raise ConfigError(
                f"shard {path} does not hold each of its users once; remove it, and start again to resume"
            )
        return table.replace_schema_metadata(None), errors

    def _write_errors(self, errors: list[dict[str, Any]]) -> None:
        if not errors:
            (self.out / ERRORS).unlink(missing_ok=True)
            return
        with replacing(self.out / ERRORS) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in errors)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing(self.out):
            yield


def check_job_results(out: Path) -> None:
    """Raise ConfigError where the results of a job would replace a file that no such job wrote."""
    for name, own in ((RESULT, _is_result), (ERRORS, _is_errors)):
        if os.path.lexists(out / name) and not (is_plain(out / name) and own(out / name)):
            raise ConfigError(
                f"output_dir {out} holds {name}, which no recommend job wrote, so it is not replaced; choose another "
                "directory, or remove it"
            )


def _is_result(path: Path) -> bool:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return False
    own = names[:4] == ["user_id", "rank", "item_id", "score"] and names[-1] == "source"
    return own and all(name.startswith("p_") for name in names[4:-1])


def _is_errors(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            entry = parse_json(file.readline(100_000), str(path))
    except (OSError, ValueError):  # DataError is a ValueError
        return False
    return isinstance(entry, dict) and entry.keys() == {"row", "user_id", "error"}


def _note(schema: pa.Schema) -> dict[str, Any]:
    note = parse_json((schema.metadata or {}).get(NOTE, b"{}"), "the note of a recommend job")
    errors = note.get("errors") if isinstance(note, dict) else None
    if not isinstance(errors, list) or not all(isinstance(entry, dict) and "row" in entry for entry in errors):
        raise ValueError("no note of a recommend job")
    return note


def _holds_users(table: pa.Table, expected: pa.Array) -> bool:
    """Whether a shard's rows are of the expected users in their order, with ranks 1, 2, ... for each."""
    if not len(table):
        return not len(expected)
    runs = pc.run_end_encode(table.column("user_id").combine_chunks().cast(expected.type))
    begins = np.concatenate([[0], runs.run_ends.to_numpy()[:-1]])
    ranks = table.column("rank").to_numpy()
    # 1, 2, ... within each run of equal users.
    counted = np.arange(len(ranks)) - np.repeat(begins, np.diff(np.append(begins, len(ranks)))) + 1
    return runs.values.equals(expected) and bool((ranks == counted).all())
