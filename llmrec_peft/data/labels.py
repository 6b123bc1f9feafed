"""Labels of a log's rows: the class number of each value in the column of the outcomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.domain_rules import LabelRule
from llmrec_peft.errors import DataError

if TYPE_CHECKING:
    from llmrec_peft.data.log import BehaviorLog

LEFT_OUT, UNKNOWN = -1, -2
"""Class numbers of a value that leaves its row out of the log, and of one that is not among the labels."""


def label_classes(log: BehaviorLog, rule: LabelRule, labels: list[str]) -> np.ndarray:
    """Class number of each row of a log by the label rule; duplicates are kept.

    Args:
        log: has the column `rule.column`.
        rule: the column, and how its values become labels.
        labels: label names in class order.

    Returns:
        int32 [rows]; -1 where the rule leaves the row out.

    Raises:
        DataError: no such column, a missing value (unless the rule leaves these out), or a value outside the labels.
    """
    column = log.column(rule.column)
    if rule.above is not None:
        return _above(log, column, rule, rule.above)
    # Only the distinct values are mapped in Python; the rows by one array lookup.
    try:
        encoded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
    except pa.ArrowNotImplementedError:
        raise DataError(
            f"{log.name}: label column '{rule.column}' must hold texts or numbers, got {column.type}; convert it"
        ) from None
    values = encoded.dictionary.to_pylist()
    codes = np.array([_class_of(value, rule, labels) for value in values], dtype=np.int32)
    rows = np.asarray(encoded.indices)
    known = list(rule.map) if rule.map else [*labels, *range(len(labels))]
    for number in np.flatnonzero(codes == UNKNOWN):
        value = values[number]
        _refuse_rows(
            log,
            rows == number,
            f"label column '{rule.column}' has {value!r}, which is not one of the domain's labels",
            f"use {', '.join(map(repr, known))} or add it to label.map (null leaves rows out)"
            if value is not None
            else "give it a label, or set label.missing to leave_out",
        )
    return codes[rows] if len(values) else np.empty(0, np.int32)


def _above(log: BehaviorLog, column: pa.ChunkedArray, rule: LabelRule, threshold: float) -> np.ndarray:
    """int32 [rows]: 1 where the value is above the threshold, else 0; -1 where it is missing."""
    try:
        values = np.asarray(pc.cast(column, pa.float64()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{log.name}: label column '{rule.column}' must hold numbers for `above`; got {column.type}"
        ) from None
    missing = np.isnan(values)  # null becomes NaN
    if rule.missing == "refuse":
        _refuse_rows(log, missing, f"label column '{rule.column}' is missing",
                     "remove these rows, or set label.missing to leave_out")  # fmt: skip
    return np.where(missing, LEFT_OUT, values > threshold).astype(np.int32)


def _class_of(value: Any, rule: LabelRule, labels: list[str]) -> int:
    """Class of one of the column's values; -1 to leave it out, -2 if it is unknown.

    Values are compared with labels as text, so that parquet, csv and jsonl agree. A number that is no label's name is a
    class number, unless labels are named by numbers: 1 must not mean "2" where the labels are "1" to "5".
    """
    if value is None or value != value:  # null or NaN
        return LEFT_OUT if rule.missing == "leave_out" else UNKNOWN
    texts = [str(value), _as_label(value)]  # "4.0" and "4"
    if rule.map is not None:
        names = [rule.map[text] for text in texts if text in rule.map]
        if not names:
            return UNKNOWN
        return LEFT_OUT if names[0] is None else labels.index(names[0])
    for text in texts:
        if text in labels:
            return labels.index(text)
    text = str(int(value)) if isinstance(value, bool) else texts[1]
    if any(_is_number(label) for label in labels) or not (text.isascii() and text.isdigit()):
        return UNKNOWN
    return int(text) if int(text) < len(labels) else UNKNOWN


def _as_label(value: Any) -> str:
    """A value as labels and maps spell it: whole numbers without a point, true and false in lower case."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_rows(log: BehaviorLog, bad: np.ndarray, what: str, advice: str) -> None:
    if bad.any():
        rows = np.flatnonzero(bad)
        shown = ", ".join(map(str, rows[:3]))
        raise DataError(f"{log.name}: {what} in {len(rows)} rows (first: {shown}); {advice}")
