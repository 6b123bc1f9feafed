"""Options of the log that a recipe reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec_peft.fields import check_fields, require


@dataclass(kw_only=True)
class OptionalDataConfig:
    """Log to compare two models on."""

    path: str | None = None
    """Directory or file of the log, a Hub data set, or simulated:shop; null to use synthetic inputs."""
    format: str = "auto"
    """Name of the reader; auto detects it from the files."""
    null_times: Literal["refuse", "drop"] = "refuse"
    """Action for interactions without a timestamp: refuse the log, or drop them and report how many."""

    def __post_init__(self) -> None:
        check_fields(self, "data.", brief=True)


@dataclass(kw_only=True)
class DataConfig(OptionalDataConfig):
    """Behaviour log."""

    path: str = field()  # without the default of the class above
    """Directory or file of the log, a Hub data set, or simulated:shop for a simulated log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.path.strip()), "data.path", "the place of a log", self.path)
