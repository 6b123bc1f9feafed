"""MIND, the Microsoft News Dataset: `behaviors.tsv` (impressions) and `news.tsv` (articles).

Source of the layout: Wu et al. 2020, "MIND: A Large-scale Dataset for News Recommendation", and msnews.github.io.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.memory_mapped import collect
from llmrec_peft.data.readers.csv_files import open_csv, read_csv
from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.data.readers.tabular import complete_items
from llmrec_peft.data.tables import ID_TYPE, SHOWN, bool_numpy
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted

_log = logging.getLogger(__name__)

NEWS = ("item_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
IMPRESSIONS = ("impression_id", "user_id", "time", "history", "impressions")
TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
EXPLODE_ROWS = 4_096
"""Impressions turned into rows at one time; an impression holds 37 articles on average and some hold 300."""

ROW_SCHEMA = pa.schema(
    [
        ("user_id", ID_TYPE),
        ("item_id", ID_TYPE),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("behaviour", pa.string()),
        ("impression_id", pa.string()),
        ("context_only", pa.bool_()),
    ]
)


def _detect(path: str) -> bool:
    return all((Path(path) / name).is_file() for name in ("behaviors.tsv", "news.tsv"))


@register("mind", "behaviors.tsv with news.tsv", _detect)
def read_mind(path: str) -> RawLog:
    """Read a MIND directory: a row for each article of an impression, label 1 and behaviour click, or 0 and show.

    The articles of a user's first History are rows before the first impression, `context_only` and clicked. MIND gives
    them an order but no time, so they are put at one-second steps that end one second before that impression.

    Raises:
        DataError: a file is missing or damaged, two rows of an article differ, or impressions have no
            labels, as in MIND's test set.
    """
    if not _detect(path):
        raise DataError(f"{path} lacks behaviors.tsv or news.tsv; unpack a part of MIND there")
    directory = Path(path)
    file = directory / "behaviors.tsv"
    schema = pa.schema([(name, pa.string()) for name in IMPRESSIONS])
    shown = collect(open_csv(file, schema, delimiter="\t", quoted=False), schema)
    if not shown.num_rows:
        raise DataError(f"{file} is empty; download it again")
    seconds = _seconds(shown.column("time"), file)

    history = _history_rows(shown, seconds)

    def rows() -> Iterator[pa.RecordBatch]:
        yield from history.to_batches()
        for start in range(0, shown.num_rows, EXPLODE_ROWS):
            part = shown.slice(start, EXPLODE_ROWS)
            yield from _impression_rows(part, seconds[start : start + EXPLODE_ROWS], file).to_batches()

    kept = list(NEWS[:5])
    items = read_csv(
        directory / "news.tsv",
        delimiter="\t",
        quoted=False,
        names=NEWS,
        types={name: pa.string() for name in NEWS},
        columns=kept,
    )
    name = log_name(path)
    items = complete_items(
        _distinct(items, directory / "news.tsv", name), history, name, counted=" (those of histories are counted)"
    )
    return RawLog(collect(rows(), ROW_SCHEMA), items, name)


def _distinct(items: pa.Table, path: Path, name: str) -> pa.Table:
    """Each article once: published parts that were joined hold many articles twice.

    Raises:
        DataError: two rows of one article differ.
    """
    whole = items.group_by(items.column_names, use_threads=False).aggregate([]).select(items.column_names)
    if whole.num_rows < items.num_rows:
        _log.warning("log %r: %d exact repeats of articles dropped", name, items.num_rows - whole.num_rows)
    counts = pc.value_counts(whole.column("item_id"))
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        raise DataError(
            f"{path} has {len(twice)} articles with rows that differ (first: {listed(twice[:SHOWN].to_pylist())}); "
            "keep one row an article"
        )
    return whole


def _seconds(times: pa.ChunkedArray, path: Path) -> np.ndarray:
    parsed = pc.strptime(times, format=TIME_FORMAT, unit="s", error_is_null=True)
    if parsed.null_count:
        row = int(np.flatnonzero(bool_numpy(parsed.is_null()))[0])
        raise DataError(
            f"line {row + 1} of {path} has time {quoted(times[row].as_py())}; MIND writes it as 11/15/2019 8:55:22 AM"
        )
    return parsed.cast(pa.int64()).to_numpy()


def _words(texts: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The space-separated words of each text: flat words, and the text that each comes from."""
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    lists = pc.split_pattern(texts.cast(ID_TYPE), " ")
    words, parents = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
    filled = pc.greater(pc.binary_length(words), 0)
    return words.filter(filled), parents[bool_numpy(filled)]


def _history_rows(shown: pa.Table, seconds: np.ndarray) -> pa.Table:
    users = shown.column("user_id")
    codes = pc.index_in(users, value_set=pc.unique(users)).to_numpy()
    order = np.lexsort((seconds, codes))
    first = order[np.concatenate([[True], np.diff(codes[order]) > 0])]
    words, parents = _words(shown.column("history").take(first))
    counts = np.bincount(parents, minlength=len(first))
    left = np.cumsum(counts)[parents] - np.arange(len(parents))  # counts down to 1 within a user
    count = len(parents)
    return pa.table(
        {
            "user_id": users.take(first[parents]).cast(ID_TYPE),
            "item_id": words,
            "timestamp": seconds[first][parents] - left,
            "label": np.ones(count, np.int8),
            "behaviour": pa.repeat(pa.scalar("click"), count),
            "impression_id": pa.nulls(count, pa.string()),
            "context_only": np.ones(count, bool),
        },
        schema=ROW_SCHEMA,
    )


def _impression_rows(part: pa.Table, seconds: np.ndarray, path: Path) -> pa.Table:
    words, parents = _words(part.column("impressions"))
    fields = pc.extract_regex(words, r"^(?P<item>.+)-(?P<label>[01])$")
    if fields.null_count:
        row = int(np.flatnonzero(bool_numpy(fields.is_null()))[0])
        name = part.column("impression_id")[int(parents[row])].as_py()
        raise DataError(
            f"impression {quoted(name)} of {path} has the entry {quoted(words[row].as_py())} without -0 or -1; "
            "a part of MIND with labels is needed (train or dev)"
        )
    labels = fields.field("label").cast(pa.int8())
    return pa.table(
        {
            "user_id": part.column("user_id").take(parents).cast(ID_TYPE),
            "item_id": fields.field("item"),
            "timestamp": seconds[parents],
            "label": labels,
            "behaviour": pa.array(["show", "click"]).take(labels),
            "impression_id": part.column("impression_id").take(parents),
            "context_only": np.zeros(len(parents), bool),
        },
        schema=ROW_SCHEMA,
    )
