"""The sections of a domain: labels, split, negatives, windows and recommendations."""

from dataclasses import dataclass
from typing import Literal

from llmrec_peft.fields import MAX_COUNT
from llmrec_peft.fields import number as of_number


@dataclass
class LabelRule:
    """The column of the outcomes, and how its values become labels."""

    column: str = "label"
    """Column of the interactions that holds the outcome."""
    above: float | None = of_number(None, -1e18, 1e18)
    """Threshold for two outcomes: values above it are the second, others the first."""
    map: dict[str, str | None] | None = None
    """From the column's values to labels; null leaves rows with this value out of the log."""
    missing: Literal["refuse", "leave_out"] = "refuse"
    """A row without a value: raise an error, or leave it out; distillation can use a teacher's prediction for it."""


@dataclass
class SplitRule:
    """How the log is split into training, validation and test targets."""

    by: Literal["time", "user"] = "time"
    """Split at one global time, or by whole users."""
    valid: float = of_number(0.1, 0, 1)
    """Fraction of the interactions (by time) or of the users (by user) for validation."""
    test: float = of_number(0.1, 0, 1)
    """Fraction for the test; with `by: time` the latest."""


@dataclass
class NegativeRule:
    """Sampled negatives for logs that hold only positives."""

    per_positive: int = of_number(0, 0, 1000)
    """Sampled negatives for each positive; 0 for logs with both outcomes."""
    sampling: Literal["popularity", "uniform"] = "popularity"
    """Draw by popularity before the positive, or uniformly among the items seen before it."""
    label: str | None = None
    """Label of sampled negatives; the first outcome by default."""


@dataclass
class StreamRule:
    """How a user's log is cut into windows."""

    context: int = of_number(10, 0, 100_000)
    """Most history events before the first target of a window; they carry no loss."""
    targets: int = of_number(30, 1, 100_000)
    """Most predicted events in a window."""
    max_length: int = of_number(1024, 8, MAX_COUNT)
    """Most tokens in a window; whole history events are dropped, the oldest first."""
    history_labels: list[str] | None = None
    """Labels whose events enter the history; all by default. Later events never see the others."""


@dataclass
class RecommendRule:
    """Which items may be recommended."""

    exclude: list[str] | None = None
    """Labels whose items are not recommended again, such as buy; all by default, [] for none."""
