"""How recipes that measure show what they found, and where they leave it, apart from what training left."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec_peft.documents import read_json
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.metrics import find_metric
from llmrec_peft.files import write_json, write_parquet
from llmrec_peft.runs.output_paths import check_output, is_plain, writing
from llmrec_peft.runs.run_directory import holds_run

FUSED = {"test", "fused_minus", "targets", "users", "fusion", "evidence", "kept"}
"""Keys of metrics.json that fusing writes."""


def check_results(directory: Path, inputs: Mapping[str, str | None]) -> None:
    """Before the minutes that scoring takes: the results can be written, and replace nothing but earlier results.

    inputs: what the recipe reads, by key.
    """
    check_output(directory, inputs, writes=("metrics.json", "predictions.parquet", "ranking.parquet"))
    if holds_run(directory):
        raise ConfigError(f"output_dir {directory} is a training run's, whose metrics.json would go; choose another")
    for path in (directory / "metrics.json", directory / "predictions.parquet", directory / "ranking.parquet"):
        if os.path.lexists(path) and not _is_result(path):
            raise ConfigError(
                f"output_dir {directory} holds {path.name}, which no recipe of this kind wrote, so it is not replaced; "
                "choose another directory, or remove it"
            )


def _is_result(path: Path) -> bool:
    """Whether `write_results` may have written a file, by the form of all that it writes."""
    if not is_plain(path):
        return False
    try:
        if path.suffix == ".parquet":
            return _is_table(pq.read_schema(path).names, path.stem)
        found = read_json(path)
        return isinstance(found, dict) and (found.keys() == FUSED or _are_metrics(found))
    except (OSError, ValueError, pa.ArrowException):  # DataError is a ValueError
        return False


def _is_table(names: list[str], stem: str) -> bool:
    """Whether columns are those of predictions.parquet, or of ranking.parquet."""
    columns = ["split", "user_id", "item_id", "timestamp", "label"]
    if stem == "predictions":
        rest = names[len(columns) :]
        return names[: len(columns)] == columns and bool(rest) and all(name.startswith("p_") for name in rest)
    columns = ["user_id", "item_id", "timestamp", "items"]
    rest = [name for name in names[len(columns) :] if name != "candidates"]
    return names[: len(columns)] == columns and bool(rest) and all(name.endswith(("_above", "_tied")) for name in rest)


def _are_metrics(found: dict[str, Any]) -> bool:
    """Whether `found` is one split's metrics by name, and nothing else but a ranking."""
    splits = [name for name in found if name != "ranking"]
    metrics = found[splits[0]] if len(splits) == 1 and splits[0] in ("train", "valid", "test") else None
    if not isinstance(metrics, dict) or "targets" not in metrics:
        return False
    for name, value in metrics.items():
        find_metric(name)  # a ValueError for another name
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            return False
    return True


def write_results(directory: Path, metrics: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> None:
    """Write metrics.json, and each table under its name as parquet."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_parquet(table, directory / f"{name}.parquet")
        write_json(metrics, directory / "metrics.json")
    print(f"written to {directory}: {', '.join(['metrics.json', *(f'{name}.parquet' for name in tables)])}")


def cell(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A value with the ends of its interval, if it has any."""
    form = "+.4f" if sign else ".4f"
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if np.isfinite(low) else "")


def print_table(lines: Mapping[str, Mapping[str, str]]) -> None:
    """A table: a line a system, a column a metric."""
    names = list(next(iter(lines.values())))
    first = max(len(title) for title in lines) + 2
    widths = [max(len(name), *(len(line[name]) for line in lines.values())) + 2 for name in names]
    print(" " * first + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for title, line in lines.items():
        print(f"{title:<{first}}" + "".join(f"{line[name]:>{w}}" for name, w in zip(names, widths, strict=True)))
