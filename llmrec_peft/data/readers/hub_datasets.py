"""Data sets read with `datasets.load_dataset`: from the Hub, or from a local copy of such a repository."""

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrec_peft.data.readers.registry import HUB_PREFIX, RawLog, register
from llmrec_peft.data.readers.tabular import SUFFIXES
from llmrec_peft.data.readers.text_records import instruction_log, pointwise_log
from llmrec_peft.errors import DataError, one_line
from llmrec_peft.messages import listed


@register(
    "hub",
    f"{HUB_PREFIX}owner/name with configurations interactions and items",
    lambda path: path.startswith(HUB_PREFIX),
    local=False,
)
def read_hub(path: str) -> RawLog:
    """Read a data set by `datasets.load_dataset`; its splits are joined, since a log makes its own split.

    The data set has configurations (or files) `interactions` and `items`, or one table: of pointwise records (`input`,
    `label`), of instructions (`instruction`, `output`), or of interactions with a `title` column.

    Raises:
        DataError: the data set cannot be loaded or has none of these forms.
    """
    import datasets

    name = path.removeprefix(HUB_PREFIX).removeprefix("datasets/")
    if not name.strip("/. "):
        raise DataError(f"data path {path!r} names no data set; write {HUB_PREFIX}owner/name")
    label = Path(name).name or name
    try:
        configurations = datasets.get_dataset_config_names(name)
        if "interactions" in configurations:
            items = _table(name, "items") if "items" in configurations else None
            return RawLog(_table(name, "interactions"), items, label)
        files = _data_files(name)
        if files:
            items = _table(name, data_files=files["items"]) if files.get("items") else None
            return RawLog(_table(name, data_files=files["interactions"]), items, label)
        table = _table(name)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds: connection, missing repository, parse, generation
        cause = error.__cause__ or error
        raise DataError(
            f"data set {name!r} cannot be loaded: {one_line(cause)}; check its name, your connection and your access"
        ) from error
    columns = set(table.column_names)
    if columns >= {"input", "label"} and "instruction" not in columns:
        return pointwise_log(_rows(table), f"data set {name!r}", label)
    if columns >= {"instruction", "output"}:
        return instruction_log(_rows(table), f"data set {name!r}", label)
    if columns >= {"user_id", "item_id", "timestamp", "title"}:
        return RawLog(table, None, label)
    raise DataError(
        f"data set {name!r} has configurations {listed(configurations)} and columns {listed(table.column_names)}; "
        "it needs configurations interactions and items, or columns input and label, or instruction and output"
    )


def _table(name: str, configuration: str | None = None, *, data_files: list[str] | None = None) -> pa.Table:
    """All splits of one configuration as one memory-mapped Arrow table."""
    import datasets

    splits = datasets.load_dataset(name, configuration, data_files=data_files)
    return pa.concat_tables([split.data.table for split in splits.values()])


def _data_files(name: str) -> dict[str, list[str]]:
    """Files of a repository without configurations whose names begin with interactions and items."""
    if Path(name).is_dir():
        names = [entry.relative_to(name).as_posix() for entry in sorted(Path(name).rglob("*")) if entry.is_file()]
    else:
        from huggingface_hub import HfApi

        names = HfApi().list_repo_files(name, repo_type="dataset")
    found = {}
    for stem in ("interactions", "items"):
        wanted = [pattern.format(stem, end) for end in SUFFIXES for pattern in ("{}{}", "{}-*{}", "*/{}{}", "*/{}-*{}")]
        found[stem] = [entry for entry in names if any(fnmatch.fnmatch(entry, pattern) for pattern in wanted)]
    return found if found["interactions"] else {}


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1_000):
        yield from batch.to_pylist()
