"""Input that used to end in a traceback or to end the process: each is read with a warning or refused in one line."""

import csv
import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers import READERS, json_lines
from llmrec_peft.errors import DataError
from llmrec_peft.serving.plain_items import Items

ROW = {"user_id": "1", "item_id": "1", "timestamp": 1_600_000_000, "rating": 5}
ITEM = {"item_id": "1", "title": "A"}


def lines(*records):
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def write(directory, rows=None, items=None):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "interactions.jsonl").write_text(lines(ROW) if rows is None else rows, encoding="utf-8")
    (directory / "items.jsonl").write_text(lines(ITEM) if items is None else items, encoding="utf-8")
    return directory


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        BehaviorLog.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_500 and "Traceback" not in message
    return message


@pytest.mark.parametrize("chunk", [50, 4 << 20])
def test_half_surrogate_pairs(tmp_path, monkeypatch, caplog, chunk):
    """Half a pair in a title, a text, a list, a key; a pair that is whole and a backslash before `ud83d` stay."""
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk)
    items = '{"item_id": "1", "title": "x\\ud83d y \\\\ud83d \\ud83d\\ude00", "k": ["\\udc00"], "\\ud800": 1}\n'
    rows = '{"user_id": "1", "item_id": "1", "timestamp": 1600000000, "rating": 5, "k": "\\udfff"}\n'
    with caplog.at_level(logging.WARNING):
        log = BehaviorLog.read(write(tmp_path, rows, items))
    expected = {"item_id": "1", "title": "x\ufffd y \\ud83d 😀", "k": ["\ufffd"], "\ufffd": 1}
    assert log.items.to_pylist() == [expected] and log.column("k").to_pylist() == ["\ufffd"]
    assert "items.jsonl: 3 halves of surrogate pairs" in caplog.text and "1 halves" in caplog.text
    assert Items.read(tmp_path)["1"] == expected
    for pair in (r"\\\ud83d", r"\\\\\ud83d\ud83d", r"\\ud83d\ude00", r"\ude00\ud83d"):
        BehaviorLog.read(write(tmp_path, items='{"item_id": "1", "title": "x' + pair + '"}\n'))
        expected = Items.read(tmp_path)["1"]["title"]
        assert BehaviorLog.read(tmp_path).items["title"].to_pylist() == [expected]


@pytest.mark.parametrize("chunk", [50, 4 << 20])
def test_half_surrogate_pairs_in_ids(tmp_path, monkeypatch, chunk):
    """As U+FFFD two users would be one: ids of users and items, in reviews, in metadata, and in serving."""
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk)
    for name in ("user_id", "item_id"):
        rows = lines(ROW | {"title": "cut \ud83d 😀"}, ROW | {name: "😀\ud83d"}, ROW | {name: "😀\ud83e"})
        message = refused(write(tmp_path / name, rows))
        assert f"line 2 of {tmp_path}" in message and f"{name} '😀\\ud83d' with half of a surrogate pair" in message
    items = write(tmp_path / "items", items=lines(ITEM, ITEM | {"item_id": "\udc00"}))
    assert "line 2 of" in refused(items) and "item_id '\\udc00'" in refused(items)
    with pytest.raises(DataError, match="line 2 of .*half a surrogate pair"):
        Items.read(items)
    review = {"rating": 5.0, "parent_asin": "B1", "user_id": "A", "timestamp": 1_588_687_728_923}
    for reviews, meta in (
        (lines(review | {"user_id": "\ud83d"}), "{}\n"),
        (lines(review | {"parent_asin": "\ud83d"}), "{}\n"),
        (lines(review), lines({"parent_asin": "\ud83d", "title": "A"})),
    ):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "B.jsonl").write_text(reviews)
        (tmp_path / "a" / "meta_B.jsonl").write_text(meta)
        assert "1 of" in refused(tmp_path / "a") and "half of a surrogate pair" in refused(tmp_path / "a")


def test_whole_surrogate_pairs_cost_no_callback(tmp_path, monkeypatch):
    """Escaped emoji, letters such as \\u00e9 and lines beside a mended one are passed on as they are."""
    calls = []
    pair = json_lines.CheckedLines._pair
    monkeypatch.setattr(json_lines.CheckedLines, "_pair", lambda self, found: calls.append(1) or pair(self, found))
    rows = lines(*[ROW | {"text": "é😀" * 50}] * 100, ROW | {"text": "\ud83d"}, *[ROW | {"text": "😀"}] * 100)
    log = BehaviorLog.read(write(tmp_path, rows))
    assert (
        len(calls) == 1
        and log.column("text").to_pylist().count("😀") == 100
        and "\ufffd" in log.column("text").to_pylist()
    )


@pytest.mark.parametrize(
    "record", [{"input": "x", "label": "\ud800"}, {"input": [{"role": "\ud800", "content": "x"}], "label": 1}]
)
def test_half_surrogate_pairs_in_records(tmp_path, record):
    """A record is its text alone: half a pair in its label, role or input is named by record."""
    (tmp_path / "a.jsonl").write_text(lines({"input": "x", "label": "1"}, record))
    assert "record 2 of" in refused(tmp_path) and "half of a surrogate pair" in refused(tmp_path)


@pytest.mark.parametrize("depth", [101, 3_000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", ("{\"a\":", "}")], ids=["lists", "objects"])  # fmt: skip
def test_deep_json(tmp_path, depth, brackets):
    """Lists and objects in every reader of JSON; at 100,000 levels Arrow's parser ended the process."""
    deep = brackets[0] * depth + ("" if brackets == "[]" else "1") + brackets[1] * depth
    row = '{"user_id":"1","item_id":"1","timestamp":1600000000,"rating":5,"k":' + deep + "}\n"
    message = refused(write(tmp_path / "a", lines(ROW) + row))
    assert "line 2 of" in message and "interactions.jsonl nests deeper than 100 levels" in message
    assert "line 1 of" in refused(write(tmp_path / "b", items='{"item_id":"1","title":"x","k":' + deep + "}\n"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text(lines({"input": "x", "label": 1}, '{"input":"x","label":' + deep + "}"))
    assert "line 2 of" in refused(tmp_path / "c") and "deeper than 100 levels" in refused(tmp_path / "c")
    (tmp_path / "d.json").write_text('[{"instruction":"x","output":"y"},{"instruction":"x","output":' + deep + "}]")
    assert "entry 2 of the array" in refused(tmp_path / "d.json") and "deeper" in refused(tmp_path / "d.json")
    (tmp_path / "e.jsonl").write_text('{"input":"x","label":' + deep + "}")
    assert "line 1 of" in refused(tmp_path / "e.jsonl") and "deeper" in refused(tmp_path / "e.jsonl")


def test_many_brackets_are_not_depth(tmp_path):
    """A line with a thousand lists, and brackets in a title, are read."""
    log = BehaviorLog.read(
        write(tmp_path, items=lines(ITEM | {"title": "[" * 1_000, "k": [[n] for n in range(1_000)]}))
    )
    assert log.items["title"].to_pylist() == ["[" * 1_000] and len(log.items["k"][0]) == 1_000


def test_very_long_numbers(tmp_path):
    """5,000 digits as an id, a rating, a time and a label."""
    digits = "1" * 5_000
    for name in ("user_id", "item_id", "timestamp", "rating"):
        row = json.dumps(ROW | {name: 0}).replace(f'"{name}": 0', f'"{name}": {digits}')
        message = refused(write(tmp_path / "a", lines(ROW, row) if name in ("timestamp", "rating") else row + "\n"))
        assert name in message and "infinite or too large" in message
    for content in (
        '{"input": "x", "label": %s}',
        '[{"instruction": "x", "output": %s}]',
        '{"input": "x", "label": 1%s.5}',
    ):
        (tmp_path / "b.json").write_text(content % digits)
        assert "b.json" in refused(tmp_path / "b.json")
    for value in (2**63, -(10**30), float("inf")):
        (tmp_path / "c.jsonl").write_text(lines({"input": "x", "label": value}))
        assert "record 1 of" in refused(tmp_path / "c.jsonl") and "at most 64 bits" in refused(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text(lines({"input": "x", "label": 1, "timestamp": 2**63}))
    assert "record 1 of" in refused(tmp_path / "c.jsonl") and "timestamp" in refused(tmp_path / "c.jsonl")


def test_parquet_that_is_not_utf8(tmp_path):
    """In a title, an id, a list and a dictionary."""
    offsets = pa.array([0, 3], pa.int32()).buffers()[1]
    bad = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"x\xff\xfe"))
    nested = pa.ListArray.from_arrays([0, 1], bad)
    for name, column in {"title": bad, "k": nested, "code": pa.DictionaryArray.from_arrays(pa.array([0]), bad)}.items():
        directory = write(tmp_path / name)
        (directory / "items.jsonl").unlink()
        pq.write_table(pa.table({"item_id": ["1"], "title": ["A"]} | {name: column}), directory / "items.parquet")
        message = refused(directory)
        assert "items.parquet" in message and "UTF" in message and "write it again" in message
    rows = pa.table({name: [value] for name, value in ROW.items()} | {"user_id": bad})
    directory = write(tmp_path / "id")
    (directory / "interactions.jsonl").unlink()
    pq.write_table(rows, directory / "interactions.parquet")
    assert "column 'user_id' of" in refused(directory)


def test_surrogates_as_bytes_are_not_utf8(tmp_path):
    """Half a pair written as three bytes, also inside a list and in an unused line's end."""
    for title in (b'"x\xed\xa0\xbd"', b'"x", "k": ["\xed\xa0\xbd"]', b'"x\xff"'):
        directory = write(tmp_path)
        (directory / "items.jsonl").write_bytes(b'{"item_id": "1", "title": ' + title + b"}\n")
        assert "items.jsonl is not UTF-8: line 1 holds the byte" in refused(directory)


PATHS = ["/dev/null", "/dev/zero", "/tmp/a\0b", "/tmp/" + "a" * 300, "a" * 100_000, "/tmp/\ud800", "/dev/null/x"]


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths_that_are_none(path):
    """Devices, NUL, 300 and 100,000 characters, half a surrogate pair; by detection and by each reader."""
    for form in ("auto", *(name for name, reader in READERS.items() if reader.local)):
        assert len(refused(path, format=form)) < 1_500


def test_loops_pipes_and_directories_with_the_names_of_files(tmp_path):
    """Symlinks to each other and to themselves, a pipe without a writer, directories named like files."""
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "does not exist" in refused(tmp_path / "a")
    (tmp_path / "interactions.csv").symlink_to(tmp_path / "interactions.csv")
    (tmp_path / "interactions").symlink_to(".")
    assert "no reader knows" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "neither a file nor a directory" in refused(tmp_path / "pipe.jsonl")
    names = ("interactions.csv", "interactions.parquet", "ratings.csv", "movies.csv", "x.inter", "x.jsonl", "x.csv")
    for name in (*names, "behaviors.tsv", "news.tsv", "meta_x.jsonl"):
        (tmp_path / "dirs" / name).mkdir(parents=True)
    for form in ("auto", *(name for name, reader in READERS.items() if reader.local)):
        refused(tmp_path / "dirs", format=form)
    directory = write(tmp_path / "x")
    (directory / "items.jsonl").unlink()
    (directory / "items.jsonl").mkdir()
    assert "lacks the column title" in refused(directory)


@pytest.mark.parametrize("damage", ["half", "tail", "noise", "plain"])
def test_damaged_gzip(tmp_path, damage):
    """Cut in the middle and in the checksum, changed within, not packed at all: jsonl, csv and records."""
    contents = {
        "interactions.jsonl.gz": lines(*[ROW | {"x": os.urandom(9).hex()} for _ in range(3_000)]),
        "interactions.csv.gz": "user_id,item_id,timestamp,rating,x\n"
        + "".join(f"1,1,1600000000,5,{os.urandom(9).hex()}\n" for _ in range(3_000)),
        "a.jsonl.gz": lines(*[{"input": os.urandom(9).hex(), "label": 1} for _ in range(3_000)]),
    }
    for name, content in contents.items():
        packed = gzip.compress(content.encode())
        broken = {"half": packed[: len(packed) // 2], "tail": packed[:-8], "plain": content.encode()}
        broken["noise"] = packed[:2_000] + b"\0" * 50 + packed[2_050:]
        directory = write(tmp_path / name.replace(".", "_"))
        (directory / "interactions.jsonl").unlink()
        (directory / name).write_bytes(broken[damage])
        path = directory / name if name.startswith("a") else directory
        assert name in refused(path, format="pointwise" if name.startswith("a") else "auto")


def test_a_line_without_an_end(tmp_path, monkeypatch):
    """A line longer than a block is refused before it fills the memory."""
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", 1_000)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 10_000)
    assert "has more than 10,000 bytes" in refused(write(tmp_path, lines(ROW | {"x": "y" * 20_000})))


def test_the_door_names_what_no_reader_foresaw(tmp_path, monkeypatch):
    """Whatever a library raises on a log becomes a DataError with its cause."""
    for fault in (RuntimeError("odd\nfile"), KeyError("x"), MemoryError(), OSError(28, "No space left on device")):

        def broken(path, fault=fault):
            raise fault

        reader = READERS["directory"]
        monkeypatch.setitem(READERS, "directory", type(reader)("directory", "", reader.detect, broken))
        assert str(tmp_path) in refused(write(tmp_path))
        monkeypatch.setitem(READERS, "directory", reader)


def test_items_of_serving_are_those_of_training(tmp_path):
    """Rows of different lengths, columns twice, half an id are refused by both; very long titles are read by both."""
    rows = "user_id,item_id,timestamp,rating\n1,1,1600000000,5\n"
    for number, content in enumerate(
        ("item_id,title\n1,A,x\n", "item_id,title,z\n1,A\n", "item_id,title,title\n1,A,B\n")
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "interactions.csv").write_text(rows)
        (directory / "items.csv").write_text(content)
        refused(directory)
        with pytest.raises(DataError, match="has column title more than once|record 2 of .* fields, and its header"):
            Items.read(directory)
    title = "x" * 200_000
    (directory / "items.csv").write_text(f'item_id,title\n1,"{title}"\n\n')
    assert BehaviorLog.read(directory).items["title"].to_pylist() == [title] == [Items.read(directory)["1"]["title"]]
    assert csv.field_size_limit() < 200_000
    twice = pa.Table.from_arrays([pa.array(["1"]), pa.array(["A"]), pa.array(["B"])], ["item_id", "title", "title"])
    pq.write_table(twice, tmp_path / "items.parquet")
    with pytest.raises(DataError, match="title"):
        Items.read(tmp_path / "items.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\n")
    assert len(Items.read(tmp_path / "items.csv")) == 0


@pytest.mark.parametrize("path", ["hf://", "hf:///", "hf://datasets/"])
def test_a_hub_path_without_a_name(path):
    """No owner, only slashes, only the kind."""
    assert "names no data set; write hf://owner/name" in refused(path)
