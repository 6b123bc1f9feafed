"""What the tests of indexing and ranking share: a small log with both labels, and a bundle of noise for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import make_small_tables
from tests.support.bundles import write_bundle

DOMAIN: dict[str, Any] = {
    "name": "movies",
    "header": "Movies a viewer of {age} rated:\n",
    "event": "{title} ({genres}) at {hour}",
    "marker": " ->",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "simultaneous": "isolate",
    "split": {"by": "time", "valid": 0.15, "test": 0.2},
    "stream": {"context": 3, "targets": 4, "max_length": 400},
    "recommend": {"exclude": ["like"]},
}
"""The header's column is the user's, and `hour` is the moment's: neither is in the item table."""

CALIBRATION = {"temperature": 1.7, "bias": [0.3, -0.3]}
TWINS = ("i20", "i23", "i26", "i29")
"""Items with one text."""


def tables(users: int = 30, events: int = 24, items: int = 60) -> tuple[pa.Table, pa.Table]:
    """(interactions, items), rows by user and time as a log has them."""
    interactions, catalogue = make_small_tables(users, events, items)
    rows = interactions.to_pandas().sort_values(["user_id", "timestamp"], kind="stable")
    rows["age"] = 20 + rows["user_id"].str[1:].astype(int)
    rows["hour"] = rows["timestamp"] // 3600 % 24
    shown = catalogue.to_pandas()
    shown.loc[shown["item_id"].isin(TWINS), "title"] = "Twin"
    return pa.Table.from_pandas(rows, preserve_index=False), pa.Table.from_pandas(shown, preserve_index=False)


def write_log(directory: Path, interactions: pa.Table, items: pa.Table) -> Path:
    """A directory with a log."""
    directory.mkdir()
    pq.write_table(interactions, directory / "interactions.parquet")
    pq.write_table(items, directory / "items.parquet")
    return directory


def noisy_bundle(directory: Path, base: Path, method: str = "lora", *, domain: dict | None = None, seed: int = 5):
    """A calibrated bundle, which answers something of its own to every text."""
    return write_bundle(directory, base, method, domain=domain or DOMAIN, seed=seed, scale=0.3, calibration=CALIBRATION)
