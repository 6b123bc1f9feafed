"""Times and ids in the spellings of other writers: read with a warning that counts, or refused by name."""

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError
from tests.support.log_files import ITEMS, MOMENT, NOW, ROWS, files, inter, records, refused, titles


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)


# Kind: times as texts, and missing times.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-02T03:04:05.000", MOMENT),
        ("2020-01-02 03:04:05 UTC", MOMENT),
        ("2020-01-02 03:04:05.250000 UTC", MOMENT + 0.25),
        ("2020-01-02T03:04:05.5Z", MOMENT + 0.5),
        ("2020-01-02 05:04:05+02", MOMENT),
        ("2020-01-02T05:04:05.000+0200", MOMENT),
        ("2020/01/02 03:04:05", MOMENT),
        ("2020-01-02", MOMENT - 11_045),
        ("1577934245.0", MOMENT),
        (" 1577934245", MOMENT),
    ],
)
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_times_as_texts(tmp_path, text, seconds, form):
    """Fractions, zones and UTC by name, as pandas, BigQuery and PostgreSQL write them; floats in a text."""
    row = {"user_id": "1", "item_id": "1", "timestamp": text, "rating": 5, "title": "A"}
    if form == "csv":
        files(tmp_path, interactions__csv=",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    elif form == "jsonl":
        files(tmp_path, interactions__jsonl=records(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "interactions.parquet")
    assert BehaviorLog.read(tmp_path).timestamps.tolist() == [seconds]


def test_texts_that_are_no_times_are_named(tmp_path):
    """US dates, words, and zoned beside zoneless times."""
    for text in ("01/13/2020", "yesterday", "2020-13-41 00:00:00"):
        rows = ROWS.replace(str(NOW), text).replace(str(NOW + 1), "2020-01-01 00:00:00.5")
        message = refused(files(tmp_path, interactions__csv=rows, items__csv=ITEMS))
        assert "is not a time" in message or "are not times" in message
        assert "timestamp of interactions" in message and text[:10] in message
    rows = ROWS.replace(str(NOW), "2020-01-02 03:04:05 UTC").replace(str(NOW + 1), "2020-01-02 03:04:05")
    message = refused(files(tmp_path, interactions__csv=rows, items__csv=ITEMS))
    assert "has no zone where other rows have one in 1 rows (row 1: '2020-01-02 03:04:05')" in message


@pytest.mark.parametrize("date", ["2020-01-02 03:04:05", "2020-01-02T03:04:05Z", "2020/01/02"])
def test_numbers_beside_dates_are_named(tmp_path, date):
    """Seconds, milliseconds and floats beside each form of date: bringing them together is left to the user."""
    for number in (NOW, NOW * 1000, f"{NOW}.5"):
        rows = ROWS.replace(str(NOW + 1), date).replace(str(NOW), str(number))
        message = refused(files(tmp_path, interactions__csv=rows, items__csv=ITEMS))
        assert f"is a number beside rows with dates in 1 rows (row 0: '{number}')" in message
        assert "bring all rows to seconds since 1970, or to dates" in message


def test_missing_times_have_a_switch(tmp_path, caplog):
    """JSON null, and in csv: empty, NULL, NaN, None, NaT and \\N."""
    places = []
    for number, text in enumerate(("", "NULL", "NaN", "None", "NaT", r"\N", "0000-00-00 00:00:00")):
        rows = ROWS + f"2,1,{text},5\n"
        places.append(files(tmp_path / str(number), interactions__csv=rows, items__csv=ITEMS))
    row = {"user_id": 1, "item_id": 1, "timestamp": NOW + 0.5, "rating": 1}
    lines = records(row, row | {"user_id": 2, "timestamp": None}, row)
    places.append(
        files(tmp_path / "json", interactions__jsonl=lines, items__jsonl=records({"item_id": 1, "title": "A"}))
    )
    for place in places:
        message = refused(place)
        assert "timestamp is null in 1 interactions" in message and "data.null_times=drop" in message
        caplog.clear()
        log = BehaviorLog.read(place, null_times="drop")
        assert log.user_ids.to_pylist() == ["1"] and len(log) == 2
        assert "1 of 3 interactions have no timestamp; they are left out" in caplog.text
    rows = "user_id,item_id,timestamp,rating\n1,1,,5\n"
    for option in ("drop", "refuse"):
        message = refused(files(tmp_path / "all", interactions__csv=rows, items__csv=ITEMS), null_times=option)
        assert "timestamp is null in 1" in message and "no interaction has a time" in message and "drop" not in message
    assert "null_times 'skip' is not one of refuse, drop" in refused(places[0], null_times="skip")


# Kind: ids that a float column spelled.


def test_ids_with_a_float_s_spelling(tmp_path, caplog):
    """Ids 1.0 against items 1: mended where each is written so, the other way round too; else named."""
    floats = ROWS.replace("\n1,1,", "\n1.0,1.0,").replace("\n1,2,", "\n2.0,2.0,")
    log = BehaviorLog.read(files(tmp_path / "a", interactions__csv=floats, items__csv=ITEMS))
    assert log.column("item_id").to_pylist() == ["1", "2"] and log.user_ids.to_pylist() == ["1", "2"]
    assert "item_id is written as '1.0' in 2 rows; read without its .0" in caplog.text
    back = ITEMS.replace("1,", "1.0,").replace("2,", "2.0,")
    assert titles(BehaviorLog.read(files(tmp_path / "b", interactions__csv=ROWS, items__csv=back))) == {
        "1": "A",
        "2": "B",
    }
    lines = [{"user_id": "1", "item_id": f"{n}.0", "timestamp": NOW, "rating": 1} for n in (1, 2)]
    files(tmp_path / "c", interactions__jsonl=records(*lines), items__csv=ITEMS)
    assert BehaviorLog.read(tmp_path / "c").column("item_id").to_pylist() == ["1", "2"]
    mixed = files(tmp_path / "d", interactions__csv=ROWS.replace("1,2,", "1,2.0,"), items__csv=ITEMS)
    assert "has '2.0' where the item table has '2'" in refused(mixed) and "astype('Int64')" in refused(mixed)
    # Both tables write 1.0: nothing to mend, and nothing is.
    both = files(tmp_path / "e", interactions__csv=floats, items__csv=back)
    assert titles(BehaviorLog.read(both)) == {"1.0": "A", "2.0": "B"}
    gap = files(tmp_path / "f", interactions__csv=floats.replace(",2.0,", ",,"), items__csv=ITEMS)
    assert "item_id in interactions of log 'f' is an empty string in 1 rows (row 1)" in refused(gap)


def test_one_id_in_two_spellings(tmp_path, caplog):
    """1 and 1.0 in one column are one id: of users, items, in parts of a table, in the item table."""
    twice = ROWS.replace("\n1,2,", "\n1.0,2,")
    assert "user_id of interactions of log 'a' has 1 ids with and without .0 (first: '1.0' and '1')" in refused(
        files(tmp_path / "a", interactions__csv=twice, items__csv=ITEMS)
    )
    other = ROWS.partition("\n")[0] + f"\n1.0,2,{NOW},5\n"
    files(tmp_path / "b", **{"interactions-0__csv": ROWS, "interactions-1__csv": other}, items__csv=ITEMS)
    assert "user_id of interactions of log 'b' has 1 ids" in refused(tmp_path / "b")
    titled = ROWS.replace("rating", "rating,title").replace("5\n", "5,A\n").replace(",3\n", ",3,B\n")
    files(tmp_path / "c", interactions__csv=titled + f"1,2.0,{NOW},1,C\n")
    assert "item_id of interactions of log 'c' has 1 ids with and without .0" in refused(tmp_path / "c")
    files(tmp_path / "d", interactions__csv=ROWS, items__csv=ITEMS + "1.0,C\n")
    assert "item_id of items of log 'd' has 1 ids with and without .0" in refused(tmp_path / "d")
    log = BehaviorLog.read(files(tmp_path / "e", interactions__csv=titled.replace("1,1,", "1,1.0,")))
    assert log.items["item_id"].to_pylist() == ["1.0", "2"]
    assert "item_id has 1 ids that end with .0, such as '1.0', beside 1 whole numbers" in caplog.text
    files(tmp_path / "f", interactions__csv=titled.replace("1,1,", "1,v1.0,").replace("1,2,", "1,v1,"))
    assert BehaviorLog.read(tmp_path / "f").items["item_id"].to_pylist() == ["v1.0", "v1"]


@pytest.mark.parametrize(("users", "others"), [("1", "1.0"), ("1.0", "1")])
def test_user_tables_with_a_float_s_spelling(tmp_path, caplog, users, others):
    """A .user whose ids have .0 gave every user an empty profile; users without a row are counted; ids may not mix."""
    rows = f"{users}\t1\t{NOW}\n{users.replace('1', '7')}\t1\t{NOW}"
    place = inter(tmp_path, row=rows, x__user=f"user_id:token\tage:float\n{others}\t20\n")
    log = BehaviorLog.read(place)
    assert log.user_ids.to_pylist() == ["1", "7"] and log.column("age").to_pylist() == [20.0, None]
    assert "read without its .0" in caplog.text and "x.user: 1 of 2 users have no row" in caplog.text
    inter(tmp_path, row=f"1\t1\t{NOW}\n2\t1\t{NOW}", x__user="user_id:token\tage:float\n1\t20\n2.0\t30\n")
    assert "user_id of interactions" in refused(tmp_path) and "has '2' where" in refused(tmp_path)
    items = f"item_id:token\tname:token\n{users}\tA\n{users.replace('1', '2')}\tB\n"
    rows = f"u\t{others}\t{NOW}\nu\t{others.replace('1', '2')}\t{NOW}"
    log = BehaviorLog.read(inter(tmp_path / "items", row=rows, x__item=items))
    assert titles(log) == {"1": "A", "2": "B"} and log.column("item_id").to_pylist() == ["1", "2"]


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("user_id", float("nan"), "user_id in interactions of log .* is null in 1 rows .row 1."),
        ("item_id", None, "item_id in interactions of log .* is null in 1 rows .row 1."),
        ("item_id", 1.5, r"item_id in interactions of log .* has a fraction in 1 rows \(row 1: 1.5\)"),
    ],
)
def test_ids_in_a_float_column(tmp_path, column, value, expected):
    """NaN, null and fractions are named by row."""
    rows = {"user_id": [1.0, 1.0], "item_id": [1.0, 2.0], "timestamp": [NOW, NOW], "rating": [1, 2]}
    rows[column][1] = value
    pq.write_table(pa.table(rows), tmp_path / "interactions.parquet")
    files(tmp_path, items__csv=ITEMS)
    with pytest.raises(DataError, match=expected):
        BehaviorLog.read(tmp_path)
