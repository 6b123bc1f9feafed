"""How recipes that measure show what they found, and where they leave it, apart from what training left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.files import write_json, write_parquet
from ..documents import read_json
from ..errors import ConfigError
from .places import check_output, writing
from .run import holds_run


def check_results(directory: Path, inputs: Mapping[str, str | None]) -> None:
    """Before the minutes that scoring takes: the results can be written, and replace nothing but earlier results.

    inputs: what the recipe reads, by key.
    """
    check_output(directory, inputs, writes=("metrics.json", "predictions.parquet", "ranking.parquet"))
    if holds_run(directory):
        raise ConfigError(f"output_dir {directory} is a training run's, whose metrics.json would go; choose another")
    for path in (directory / "metrics.json", directory / "predictions.parquet", directory / "ranking.parquet"):
        if path.exists() and not _is_result(path):
            raise ConfigError(
                f"output_dir {directory} holds {path.name}, which no recipe of this kind wrote, so it is not replaced; "
                "choose another directory, or remove it"
            )


def _is_result(path: Path) -> bool:
    """Whether `write_results` may have written a file."""
    try:
        if path.suffix == ".parquet":
            return {"user_id", "item_id"} <= set(pq.read_schema(path).names)
        found = read_json(path)
    except (OSError, ValueError, pa.ArrowException):  # DataError is a ValueError
        return False
    return isinstance(found, dict) and any(isinstance(found.get(name), dict) for name in ("train", "valid", "test"))


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


def print_cells(lines: Mapping[str, Mapping[str, str]]) -> None:
    """A table: a line a system, a column a metric."""
    names = list(next(iter(lines.values())))
    first = max(len(title) for title in lines) + 2
    widths = [max(len(name), *(len(line[name]) for line in lines.values())) + 2 for name in names]
    print(" " * first + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for title, line in lines.items():
        print(f"{title:<{first}}" + "".join(f"{line[name]:>{w}}" for name, w in zip(names, widths, strict=True)))
