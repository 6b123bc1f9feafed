"""How recipes that measure show what they found, and where they leave it, apart from what training left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.files import write_json, write_parquet
from ..errors import ConfigError
from .run import check_place, holds_run


def check_output(directory: Path) -> None:
    """Before the minutes that scoring takes: the directory can be written, and is not that of a training run."""
    check_place(directory)
    if holds_run(directory):
        raise ConfigError(f"output_dir {directory} is a training run's, whose metrics.json would go; choose another")


def write_results(directory: Path, metrics: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> None:
    """Write metrics.json, and each table under its name as parquet."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_parquet(table, directory / f"{name}.parquet")
        write_json(metrics, directory / "metrics.json")
    except OSError as error:
        raise ConfigError(f"output_dir {directory} cannot be written ({error.strerror}); choose another") from None
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
