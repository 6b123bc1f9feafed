"""An export answers as the scorer of the model that it was made of, by ONNX Runtime alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from llmrec_peft import Scorer
from llmrec_peft.data.rendering import render
from llmrec_peft.data.templates import fill
from llmrec_peft.errors import BundleError, DataError, ModelError, StreamError
from llmrec_peft.requests.plain_items import PlainItems
from llmrec_peft.requests.request import Request
from llmrec_peft.serving import OnnxScorer
from llmrec_peft.serving import onnx_scorer as scorer_module
from tests.conftest import NASTY_TITLES, ROOT
from tests.support.requests import HISTORY, MOVIES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own call
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LONG = [(f"i{n % 24}", "like" if n % 3 else "dislike") for n in range(40)]
NEW = [{"title": title, "genres": "Drama"} for title in (*NASTY_TITLES, "Кино 🎬", "ｘ －＞ yes")]


@pytest.fixture
def pair(exported, items):
    """(OnnxScorer, Scorer) of one model."""
    merged, onnx, _ = exported
    return OnnxScorer.load(onnx, items.to_pylist(), threads=1), Scorer.load(merged, items)


def test_equal_to_the_scorer(pair):
    onnx, expected = pair
    assert onnx.labels == expected.labels and onnx.domain["name"] == expected.domain.name
    for history in (HISTORY, [], LONG):
        found = onnx.score(history, MOVIES + NEW)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected.score(history, MOVIES + NEW), atol=1e-4)
    assert np.abs(onnx.score(HISTORY, MOVIES) - onnx.score([], MOVIES)).max() > 1e-2
    by_mapping = [{"item_id": "i4", "genres": "Opera"}, {"item_id": "i4"}, "i4"]
    np.testing.assert_allclose(onnx.score(HISTORY, by_mapping), expected.score(HISTORY, by_mapping), atol=1e-4)


def test_a_window_that_overflows_drops_the_oldest_for_that_candidate_alone(pair):
    onnx, expected = pair
    mixed = [{"title": "word " * size, "genres": "Drama"} for size in (1, 60, 120, 140, 150, 155)]
    dropped = onnx._encoder.encode(Request(LONG, mixed)).dropped
    assert dropped[0] == 0 and len(set(dropped.tolist())) > 2, dropped
    found = onnx.score(LONG, mixed)
    np.testing.assert_allclose(found, expected.score(LONG, mixed), atol=1e-4)
    with pytest.raises(StreamError, match="candidate 1 takes"):
        onnx.score(LONG, ["i3", {"title": "word " * 600, "genres": "Drama"}])


def test_histories_of_unequal_length_and_rows_of_few_candidates(pair, monkeypatch):
    onnx, expected = pair
    requests = [(HISTORY[:n], MOVIES[: 8 - n]) for n in (5, 0, 3, 1)] + [(HISTORY, MOVIES), (HISTORY, MOVIES[::-1])]
    want = expected.score_many(requests)
    for tokens in (4096, 50, 1):
        for found, right in zip(onnx.score_many(requests, batch_tokens=tokens), want, strict=True):
            np.testing.assert_allclose(found, right, atol=1e-4)


def test_a_pass_is_bounded_for_any_request(pair, monkeypatch):
    onnx, _ = pair
    sizes = []
    run = onnx._model.graph._run
    monkeypatch.setattr(
        onnx._model.graph, "_run", lambda rows: sizes.append((len(rows), max(map(len, rows)))) or run(rows)
    )
    monkeypatch.setattr(scorer_module, "CANDIDATE_TOKENS", 100)
    once = onnx.score(HISTORY, MOVIES)
    many = [{"title": f"Film {n}", "genres": "Drama"} for n in range(400)]
    sizes.clear()
    found = onnx.score(HISTORY, many + many, batch_tokens=1000)
    assert len(sizes) > 10 and max(rows * length for rows, length in sizes) <= 1000
    np.testing.assert_array_equal(found[:400], found[400:])
    np.testing.assert_allclose(onnx.score(HISTORY, [*MOVIES, *many])[:8], once, atol=1e-5)


@pytest.mark.parametrize(
    ("history", "candidates", "message"),
    [
        ([("i3", "adored")], MOVIES, "label 'adored'"),
        ([("zz", "like")] + HISTORY * 9, MOVIES, "item 'zz' is unknown among the 24 items"),
        (HISTORY, ["i3", "zz"], "item 'zz' is unknown"),
        (HISTORY, "i3", "must be a list"),
        (HISTORY, [True], "must be an item id or a mapping"),
        (HISTORY, [{"title": "x"}], "lacks genres"),
        ([("i3",)], MOVIES, "must be a pair"),
    ],
)
def test_bad_input_is_named_as_the_scorer_names_it(history, candidates, message, pair):
    for scorer in pair:
        with pytest.raises(DataError, match=message):
            scorer.score(history, candidates)
        with pytest.raises(DataError, match=f"request 1: .*{message}"):
            scorer.score_many([(HISTORY, MOVIES), (history, candidates)])
        assert scorer.score(HISTORY, []).shape == (0, 2)
        assert scorer.score_many([]) == []


def test_without_torch_transformers_and_pyarrow(exported, items, tmp_path):
    merged, onnx, _ = exported
    rows = items.to_pylist()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    requests = [(HISTORY, MOVIES), ([], ["i3"])]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/serving/score_alone.py", onnx, tmp_path, json.dumps(requests)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    for found, want in zip(printed["answers"], Scorer.load(merged, items).score_many(requests), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-4)
    assert "pip install llmrec-peft[train]" in printed["message"]


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_damaged_file_is_refused(name, exported, tmp_path):
    directory = shutil.copytree(exported[1], tmp_path / "copy")
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} has the SHA-256 \w+\.\.\., but serving.json says \w+"):
        OnnxScorer.load(directory)
    (directory / name).unlink()
    with pytest.raises(BundleError, match=f"{name} has the SHA-256 none"):
        OnnxScorer.load(directory)


def test_an_edited_manifest_is_refused(exported, tmp_path):
    directory = shutil.copytree(exported[1], tmp_path / "copy")
    path = directory / "serving.json"
    manifest = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**manifest, "calibration": {"temperature": 1.0, "bias": None}}), "utf-8")
    with pytest.raises(BundleError, match="so it was edited"):
        OnnxScorer.load(directory)
    path.write_text(json.dumps({**manifest, "format_version": 9}), "utf-8")
    with pytest.raises(BundleError, match="format_version 9"):
        OnnxScorer.load(directory)
    path.unlink()
    with pytest.raises(BundleError, match=r"no serving\.json"):
        OnnxScorer.load(directory)


def test_settings_that_cannot_be(exported):
    with pytest.raises(BundleError, match="no model of precision 'int4'; use float32 or int8"):
        OnnxScorer.load(exported[1], precision="int4")
    with pytest.raises(ModelError, match="threads must be at least 1, not 0"):
        OnnxScorer.load(exported[1], threads=0)


# -- the parts that stand twice ----------------------------------------------------------------------


def test_one_row_is_filled_as_many_are():
    import pyarrow as pa

    values = [*NASTY_TITLES, "", None, "plain", "- > ->", "-", ">", "no\nyes"]
    forbidden = ["->", "<|endoftext|>", "<s>", "[SEP]"]
    for template in ("{a}", "x {a}{b} -> {b}", "{b}{a}"):
        columns = {"a": pa.array(values, pa.large_string()), "b": pa.array(values[::-1], pa.large_string())}
        expected = render(template, columns, forbidden).to_pylist()
        found = [fill(template, {"a": a, "b": b}, forbidden) for a, b in zip(values, values[::-1], strict=True)]
        assert found == expected
    for column in ([1, 2, None], [1.0, 2.5, None], [True, False], [["a", "b"], [], None], [[1.0, 2.5]], [[True]]):
        expected = render("{a}", {"a": pa.array(column)}, forbidden).to_pylist()
        assert [fill("{a}", {"a": value}, forbidden) for value in column] == expected
    assert fill("{a:.2f}", {"a": 3}, []) == "3.00"


def test_files_of_items_are_read_as_the_package_reads_them(tmp_path):
    from llmrec_peft.requests.item_table import ItemTable

    text = 'item_id,title,year,price,new,tag\n007,"A, ""b""",1999,2.50,true,x\n8,C,,3,False,\n'
    lines = [
        {"item_id": "a", "title": "T", "price": 3, "kinds": ["x", "y"]},
        {"item_id": "b", "title": "U", "price": 2.5},
    ]
    (tmp_path / "items.csv").write_text(text, "utf-8")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for name in ("items.csv", "items.jsonl"):
        expected = ItemTable.read(tmp_path / name).table.to_pylist()
        items = PlainItems.read(tmp_path / name)
        assert [{key: items[row["item_id"]].get(key) for key in row} for row in expected] == expected
        types = [[type(value) for value in row.values()] for row in expected]
        assert [[type(items[row["item_id"]].get(key)) for key in row] for row in expected] == types
    with pytest.raises(DataError, match="'a' in more than one row"):
        PlainItems.read([{"item_id": "a"}, {"item_id": "a"}])
    with pytest.raises(DataError, match="row 0 must be a mapping with an item_id, not 'Toy Story'"):
        PlainItems.read({"a": "Toy Story"})
    with pytest.raises(DataError, match="does not exist"):
        PlainItems.read(tmp_path / "none.csv")
