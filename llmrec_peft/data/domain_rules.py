"""The sections of a domain: labels, split, negatives, windows and recommendations."""

from dataclasses import dataclass
from typing import Literal

from llmrec_peft.fields import MAX_COUNT
from llmrec_peft.fields import number as of_number


@dataclass
class LabelRule:
    """Which column says what the user did, and how its values become labels."""

    column: str = "label"
    """Column of the interactions that holds the outcome."""
    above: float | None = of_number(None, -1e18, 1e18)
    """With two outcomes: values above this are the second one, others the first."""
    map: dict[str, str | None] | None = None
    """From the column's values to labels; null leaves such rows out of the log."""
    missing: Literal["refuse", "leave_out"] = "refuse"
    """What a row without a value is: an error, or left out of the log; distilling can ask a teacher about it."""


@dataclass
class SplitRule:
    """How the log is divided into training, validation and test targets."""

    by: Literal["time", "user"] = "time"
    """One global time for all users, or whole users."""
    valid: float = of_number(0.1, 0, 1)
    """Share of the interactions (by time) or of the users (by user) for validation."""
    test: float = of_number(0.1, 0, 1)
    """Share for the test, taken last."""


@dataclass
class NegativeRule:
    """Sampled negatives for logs that hold positives alone."""

    per_positive: int = of_number(0, 0, 1000)
    """How many sampled items stand beside each positive; 0 for logs with both outcomes."""
    sampling: Literal["popularity", "uniform"] = "popularity"
    """Draw by popularity in the past of the positive, or uniformly among the items seen by then."""
    label: str | None = None
    """The label that sampled items get; the first outcome if not given."""


@dataclass
class StreamRule:
    """How one user's log is cut into windows."""

    context: int = of_number(10, 0, 100_000)
    """History events before the targets, at most; their outcomes carry no loss."""
    targets: int = of_number(30, 1, 100_000)
    """Events in a window that are answered, at most."""
    max_length: int = of_number(1024, 8, MAX_COUNT)
    """Tokens in a window, at most; the oldest history events are left out first, whole."""
    history_labels: list[str] | None = None
    """Labels whose events later events may see; all if not given. Others are candidates and leave no trace."""


@dataclass
class RecommendRule:
    """What is recommended."""

    exclude: list[str] | None = None
    """Labels whose items are not recommended again, such as buy; all if not given, [] for none."""
