"""Published files as they are, with their quirks: read with a warning that counts, or refused with cause and mend.

Each test names its kind, and tries several inputs that fail the same way.
"""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec_peft.data.csv_rules import typed_values
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers import detect_format
from llmrec_peft.data.readers.amazon_items import price_of, shown_text
from llmrec_peft.data.readers.csv_files import typed_columns
from llmrec_peft.errors import DataError
from llmrec_peft.requests.plain_items import PlainItems

NOW = 1_600_000_000
ROWS = f"user_id,item_id,timestamp,rating\n1,1,{NOW},5\n1,2,{NOW + 1},3\n"
ITEMS = "item_id,title\n1,A\n2,B\n"


def files(directory, **contents):
    """Write files; `__` in a name stands for a point."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return directory


def records(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        BehaviorLog.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_000
    return message


def titles(log):
    return dict(zip(log.items["item_id"].to_pylist(), log.items["title"].to_pylist(), strict=True))


# Kind: codes in csv that look like numbers lose their text.


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0012", "7", ""], ["0012", "7", ""]),
        (["12E4", "5"], ["12E4", "5"]),
        (["+5", "6"], ["+5", "6"]),
        (["0x1F", "2"], ["0x1F", "2"]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        (["-0012", "1.5"], ["-0012", "1.5"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["2020-01-02", "2020-01-03"], ["2020-01-02", "2020-01-03"]),
        (["2020-01-02T03:04:05Z", ""], ["2020-01-02T03:04:05Z", ""]),
        (["NA", "None", "x"], ["NA", "None", "x"]),
        (["NA", "NA"], ["NA", "NA"]),
        (["1999", "", " 2001"], [1999, None, 2001]),
        (["1.50", "2", "NaN"], [1.5, 2.0, None]),
        (["1e-05", "1.0E10", ".5", "-3"], [1e-05, 1e10, 0.5, -3.0]),
        (["True", "false", "NULL"], [True, False, None]),
        (["", ""], [None, None]),
    ],
)
def test_a_csv_column_is_typed_only_where_nothing_is_lost(texts, expected):
    """One rule in training and in torch-free serving; other codes: 0x1F, 12E4, +5, 20 digits, dates."""
    table = typed_columns(pa.table({"code": texts}))
    for found in (table["code"].to_pylist(), typed_values(texts)):
        assert found == expected and [type(value) for value in found] == [type(value) for value in expected]


def test_codes_keep_their_zeros_in_every_reader_of_csv(tmp_path):
    """Also where the first code with a zero is in a later shard, and in columns of interactions."""
    items = 'item_id,title,brand,code,year\n1,NA,NA,0012,1999\n2,null,None,0007,\n3,"nan, x",x,0100,2001\n'
    log = BehaviorLog.read(files(tmp_path / "a", interactions__csv=ROWS, items__csv=items))
    expected = [
        {"item_id": "1", "title": "NA", "brand": "NA", "code": "0012", "year": 1999},
        {"item_id": "2", "title": "null", "brand": "None", "code": "0007", "year": None},
        {"item_id": "3", "title": "nan, x", "brand": "x", "code": "0100", "year": 2001},
    ]
    assert log.items.to_pylist() == expected
    served = PlainItems.read(tmp_path / "a")
    assert [served[item] for item in "123"] == expected
    head, _, rest = ROWS.replace("rating", "rating,zip").partition("\n")
    first, second = (f"{row},{code}\n" for row, code in zip(rest.split(), ("10115", "01067"), strict=True))
    files(tmp_path / "b", **{"interactions-0__csv": f"{head}\n{first}", "interactions-1__csv": f"{head}\n{second}"})
    log = BehaviorLog.read(files(tmp_path / "b", items__csv=ITEMS))
    assert log.column("zip").to_pylist() == ["10115", "01067"]


def test_csv_of_other_writers(tmp_path, caplog):
    """Byte-order marks, CRLF, quoted line breaks and semicolons are read; training and serving alike."""
    mark = "\ufeff"
    items = mark + 'item_id,title\r\n1,"A\r\nb"\r\n2,B\r\n'
    log = BehaviorLog.read(files(tmp_path / "a", interactions__csv=mark + ROWS.replace("\n", "\r\n"), items__csv=items))
    assert (
        titles(log)
        == {"1": "A\r\nb", "2": "B"}
        == {item: PlainItems.read(tmp_path / "a")[item]["title"] for item in "12"}
    )
    for sign in ";\t|":
        text = "item_id;title;price\n1;A, b;1,5\n2;B;2.5\n".replace(";", sign)
        log = BehaviorLog.read(files(tmp_path / "b", interactions__csv=ROWS.replace(",", sign), items__csv=text))
        assert log.items.to_pylist()[0] == {"item_id": "1", "title": "A, b", "price": "1,5"}
        assert PlainItems.read(tmp_path / "b")["1"] == log.items.to_pylist()[0]
        assert f"its fields are separated by {sign!r}" in caplog.text
    for name in ("USER_ID", "userId", "User-ID"):
        files(tmp_path / "c", interactions__csv=ROWS.replace("user_id", name), items__csv=ITEMS)
        assert f"has the column '{name}' where user_id belongs; rename it to user_id" in refused(tmp_path / "c")


# Kind: times as texts, and missing times.

MOMENT = 1_577_934_245  # 2020-01-02 03:04:05 UTC


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
        assert "timestamp of interactions" in message and "no time" in message and text[:10] in message
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


# Kind: RecBole's own and others' atomic files.


def inter(directory, header="user_id:token\titem_id:token\ttimestamp:float", row=f"u\t1\t{NOW}", **more):
    return files(directory, x__inter=f"{header}\n{row}\n", **more)


@pytest.mark.parametrize(
    ("header", "row", "title"),
    [
        ("item_id:token\tcategory_name:token\tproduct_name:token", "1\tShoes\tRed runner", "Red runner"),
        ("item_id:token\tname:token_seq\tstore_name:token", "1\tRed runner\tAcme", "Red runner"),
        ("item_id:token\tuser_name:token\tmovie_title:token_seq", "1\tJo\tRed runner", "Red runner"),
        ("app_name:token\tdeveloper:token\tid:token", "Red runner\tAcme\t1", "Red runner"),
        ("item_id:token\tbrand_name:token", "1\tAcme", "1"),
        ("item_id:token\tcategories:token_seq\tprice:float", "1\tA B\t5", "1"),
        ("item_id:token\tbrand:token\ttitle_length:float", "1\tG\t5", "1"),
        ("item_id:token\tbrand:token\tmean_title:float", "1\tG\t5", "1"),
        ("item_id:token\thostname:token", "1\twww", "1"),
        ("item_id:token\tsubtitle:token", "1\tS", "1"),
        ("item_id:token\tusername:token\timage_filename:token", "1\tBob\tb.jpg", "1"),
        ("item_id:token\ttitle_language:token\tnamed_by:token", "1\ten\tBob", "1"),
    ],
)  # fmt: skip
def test_the_title_in_recbole_items(tmp_path, caplog, header, row, title):
    """Names of a category, brand or shop are no titles, nor are numbers and parts of words; without any, ids are."""
    log = BehaviorLog.read(inter(tmp_path, x__item=f"{header}\n{row}\n"))
    assert titles(log) == {"1": title}
    assert ("no column holds titles" in caplog.text) == (title == "1")


def test_titles_in_recbole_interactions_and_titles_that_compete(tmp_path):
    """A title in .inter is used, with or without .item; two columns that may both be it are named."""
    header, row = "user_id:token\titem_id:token\ttitle:token_seq\ttimestamp:float", f"u\t1\tA thing\t{NOW}"
    assert titles(BehaviorLog.read(inter(tmp_path, header, row))) == {"1": "A thing"}
    assert titles(BehaviorLog.read(inter(tmp_path, header, row, x__item="item_id:token\tbrand:token\n1\tB\n"))) == {
        "1": "A thing"
    }
    message = refused(inter(tmp_path, x__item="item_id:token\tlong_name:token\tshort_name:token\n1\ta\tb\n"))
    assert "x.item has no title but long_name, short_name; rename the one that is the item's to title" in message


def test_a_guessed_title_is_told(tmp_path, caplog):
    """A name that does not say whose title it is; productName is product_name; a title that is a number is refused."""
    for name, guessed in (("display_name", True), ("original_title", True), ("productName", True), ("name", False)):
        caplog.clear()
        assert titles(BehaviorLog.read(inter(tmp_path, x__item=f"item_id:token\t{name}:token\n1\tA\n"))) == {"1": "A"}
        assert (f"no column is called title; {name} is taken for it" in caplog.text) == guessed
    message = refused(inter(tmp_path, x__item="item_id:token\ttitle:float\n1\t300\n"))
    assert "x.item has title:float" in message and "write title:token" in message


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_recbole_with_other_separators(tmp_path, caplog, separator):
    """Commas, semicolons and bars are read; spaces are refused by the header."""
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float".replace("\t", separator)
    log = BehaviorLog.read(inter(tmp_path, header, f"u\t1\t5.0\t{NOW}".replace("\t", separator)))
    assert log.column("rating").to_pylist() == [5.0] and f"separated by {separator!r}" in caplog.text
    assert "separated by tabs" in refused(inter(tmp_path, "user_id:token item_id:token timestamp:float", f"u 1 {NOW}"))


@pytest.mark.parametrize("name", ["venue_id", "artist_id", "business_id", "product_id", "movie_id"])
def test_recbole_items_under_other_names(tmp_path, caplog, name):
    """foursquare, lastfm, yelp, steam and others; .item has the same name, or id."""
    header = f"user_id:token\t{name}:token\ttimestamp:float"
    for key in (name, "id", "item_id"):
        log = BehaviorLog.read(inter(tmp_path, header, x__item=f"{key}:token\tname:token\n1\tA\n"))
        assert titles(log) == {"1": "A"} and f"the column {name} is read as item_id" in caplog.text
    both = inter(tmp_path, f"user_id:token\t{name}:token\tvideo_id:token\ttimestamp:float", f"u\t1\t2\t{NOW}")
    assert f"lacks item_id and has {name}, video_id" in refused(both) or f"has video_id, {name}" in refused(both)


def test_recbole_floats_that_are_none(tmp_path, caplog):
    """yelp's `yelping_since:float` and `date:float` hold dates: read as text, and as times."""
    header = "user_id:token\tbusiness_id:token\tstars:float\tdate:float"
    log = BehaviorLog.read(
        inter(
            tmp_path,
            header,
            "u\tb\t4.0\t2020-01-02 03:04:05",
            x__user="user_id:token\tyelping_since:float\tfans:float\nu\t2011-04-02 10:11:12\t3\n",
            x__item="business_id:token\titem_name:token_seq\tstate:token\nb\tThe Bar\tIT\n",
        )
    )
    assert log.timestamps.tolist() == [MOMENT] and log.column("rating").to_pylist() == [4.0]
    assert log.column("yelping_since").to_pylist() == ["2011-04-02 10:11:12"] and log.column("fans").to_pylist() == [
        3.0
    ]
    assert titles(log) == {"b": "The Bar"} and "column yelping_since does not hold double alone" in caplog.text
    caplog.clear()
    rows = "\n".join(f"u\tb\t{value}\t{NOW}" for value in ("4e0", "NA", "good", "bad"))
    log = BehaviorLog.read(
        inter(tmp_path / "rating", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows)
    )
    assert log.column("rating").to_pylist() == ["4e0", "NA", "good", "bad"]
    assert "2 of its 4 values are none, the first in row 2 ('good'); read as text" in caplog.text
    message = refused(inter(tmp_path / "lastfm", "user_id:token\tartist_id:token\tweight:float", "2\t51\t13883"))
    assert "x.inter has no timestamp:float" in message and "needs an order" in message


# Kind: MIND, sampled or joined.

NEWS = "".join(f"N{n}\tnews\tlocal\tTitle {n}\tAbstract\thttp://x\t[]\t[]\n" for n in (1, 2, 3))
SHOWN = "1\tU1\t11/11/2019 9:05:58 AM\tN1\tN2-1 N3-0\n"


def test_mind_with_gaps_and_repeats(tmp_path, caplog):
    """Unknown articles of a history, articles twice, blank titles; an article with two texts is refused by its id."""
    log = BehaviorLog.read(files(tmp_path, behaviors__tsv=SHOWN.replace("\tN1\t", "\tN9 N1\t"), news__tsv=NEWS))
    assert titles(log) == {"N1": "Title 1", "N2": "Title 2", "N3": "Title 3", "N9": "N9"}
    assert "1 of 2 items have no metadata (those of histories are counted)" in caplog.text
    caplog.clear()
    log = BehaviorLog.read(files(tmp_path, behaviors__tsv=SHOWN, news__tsv=NEWS + NEWS[:-1]))
    assert len(titles(log)) == 3 and "3 exact repeats of articles dropped" in caplog.text
    caplog.clear()
    log = BehaviorLog.read(files(tmp_path, behaviors__tsv=SHOWN, news__tsv=NEWS.replace("Title 1", " ")))
    assert titles(log)["N1"] == "N1" and "1 items have no title" in caplog.text
    files(tmp_path, news__tsv=NEWS + NEWS.replace("Title 2", "Other"))
    assert "news.tsv has 1 articles with rows that differ (first: N2)" in refused(tmp_path)
    log = BehaviorLog.read(
        files(tmp_path, behaviors__tsv="\ufeff" + SHOWN.replace("\n", "\r\n"), news__tsv="\ufeff" + NEWS)
    )
    assert log.column("item_id").to_pylist() == ["N1", "N2", "N3"]


# Kind: Amazon of every year.


@pytest.mark.parametrize(
    ("price", "number"),
    [
        ("12,99 €", 12.99),
        ("$1,299.00 - $1,499.00", 1299.0),
        ("1.299,00 €", 1299.0),
        ("1 299,50 kr", 1299.5),
        ("1\u202f299,5", 1299.5),
        ("CHF 1'299.50", 1299.5),
        ("$1,299", 1299.0),
        ("1,234,567", 1234567.0),
        ("from 9.5", 9.5),
        ("0,999", 0.999),
        ("£5", 5.0),
        ("$.99", 0.99),
        ("€ ,99", 0.99),
        ("Rs.1,29,999.00", 129999.0),
        ("1.234.567", 1234567.0),
        ("US$12.50 - US$13", 12.5),
        ("—", None),
        ("١٢٫٩٩", None),
        ("2 for $5.00", None),
        ("Was $20.00 Now $10.00", None),
        ("1.299 €", None),
        ("1.299.00", None),
        ("1,299,00", None),
        ("1,299.00,5", None),
        ("-5.00", None),
        (10**400, None),
        (".a-section{margin:6px} .a-spacing-mini{margin:12px}", None),
        (float("nan"), None),
        (True, None),
        (["3"], None),
    ],
)
def test_prices_with_either_decimal_sign(price, number):
    """Commas, points, spaces and apostrophes, as decimal signs or between thousands; null where either may be meant.

    The same way fail: digits of other scripts, several numbers, groups that are not of three digits.
    """
    assert price_of(price) == number


def test_prices_that_are_left_empty_are_counted(tmp_path, caplog):
    """Texts with digits that are not one price; a dash and a missing price need no word."""
    prices = ("1.299 €", "2 for $5.00", "١٢", "—", None, "$5")
    meta = records(*({"parent_asin": f"B{n}", "title": "T", "price": price} for n, price in enumerate(prices)))
    log = BehaviorLog.read(files(tmp_path, All__jsonl=records(REVIEW_2023), meta_All__jsonl=meta))
    assert log.items["price"].to_pylist() == [None] * 5 + [5.0]
    assert "meta_All.jsonl: 3 prices are not one number" in caplog.text and "(first: '1.299 €')" in caplog.text


def test_texts_as_the_shop_shows_them():
    """Entities with their semicolon only, decimal, hexadecimal and by name."""
    assert shown_text("Black &amp; Decker 12&quot; &#39;Pro&#39; &#x2122;") == ("Black & Decker 12\" 'Pro' ™", 0)
    assert shown_text("AT&T Black&copper &unknown;") == ("AT&T Black&copper &unknown;", 0)
    for text in ("&notit;", "&copyright; 2020", "&amper;", "&ampamp;"):  # a known name and more letters
        assert shown_text(text) == (text, 0)
    assert shown_text(["a &lt; b", 5, "c"]) == ("a < b; c", 0)
    assert shown_text("cut \ud83d here, \ud83d\ude00 whole") == ("cut \ufffd here, 😀 whole", 1)


REVIEW_2023 = {
    "rating": 5.0,
    "title": "t",
    "asin": "B1",
    "parent_asin": "B1",
    "user_id": "AE",
    "timestamp": 1588687728923,
    "verified_purchase": True,
}
REVIEW_2018 = {
    "overall": 5.0,
    "reviewerID": "A1",
    "asin": "B1",
    "reviewText": "cut \ud83d",
    "unixReviewTime": 1514764800,
}


def test_amazon_2023(tmp_path, caplog):
    """The 5-core csv, also a part of it with histories; half an emoji in titles and in reviews."""
    meta = records({"parent_asin": "B1", "title": "cut \ud83d &amp; more", "store": "J&amp;J", "price": "12,99 €"})
    head = "user_id,parent_asin,rating,timestamp"
    forms = {
        "All__csv": f"{head}\nAE,B1,5.0,1588687728923\n",
        "All__train__csv": f"{head},history\nAE,B1,5.0,1588687728923,B7 B8\n",
        "All__jsonl": records(REVIEW_2023 | {"title": "\ud83d"}),
    }
    for number, (name, content) in enumerate(forms.items()):
        place = files(tmp_path / str(number), **{name: content, "meta_All__jsonl": meta})
        assert detect_format(place) == "amazon_reviews_2023"
        log = BehaviorLog.read(place)
        assert log.timestamps.tolist() == [1588687728.923] and log.column("rating").to_pylist() == [5.0]
        assert (
            log.items.to_pylist()[0] | {"title": "cut \ufffd & more", "store": "J&J", "price": 12.99}
            == log.items.to_pylist()[0]
        )
    assert "1 halves of surrogate pairs" in caplog.text


@pytest.mark.parametrize(
    ("time", "named", "advice"),
    [
        (1588687728, "looks like seconds (row 1: 1588687728)", "multiply by 1000"),
        (1588687728923000, "looks like microseconds (row 1: 1588687728923000)", "write milliseconds"),
        (0, "looks like numbers below 100,000,000 (row 1: 0)", "write milliseconds"),
        (1588687728923000000, "looks like nanoseconds (row 1: 1588687728923000000)", "write milliseconds"),
    ],
)
def test_amazon_2023_in_another_unit(tmp_path, time, named, advice):
    """Seconds divided by 1000 would be an undated log; the message names the numbers as they stand in the file."""
    rows = [REVIEW_2023 | {"timestamp": None}, REVIEW_2023 | {"timestamp": time}]
    jsonl = files(tmp_path / "jsonl", All__jsonl=records(*rows))
    head = "user_id,parent_asin,rating,timestamp\n"
    csv = files(tmp_path / "csv", All__csv=f"{head}AE,B1,5.0,1588687728923\nAE,B1,5.0,{time}\n")
    for place in (jsonl, csv):
        message = refused(place, null_times="drop")
        assert named in message and advice in message and "All." in message and "1 of 2 reviews" in message


def test_amazon_before_2023(tmp_path):
    """Reviews of 2018, and ratings without a header: the user first in 2014, the item first in 2018."""
    meta = records({"asin": "B1", "title": "T &amp; U", "price": "$1,299.00", "main_cat": "M", "category": ["a", "b"]})
    place = files(tmp_path / "a", All_5__json=records(REVIEW_2018), meta_All__json=meta)
    log = BehaviorLog.read(place)
    assert log.timestamps.tolist() == [1514764800] and log.user_ids.to_pylist() == ["A1"]
    item = log.items.to_pylist()[0]
    assert (item["title"], item["price"], item["categories"]) == ("T & U", 1299.0, "a; b")
    for name, row in {"2014": "A39HTATAQ9V7YF,0205616461,5.0", "2018": "0205616461,A39HTATAQ9V7YF,5.0"}.items():
        log = BehaviorLog.read(files(tmp_path / name, ratings_Beauty__csv=f"{row},1369699200\n"))
        assert titles(log) == {"0205616461": "0205616461"} and log.user_ids.to_pylist() == ["A39HTATAQ9V7YF"]
    files(place, meta_All__json="{'asin': 'B1', 'title': 'x'}\n")
    assert "Python literal: convert each line by json.dumps(ast.literal_eval(line))" in refused(place)


# Kind: MovieLens as others hand it on.


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("1260759144.0", 1260759144),
        ("1260759144", 1260759144),
        ('"2020-01-02 03:04:05"', MOMENT),
        ("2020-01-02T03:04:05Z", MOMENT),
    ],
)
@pytest.mark.parametrize("names", [("ratings", "movies"), ("rating", "movie")])
def test_movielens_csv_of_kaggle(tmp_path, caplog, time, seconds, names):
    """rating.csv with movie.csv, ISO times, floats as times, byte-order marks, tags and links beside them."""
    mark = "\ufeff"
    contents = {
        f"{names[0]}__csv": f'{mark}"userId","movieId","rating","timestamp"\r\n1,31,3.5,{time}\r\n',
        f"{names[1]}__csv": f'{mark}movieId,title,genres\n1,A (1999),Drama\n31,"Beta, The (2000)",Crime|Drama\n',
    }
    log = BehaviorLog.read(files(tmp_path, **contents, tag__csv="userId,movieId,tag,timestamp\n"))
    assert log.timestamps.tolist() == [seconds] and titles(log)["31"] == "Beta, The (2000)"
    assert caplog.text == ""  # times as dates or floats lose nothing


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_movielens_dat_with_a_byte_order_mark(tmp_path, encoding):
    """In users.dat, movies.dat and ratings.dat, as editors leave it; CRLF too."""
    mark = b"\xef\xbb\xbf"
    files(
        tmp_path,
        ratings__dat=mark + b"1::1::5::978300760\r\n",
        movies__dat=mark + "1::Amélie (2001)::Drama\r\n".encode(encoding),
        users__dat=mark + b"1::F::25::10::00000\r\n",
    )
    log = BehaviorLog.read(tmp_path)
    assert titles(log) == {"1": "Amélie (2001)"} and log.user_ids.to_pylist() == ["1"]
    assert log.column("age").to_pylist() == ["25-34"]


# Kind: Taobao's UserBehavior.csv, which has no header, no titles, and times of other centuries.


def test_taobao(tmp_path, caplog):
    """A directory, the file itself, and another name: the first row tells."""
    rows = "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n2,2333346,2520771,pv,-2134949234\n"
    for name in ("UserBehavior__csv", "part__csv"):
        place = files(tmp_path / name, **{name: rows})
        for path in (place, place / name.replace("__", ".")):
            caplog.clear()
            log = BehaviorLog.read(path)
            assert detect_format(path) == "taobao" and log.timestamps.tolist() == [1511544070, 1511561733]
            assert log.column("behaviour").to_pylist() == ["pv", "buy"]
            assert log.items.to_pylist()[1] == {"item_id": "2333346", "title": "2333346", "category": "2520771"}
            assert "1 interactions with times outside 1990 to 2100 left out" in caplog.text
            assert "no titles are published; the ids of its 2 items are their titles" in caplog.text


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([1511544070, 1511561733000], "holds milliseconds (row 1: 1511561733000)"),
        ([1511544070000, 1511561733000], "holds milliseconds (rows 0, 1: 1511544070000, 1511561733000)"),
        ([1511544070, -5, 1511561733000000], "holds microseconds (row 2: 1511561733000000)"),
        ([1511544070, 20171125003000], "YYYYMMDDhhmmss (row 1: 20171125003000)"),
        ([-5], "outside 1990 to 2100 in 1 of 1 rows"),
        ([1511544070] * 900 + [44] * 100, "outside 1990 to 2100 in 100 of 1000 rows"),
    ],
)
def test_taobao_in_another_unit(tmp_path, rows, named):
    """Rows of another unit, and more rows than the few of other centuries, are not left out but named."""
    assert named in refused(files(tmp_path, UserBehavior__csv="".join(f"1,2,3,pv,{time}\n" for time in rows)))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    """Latin-1 close to the header: in each reader of csv and tsv."""
    bad = "Amélie".encode("latin-1")
    ratings = b"userId,movieId,rating,timestamp\n1,1,4,1112486027\n"
    head = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    forms = {
        "movies__csv": {"ratings__csv": ratings, "movies__csv": b"movieId,title,genres\n1," + bad + b",Drama\n"},
        "ratings__csv": {"ratings__csv": ratings + bad + b",1,4,1\n", "movies__csv": "movieId,title,genres\n1,A,B\n"},
        "B__csv": {"B__csv": b"user_id,parent_asin,rating,timestamp\n" + bad + b",B1,5.0,1588687728593\n"},
        "x__inter": {"x__inter": head + bad + b"\t1\tgood\t1333476009\n"},
        "items__csv": {"interactions__csv": ROWS, "items__csv": b"item_id,title\n1," + bad + b"\n"},
    }
    for number, (name, contents) in enumerate(forms.items()):
        message = refused(files(tmp_path / str(number), **contents))
        line = 3 if name == "ratings__csv" else 2
        assert f"{name.replace('__', '.')} is not UTF-8: line {line} holds the byte 0xe9" in message


def test_jsonl_keeps_what_it_holds(tmp_path):
    """Texts that look like dates stay as written, and ids beyond 63 bits stay whole."""
    big = 2**64 - 1
    row = {"user_id": big, "item_id": big - 1, "timestamp": NOW, "rating": 1}
    item = {"item_id": big - 1, "title": "A", "day": "2020-01-02T03:04:05", "code": "0012"}
    log = BehaviorLog.read(files(tmp_path, interactions__jsonl=records(row), items__jsonl=records(item)))
    assert log.items.to_pylist() == [item | {"item_id": str(big - 1)}] and log.user_ids.to_pylist() == [str(big)]


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)
