"""The files that evaluation and indexing leave: metrics.json, predictions.parquet and ranking.parquet."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec_peft.documents import read_json
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.metrics import find_metric
from llmrec_peft.files import write_json, write_parquet, writing
from llmrec_peft.runs.output_paths import check_output_directory, is_plain
from llmrec_peft.runs.run_directory import holds_run

FILES = ("metrics.json", "predictions.parquet", "ranking.parquet")
_INDEX_KEYS = {"test", "fused_minus", "targets", "users", "fusion"}
INDEX_METRICS = (_INDEX_KEYS | {"retrieval_index", "written"}, _INDEX_KEYS | {"evidence", "kept"})
"""Keys of metrics.json that recipes/index.py writes, now, and as version 0.1.0 wrote them."""


def check_results(directory: Path, inputs: Mapping[str, str | None]) -> None:
    """Check, before the minutes of scoring, that results can be written and replace nothing but earlier results.

    inputs: paths that the recipe reads, by the key that names them.
    """
    check_output_directory(directory, inputs, writes=FILES)
    if holds_run(directory):
        raise ConfigError(
            f"output_dir {directory} is a training run's, whose metrics.json would be replaced; choose another"
        )
    for path in (directory / name for name in FILES):
        if os.path.lexists(path) and not _is_result(path):
            raise ConfigError(
                f"output_dir {directory} holds {path.name}, which no recipe of this kind wrote, so it is not replaced; "
                "choose another directory, or remove it"
            )


def _is_result(path: Path) -> bool:
    """Whether `write_results` may have written a file, by its form."""
    if not is_plain(path):
        return False
    try:
        if path.suffix == ".parquet":
            return _is_table(pq.read_schema(path).names, path.stem)
        found = read_json(path)
        return isinstance(found, dict) and (found.keys() in INDEX_METRICS or _are_metrics(found))
    except (OSError, ValueError, pa.ArrowException):  # DataError is a ValueError
        return False


def _is_table(names: list[str], stem: str) -> bool:
    """Whether the columns are those of predictions.parquet or ranking.parquet, by the file's stem."""
    columns = ["split", "user_id", "item_id", "timestamp", "label"]
    if stem == "predictions":
        rest = names[len(columns) :]
        return names[: len(columns)] == columns and bool(rest) and all(name.startswith("p_") for name in rest)
    columns = ["user_id", "item_id", "timestamp", "items"]
    rest = [name for name in names[len(columns) :] if name != "candidates"]
    return names[: len(columns)] == columns and bool(rest) and all(name.endswith(("_above", "_tied")) for name in rest)


def _are_metrics(found: dict[str, Any]) -> bool:
    """Whether `found` holds the metrics of one split, and nothing else but a ranking."""
    splits = [name for name in found if name != "ranking"]
    metrics = found[splits[0]] if len(splits) == 1 and splits[0] in ("train", "valid", "test") else None
    if not isinstance(metrics, dict) or "targets" not in metrics:
        return False
    for name, value in metrics.items():
        find_metric(name)  # raises a ValueError for an unknown name
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            return False
    return True


def write_results(directory: Path, metrics: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> None:
    """Write metrics.json, and each table under its name as parquet. metrics.json comes last."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_parquet(table, directory / f"{name}.parquet")
        write_json(metrics, directory / "metrics.json")
    print(f"written to {directory}: {', '.join(['metrics.json', *(f'{name}.parquet' for name in tables)])}")
