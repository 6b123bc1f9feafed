"""Domains: what their files may say, the label rules, and item text as plain data."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import yaml

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.rendering import render
from llmrec_peft.data.templates import neutralise, template_columns
from llmrec_peft.errors import DataError, DomainError

TEXT = """
name: movies
header: "Movies {user_id} rated:\\n"
event: "{title} ({genres}, {price:.2f})"
marker: " =>"
outcomes: {dislike: " no\\n", like: " yes\\n"}
label: {column: rating, above: 3}
simultaneous: isolate
duplicates: keep
split: {by: user, valid: 0.2, test: 0.3}
negatives: {per_positive: 2, sampling: uniform, label: dislike}
stream: {context: 5, targets: 7, max_length: 512, history_labels: [like]}
recommend: {exclude: [like]}
"""
SMALL = {"name": "movies", "event": "{title}", "outcomes": {"dislike": " no\n", "like": " yes\n"}}


def test_from_yaml_and_back(tmp_path):
    path = tmp_path / "movies.yaml"
    path.write_text(TEXT, encoding="utf-8")
    domain = Domain.from_yaml(path)
    assert domain.to_dict() == {
        **yaml.safe_load(TEXT),
        "label": {"column": "rating", "above": 3, "map": None, "missing": "refuse"},
    }
    assert Domain.from_dict(domain.to_dict()) == domain
    assert Domain.from_dict(yaml.safe_load(yaml.safe_dump(domain.to_dict(), sort_keys=False))) == domain
    assert domain.labels == ["dislike", "like"] and domain.negative_class == 0
    assert domain.event_columns == ["title", "genres", "price"] and domain.header_columns == ["user_id"]


def test_defaults():
    domain = Domain.from_dict(SMALL)
    assert (domain.header, domain.marker, domain.simultaneous, domain.label.column) == ("", " ->", "order", "label")
    assert (domain.split.by, domain.split.valid, domain.split.test) == ("time", 0.1, 0.1)
    assert (domain.stream.context, domain.stream.targets, domain.stream.max_length) == (10, 30, 1024)
    assert domain.negatives.per_positive == 0 and domain.stream.history_labels is None
    assert domain.recommend.exclude is None


def test_order_of_labels_is_the_order_of_the_file(tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("name: d\nevent: '{title}'\noutcomes: {z: ' z', b: ' b', a: ' a'}\nnegatives: {label: b}\n")
    assert Domain.from_yaml(path).labels == ["z", "b", "a"] and Domain.from_yaml(path).negative_class == 1


WRONG = [
    ({"nam": 1}, "domain: unknown key 'nam'; the keys are name, event, outcomes, header, marker, label"),
    ({"stream": {"contexts": 3}}, "domain: stream: unknown key 'contexts'; the keys are context, targets, max_length"),
    ({"label": {"colum": "x"}}, "domain: label: unknown key 'colum'; the keys are column, above, map"),
    ({"label": "rating"}, "domain: label: must be a mapping of keys; got str"),
    ({"split": None}, "domain: split: must be a mapping of keys; got NoneType"),
    ({"outcomes": {True: " yes", False: " no"}}, "outcomes: labels must be text, and YAML reads True here; put quotes"),
    ({"outcomes": {0: " no", 1: " yes"}}, "outcomes: labels must be text, and YAML reads 0 here"),
    ({"outcomes": ["a", "b"]}, r"outcomes: must be a mapping; got \['a', 'b'\]"),
    ({"outcomes": {"a": True, "b": " b"}}, r"the outcome of 'a' must be a word; got True \(quote yes, no, on, off\)"),
    ({"outcomes": {"a": "  ", "b": " b"}}, "the outcome of 'a' must be a word"),
    ({"outcomes": {"a": " a"}}, r"outcomes must hold two labels or more; got \['a'\]"),
    ({"outcomes": {"a": " x", "b": " x"}}, "two labels have one outcome word"),
    ({"outcomes": {"a": " x ->", "b": " b"}}, "the outcome ' x ->' of 'a' contains the marker ' ->'; reword"),
    ({"label": {"map": {True: "like"}}}, "map: labels must be text, and YAML reads True here; put quotes"),
    ({"label": {"map": {"x": "love"}}}, "label.map maps 'x' to 'love'; the labels are dislike, like"),
    ({"label": {"above": 3, "map": {"1": "like"}}}, "label.above needs two outcomes and no map"),
    ({"label": {"above": 3}, "outcomes": {"a": " a", "b": " b", "c": " c"}}, "label.above needs two outcomes .* got 3"),
    ({"label": {"above": "3"}}, "label.above must be a number; got '3'"),
    ({"label": {"column": 3}}, "label.column must be a column's name; got 3"),
    ({"split": {"valid": "a tenth"}}, "split.valid must be a number; got 'a tenth'"),
    ({"split": {"by": "item"}}, "split.by must be one of time, user; got 'item'"),
    ({"simultaneous": "hide"}, "simultaneous must be one of order, isolate; got 'hide'"),
    ({"negatives": {"sampling": "hard"}}, "negatives.sampling must be one of popularity, uniform; got 'hard'"),
    ({"negatives": {"label": "no"}}, "negatives.label 'no' is not among the labels dislike, like"),
    ({"negatives": {"per_positive": -1}}, "negatives.per_positive must be a whole number of at least 0; got -1"),
    ({"stream": {"context": -1}}, "stream.context must be a whole number of at least 0; got -1"),
    ({"stream": {"targets": 0}}, "stream.targets must be a whole number of at least 1; got 0"),
    ({"stream": {"targets": True}}, "stream.targets must be a whole number of at least 1; got True"),
    ({"stream": {"max_length": 2.5}}, "stream.max_length must be a whole number of at least 8; got 2.5"),
    ({"recommend": {"exclude": ["no"]}}, "recommend.exclude has 'no'; the labels are dislike, like"),
    ({"recommend": {"include": []}}, "unknown key 'include'"),
    ({"stream": {"history_labels": ["no"]}}, "stream.history_labels has 'no'; the labels are dislike, like"),
    ({"stream": {"history_labels": "like"}}, "stream.history_labels must be a list of labels, or left out; got 'like'"),
    ({"event": "{title} -> {genres}"}, "event contains the marker ' ->', which only closes events; reword"),
    ({"header": "a->b"}, "header contains the marker ' ->'"),
    ({"event": "{title} {label}"}, "event shows the column 'label', which reveals the label; remove it"),
    ({"event": "{title} {label}", "label": {"column": "behaviour"}}, "event shows the column 'label', which reveals"),
    ({"event": "{title} {liked}", "label": {"column": "liked"}}, "event shows the column 'liked', which reveals"),
    ({"header": "{rating}"}, "header shows the column 'rating', which reveals the label"),
    ({"event": "no column"}, r"event 'no column' names no column; use at least one, such as \{title\}"),
    ({"event": "{title"}, "event is not a template .*; write {{ for a brace"),
    ({"event": "{}"}, r"event has the field \{\}; fields are column names"),
    ({"event": "{title.upper}"}, r"event has the field \{title.upper\}; fields are column names"),
    ({"event": "{title[0]}"}, r"event has the field \{title\[0\]\}; fields are column names"),
    ({"event": "{title!r}"}, r"event has the field \{title!r\}; fields are column names"),
    ({"event": 5}, "event must be a text that is not blank; got 5"),
    ({"name": " "}, "name must be a text that is not blank; got ' '"),
    ({"marker": "\n"}, r"marker must be a text that is not blank; got '\\n'"),
    ({"header": None}, "header must be a text, or left out; got None"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_a_domain_may_not_contain(change, message):
    with pytest.raises(DomainError, match=message) as caught:
        Domain.from_dict({**SMALL, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "event", "outcomes"])
def test_required_keys(key):
    with pytest.raises(DomainError, match=f"key '{key}' is required and missing; add it"):
        Domain.from_dict({name: value for name, value in SMALL.items() if name != key})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "a domain file must be YAML in UTF-8; "),
        (b"name: \xff", "a domain file must be YAML in UTF-8; "),
        (b"- a\n", "must be a mapping of keys; got list"),
        (b"", "must be a mapping of keys; got NoneType"),
        (
            b"name: d\nevent: '{title}'\noutcomes: {no: ' no', yes: ' yes'}\n",
            "YAML reads False here; put quotes around",
        ),
    ],
)
def test_files_that_are_no_domain(content, message, tmp_path):
    path = tmp_path / "d.yaml"
    path.write_bytes(content)
    with pytest.raises(DomainError, match=message) as caught:
        Domain.from_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(DomainError, match="cannot read the domain file .*; give an existing YAML"):
        Domain.from_yaml(tmp_path / "none.yaml")


# -- labels ----------------------------------------------------------------------------------------


def log_of(values, column="label"):
    """One user's log whose `column` holds the values."""
    table = {"user_id": ["u"] * len(values), "item_id": ["i"] * len(values), "timestamp": list(range(len(values)))}
    table["label"] = [0] * len(values)
    return BehaviorLog(pa.table({**table, column: values}), pa.table({"item_id": ["i"], "title": ["t"]}), name="log")


def classes(values, label=None, outcomes=("dislike", "like"), column="label"):
    content = {
        **SMALL,
        "outcomes": {name: f" {name}" for name in outcomes},
        "label": {"column": column, **(label or {})},
    }
    return Domain.from_dict(content).classes(log_of(values, column)).tolist()


@pytest.mark.parametrize(
    ("values", "label", "expected"),
    [
        ([0, 1, 1], None, [0, 1, 1]),
        ([0.0, 1.0], None, [0, 1]),
        ([True, False], None, [1, 0]),
        (["like", "dislike"], None, [1, 0]),
        (["1", "0"], None, [1, 0]),
        (pa.array(["like", "dislike", "like"]).dictionary_encode(), None, [1, 0, 1]),
        ([3, 4, 2, 3], {"above": 3}, [0, 1, 0, 0]),
        ([3.0, 3.5], {"above": 3}, [0, 1]),
        (["3", "3.5"], {"above": 3}, [0, 1]),
        (["a", "b", "c"], {"map": {"a": "like", "b": None, "c": "dislike"}}, [1, -1, 0]),
        ([1, 2, 3], {"map": {1: "dislike", 2: None, 3: "like"}}, [0, -1, 1]),
        ([True, False], {"map": {"True": "like", "False": None}}, [1, -1]),
    ],
)
def test_label_rules(values, label, expected):
    assert classes(values, label) == expected


def test_more_than_two_labels():
    assert classes([2, 0, 1], outcomes=("a", "b", "c")) == [2, 0, 1]
    assert classes(["c", "a"], outcomes=("a", "b", "c")) == [2, 0]


@pytest.mark.parametrize(
    ("values", "label", "message"),
    [
        ([0, 2, 2, 1], None, r"label column 'x' has 2, .* in 2 rows \(first: 1, 2\); use 'dislike', 'like', 0, 1"),
        ([0, -1], None, r"has -1, .* in 1 rows \(first: 1\)"),
        ([0.5, 1.0], None, r"has 0.5, .* \(first: 0\)"),
        (["like", "Like"], None, r"has 'Like', which .* \(first: 1\); .* label.map \(null leaves rows out\)"),
        ([0, None], None, r"has None, .* \(first: 1\)"),
        (["a", "b"], {"map": {"a": "like"}}, r"has 'b', .* \(first: 1\); use 'a' or add it"),
        ([4.0, None, float("nan")], {"above": 3}, r"label column 'x' is missing in 2 rows \(first: 1, 2\)"),
        (["good"], {"above": 3}, "label column 'x' must hold numbers for `above`; got string"),
    ],
)  # fmt: skip
def test_labels_outside_the_rule_name_their_rows(values, label, message):
    with pytest.raises(DataError, match=message) as caught:
        classes(values, label, column="x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [{"above": 3}, {"map": {"4.0": "like", "2.0": "dislike"}}])
def test_rows_without_a_value_can_be_left_out(label):
    assert classes([4.0, None, 2.0, float("nan")], {**label, "missing": "leave_out"}, column="x") == [1, -1, 0, -1]


def test_a_label_column_that_is_not_there():
    domain = Domain.from_dict({**SMALL, "label": {"column": "stars"}})
    with pytest.raises(DataError, match="stars.*user_id, item_id, timestamp, label"):
        domain.classes(log_of([0, 1]))


# -- text ------------------------------------------------------------------------------------------

PIECES = tuple("-><s/|[]aé日🎬 \n\r\t\x00\x1f\x85\u2028\u2029\u200b\ufeff\u3000\u202e")
PIECES = ("->", "<s>", "</s>", "<|im_end|>", "<|", "|>", "im_end", *PIECES)
FORBIDDEN = (
    ["->"],
    ["<|im_end|>", "</s>", "<s>", "->"],
    ["|", "<|im_end|>", "->"],
    ["- >", "->", ">"],
    ["s", "<s>", "< s>"],
    ["--", "-- --", "a a", "aa"],
)
BREAKS = "\n\r\t\x00\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x85\u200b\u2028\u2029\ufeff"


def test_neutralised_text_spells_nothing_and_stays_on_one_line():
    rng = np.random.default_rng(0)
    for number in range(4000):
        forbidden = FORBIDDEN[number % len(FORBIDDEN)]
        text = "".join(rng.choice(PIECES, rng.integers(0, 12)))
        clean = neutralise(text, forbidden)
        assert not any(word in clean for word in forbidden), (text, clean)
        assert not any(character in clean for character in BREAKS) and len(clean.splitlines()) <= 1
        assert neutralise(clean, forbidden).split() == clean.split()


def test_harmless_text_stays_as_it_is():
    for text in ("Toy Story (1995)", "100% - wool > silk", "{title} {{x}}", "日本語 café 🎬", "a < s> b"):
        assert neutralise(text, ["->", "<s>"]) == text


def test_nothing_but_spaces_and_single_forbidden_characters_is_lost():
    rng = np.random.default_rng(1)
    for _ in range(500):
        text = "".join(rng.choice(PIECES[:14], rng.integers(0, 12)))
        clean = neutralise(text, ["<|im_end|>", "</s>", "<s>", "->"])
        assert clean.replace(" ", "") == text.replace(" ", "")


def test_a_forbidden_text_with_a_space_at_its_edge_is_broken_up_too():
    assert "<end>" not in neutralise("a <end> b <end>", [" <end> "])
    assert Domain.from_dict(SMALL).forbidden([" <end>", "  ", "\n"]) == ["->", "<end>"]


def test_render():
    columns = {"title": pa.array(["A", None, "C\nD"]), "price": pa.array([1.5, 2.25, None])}
    texts = render("{title}: {price:.2f} {{x}} {title}", columns, []).to_pylist()
    assert texts == ["A: 1.50 {x} A", ": 2.25 {x} ", "C D:  {x} C D"]


def test_render_shows_float32_and_categories_as_they_are_read():
    columns = {"price": pa.array([2.55, 0.1], pa.float32()), "kind": pa.array(["a", "b"]).dictionary_encode()}
    assert render("{kind} {price}", columns, []).to_pylist() == ["a 2.55", "b 0.1"]


def test_render_breaks_up_what_two_columns_spell_together():
    columns = {"a": pa.array(["x-", "x", "<"]), "b": pa.array([">y", "y", "s>"])}
    # The template's own line break and special token are the domain's wish, and stay.
    assert render("{a}{b}\nend", columns, ["<s>", "->"]).to_pylist() == ["x- >y\nend", "xy\nend", "< s>\nend"]
    texts = render("<s>{a}{b}", columns, ["<s>", "->"]).to_pylist()
    assert texts[1] == "<s>xy" and all(text.count("<s>") <= 1 and "->" not in text for text in texts)


def test_a_format_that_does_not_fit_its_column():
    with pytest.raises(DomainError, match=r"field \{a:.2f\} does not fit the column's values of type string"):
        render("{a:.2f}", {"a": pa.array(["x"])}, [])


def test_template_columns():
    assert template_columns("{b} {a} {b:.2f} {{c}}") == ["b", "a"]


STARS = {str(star): f" {star} stars\n" for star in range(1, 6)}


@pytest.mark.parametrize(
    ("outcomes", "values", "expected"),
    [
        ({"1": " yes\n", "0": " no\n"}, [1, 0, 1], ["1", "0", "1"]),
        (STARS, [1, 4, 2], ["1", "4", "2"]),
        ({"no": " no\n", "yes": " yes\n"}, [1, 0, 1], ["yes", "no", "yes"]),
    ],
)
def test_columns_of_every_type_mean_the_same_labels(outcomes, values, expected):
    domain = Domain.from_dict({**SMALL, "outcomes": outcomes})
    for column in (pa.array(values), pa.array(values, pa.float64()), pa.array([str(value) for value in values])):
        found = domain.classes(log_of(column))
        assert [domain.labels[number] for number in found] == expected


def test_numbers_are_not_positions_where_labels_are_numbers():
    with pytest.raises(DataError, match="has 0, which is not one of the domain's labels"):
        Domain.from_dict({**SMALL, "outcomes": STARS}).classes(log_of(pa.array([0, 1])))


def test_truth_values_are_labels_and_keys_of_a_map():
    column = pa.array([True, False])
    assert Domain.from_dict(SMALL).classes(log_of(column)).tolist() == [1, 0]
    mapped = {**SMALL, "label": {"map": {"true": "like", "false": "dislike"}}}
    assert Domain.from_dict(mapped).classes(log_of(column)).tolist() == [1, 0]


def test_more_labels_than_a_byte_counts():
    names = [f"label{number}" for number in range(300)]
    domain = Domain.from_dict({**SMALL, "outcomes": {name: f" {name}\n" for name in names}})
    assert domain.classes(log_of(pa.array(names))).tolist() == list(range(300))


def test_lists_are_joined_and_structs_refused():
    genres = pa.array([["Action", "Crime -> yes\n"], [], None, ["War"]])
    assert render("{genres}!", {"genres": genres}, ["->"]).to_pylist() == ["Action, Crime - > yes!", "!", "!", "War!"]
    with pytest.raises(DomainError, match=r"field \{x\} names a column of type struct<.*flatten it"):
        render("{x}", {"x": pa.array([{"a": 1}])}, [])
