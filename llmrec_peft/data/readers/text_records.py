"""Records that contain their whole text: pointwise JSON lines and instruction files.

Each record becomes one user and one item, hence a stream with one marker at its end.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.memory_mapped import collect
from llmrec_peft.data.readers.json_records import first_keys, is_json, read_records, record_batches
from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.errors import DataError
from llmrec_peft.messages import quoted


def text_file(path: str, keys: set[str]) -> Path | None:
    """The JSON file that a path means: itself, or the one in a directory whose first record has the keys."""
    place = Path(path)
    found = [place] if is_json(place) else sorted(e for e in place.glob("*") if is_json(e)) if place.is_dir() else []
    matching = [entry for entry in found if keys <= first_keys(entry)]
    return matching[0] if len(matching) == 1 else None


def _needed(path: str, keys: set[str]) -> Path:
    file = Path(path) if Path(path).is_file() else text_file(path, keys)
    if file is None:
        names = ", ".join(sorted(keys))
        raise DataError(f"{path} holds no single JSON file whose records have {names}; name the file")
    return file


@register("pointwise", 'a .jsonl of {"input", "label"}', lambda path: text_file(path, {"input", "label"}) is not None)
def read_pointwise(path: str) -> RawLog:
    """Read `{"input": text or dialogue, "label": value}` records; a dialogue is a list of `{"role", "content"}`.

    Items have the text as `title`. If every record has a `timestamp` (seconds), it is used; otherwise the record's
    number in the file is its time.

    Raises:
        DataError: a record whose input or label is missing or has a wrong type; the message names the record.
    """
    file = _needed(path, {"input", "label"})
    return pointwise_log(read_records(file), str(file), log_name(path))


@register(
    "instruction",
    'a .json or .jsonl of {"instruction", "input", "output"}',
    lambda path: text_file(path, {"instruction", "output"}) is not None,
)
def read_instruction(path: str) -> RawLog:
    """Read `{"instruction", "input", "output"}` records, JSON lines or one array; `output` becomes the label.

    Items have `instruction`, `input` and, as `title`, both joined by a line break.

    Raises:
        DataError: a record whose instruction or output is missing or has a wrong type; the message names the record.
    """
    file = _needed(path, {"instruction", "output"})
    return instruction_log(read_records(file), str(file), log_name(path))


def pointwise_log(records: Iterable[dict[str, Any]], where: str, name: str) -> RawLog:
    """The log of pointwise records; `where` names their source in messages."""

    def columns(record: dict[str, Any], number: int) -> dict[str, str]:
        return {"title": _text_of(record.get("input"), number, where)}

    return _collect(records, columns, ["title"], "label", where, name)


def instruction_log(records: Iterable[dict[str, Any]], where: str, name: str) -> RawLog:
    """The log of instruction records; `where` names their source in messages."""

    def columns(record: dict[str, Any], number: int) -> dict[str, str]:
        instruction = _text_value("instruction", record.get("instruction"), number, where)
        more = _text_value("input", record.get("input") or "", number, where)
        title = f"{instruction}\n{more}" if more.strip() else instruction
        return {"title": _filled(title, number, where), "instruction": instruction, "input": more}

    return _collect(records, columns, ["title", "instruction", "input"], "output", where, name)


def _text_value(key: str, value: Any, number: int, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"record {number} of {where} has {key} {quoted(value)}; it must be a text")
    return value


def _text_of(value: Any, number: int, where: str) -> str:
    """A text as it is; a dialogue as one `role: content` line a turn."""
    if isinstance(value, str):
        return _filled(value, number, where)
    turns = value if isinstance(value, list) else []
    if turns and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
        return _filled("\n".join(f"{turn.get('role', 'user')}: {turn['content']}" for turn in turns), number, where)
    raise DataError(
        f"record {number} of {where} has input {quoted(value)}; it must be a text or a list of role and content"
    )


def _filled(text: str, number: int, where: str) -> str:
    if not text.strip():
        raise DataError(f"record {number} of {where} has an empty text; fill it or drop the record")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"record {number} of {where} holds half of a surrogate pair at character {error.start}, which is not text; "
            "correct its escape"
        ) from error
    return text


def _collect(
    records: Iterable[dict[str, Any]],
    columns: Callable[[dict[str, Any], int], dict[str, str]],
    item_columns: list[str],
    label_key: str,
    where: str,
    name: str,
) -> RawLog:
    fields = [("id", pa.large_string()), ("label", pa.large_string()), ("timestamp", pa.float64())]
    schema = pa.schema(fields + [(column, pa.large_string()) for column in item_columns])
    kinds: set[type] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records, start=1):
            row: dict[str, Any] = columns(record, number)
            row["id"] = f"r{number:09d}"  # of one width, so that sorted ids are in file order
            row["label"] = _label_of(record.get(label_key), kinds, number, label_key, where)
            row["timestamp"] = _time_of(record.get("timestamp"), number, where)
            yield row

    table = collect(record_batches(rows(), schema), schema)
    label = table.column("label")
    if kinds == {int}:
        label = label.cast(pa.int64())
    elif kinds <= {int, float}:
        label = label.cast(pa.float64())
    times = table.column("timestamp")
    if times.null_count == len(times):
        times = pa.chunked_array([pa.array(np.arange(len(times)))])
    elif not pc.any(pc.not_equal(pc.floor(times), times)).as_py():
        times = times.cast(pa.int64(), safe=False) if not times.null_count else times
    ids = table.column("id")
    interactions = pa.table({"user_id": ids, "item_id": ids, "timestamp": times, "label": label})
    items = pa.table({"item_id": ids, **{column: table.column(column) for column in item_columns}})
    return RawLog(interactions, items, name)


def _label_of(value: Any, kinds: set[type], number: int, key: str, where: str) -> str:
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | float | str) or value != value or value == "":
        raise DataError(f"record {number} of {where} has {key} {quoted(value)}; it must be a text or a number")
    if not isinstance(value, str) and not abs(value) < 2**63:
        raise DataError(f"record {number} of {where} has {key} {quoted(value)}; a number has at most 64 bits")
    kinds.add(type(value))
    return _filled(value, number, where).strip() if isinstance(value, str) else str(value)


def _time_of(value: Any, number: int, where: str) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63):
        return value
    raise DataError(f"record {number} of {where} has timestamp {quoted(value)}; it must be seconds since 1970")
