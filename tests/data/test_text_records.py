"""Readers of pointwise and instruction records, and of data sets of the `datasets` library."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers import detect_format
from llmrec_peft.errors import DataError

ROWS = {
    "user_id": ["007", "7", "007"],
    "item_id": ["01", "1", "1"],
    "timestamp": [3, 2, 1],
    "label": [1, 0, 1],
    "note": ["café", 'a "quoted", one', "two\nlines"],
}
ITEMS = {"item_id": ["01", "1"], "title": ["Heat, The (1995)", "naïve 日本"], "price": [1.5, None]}


def write(directory):
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(ROWS), directory / "interactions.parquet")
    pq.write_table(pa.table(ITEMS), directory / "items.parquet")
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


DIALOGUE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nthere"}]


def test_pointwise(tmp_path):
    records = [{"input": "Will it rain?", "label": 1}, {"input": DIALOGUE, "label": 0}, {"input": "x", "label": True}]
    file = lines(tmp_path / "train.jsonl", records)
    log = BehaviorLog.read(file)
    assert log.column("label").to_pylist() == [1, 0, 1] and log.column("label").type == pa.int64()
    assert log.num_users == log.num_items == 3 and log.item_codes.tolist() == [0, 1, 2]
    assert log.timestamps.tolist() == [0, 1, 2]
    titles = log.items.column("title").to_pylist()
    assert titles == ["Will it rain?", "user: Hi\nassistant: Hello\nthere", "x"]
    assert BehaviorLog.read(tmp_path).interactions.equals(log.interactions)  # the only JSON file of its directory


def test_pointwise_labels_and_times(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"input": "x", "label": "yes ", "timestamp": 9}, {"input": "y", "label": "no"}])
    assert "timestamp is null in 1 interactions" in refused(file)
    lines(file, [{"input": "x", "label": "yes ", "timestamp": 9}, {"input": "y", "label": "no", "timestamp": 8}])
    log = BehaviorLog.read(file)
    assert log.column("label").to_pylist() == ["yes", "no"] and log.timestamps.tolist() == [9, 8]
    lines(file, [{"input": "x", "label": 0.5}, {"input": "y", "label": 1}])
    assert BehaviorLog.read(file).column("label").to_pylist() == [0.5, 1.0]


def test_pointwise_many_records_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("llmrec_peft.data.readers.json_records.BATCH_RECORDS", 7)
    file = lines(tmp_path / "a.jsonl", [{"input": f"text {n}", "label": n % 2} for n in range(100)])
    log = BehaviorLog.read(file)
    assert log.items.column("title").to_pylist() == [f"text {n}" for n in range(100)]
    assert log.item_codes.tolist() == list(range(100)) and log.column("label").to_pylist() == [0, 1] * 50


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input": "", "label": 1}, "record 2 of .* has an empty text"),
        ({"input": "\ud800", "label": 1}, "record 2 of .* half of a surrogate pair"),
        ({"input": 5, "label": 1}, "record 2 of .* has input 5; it must be a text or a list of role and content"),
        ({"input": [], "label": 1}, r"record 2 of .* has input \[\]"),
        ({"input": [{"role": "user"}], "label": 1}, "record 2 of .* must be a text or a list"),
        ({"input": "x", "label": None}, "record 2 of .* has label None; it must be a text or a number"),
        ({"input": "x", "label": [1]}, "record 2 of .* has label"),
        ({"input": "x", "label": float("nan")}, "record 2 of .* has label nan"),
        ({"label": 1}, "record 2 of .* has input None"),
        ({"input": "x", "label": 1, "timestamp": "now"}, "record 2 of .* has timestamp 'now'"),
        ("text", "record 2 of .* is 'text'; each must be a JSON object"),
    ],
)
def test_pointwise_bad_records(tmp_path, record, expected):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"input": "x", "label": 0}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=expected):
        BehaviorLog.read(file)


def test_pointwise_damaged_files(tmp_path):
    file = text(tmp_path / "a.jsonl", '{"input": "x", "label": 1}\n{"input": "y", \n')
    assert "line 2 of" in refused(file) and "is not JSON" in refused(file)
    file.write_bytes(b'{"input": "x", "label": 1}\n{"input": "caf\xe9", "label": 1}\n')
    assert "a.jsonl is not UTF-8: line 2 holds the byte 0xe9" in refused(file)
    lines(file, [{"input": "x"}])
    assert "record 1 of" in refused(file, format="pointwise") and "has label None" in refused(file, format="pointwise")
    message = refused(tmp_path, format="pointwise")
    assert "holds no single JSON file whose records have input, label; name the file" in message
    text(file, "  \n")
    assert "a.jsonl is empty" in refused(file, format="pointwise")


INSTRUCTIONS = [
    {"instruction": "Does the user like it?", "input": 'Liked: "Heat"', "output": "Yes."},
    {"instruction": "Does it sell?", "input": "", "output": "No."},
]


@pytest.mark.parametrize("form", ["array", "indented", "lines", "bom"])
def test_instruction(tmp_path, form):
    file = tmp_path / "train.json"
    contents = {
        "array": json.dumps(INSTRUCTIONS),
        "indented": "\n " + json.dumps(INSTRUCTIONS, indent=2) + "\n",
        "lines": "\n\n".join(json.dumps(record) for record in INSTRUCTIONS),
        "bom": "\ufeff" + json.dumps(INSTRUCTIONS),
    }
    text(file, contents[form])
    assert detect_format(file) == "instruction"
    log = BehaviorLog.read(file)
    assert log.column("label").to_pylist() == ["Yes.", "No."]
    assert log.items.column("title").to_pylist() == ['Does the user like it?\nLiked: "Heat"', "Does it sell?"]
    assert log.items.column("instruction").to_pylist() == [record["instruction"] for record in INSTRUCTIONS]
    assert log.items.column("input").to_pylist() == ['Liked: "Heat"', ""]


def test_a_long_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("llmrec_peft.data.readers.json_records.CHUNK", 64)
    records = [{"instruction": f"number {n} " + "é]}," * (n % 50), "output": n} for n in range(200)]
    text(tmp_path / "a.json", json.dumps(records, ensure_ascii=False))
    log = BehaviorLog.read(tmp_path / "a.json")
    assert log.items.column("title").to_pylist() == [record["instruction"] for record in records]
    assert log.column("label").to_pylist() == list(range(200))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(INSTRUCTIONS)[:-1], "the array has no end"),
        ("[", "entry 1 of the array in .* is not JSON: the array has no end"),
        (json.dumps(INSTRUCTIONS)[:-20], "entry 2 of the array in .* is not JSON"),
        (json.dumps([*INSTRUCTIONS, 5]), "record 3 of .* is 5; each must be a JSON object"),
        (json.dumps([{**INSTRUCTIONS[0], "instruction": 1}]), "record 1 of .* has instruction 1; it must be a text"),
        (json.dumps([{**INSTRUCTIONS[0], "input": {}}, {**INSTRUCTIONS[0], "input": [1]}]), r"record 2 .* input \[1\]"),
        (json.dumps([{**INSTRUCTIONS[0], "output": ""}]), "record 1 of .* has output ''"),
    ],
)
def test_instruction_bad_files(tmp_path, content, expected):
    text(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=expected):
        BehaviorLog.read(tmp_path / "a.json", format="instruction")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


def test_hub_with_configurations(hub_cache):
    directory = write(hub_cache / "repo" / "shop")
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("interactions", "items")
    )
    text(directory / "README.md", card + "---\n")
    log = BehaviorLog.read(f"hf://{directory}")
    assert log.name == "shop" and log.interactions.num_rows == 3
    assert log.items.column("title").to_pylist() == ITEMS["title"]
    assert BehaviorLog.read(str(directory), format="hub").interactions.equals(log.interactions)


def test_hub_with_files_only(hub_cache):
    directory = write(hub_cache / "repo" / "shop")
    log = BehaviorLog.read(directory, format="hub")
    assert log.column("note").to_pylist() == BehaviorLog.read(directory).column("note").to_pylist()


def test_hub_with_splits_of_pointwise_records(hub_cache):
    directory = hub_cache / "repo" / "talk"
    lines(directory / "train.jsonl", [{"input": DIALOGUE, "label": 1}, {"input": [DIALOGUE[0]], "label": 0}])
    lines(directory / "test.jsonl", [{"input": [DIALOGUE[0]], "label": 0}])
    log = BehaviorLog.read(directory, format="hub")
    assert log.column("label").to_pylist() == [1, 0, 0] and log.items.column("title")[1].as_py() == "user: Hi"


def test_hub_with_instructions_and_titled_interactions(hub_cache):
    lines(hub_cache / "a" / "train.jsonl", INSTRUCTIONS)
    assert BehaviorLog.read(hub_cache / "a", format="hub").column("label").to_pylist() == ["Yes.", "No."]
    lines(hub_cache / "b" / "train.jsonl", pa.table({**ROWS, "title": ["a", "b", "b"]}).to_pylist())
    assert BehaviorLog.read(hub_cache / "b", format="hub").num_items == 2


def test_hub_errors(hub_cache):
    lines(hub_cache / "a" / "train.jsonl", [{"text": "x"}])
    assert "and columns text; it needs configurations interactions and items" in refused(hub_cache / "a", format="hub")
    message = refused("hf://nobody/nothing-here")
    assert "data set 'nobody/nothing-here' cannot be loaded" in message and "check its name" in message
