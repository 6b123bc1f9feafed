"""BehaviorLog: order, codes and the message for each broken rule."""

import datetime
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from llmrec_peft.data import log as log_module
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError

NEW_YEAR = 1_577_836_800  # 2020


def moments(seconds: list[float], unit: str, zone: str | None = None) -> pa.Array:
    """Datetimes so many seconds after the first moment of 2020."""
    ticks = {"s": 1, "ms": 1000}[unit]
    return pa.array([int((NEW_YEAR + n) * ticks) for n in seconds], pa.timestamp(unit, zone))


def interactions(**changes) -> pa.Table:
    columns = {
        "user_id": ["b", "a", "b", "a", "c"],
        "item_id": ["y", "x", "x", "y", "x"],
        "timestamp": [30, 20, 10, 20, 5],
        "label": [1, 0, 0, 1, 1],
    }
    columns.update(changes)
    return pa.table({name: values for name, values in columns.items() if values is not None})


def items(**changes) -> pa.Table:
    return pa.table({"item_id": ["x", "y"], "title": ["Ex", "Why"], **changes})


def message(rows: pa.Table, table: pa.Table | None = None) -> str:
    with pytest.raises(DataError) as caught:
        BehaviorLog(rows, items() if table is None else table, name="shop")
    text = str(caught.value)
    assert "\n" not in text and "'shop'" in text and len(text) < 500
    return text


def test_rows_are_sorted_by_user_then_time_then_arrival():
    log = BehaviorLog(interactions(), items(), name="shop")
    assert log.user_ids.to_pylist() == ["a", "b", "c"]
    assert log.user_codes.tolist() == [0, 0, 1, 1, 2] and log.user_codes.dtype == np.int32
    assert log.user_offsets.tolist() == [0, 2, 4, 5] and log.user_offsets.dtype == np.int64
    assert log.timestamps.tolist() == [20, 20, 10, 30, 5]
    assert log.item_codes.tolist() == [0, 1, 0, 1, 0] and log.item_codes.dtype == np.int32
    assert log.column("label").to_pylist() == [0, 1, 0, 1, 1]
    assert log.column("user_id").to_pylist() == ["a", "a", "b", "b", "c"]
    assert log.column("timestamp").to_pylist() == log.timestamps.tolist()
    assert (len(log), log.num_users, log.num_items) == (5, 3, 2)
    assert repr(log) == "BehaviorLog('shop': 5 interactions of 3 users with 2 items)"


def test_sort_equals_a_plain_sort_of_many_rows():
    rng = np.random.default_rng(0)
    count = 2_000
    users = [f"u{code}" for code in rng.integers(0, 50, count)]
    seconds = rng.integers(0, 40, count).tolist()  # few values, so that many rows tie
    rows = interactions(
        user_id=users, item_id=["x"] * count, timestamp=seconds, label=[1] * count, place=list(range(count))
    )
    log = BehaviorLog(rows, items())
    expected = sorted(range(count), key=lambda row: (users[row], seconds[row], row))
    assert log.column("place").to_pylist() == expected


def test_summary_counts():
    log = BehaviorLog(interactions(behaviour=["click", "skip", "skip", "click", "click"]), items())
    assert log.summary() == {
        "users": 3,
        "items": 2,
        "interactions": 5,
        "first_time": 5,
        "last_time": 30,
        "behaviours": {"click": 3, "skip": 2},
    }


def test_whole_number_ids_become_strings_and_float_ids_lose_their_point():
    rows = interactions(user_id=[2, 1, 2, 1, 3], item_id=[10.0, 20.0, 20.0, 10.0, 20.0])
    log = BehaviorLog(rows, items(item_id=[20, 10]))
    assert log.user_ids.to_pylist() == ["1", "2", "3"]
    assert log.items.column("item_id").to_pylist() == ["20", "10"]


def test_dictionary_columns_are_read_as_their_values():
    rows = interactions()
    for place, name in enumerate(("user_id", "item_id")):
        rows = rows.set_column(place, name, rows.column(name).dictionary_encode())
    assert BehaviorLog(rows, items()).user_ids.to_pylist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        (moments([3, 2, 1, 2, 5], "s"), [NEW_YEAR + n for n in (2, 2, 1, 3, 5)], np.int64),
        (moments([3, 2, 1, 2, 5], "ms", "UTC"), [NEW_YEAR + n for n in (2, 2, 1, 3, 5)], np.int64),
        (moments([3, 2.5, 1, 2.5, 5], "ms"), [NEW_YEAR + n for n in (2.5, 2.5, 1, 3, 5)], np.float64),
        (pa.array([datetime.date(2020, 1, 2)] * 5), [NEW_YEAR + 86400] * 5, np.int64),
        (pa.array([3.5, 2, 1, 2, 5]), [2, 2, 1, 3.5, 5], np.float64),
        (pa.array([3, 2, 1, 2, 5], pa.uint16()), [2, 2, 1, 3, 5], np.int64),
    ],
)
def test_times_of_any_kind_become_seconds(values, expected, kind):
    log = BehaviorLog(interactions(timestamp=values), items())
    assert log.timestamps.tolist() == expected and log.timestamps.dtype == kind


def test_context_only_is_boolean_and_null_means_false():
    log = BehaviorLog(interactions(context_only=[None, True, None, False, 1 == 1]), items())
    assert log.column("context_only").to_pylist() == [True, False, False, False, True]
    assert log.column("context_only").type == pa.bool_()
    assert "context_only" in message(interactions(context_only=["a", "b", "c", "d", "e"]))


def test_items_can_come_from_titles_of_the_interactions():
    log = BehaviorLog(interactions(title=["Why", "Ex", "Other", "Why", "Ex"]))
    assert dict(zip(*(log.items.column(name).to_pylist() for name in ("item_id", "title")), strict=True)) == {
        "y": "Why",
        "x": "Ex",
    }
    with pytest.raises(DataError, match="come without an item table, lacks the column title; it has user_id, item_id"):
        BehaviorLog(interactions())


def test_a_title_of_a_million_characters_is_data():
    long = "x" * 1_000_000
    log = BehaviorLog(interactions(), items(title=["Ex", long]))
    assert log.items.column("title")[1].as_py() == long


def test_column_and_item_index_name_what_exists():
    log = BehaviorLog(interactions(), items(), name="shop")
    assert [log.item_index("x"), log.item_index("y")] == [0, 1]
    with pytest.raises(DataError, match="'shop' has no item with id 'zz' among 2 items"):
        log.item_index("zz")
    with pytest.raises(DataError, match="no column 'price'; it has user_id, item_id, timestamp, label"):
        log.column("price")


@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp"])
def test_missing_column(name):
    text = message(interactions().drop_columns([name]))
    assert f"lacks the column {name}; it has" in text and "label" in text


def test_missing_outcome_column():
    text = message(interactions(label=None))
    assert "needs one of label, rating, behaviour; it has user_id, item_id, timestamp" in text


def test_a_column_named_twice():
    assert "has column label more than once" in message(interactions().append_column("label", [[1] * 5]))


def test_empty_log_and_empty_items():
    assert "has no rows" in message(interactions().slice(0, 0))
    assert "items of log 'shop' has no rows" in message(interactions(), items().slice(0, 0))


def test_missing_item_columns():
    assert "items of log 'shop' lacks the column title; it has item_id" in message(
        interactions(), items().select(["item_id"])
    )


def test_repeated_item_ids():
    table = pa.table({"item_id": ["x", "y", "x"], "title": ["a", "b", "c"]})
    assert "has 1 ids in more than one row (first: 'x')" in message(interactions(), table)


@pytest.mark.parametrize("title", [None, "", " \t\n"])
def test_items_without_text(title):
    assert "has 1 items without a title (first: 'y')" in message(interactions(), items(title=["Ex", title]))


def test_titles_that_are_numbers():
    assert "must be text, got int64" in message(interactions(), items(title=[1, 2]))


def test_unknown_items():
    text = message(interactions(item_id=["y", "zz", "x", "zz", "x"]))
    assert "lacks in 2 rows (rows 1, 3: 'zz', 'zz')" in text


@pytest.mark.parametrize("name", ["user_id", "item_id"])
def test_null_and_empty_ids(name):
    column = interactions().column(name).to_pylist()
    column[1] = None
    assert f"{name} in interactions of log 'shop' is null in 1 rows (row 1)" in message(interactions(**{name: column}))
    column[1], column[3] = "", "  "
    text = message(interactions(**{name: column}))
    assert f"{name} in interactions of log 'shop' is an empty string in 2 rows (rows 1, 3)" in text


def test_ids_of_a_wrong_kind():
    assert "must be strings or whole numbers, got double" in message(interactions(user_id=[1.5, 2, 3, 4, 5]))
    assert "must be strings or whole numbers, got list" in message(interactions(user_id=[["a"]] * 5))
    nan = pa.array([1.0, float("nan"), 2, 3, 4])
    assert "must be strings or whole numbers" in message(interactions(user_id=nan))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_bad_times(bad):
    text = message(interactions(timestamp=[1.0, 2.0, bad, 4.0, 5.0]))
    assert f"in 1 interactions of log 'shop' (row 2: {bad})" in text and "seconds since 1970" in text


def test_null_negative_and_textual_times():
    assert "timestamp is null in 2 interactions" in message(interactions(timestamp=[1, None, 2, None, 3]))
    assert "(row 0: -5)" in message(interactions(timestamp=[-5, 1, 2, 3, 4]))
    assert "got string" in message(interactions(timestamp=["1", "2", "3", "4", "5"]))


def test_a_message_names_only_the_first_offenders():
    text = message(interactions(timestamp=[-1, -2, -3, -4, -5]).take([0, 1, 2, 3, 4, 0, 1]))
    assert "in 7 interactions" in text and "(rows 0, 1, 2, 3, 4, ...: -1, -2, -3, -4, -5)" in text


def test_long_values_are_cut_in_messages():
    assert len(message(interactions(item_id=["y", "z" * 10_000, "x", "y", "x"]))) < 400


def test_large_logs_are_mapped_from_disk_and_equal_small_ones(monkeypatch, tmp_path):
    rng = np.random.default_rng(1)
    count = 5_000
    rows = pa.table(
        {
            "user_id": pc.cast(pa.array(rng.integers(0, 99, count)), pa.string()),
            "item_id": pa.array(["x", "y"]).take(pa.array(rng.integers(0, 2, count))),
            "timestamp": rng.integers(0, 1_000, count),
            "label": rng.integers(0, 2, count),
            "note": pa.array(["n1", "n2", None]).take(pa.array(rng.integers(0, 3, count))),
        }
    )
    small = BehaviorLog(rows, items())
    monkeypatch.setenv("LLMREC_PEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(log_module, "MAPPED_ROWS", 1_000)
    monkeypatch.setattr(log_module, "BATCH_ROWS", 512)
    before = pa.total_allocated_bytes()
    large = BehaviorLog(rows, items())
    assert large.interactions.equals(small.interactions)
    assert np.array_equal(large.user_codes, small.user_codes) and np.array_equal(large.item_codes, small.item_codes)
    assert large.column("note").num_chunks == 10
    # The table takes no memory of the pool: its buffers are pages of the file, whose name is gone already.
    assert pa.total_allocated_bytes() - before < large.interactions.nbytes / 2
    assert list((tmp_path / "spool").iterdir()) == []
    again = pickle.loads(pickle.dumps(large))
    assert again.interactions.equals(small.interactions)


def test_split_gives_three_parts():
    rng = np.random.default_rng(0)
    count = 200
    rows = interactions(
        user_id=[f"u{code}" for code in rng.integers(0, 9, count)],
        item_id=["x"] * count,
        timestamp=rng.permutation(count).tolist(),
        label=[1] * count,
    )
    splits = BehaviorLog(rows, items()).split(valid=0.2, test=0.1)
    assert [len(part.rows) for part in (splits.train, splits.valid, splits.test)] == [140, 40, 20]
