"""Times of another unit than seconds never pass for seconds, whatever brings them.

The same way fail: microseconds, nanoseconds, Windows file times, dates written as digits, datetimes of 1970 or of the
year 50,000, zeros in place of missing times, and unsigned or huge numbers.
"""

import datetime
import decimal
import json
import logging

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.times import check_moment
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.retrieval.popularity import Popularity
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex

SECONDS = np.array([1_577_934_245, 1_578_020_645, 1_578_107_045])
DATES = ("2020-01-02 03:04:05", "2020-01-03 03:04:05", "2020-01-04 03:04:05")


def log_of(times) -> BehaviorLog:
    rows = {"user_id": ["u"] * len(times), "item_id": ["a"] * len(times), "timestamp": times, "label": [1] * len(times)}
    return BehaviorLog(pa.table(rows), pa.table({"item_id": ["a"], "title": ["A"]}), name="shop")


def refusal(times) -> str:
    with pytest.raises(DataError) as caught:
        log_of(times)
    message = str(caught.value)
    assert "\n" not in message and "'shop'" in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("times", "named", "mend"),
    [
        (SECONDS * 10**3 + 123, "milliseconds", "divide by 1000"),
        (SECONDS * 1e3, "milliseconds", "divide by 1000"),
        (pa.array([decimal.Decimal(int(n) * 1000) for n in SECONDS]), "milliseconds", "divide by 1000"),
        (pa.array(SECONDS * 1000, pa.uint64()), "milliseconds", "divide by 1000"),
        (SECONDS * 10**6, "microseconds", "divide by 1000000"),
        (SECONDS * 10**9, "nanoseconds", "divide by 1000000000"),
        ((SECONDS + 11_644_473_600) * 10**7, "Windows file times", "subtract 11644473600"),
        (SECONDS - 978_307_200, "seconds before 1990, or since 2001", "add 978307200"),
        ([20200102, 20200103, 20200104], "YYYYMMDD", "write them as datetimes"),
        ([2020010203, 2020010304, 2020010405], "YYYYMMDDhh", "write them as datetimes"),
        ([14102100, 14102101, 14102200], "YYMMDDhh", "write them as datetimes"),  # Avazu
        ([20200102030405, 20200103030405], "YYYYMMDDhhmmss", "write them as datetimes"),
        (pa.array([2**64 - 1, 2**63], pa.uint64()), "no known unit", "correct them"),
        ([1e300, 1e301], "no known unit", "correct them"),
    ],
)
def test_a_column_of_another_unit_is_named(times, named, mend):
    message = refusal(times)
    assert named in message and mend in message and f"of all {len(times)} interactions" in message and "row" in message


@pytest.mark.parametrize(
    ("times", "named"),
    [
        (
            [1_600_000_000, 1_600_000_000_999],
            "seconds in 1 rows (row 0: 1600000000) and milliseconds in 1 rows (row 1: ",
        ),
        (
            [1_600_000_000, 0, 1_600_000_001, 0],
            "numbers below 100,000,000 in 2 rows (rows 1, 3: 0, 0) and seconds in 2",
        ),
        ([1_600_000_000_000, 1_600_000_000_000_000], "milliseconds in 1 rows (row 0: 1600000000000) and microseconds"),
        ([20200102, 1_577_934_245], "numbers below 100,000,000 in 1 rows (row 0: 20200102) and seconds in 1 rows"),
        ([1_600_000_000.0, 5e9], "seconds in 1 rows (row 0: 1600000000.0) and no known unit"),
    ],
)
def test_mixed_units_are_both_named(times, named):
    message = refusal(times)
    assert named in message and "mixes units" in message


@pytest.mark.parametrize("name", ["interactions.csv", "interactions.jsonl"])
def test_files_that_pandas_writes_by_default(tmp_path, name):
    rows = [{"user_id": 1, "item_id": n, "timestamp": int(t) * 1000, "rating": 5} for n, t in enumerate(SECONDS, 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith("csv"):
        text = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n"
    (tmp_path / name).write_text(text)
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n2,B\n3,C\n")
    with pytest.raises(DataError, match="looks like milliseconds .*divide by 1000"):
        BehaviorLog.read(tmp_path)


@pytest.mark.parametrize(
    ("times", "named"),
    [
        (pa.array(SECONDS, pa.timestamp("ns")), "without unit="),  # pandas.to_datetime without a unit
        (pa.array(SECONDS, pa.timestamp("ms")), "without unit="),
        (pa.array(SECONDS * 1000, pa.timestamp("s")), "outside 1990 to 2100"),
        (
            pa.array([datetime.date(1900, 1, 1), datetime.date(2020, 1, 1)]),
            "in 1 interactions of log 'shop' (row 0: 1900",
        ),
        (pa.array([-(2**62), 2**62], pa.timestamp("s")), "outside 1990 to 2100"),
        (pa.array([None, 5], pa.timestamp("ns")), "is null in 1"),  # NaT
        (pa.array([5, 6], pa.duration("s")), "got duration"),
        (pa.array([5, 6], pa.time32("s")), "got time32"),
        (pa.array([[5], [6]]), "got list"),
        ([True, False], "got bool"),
    ],
)
def test_datetimes_and_other_types(times, named):
    assert named in refusal(times)


@pytest.mark.parametrize(
    "times",
    [
        pa.array([datetime.datetime.fromisoformat(date) for date in DATES], pa.timestamp("ns")),
        pa.array([datetime.datetime.fromisoformat(date + "+00:00") for date in DATES], pa.timestamp("us", "UTC")),
        pa.array([datetime.datetime.fromisoformat(date + "+00:00") for date in DATES], pa.timestamp("s", "Asia/Tokyo")),
        pa.array(SECONDS * 1000, pa.timestamp("ms")).dictionary_encode(),
        pa.array(SECONDS, pa.uint64()),
        SECONDS.astype(float),
    ],
)
def test_seconds_and_datetimes_are_dated(times):
    log = log_of(times)
    assert log.dated and log.timestamps.tolist() == SECONDS.tolist()


def test_numbers_that_only_order(caplog):
    """Row numbers need no word; other small numbers are said to be an order, and what else they may be."""
    with caplog.at_level(logging.WARNING):
        for rows in (range(5), range(1, 6), [3, 1, 2, 0], np.arange(3.0)):
            assert not log_of(rows).dated
    assert caplog.text == ""
    for times, named in [
        ([2019, 2020, 2020], "years"), ([18_000, 18_001], "days since 1970"), ([43_831, 43_832], "Excel"),
        ([26_300_000, 26_300_001], "minutes since 1970"), ([202_001, 202_012], "YYYYMM"),
        ([-0.0, 2.5, 7e7], "the order"),
    ]:  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            log = log_of(times)
        assert not log.dated and log.timestamps.tolist() == sorted(times) and named in caplog.text


def test_times_of_half_precision_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        log_of(SECONDS.astype(np.float32))
    assert "float32, which tells times apart by about two minutes" in caplog.text


def test_no_half_life_without_dates():
    rng = np.random.default_rng(0)
    found = {}
    for name, times in (("order", rng.permutation(300)), ("dated", 1_600_000_000 + rng.permutation(300) * 86_400)):
        rows = {"user_id": [f"u{n % 9}" for n in range(300)], "item_id": [f"i{n % 7}" for n in range(300)],
                "title": ["t"] * 300, "timestamp": times, "label": [1] * 300}  # fmt: skip
        log = BehaviorLog(pa.table(rows))
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            choose = lambda *given, asked=asked: asked.append(1)  # noqa: E731
            patch.setattr("llmrec_peft.retrieval.retrieval_index.choose_half_life", choose)
            RetrievalIndex.fit(log, np.arange(300), np.ones(300, int))
        found[name] = len(asked)
    assert found == {"order": 0, "dated": 1} and Popularity().half_life is None


def test_a_moment_is_of_the_kind_of_the_log():
    for moment, dated in ((None, True), (1_600_000_000, True), (1.6e9, True), (77, False), (0, False)):
        check_moment(moment, dated, "until")
    for moment, named in (
        (1_600_000_000_000, "milliseconds"),
        (20200102, "below"),
        (1e300, "no known"),
        (-1, "no known"),
    ):
        with pytest.raises(ConfigError, match=f"until .* looks like .*{named}"):
            check_moment(moment, True, "until")
    with pytest.raises(ConfigError, match="is a date, but the log's times .* only order its rows"):
        check_moment(1_600_000_000, False, "until")
