"""Odd values in tables and templates: one text in training and serving, or an error of one line.

The same way fail: nan, infinities, bytes, structs, nested lists, halves of surrogate pairs, invalid UTF-8, invisible
titles and ids, dates beyond Python's, and formats that take memory.
"""

import datetime
import decimal
import sys

import numpy as np
import pyarrow as pa
import pytest

from llmrec_peft import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.rendering import python_values, render
from llmrec_peft.data.tables import is_blank
from llmrec_peft.data.templates import fill
from llmrec_peft.data.titles import is_unseen
from llmrec_peft.errors import DataError, DomainError, LLMRecError

INVISIBLE = ["", " \t\n", "\u200b\u200d", "\u202e\u2066", "\x00\x1f", "\u3164\uffa0", "\u2800", "\ufe0f", "\xad",
             "\U000e0041", "\u115f\u1160", "\u180e\u034f", "\x85\u2028"]  # fmt: skip
FORBIDDEN = ["->", "<s>"]


def broken(texts: list[bytes]) -> pa.Array:
    """A string column of these bytes, whatever they are, as another tool's parquet can hold them."""
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def log_of(items: dict | None = None, **rows) -> BehaviorLog:
    table = {"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [0, 1], "label": [1, 0], **rows}
    return BehaviorLog(pa.table(table), pa.table({"item_id": ["a", "b"], "title": ["A", "B"], **(items or {})}))


@pytest.mark.parametrize("text", INVISIBLE)
def test_titles_and_ids_that_nobody_sees(text):
    with pytest.raises(DataError, match=r"1 items without a title \(first: 'b'\)"):
        log_of({"title": ["A", text]})
    with pytest.raises(DataError, match=r"item_id in .* is an empty string in 1 rows"):
        log_of({"item_id": ["a", text]})


def test_both_forms_of_invisible_agree_on_every_character():
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    found = is_blank(pa.array(characters)).to_pylist()
    assert found == [is_unseen(character) for character in characters] and 300 < sum(found) < 4500
    assert not any(map(is_unseen, ["\ufffd", "é", "日", "🎬", "x\u200b", "\u0301", "!"]))


@pytest.mark.parametrize("bad", [b"\xed\xa0\xbd", b"\xff", b"caf\xe9"])
def test_bytes_that_are_not_utf8(bad):
    for tables in ({"items": {"title": broken([b"A", bad])}}, {"user_id": broken([b"u", bad])},
                   {"note": broken([b"u", bad])},
                   {"items": {"tags": pa.ListArray.from_arrays([0, 1, 2], broken([b"u", bad]))}},
                   {"note": broken([b"u", bad]).dictionary_encode()}):  # fmt: skip
        with pytest.raises(DataError, match="is damaged .*write the texts as UTF-8"):
            log_of(**tables)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (pa.array([1.0, float("nan")]), "is NaN in 1 rows (row 1)"),
        (pa.array([1.0, 2.0**60]), "is a float above 9,007,199,254,740,992"),
        (pa.array([1.0, float("inf")]), "is a float above"),
        (pa.array([b"a", b"b"]), "got binary"),
        (pa.array([{"a": 1}, None]), "got struct"),
        (pa.array([True, False]), "got bool"),
    ],
)
def test_ids_of_odd_types(ids, named):
    with pytest.raises(DataError) as caught:
        log_of(user_id=ids)
    assert named in str(caught.value) and "\n" not in str(caught.value)


ODD = [
    pa.array([None, float("nan"), -0.0, 0.0, 2.55, 1e300, 1e-7, 3.0]),
    pa.array([None, float("nan"), 2.55, 0.1, 3.0, -0.0], pa.float32()),
    pa.array([1.5, None, float("nan")], pa.float16()),
    pa.array([2**64 - 1, 0, None], pa.uint64()),
    pa.array([-(2**63), 2**63 - 1, None]),
    pa.array([True, False, None]),
    pa.array([decimal.Decimal("1.50"), None]),
    pa.array([datetime.date(2020, 1, 2), None]),
    pa.array([1_600_000_000_123_456_000, None], pa.timestamp("ns")),
    pa.array([1_600_000_000, None], pa.timestamp("s", "UTC")),
    pa.array([90_061, None], pa.duration("s")),
    pa.array([3_661, None], pa.time32("s")),
    pa.array(["a -> b\n<s>", None, "\u202e\x00é\u2028🎬", " x ", "->->", "-> ->"]),
    pa.array(["x", "y", None, "x"]).dictionary_encode(),
    pa.array([["Drama", "a -> b"], [], None, ["x", None], ["y"]]),
    pa.array([[1.0, 2.55], [1e-7], [float("nan")], [1e20]]),
    pa.array([[1.0, 2.55]], pa.list_(pa.float32())),
    pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)),
    pa.array([[True], [False]]),
    pa.nulls(3),
]  # fmt: skip


@pytest.mark.parametrize("values", ODD, ids=lambda values: str(values.type))
def test_training_and_serving_write_one_text(values):
    assert_one_text("<s>{x}-{x}>", values)


def test_training_and_serving_write_one_text_at_random():
    rng = np.random.default_rng(0)
    pieces = ["->", "<", "s", ">", "-", " ", "\n", "\x00", "é", "日", "🎬", "\u200b", "a", "\u2028", "{", "}", "\ufffd"]
    for _ in range(60):
        texts = ["".join(rng.choice(pieces, rng.integers(0, 9))) for _ in range(20)]
        numbers = np.ldexp(rng.normal(size=20), rng.integers(-40, 60, 20))
        numbers[rng.integers(0, 20, 3)] = [np.nan, -0.0, 7]
        for values in (pa.array(texts), pa.array([texts[:3], texts[3:5], []]), pa.array(numbers),
                       pa.array(numbers.astype(np.float32)), pa.array(rng.integers(-(2**62), 2**62, 9))):  # fmt: skip
            assert_one_text("{x}{x} <s>{x}", values)
        assert_one_text("{x:,.2f}|{x:>12.3g}", pa.array(numbers))


def assert_one_text(template: str, values: pa.Array) -> None:
    found = render(template, {"x": values}, FORBIDDEN).to_pylist()
    if pa.types.is_nested(values.type):  # a float in a list is float32's short form in both
        rows = [None if row is None else [np.float32(p) if values.type.value_type == pa.float32() else p for p in row]
                for row in values.to_pylist()]  # fmt: skip
    else:
        rows = python_values(values, "x")
    assert found == [fill(template, {"x": row}, FORBIDDEN) for row in rows]


def test_missing_numbers_are_no_words():
    values = pa.array([float("nan"), None, 1.5])
    assert render("{x}!", {"x": values}, []).to_pylist() == ["!", "!", "1.5!"]
    for missing in (None, float("nan"), np.float32("nan"), np.datetime64("NaT"), decimal.Decimal("sNaN")):
        assert fill("{x:.2f}!", {"x": missing}, []) == "!"


def test_halves_of_surrogate_pairs():
    for text, right in (
        ("a\ud83d", "a\ufffd"),
        ("\udfff b", "\ufffd b"),
        ("\ud83d\ude00", "😀"),
        ("-\ud800>", "-\ufffd>"),
    ):
        assert fill("{x}", {"x": text}, FORBIDDEN) == right == fill("{x}", {"x": [text]}, FORBIDDEN)
    assert fill("{x:c}", {"x": 0xD83D}, []) == "\ufffd" == render("{x:c}", {"x": pa.array([0xD83D])}, [])[0].as_py()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([float("inf")]),
        pa.array([[1.0, float("-inf")]]),
        pa.array([b"abc"]),
        pa.array([b"abc"], pa.large_binary()),
        pa.array([b"abc"], pa.binary(3)),
        pa.array([{"a": 1}]),
        pa.array([[["a"]]]),
        pa.array([[{"a": 1}]]),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([10**17], pa.timestamp("s")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([0], pa.timestamp("s", "Mars/Olympus")),
        pa.array([decimal.Decimal("1.5")], pa.decimal32(5, 2)),
        broken([b"\xff"]),
    ],
    ids=lambda values: str(values.type),
)
def test_columns_that_no_template_can_show(values):
    with pytest.raises((DataError, DomainError)) as caught:
        render("{x}", {"x": values}, [])
    assert "x" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [b"x", {"a": 1}, {1}, object(), 1j, [["a"]], [{"a": 1}], 10**5000, 2**65, float("inf"), np.float32("inf"), int, ...,
     decimal.Decimal("-Infinity"), np.zeros((2, 2)), np.array([1j]), [float("inf")], range(3)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_that_no_template_can_show(value):
    with pytest.raises(LLMRecError) as caught:
        fill("{x}", {"x": value}, [])
    assert "'x'" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("{title:>1000000000}", "no number above 1000"),
        ("{title:.1000000000}", "no number above 1000"),
        ("{title:0>9999999999999999999999}", "no number above 1000"),
        ("{title:>１００００}", "no number above 1000"),
        ("{day:%999999Y}", "no number above 1000"),
        ("{title:" + " " * 101 + "}", "at most 100 characters"),
        ("{title:{width}}", "no field inside"),
        ("{title.__class__}", "fields are column names"),
        ("{title[0]}", "fields are column names"),
        ("{title!r}", "fields are column names"),
        ("{title!r:>10}", "fields are column names"),
        ("{0}", "fields are column names"),
        ("{title", "is not a template"),
        ("{title}" * 201, "201 fields"),
        ("x" * 100_001 + "{title}", "the most; shorten it"),
        ("\ud83d{title}", "half of a surrogate pair"),
    ],
)
def test_templates_out_of_bounds(field, named):
    for key in ("event", "header"):
        texts = {"event": "{title}", key: field}
        with pytest.raises(DomainError) as caught:
            Domain.from_dict({"name": "d", "outcomes": {"a": " a", "b": " b"}, **texts})
        assert named in str(caught.value) and key in str(caught.value) and len(str(caught.value)) < 400


def test_formats_in_bounds_stay():
    for event in ("{price:>10.2f}", "{title:.80}", "{day:%Y-%m-%d}", "{price:,}", "{title:*^1000}"):
        assert Domain.from_dict({"name": "d", "event": event, "outcomes": {"a": " a", "b": " b"}}).event == event


@pytest.mark.parametrize("values", [[[1], [2]], [{"a": 1}, {"a": 2}]])
def test_label_columns_of_odd_types(values):
    log = log_of(label=pa.array(values))
    for label in ({"column": "label"}, {"column": "label", "above": 1}):
        domain = Domain.from_dict({"name": "d", "event": "{title}", "outcomes": {"a": " a", "b": " b"}, "label": label})
        with pytest.raises(DataError, match="label column 'label' must hold"):
            domain.classes(log)
