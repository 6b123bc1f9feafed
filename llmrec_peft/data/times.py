"""Times of a log as seconds since 1970, and detection of other units in a time column.

A log's times are of one of two kinds. Either all of them are seconds since 1970, from 1990 to 2100: the log is *dated*.
Or all of them are below 10^8 (March 1973): row numbers, or times since an unknown start. Such numbers only define an
order, so they are not used as dates or durations (`until`, a half-life). Anything else is another unit, or several
units in one column, and is refused with the name of the unit.
"""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.messages import listed

logger = logging.getLogger(__name__)

ORDER_BELOW = 10**8
"""Numbers below this only define an order."""
EARLIEST, LATEST = 631_152_000, 4_102_444_800
"""Seconds since 1970 of 1990-01-01 and 2100-01-01: dated times lie from the first to before the second."""
SHOWN = 3
"""Rows that a message names, at most."""
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class Unit:
    """A range of numbers [low, high) that times of one unit lie in.

    name: name of the unit in messages. mend: how to convert its numbers to seconds since 1970.
    """

    low: float
    high: float
    name: str
    mend: str


ORDER = Unit(0, ORDER_BELOW, f"numbers below {ORDER_BELOW:,}", "")
SECONDS = Unit(EARLIEST, LATEST, "seconds", "")
MILLISECONDS = Unit(EARLIEST * 1e3, LATEST * 1e3, "milliseconds", "divide by 1000")
_UNITS = (
    ORDER,
    Unit(ORDER_BELOW, EARLIEST, "seconds before 1990, or since 2001", "add 978307200 if they count from 2001"),
    SECONDS,
    MILLISECONDS,
    Unit(19900101000000, 21000101000000, "dates written as YYYYMMDDhhmmss", "write them as datetimes"),
    Unit(EARLIEST * 1e6, LATEST * 1e6, "microseconds", "divide by 1000000"),
    Unit((EARLIEST + 11_644_473_600) * 1e7, (LATEST + 11_644_473_600) * 1e7, "Windows file times",
         "divide by 10000000 and subtract 11644473600"),
    Unit(EARLIEST * 1e9, LATEST * 1e9, "nanoseconds", "divide by 1000000000"),
    Unit(0, np.inf, "no known unit of a time between 1990 and 2100", "correct them"),  # all others: it stands last
)  # fmt: skip
_RULE = "times are seconds since 1970, from 1990 to 2100"

# Digits that spell a calendar, from the left: (divisor, lowest, highest) of each part.
_YEAR, _SHORT_YEAR, _MONTH, _DAY, _HOUR = (1990, 2099), (10, 49), (1, 12), (1, 31), (0, 23)
_SPELLINGS = {
    "YYYYMMDD": ((10_000, _YEAR), (100, _MONTH), (1, _DAY)),
    "YYYYMMDDhh": ((1_000_000, _YEAR), (10_000, _MONTH), (100, _DAY), (1, _HOUR)),
    "YYMMDDhh": ((1_000_000, _SHORT_YEAR), (10_000, _MONTH), (100, _DAY), (1, _HOUR)),
}
_ALSO = ((1990, 2100, "years"), (7_305, 47_482, "days since 1970"), (32_874, 73_051, "days as Excel counts them"),
         (175_320, 1_139_568, "hours since 1970"), (199_001, 209_913, "months as YYYYMM"),
         (10_519_200, 68_374_080, "minutes since 1970"))  # fmt: skip


def to_seconds(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Timestamps as seconds since 1970, or as numbers that only define an order; int64 or float64 [rows].

    Dates and datetimes become seconds (UTC where a zone is given), whole where every one is whole.

    Raises:
        DataError: not a number or a datetime; null, NaN, infinite or negative; datetimes outside 1990 to 2100; numbers
            of another unit than seconds, or of several units.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count or pa.types.is_null(column.type):
        rows = np.flatnonzero(np.asarray(column.is_null()))
        raise DataError(f"timestamp is null in {len(rows)} {where} ({_rows(rows)}); drop or fill these rows")
    typed = pa.types.is_date(column.type) or pa.types.is_timestamp(column.type)
    seconds = _from_datetimes(column) if typed else _from_numbers(column, where)
    bad = np.flatnonzero(~(np.isfinite(seconds) & ((seconds >= 0) | typed)))
    if len(bad):
        raise DataError(
            f"timestamp is NaN, infinite or negative in {len(bad)} {where} ({_shown(seconds, bad, 5)}); "
            "timestamps are seconds since 1970; fix or drop these rows"
        )
    if typed:
        _check_datetimes(seconds, where)
    else:
        _check_units(seconds, where)
    return np.ascontiguousarray(seconds)


def from_milliseconds(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Published times in milliseconds as seconds; float64 [rows], NaN where null.

    Raises:
        DataError: numbers of another unit; the message names the unit and the numbers as in the file.
    """
    known = column.drop_null() if column.null_count else column
    numbers = known.to_numpy()
    if len(numbers) and not (MILLISECONDS.low <= numbers.min() and numbers.max() < MILLISECONDS.high):
        places = _unit_numbers(numbers)
        wrong = np.flatnonzero(places != _UNITS.index(MILLISECONDS))
        unit = _UNITS[int(places[wrong[0]])]
        rows = np.flatnonzero(np.asarray(column.is_valid()))[wrong]
        raise DataError(
            f"timestamp of {len(wrong)} of {len(column)} {where} is not in milliseconds from 1990 to 2100 but looks "
            f"like {unit.name} ({_rows(rows, SHOWN)}: {listed([str(numbers[row]) for row in wrong[:SHOWN]])}); "
            f"{'multiply by 1000' if unit is SECONDS else 'write milliseconds since 1970'}"
        )
    return column.to_numpy() / np.float64(1000)


def check_left_out(times: np.ndarray, rows: np.ndarray, where: str) -> None:
    """Raise DataError if times outside 1990 to 2100 are not wrong dates, but times in a finer unit than seconds.

    Args:
        times: int64 [n], of the rows that a reader would leave out.
        rows: int64 [n], numbers of these rows.
        where: name of their source in messages.
    """
    numbers = _unit_numbers(times)
    found = np.flatnonzero((numbers > _UNITS.index(SECONDS)) & (numbers < len(_UNITS) - 1))
    if len(found):
        unit = _UNITS[int(numbers[found[0]])]
        raise DataError(
            f"timestamp of {where} holds {unit.name} ({_rows(rows[found], SHOWN)}: "
            f"{listed([str(time) for time in times[found[:SHOWN]]])}), and {_RULE}; {unit.mend}"
        )


def are_dated(seconds: np.ndarray) -> bool:
    """Whether validated times are seconds since 1970; otherwise they only define an order."""
    return not len(seconds) or bool(seconds[0] >= ORDER_BELOW)


def check_moment(moment: float | None, dated: bool, what: str) -> None:
    """Raise ConfigError if a configured moment cannot be compared with the times of a log.

    Args:
        moment: seconds since 1970, or None.
        dated: whether the log's times are seconds since 1970.
        what: the setting of the moment, such as `until`.
    """
    if moment is None:
        return
    unit = _UNITS[int(_unit_numbers(np.array([float(moment)]))[0])]
    if dated and unit is not SECONDS:
        mend = unit.mend or "give seconds since 1970"
        raise ConfigError(f"{what} {moment} looks like {unit.name}, and {_RULE}; {mend}")
    if not dated and unit is not ORDER:
        raise ConfigError(
            f"{what} {moment} is a date, but the log's times are below {ORDER_BELOW:,} and only order its rows; "
            "give one of the log's own numbers"
        )


def _from_datetimes(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_date64(column.type):
        column = column.cast(pa.timestamp("ms"))
    elif pa.types.is_date32(column.type):
        column = column.cast(pa.timestamp("s"))
    ticks, per_second = column.cast(pa.int64()).to_numpy(), _TICKS[column.type.unit]
    return ticks // per_second if not np.any(ticks % per_second) else ticks / per_second


def _from_numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    kind = column.type
    if pa.types.is_uint64(kind):
        values = column.to_numpy()
        return values.astype(np.int64 if values.max(initial=0) < 2**63 else np.float64)
    if pa.types.is_integer(kind):
        return column.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = column.cast(pa.float64()).to_numpy() + 0.0  # -0.0 becomes 0.0
        if pa.types.is_float32(kind) and np.any(values >= EARLIEST):
            logger.warning("timestamp of %s is float32, which tells times apart by about two minutes", where)
        return values
    raise DataError(f"timestamp of {where} must be numbers (seconds) or datetimes, got {kind}; convert the column")


def _check_datetimes(seconds: np.ndarray, where: str) -> None:
    bad = np.flatnonzero((seconds < EARLIEST) | (seconds >= LATEST))
    if not len(bad):
        return
    dates = listed([_date(seconds[row]) for row in bad[:SHOWN]])
    # pandas.to_datetime without a unit reads seconds, milliseconds and microseconds as nanoseconds since 1970.
    early = len(bad) == len(seconds) and bool(np.all(np.abs(seconds) < LATEST / 10**3))
    mend = "look like numbers read in too small a unit, as pandas.to_datetime does without unit=" if early else ""
    raise DataError(
        f"timestamp is a date outside 1990 to 2100 in {len(bad)} {where} ({_rows(bad)}: {dates}); "
        f"{f'they {mend}; ' if mend else ''}correct or drop these rows"
    )


def _check_units(seconds: np.ndarray, where: str) -> None:
    """Raise DataError unless all numbers are seconds from 1990 to 2100, or all are below `ORDER_BELOW`."""
    if not len(seconds):
        return
    low, high = seconds.min(), seconds.max()
    ordered, dated = high < ORDER_BELOW, low >= EARLIEST and high < LATEST
    if ordered or dated:
        for spelling, parts in _SPELLINGS.items():
            if _spells(seconds, parts):
                raise DataError(
                    f"timestamp of all {len(seconds)} {where} looks like dates written as {spelling} "
                    f"({_shown(seconds, np.arange(len(seconds)))}), and {_RULE}; write them as datetimes, such as "
                    "2020-01-31 12:00:00, or as seconds"
                )
        if ordered:
            _warn_order(seconds, where)
        return
    numbers = _unit_numbers(seconds)
    found = [(_UNITS[number], np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
    if len(found) > 1:
        mixed = [f"{unit.name} in {len(rows)} rows ({_shown(seconds, rows)})" for unit, rows in found]
        raise DataError(
            f"timestamp mixes units in the {len(seconds)} {where}: {' and '.join(mixed)}; {_RULE}; bring all rows to "
            "seconds, or drop those of the other unit"
        )
    unit, rows = found[0]
    raise DataError(
        f"timestamp of all {len(seconds)} {where} looks like {unit.name} ({_shown(seconds, rows)}), and {_RULE}; "
        f"{unit.mend}"
    )


def _unit_numbers(seconds: np.ndarray) -> np.ndarray:
    """Index in `_UNITS` of the unit of each number, int64 [rows]."""
    number = np.full(len(seconds), len(_UNITS) - 1, np.int64)
    for place, unit in enumerate(_UNITS[:-1]):
        number[(seconds >= unit.low) & (seconds < unit.high)] = place
    return number


def _spells(numbers: np.ndarray, parts: tuple[tuple[int, tuple[int, int]], ...]) -> bool:
    """Whether every number is whole and its digits form a date."""
    rest = numbers
    for divisor, (low, high) in parts:
        part, rest = rest // divisor, rest % divisor
        if part.min() < low or part.max() > high:
            return False
    return not np.any(rest)


def _warn_order(numbers: np.ndarray, where: str) -> None:
    """Warn how numbers that only define an order are read; plain row numbers need no warning."""
    low, high = numbers.min(), numbers.max()
    if low in (0, 1) and high - low == len(numbers) - 1 and len(np.unique(numbers)) == len(numbers):
        return
    also = [name for first, last, name in _ALSO if low >= first and high < last]
    logger.warning(
        "timestamp of %d %s lies from %s to %s, below %s: taken as the order of events, not as dates; --until takes "
        "such numbers too, and no half-life is fitted%s",
        len(numbers), where, low, high, f"{ORDER_BELOW:,}",
        f". They may be {' or '.join(also)}: convert them to seconds if they are" if also else "",
    )  # fmt: skip


def _date(seconds: float) -> str:
    try:
        return str(np.datetime64(int(seconds), "s")).replace("T", " ")
    except (OverflowError, ValueError):
        return f"{seconds} s"


def _rows(rows: np.ndarray, limit: int = 5) -> str:
    """`row 7` or `rows 7, 9, 12, ...`; rows are counted from 0."""
    shown = ", ".join(str(int(row)) for row in rows[:limit])
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', ...' if len(rows) > limit else ''}"


def _shown(values: np.ndarray, rows: np.ndarray, limit: int = SHOWN) -> str:
    return f"{_rows(rows, limit)}: {listed([str(values[row]) for row in rows[:limit]])}"
