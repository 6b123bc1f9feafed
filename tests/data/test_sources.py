"""The toolkit's own layout, detection, and what damaged files get."""

import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from llmrec_peft.data import memory_mapped
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers import READERS, describe_formats
from llmrec_peft.errors import DataError

ROWS = {
    "user_id": ["007", "7", "007"],
    "item_id": ["01", "1", "1"],
    "timestamp": [3, 2, 1],
    "label": [1, 0, 1],
    "note": ["café", 'a "quoted", one', "two\nlines"],
}
ITEMS = {"item_id": ["01", "1"], "title": ["Heat, The (1995)", "naïve 日本"], "price": [1.5, None]}


def write(directory, form="parquet", rows=ROWS, items=ITEMS, stem="interactions"):
    directory.mkdir(parents=True, exist_ok=True)
    for name, columns in ((stem, rows), ("items", items)):
        table = pa.table(columns)
        if form == "parquet":
            pq.write_table(table, directory / f"{name}.parquet")
        elif form == "csv":
            pacsv.write_csv(table, directory / f"{name}.csv")
        elif form == "jsonl.gz":
            with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
        else:
            lines(directory / f"{name}.jsonl", table.to_pylist())
    return directory


def lines(path, records, ending="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + ending for record in records), encoding="utf-8")
    return path


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        BehaviorLog.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_000
    return message


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "jsonl.gz"])
def test_directory_in_every_form(tmp_path, form):
    log = BehaviorLog.read(write(tmp_path / "shop", form))
    assert log.name == "shop" and log.user_ids.to_pylist() == ["007", "7"]
    assert log.column("item_id").to_pylist() == ["1", "01", "1"]
    assert log.column("note").to_pylist() == ["two\nlines", "café", 'a "quoted", one']
    assert log.items.column("title").to_pylist() == ITEMS["title"]
    assert log.items.column("price").to_pylist() == ITEMS["price"]
    assert BehaviorLog.read(str(tmp_path / "shop"), format="directory").interactions.equals(log.interactions)


def test_interactions_file_stands_for_its_directory(tmp_path):
    directory = write(tmp_path / "shop", "csv")
    assert len(BehaviorLog.read(directory / "interactions.csv")) == 3


def test_shards_are_read_in_order_and_must_have_the_same_columns(tmp_path):
    whole = pa.table(ROWS)
    write(tmp_path / "shop")
    (tmp_path / "shop" / "interactions.parquet").unlink()
    for number in range(3):
        pq.write_table(whole.slice(number, 1), tmp_path / "shop" / f"interactions-{number}.parquet")
    log = BehaviorLog.read(tmp_path / "shop")
    assert log.interactions.equals(BehaviorLog.read(write(tmp_path / "whole")).interactions)
    pq.write_table(whole.select(["user_id"]), tmp_path / "shop" / "interactions-3.parquet")
    assert "interactions-3.parquet has columns user_id but interactions-0.parquet has" in refused(tmp_path / "shop")


def test_shards_in_a_folder(tmp_path):
    write(tmp_path / "shop")
    (tmp_path / "shop" / "interactions").mkdir()
    (tmp_path / "shop" / "interactions.parquet").rename(tmp_path / "shop" / "interactions" / "part-0.parquet")
    assert len(BehaviorLog.read(tmp_path / "shop")) == 3


def test_csv_shards_join(tmp_path):
    directory = write(tmp_path / "shop", "csv", stem="interactions-0")
    pacsv.write_csv(pa.table({**ROWS, "timestamp": [0.5, 1.5, 2.5]}), directory / "interactions-1.csv")
    assert BehaviorLog.read(directory).timestamps.tolist() == [0.5, 1.0, 2.5, 3.0, 1.5, 2.0]


def test_two_forms_of_one_table_are_refused(tmp_path):
    write(tmp_path / "shop")
    write(tmp_path / "shop", "csv")
    assert "in more than one form (interactions.csv, interactions.parquet)" in refused(tmp_path / "shop")


def test_dictionary_columns_in_parquet(tmp_path):
    table = pa.table(ROWS)
    rows = {name: table.column(name).dictionary_encode() if name != "timestamp" else ROWS[name] for name in ROWS}
    log = BehaviorLog.read(write(tmp_path / "shop", rows=rows))
    assert log.column("user_id").to_pylist() == ["007", "007", "7"] and log.column("label").type == pa.int64()
    assert log.column("note").type == pa.string()


def test_large_parquet_is_memory_mapped_and_equals_the_small_path(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    count = 3_000
    rows = {
        "user_id": [f"u{code}" for code in rng.integers(0, 50, count)],
        "item_id": [("01", "1")[code] for code in rng.integers(0, 2, count)],
        "timestamp": rng.integers(0, 500, count),
        "rating": rng.random(count),
        "note": pa.array([f"note {n % 700}" for n in range(count)]).dictionary_encode(),
    }
    directory = write(tmp_path / "shop", rows=rows)
    small = BehaviorLog.read(directory)
    mapped = []
    real = memory_mapped.map_batches

    def counting(batches, schema):
        mapped.append(schema)
        return real(batches, schema)

    monkeypatch.setattr(memory_mapped, "MAPPED_ROWS", 1_000)
    monkeypatch.setattr(memory_mapped, "map_batches", counting)
    monkeypatch.setattr("llmrec_peft.data.readers.tabular.BATCH_ROWS", 256)
    assert BehaviorLog.read(directory).interactions.equals(small.interactions)
    assert len(mapped) == 1


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_title_of_a_million_characters(tmp_path, form):
    long = "word " * 200_000 + "end"
    log = BehaviorLog.read(write(tmp_path / "shop", form, items={"item_id": ["01", "1"], "title": ["x", long]}))
    assert log.items.column("title")[1].as_py() == long


def test_jsonl_ids_may_be_numbers(tmp_path):
    rows = {**ROWS, "user_id": [1, 2, 1], "item_id": [1, 2, 2]}
    log = BehaviorLog.read(write(tmp_path / "shop", "jsonl", rows=rows, items={**ITEMS, "item_id": [1, 2]}))
    assert log.user_ids.to_pylist() == ["1", "2"]


def test_csv_datetimes_become_seconds(tmp_path):
    rows = {**ROWS, "timestamp": ["2020-01-01 00:00:01", "2020-01-01 00:00:00", "1990-01-01 00:00:05"]}
    log = BehaviorLog.read(write(tmp_path / "shop", "csv", rows=rows))
    assert log.timestamps.tolist() == [631152005, 1577836801, 1577836800]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "inside"])
def test_corrupt_parquet(tmp_path, damage):
    many = {"user_id": ["u"] * 5_000, "item_id": ["1"] * 5_000, "timestamp": list(range(5_000)), "label": [1] * 5_000}
    file = write(tmp_path / "shop", rows=many) / "interactions.parquet"
    content = file.read_bytes()
    # The cut file lacks its footer; in "inside" the footer is right and the first page is not.
    inside = content[:4] + b"\xff" * 64 + content[68:]
    file.write_bytes({"cut": content[:-20], "noise": b"hello", "empty": b"", "inside": inside}[damage])
    message = refused(tmp_path / "shop")
    assert str(file) in message and "parquet file" in message and "write it again" in message


def test_csv_that_is_not_utf8(tmp_path):
    directory = write(tmp_path / "shop", "csv")
    (directory / "items.csv").write_bytes("item_id,title\n01,x\n1,café\n".encode("latin-1"))
    assert "items.csv is not UTF-8: line 3 holds the byte 0xe9; save the file as UTF-8" in refused(directory)


def test_jsonl_that_is_not_utf8(tmp_path):
    directory = write(tmp_path / "shop", "jsonl")
    content = '{"item_id": "01", "title": "x"}\n{"item_id": "1", "title": "café"}\n'.encode("latin-1")
    (directory / "items.jsonl").write_bytes(content)
    assert "items.jsonl is not UTF-8: line 2 holds the byte 0xe9" in refused(directory)


@pytest.mark.parametrize(("form", "kind"), [("csv", "csv file"), ("jsonl", "JSON lines")])
def test_empty_and_broken_text_files(tmp_path, form, kind):
    directory = write(tmp_path / "shop", form)
    for content in ("", "a,b\n1,2,3\n{"):
        (directory / f"interactions.{form}").write_text(content)
        message = refused(directory)
        assert f"interactions.{form}" in message and kind in message


def test_damaged_gzip(tmp_path):
    directory = write(tmp_path / "shop", "jsonl.gz")
    file = directory / "interactions.jsonl.gz"
    file.write_bytes(file.read_bytes()[:30])
    assert "interactions.jsonl.gz is not readable JSON lines" in refused(directory)


def test_an_empty_user_in_csv_is_not_a_user(tmp_path):
    directory = write(tmp_path / "shop", "csv", rows={**ROWS, "user_id": ["007", "", "007"]})
    assert "user_id in interactions of log 'shop' is an empty string in 1 rows (row 1)" in refused(directory)


def test_bad_directories(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere") and "hf://owner/name" in refused(tmp_path / "nowhere")
    assert "does not exist; the mind reader needs behaviors.tsv" in refused(tmp_path / "nowhere", format="mind")
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty")
    assert "is an empty directory" in message and all(name in message for name in READERS)
    text(tmp_path / "other" / "notes.txt", "hello")
    assert "holds notes.txt; supported are directory (interactions.parquet" in refused(tmp_path / "other")
    assert "notes.txt', which is a file of 5 bytes" in refused(tmp_path / "other" / "notes.txt")
    assert "holds no interactions file" in refused(tmp_path / "other", format="directory")
    assert "format 'xml' is not one of auto, directory" in refused(tmp_path / "other", format="xml")


def test_ambiguous_directories_ask_for_a_format(tmp_path):
    directory = write(tmp_path / "both")
    text(directory / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.0,100\n")
    text(directory / "movies.csv", "movieId,title,genres\n10,Heat,Crime\n")
    assert "looks like directory, movielens; say which with format=" in refused(directory)
    assert BehaviorLog.read(directory, format="movielens").items.column("title").to_pylist() == ["Heat"]


def test_the_registry_describes_every_reader():
    assert list(READERS) == [
        "directory",
        "movielens",
        "amazon_reviews_2023",
        "amazon_reviews_2018",
        "taobao",
        "mind",
        "recbole",
        "pointwise",
        "instruction",
        "hub",
    ]
    assert all(f"{reader.name} ({reader.layout})" in describe_formats() for reader in READERS.values())


def python_calls(action) -> int:
    """How many functions, of Python and of C, Python code calls while the action runs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_nothing_loops_over_rows(tmp_path, form):
    """Ten times the rows take the same calls, so that no row is visited by Python."""
    for count in (200, 2_000):
        place = tmp_path / str(count)
        numbers = range(count)
        rows = {"user_id": [f"u{n % 9}" for n in numbers], "item_id": ["1"] * count, "label": [1] * count}
        write(place, form, rows={**rows, "timestamp": [count - n for n in numbers]})
    BehaviorLog.read(tmp_path / "200")  # loads what is loaded once
    few, many = (python_calls(lambda n=n: BehaviorLog.read(tmp_path / n)) for n in ("200", "2000"))
    assert abs(many - few) < 100
