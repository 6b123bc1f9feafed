"""Printing in recipes."""

from collections.abc import Callable, Mapping

import numpy as np
from accelerate import PartialState


def main_printer(state: PartialState) -> Callable[[str], None]:
    """A function that prints a line at once on the main process, and nothing on the others."""

    def show(line: str) -> None:
        if state.is_main_process:
            print(line, flush=True)

    return show


def format_interval(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A value with the ends of its interval, if it has one."""
    form = "+.4f" if sign else ".4f"
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if np.isfinite(low) else "")


def print_table(lines: Mapping[str, Mapping[str, str]]) -> None:
    """Print a table with one line for each system and one column for each metric."""
    names = list(next(iter(lines.values())))
    first = max(len(title) for title in lines) + 2
    widths = [max(len(name), *(len(line[name]) for line in lines.values())) + 2 for name in names]
    print(" " * first + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for title, line in lines.items():
        print(f"{title:<{first}}" + "".join(f"{line[name]:>{w}}" for name, w in zip(names, widths, strict=True)))
