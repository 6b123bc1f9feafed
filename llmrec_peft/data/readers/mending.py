"""Normalise the spellings of times and ids in published files, before the log checks its tables."""

import logging
import re

import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.csv_rules import NULLS
from llmrec_peft.data.tables import ID_TYPE, bool_numpy, is_text, numbered, offenders
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted

_log = logging.getLogger(__name__)

NULL_TIMES = ("refuse", "drop")
_NO_TIMES = pa.array(sorted(NULLS | {"none", "nil", "(null)", "-", "0000-00-00", "0000-00-00 00:00:00"}))
_TIME = (
    r"^(?P<day>[0-9]{4}[-/][0-9]{2}[-/][0-9]{2})"
    r"(?:[T ](?P<clock>[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]{1,9})?)?)"
    r" ?(?P<zone>Z|z|UTC|GMT|[-+][0-9]{2}(?::?[0-9]{2})?)?)?$"
)
_FLOAT_ID, _WHOLE_ID = r"^(?:0|[1-9][0-9]*)\.0$", r"^(?:0|[1-9][0-9]*)$"
_NUMBER = r"^[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?$"


def check_names(table: pa.Table, needed: tuple[str, ...], where: str) -> None:
    """Raise DataError if a needed column exists under another spelling: `USER_ID`, `userId` or ` user_id`."""
    for name in needed:
        plain = name.replace("_", "")
        found = [other for other in table.column_names if re.sub(r"[\W_]", "", other).lower() == plain]
        if found and name not in table.column_names:
            raise DataError(f"{where} has the column {found[0]!r} where {name} belongs; rename it to {name}")


def plain_times(interactions: pa.Table, name: str, null_times: str) -> pa.Table:
    """The interactions with numbers or datetimes as `timestamp`; `null_times` drop leaves out rows without one.

    Texts are parsed as numbers or as ISO 8601 times, with or without fraction and zone; without a zone they are UTC.

    Raises:
        DataError: a text is not a time, times with and without zone are mixed, or a time is missing and must not be.
    """
    if interactions.column_names.count("timestamp") != 1:
        return interactions
    where = f"interactions of log {name!r}"
    times = interactions.column("timestamp")
    if pa.types.is_dictionary(times.type):
        times = times.cast(times.type.value_type)
    if is_text(times.type):
        times = _parsed(times.cast(pa.string()), where)
    interactions = interactions.set_column(interactions.column_names.index("timestamp"), "timestamp", times)
    missing = times.is_null(nan_is_null=True)
    count, rows = offenders(bool_numpy(missing))
    if not count:
        return interactions
    if null_times == "drop" and count < len(times):
        _log.warning("log %r: %d of %d interactions have no timestamp; they are left out", name, count, len(times))
        return interactions.filter(pc.invert(missing))
    advice = (
        "fill these rows, or leave them out by data.null_times=drop, in Python BehaviorLog.read(..., null_times='drop')"
        if count < len(times)
        else "no interaction has a time: fill the column, by row numbers if only the order of events is known"
    )
    raise DataError(f"timestamp is null in {count} {where} ({numbered(rows, count)}); {advice}")


def _parsed(texts: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.is_in(texts, value_set=_NO_TIMES), None, texts)
    for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    fields = pc.extract_regex(texts, _TIME)
    numbers = pc.fill_null(pc.match_substring_regex(texts, _NUMBER), False)
    no_date = pc.and_(fields.is_null(), texts.is_valid())
    if fields.null_count == len(texts):
        _check_times(texts, no_date, where, "is not a time")
    _check_times(texts, pc.and_(no_date, pc.invert(numbers)), where, "is not a time")
    _check_times(
        texts, numbers, where, "is a number beside rows with dates", "bring all rows to seconds since 1970, or to dates"
    )
    day, clock, zone = (pc.struct_field(fields, name) for name in ("day", "clock", "zone"))
    zoned = pc.not_equal(zone, "")
    if pc.any(zoned).as_py():
        _check_times(texts, pc.fill_null(pc.invert(zoned), False), where, "has no zone where other rows have one")
    day = pc.replace_substring(day, "/", "-")
    clock = pc.replace_substring(pc.if_else(pc.equal(clock, ""), "00:00", clock), ",", ".")
    zone = pc.replace_substring_regex(zone, "z|UTC|GMT", "Z")
    whole = pc.binary_join_element_wise(pc.binary_join_element_wise(day, clock, "T"), zone, "")
    for unit in ("us", "ns"):
        try:
            return whole.cast(pa.timestamp(unit, "UTC") if pc.any(zoned).as_py() else pa.timestamp(unit))
        except pa.ArrowInvalid as error:
            last = error
    raise DataError(f"timestamp of {where} holds texts that are not times: {last!s:.160}; correct these rows")


def _check_times(
    texts: pa.ChunkedArray,
    wrong: pa.ChunkedArray,
    where: str,
    reason: str,
    advice: str = "write seconds since 1970, or 2020-01-02T03:04:05Z",
) -> None:
    count, rows = offenders(bool_numpy(wrong))
    if count:
        raise DataError(
            f"timestamp of {where} {reason} in {count} rows ({numbered(rows, count)}: "
            f"{listed([quoted(value) for value in texts.take(rows).to_pylist()])}); {advice}"
        )


def plain_ids(interactions: pa.Table, items: pa.Table | None, name: str) -> tuple[pa.Table, pa.Table | None]:
    """Both tables with NaN ids as nulls, and with float ids, such as 1.0, as whole numbers.

    pandas writes a column of whole numbers as floats if it has a gap. Text ids lose their ".0", with a warning, if
    every id of the column has one and no id of the other table does.

    Raises:
        DataError: an id with a fraction, or ids with and without ".0" whose match is ambiguous.
    """
    where = f"interactions of log {name!r}"
    for column in ("user_id", "item_id"):
        interactions = _without_nan(interactions, column, where)
        _check_spellings(interactions, column, where)
    if _all_floats(interactions, "user_id"):
        interactions = _stripped(interactions, "user_id", where)
    if items is None:
        return (_stripped(interactions, "item_id", where), None) if _all_floats(interactions, "item_id") else (
            interactions, None)  # fmt: skip
    items = _without_nan(items, "item_id", f"items of log {name!r}")
    return meeting_ids(interactions, items, "item_id", where, f"items of log {name!r}")


def meeting_ids(
    interactions: pa.Table, others: pa.Table, column: str, where: str, other: str
) -> tuple[pa.Table, pa.Table]:
    """Interactions and a table of items or users; ".0" is removed from ids if only one of the two has it.

    Args:
        where, other: names of the two tables in messages.

    Raises:
        DataError: ids with and without ".0" in one column, or an ambiguous match.
    """
    _check_spellings(others, column, other)
    if column not in interactions.column_names or column not in others.column_names:
        return interactions, others
    known, used = _id_texts(others, column), _id_texts(interactions, column)
    if known is None or used is None:
        return interactions, others
    used = pc.unique(used).drop_null()
    strangers = used.filter(pc.invert(pc.is_in(used, value_set=pc.unique(known))))
    if not len(strangers):
        return interactions, others
    if _all_floats(interactions, column) and not _some_floats(known):
        return _stripped(interactions, column, where), others
    if _all_floats(others, column) and not _some_floats(used):
        return interactions, _stripped(others, column, other)
    _check_strangers(strangers, known, column, where, "the item table" if column == "item_id" else other)
    return interactions, others


def ids_as_known(table: pa.Table, column: str, known: pa.Array | pa.ChunkedArray, where: str, of: str) -> pa.Table:
    """A table with the ids of one column spelled as the `known` ids: without ".0", with a warning, as in `plain_ids`.

    Args:
        of: name of the source of the known ids in messages.

    Raises:
        DataError: ids with and without ".0" whose match is ambiguous.
    """
    ids = _id_texts(_without_nan(table, column, where), column)
    if ids is None:
        return table
    _check_spellings(table, column, where)
    ids = pc.unique(ids).drop_null()
    strangers = ids.filter(pc.invert(pc.is_in(ids, value_set=pc.unique(known))))
    if not len(strangers):
        return table
    if _all_floats(table, column) and not _some_floats(known):
        return _stripped(table, column, where)
    _check_strangers(strangers, known, column, where, of)
    return table


def _check_spellings(table: pa.Table, column: str, where: str) -> None:
    """Raise DataError if a column has one id with and without ".0"; warn if some other ids end with it."""
    if table.column_names.count(column) != 1 or not is_text(table.column(column).type):
        return
    ids = pc.unique(table.column(column)).drop_null().cast(ID_TYPE)
    floats = ids.filter(pc.match_substring_regex(ids, _FLOAT_ID))
    if not len(floats):
        return
    bare = pc.replace_substring_regex(floats, r"\.0$", "")
    twice = floats.filter(pc.is_in(bare, value_set=ids))
    if len(twice):
        first = twice[0].as_py()
        raise DataError(
            f"{column} of {where} has {len(twice)} ids with and without .0 (first: {first!r} and {first[:-2]!r}), as "
            "pandas writes whole numbers where a column had gaps; write all ids as text or astype('Int64')"
        )
    whole = pc.sum(pc.match_substring_regex(ids, _WHOLE_ID)).as_py()
    if whole:
        _log.warning("%s: %s has %d ids that end with .0, such as %s, beside %d whole numbers; they are read as they "
                     "stand", where, column, len(floats), quoted(floats[0].as_py()), whole)  # fmt: skip


def _check_strangers(
    strangers: pa.Array, known: pa.Array | pa.ChunkedArray, column: str, where: str, other: str
) -> None:
    """Raise DataError for ids that the other table has with the other spelling: with or without ".0"."""
    bare = pc.replace_substring_regex(strangers, r"\.0$", "")
    longer = pc.binary_join_element_wise(strangers, *(pa.scalar(end, ID_TYPE) for end in (".0", "")))
    twins = pc.if_else(pc.equal(bare, strangers), longer, bare)
    meant = pc.is_in(twins, value_set=pc.unique(known))
    if pc.any(meant).as_py():
        first = pc.index(meant, True).as_py()
        raise DataError(
            f"{column} of {where} has {quoted(strangers[first].as_py())} where {other} has "
            f"{quoted(twins[first].as_py())}, and not all ids are written so; pandas writes whole numbers with .0 "
            "where a column had gaps: write the ids again as text or astype('Int64')"
        )


def _without_nan(table: pa.Table, column: str, where: str) -> pa.Table:
    """NaN ids as nulls, which the log's checks report by row. Raises DataError for fractions."""
    if table.column_names.count(column) != 1 or not pa.types.is_floating(table.column(column).type):
        return table
    ids = table.column(column)
    ids = pc.if_else(pc.is_nan(ids), None, ids)
    count, rows = offenders(bool_numpy(pc.fill_null(pc.not_equal(pc.floor(ids), ids), False)))
    if count:
        values = listed([str(value) for value in ids.take(rows).to_pylist()])
        raise DataError(
            f"{column} in {where} has a fraction in {count} rows ({numbered(rows, count)}: {values}); "
            "ids are texts or whole numbers"
        )
    return table.set_column(table.column_names.index(column), column, ids)


def _id_texts(table: pa.Table, column: str) -> pa.ChunkedArray | None:
    """An id column as the log will spell it; None if it is not valid, which the log's checks report."""
    if table.column_names.count(column) != 1:
        return None
    ids = table.column(column)
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    try:
        return (ids.cast(pa.int64()) if pa.types.is_floating(ids.type) else ids).cast(ID_TYPE)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _some_floats(ids: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.match_substring_regex(ids, _FLOAT_ID)).as_py())


def _all_floats(table: pa.Table, column: str) -> bool:
    """Whether all ids of a text column end with ".0"; blank ones do not count."""
    if table.column_names.count(column) != 1 or not is_text(table.column(column).type):
        return False
    ids = pc.unique(table.column(column))  # far fewer than rows
    matches = pc.or_(
        pc.match_substring_regex(ids, _FLOAT_ID), pc.is_in(ids, value_set=pa.array(["", "nan", "NaN"], ids.type))
    )
    return bool(pc.all(matches).as_py()) and _some_floats(ids)


def _stripped(table: pa.Table, column: str, where: str) -> pa.Table:
    ids = table.column(column)
    plain = pc.replace_substring_regex(ids, r"\.0$", "")
    plain = pc.if_else(pc.is_in(plain, value_set=pa.array(["nan", "NaN"], plain.type)), None, plain)
    _log.warning("%s: %s is written as %s in %d rows; read without its .0", where, column,
                 quoted(ids.drop_null()[0].as_py()), len(ids) - ids.null_count)  # fmt: skip
    return table.set_column(table.column_names.index(column), column, plain)
