"""Csv and JSON lines of other writers: read with a warning that counts, or refused with cause and advice."""

import logging

import pyarrow as pa
import pytest

from llmrec_peft.data.csv_rules import typed_values
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers.csv_files import typed_columns
from llmrec_peft.serving.plain_items import Items
from tests.support.log_files import ITEMS, NOW, ROWS, files, records, refused, titles


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)


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
    served = Items.read(tmp_path / "a")
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
        titles(log) == {"1": "A\r\nb", "2": "B"} == {item: Items.read(tmp_path / "a")[item]["title"] for item in "12"}
    )
    for sign in ";\t|":
        text = "item_id;title;price\n1;A, b;1,5\n2;B;2.5\n".replace(";", sign)
        log = BehaviorLog.read(files(tmp_path / "b", interactions__csv=ROWS.replace(",", sign), items__csv=text))
        assert log.items.to_pylist()[0] == {"item_id": "1", "title": "A, b", "price": "1,5"}
        assert Items.read(tmp_path / "b")["1"] == log.items.to_pylist()[0]
        assert f"its fields are separated by {sign!r}" in caplog.text
    for name in ("USER_ID", "userId", "User-ID"):
        files(tmp_path / "c", interactions__csv=ROWS.replace("user_id", name), items__csv=ITEMS)
        assert f"has the column '{name}' where user_id belongs; rename it to user_id" in refused(tmp_path / "c")


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
