"""A directory with an `interactions` and an `items` table, the toolkit's own layout."""

from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.data.readers.tabular import SUFFIXES, read_tables, suffix_of
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed


def _base(path: str) -> Path:
    """The directory of a log; also given by the path of its interactions file."""
    place = Path(path)
    return place.parent if place.is_file() and place.name.startswith("interactions") else place


def find_shards(directory: Path, stem: str) -> list[Path]:
    """The files of one table: `stem.<suffix>`, or shards `stem-*.<suffix>` or `stem/*.<suffix>`, sorted by name.

    Raises:
        DataError: files of more than one format.
    """
    if not directory.is_dir():
        return []
    whole = [entry for entry in directory.iterdir() if entry.is_file() and _is_named(entry, stem)]
    whole += [entry for entry in (directory / stem).glob("*") if entry.is_file() and suffix_of(entry)]
    if len({suffix_of(entry) for entry in whole}) > 1:
        names = listed(sorted(entry.name for entry in whole))
        raise DataError(f"{directory} holds {stem} in more than one form ({names}); keep one of them")
    return sorted(whole)


def _is_named(entry: Path, stem: str) -> bool:
    suffix = suffix_of(entry)
    rest = entry.name[: -len(suffix)] if suffix else ""
    return rest == stem or rest.startswith(f"{stem}-")


def _detect(path: str) -> bool:
    return bool(find_shards(_base(path), "interactions"))


@register("directory", "interactions.parquet|csv|jsonl with items.parquet|csv|jsonl", _detect)
def read_directory(path: str) -> RawLog:
    """Read `interactions` and `items` as parquet, csv or jsonl (also gzipped), whole or in shards.

    Raises:
        DataError: no interactions file, more than one form of it, or a damaged file.
    """
    directory = _base(path)
    shards = find_shards(directory, "interactions")
    if not shards:
        endings = listed(list(SUFFIXES))
        raise DataError(f"{directory} holds no interactions file; add interactions with one of {endings}")
    item_shards = find_shards(directory, "items")
    items: pa.Table | None = read_tables(item_shards) if item_shards else None
    return RawLog(read_tables(shards), items, log_name(directory))
