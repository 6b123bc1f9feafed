"""Random hostile input for readers, requests, manifests and configurations.

Whatever comes in, the package either takes it or raises one of its own errors in one line. Each property runs a fixed
number of seeded examples; `LLMREC_PEFT_FUZZ_EXAMPLES` and `LLMREC_PEFT_FUZZ_SEED` set others for a longer search:

    LLMREC_PEFT_FUZZ_EXAMPLES=5000 LLMREC_PEFT_FUZZ_SEED=1 pytest tests/fuzz
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from llmrec_peft import BehaviorLog, Domain, Scorer, build_streams
from llmrec_peft.config import CONFIGS, config_to_yaml, read_config
from llmrec_peft.errors import LLMRecError
from llmrec_peft.inference.merged import load_answering
from llmrec_peft.serving.scorer import OnnxScorer
from tests.conftest import make_small_tables
from tests.fuzz.strategies import changed, damaged, scalars, trees

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("LLMREC_PEFT_FUZZ_EXAMPLES", "150"))
SEED = int(os.environ.get("LLMREC_PEFT_FUZZ_SEED", "0"))

DOMAIN = Domain.from_dict(
    {
        "name": "small",
        "event": "{title} ({genres})",
        "outcomes": {"skip": " no\n", "click": " yes\n"},
        "stream": {"context": 3, "targets": 4, "max_length": 400},
    }
)
FORMS = ("parquet", "csv", "jsonl", "recbole", "movielens", "amazon", "mind")


def fuzz(test: Any) -> Any:
    """Run a property on `EXAMPLES` examples of one seed, however slow the first may be."""
    plan = settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    return plan(seed(SEED)(test))


@contextmanager
def ours_alone() -> Iterator[None]:
    """Pass our own errors, if their message is one printable line; any other exception fails the test."""
    try:
        yield
    except LLMRecError as error:
        text = str(error)
        assert text and "\n" not in text and "\0" not in text
        assert len(text) < 3000


def write_log(place: Path, form: str, rows: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    """Write rows of odd values in one of the published forms; what a form cannot hold is written as text."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if form == "parquet":
        for name, table in (("interactions", rows), ("items", items)):
            pq.write_table(_arrow(table), place / f"{name}.parquet")
    elif form == "jsonl":
        for name, table in (("interactions", rows), ("items", items)):
            (place / f"{name}.jsonl").write_bytes(_json_lines(table))
    elif form == "csv":
        for name, table in (("interactions", rows), ("items", items)):
            (place / f"{name}.csv").write_bytes(_separated(table, ",", header=list(table[0])))
    elif form == "recbole":
        kinds = {"timestamp": "float", "rating": "float"}
        for suffix, table in (("inter", rows), ("item", items)):
            header = [f"{name}:{kinds.get(name, 'token')}" for name in table[0]]
            (place / f"small.{suffix}").write_bytes(_separated(table, "\t", header=header))
    elif form == "movielens":
        ratings = [{"u": r["user_id"], "i": r["item_id"], "r": r["rating"], "t": r["timestamp"]} for r in rows]
        (place / "ratings.csv").write_bytes(_separated(ratings, ",", ["userId", "movieId", "rating", "timestamp"]))
        movies = [{"i": i["item_id"], "t": i["title"], "g": i["genres"]} for i in items]
        (place / "movies.csv").write_bytes(_separated(movies, ",", ["movieId", "title", "genres"]))
    elif form == "amazon":
        reviews = [
            {"user_id": r["user_id"], "parent_asin": r["item_id"], "rating": r["rating"], "timestamp": r["timestamp"]}
            for r in rows
        ]
        (place / "Toys.jsonl").write_bytes(_json_lines(reviews))
        meta = [{"parent_asin": i["item_id"], "title": i["title"], "price": i["genres"]} for i in items]
        (place / "meta_Toys.jsonl").write_bytes(_json_lines(meta))
    else:
        lines = [
            {"n": n, "u": r["user_id"], "t": r["timestamp"], "h": r["item_id"], "s": f"{r['item_id']}-{r['label']}"}
            for n, r in enumerate(rows)
        ]
        (place / "behaviors.tsv").write_bytes(_separated(lines, "\t"))
        news = [
            {"i": i["item_id"], "c": "news", "s": "x", "t": i["title"], "a": "", "u": "", "e": "[]", "f": "[]"}
            for i in items
        ]
        (place / "news.tsv").write_bytes(_separated(news, "\t"))  # fmt: skip


def _arrow(rows: list[dict[str, Any]]) -> pa.Table:
    columns = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
            columns[name] = pa.array([_text(value) for value in values])
    return pa.table(columns)


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _separated(rows: list[dict[str, Any]], separator: str, header: list[str] | None = None) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, escapechar="\\")
    if header:
        writer.writerow(header)
    for row in rows:
        writer.writerow(["" if value is None else str(value).replace("\0", "") for value in row.values()])
    return file.getvalue().encode("utf-8", "surrogatepass")


INTERACTIONS, ITEMS = (table.to_pylist() for table in make_small_tables(users=4, events=8, items=8))


@fuzz
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_a_reader_takes_a_log_or_names_what_is_wrong(data, form, tmp_path_factory, tiny_tokenizer):
    rows, items = data.draw(changed(INTERACTIONS)), data.draw(changed(ITEMS))
    rows, items = (
        [row for row in table if isinstance(row, dict)] if isinstance(table, list) else [] for table in (rows, items)
    )
    full = [dict.fromkeys(INTERACTIONS[0]) | row for row in rows], [dict.fromkeys(ITEMS[0]) | row for row in items]
    if not all(full):
        return
    place = tmp_path_factory.getbasetemp() / "fuzzed"
    write_log(place, form, *full)
    if data.draw(st.integers(0, 3)) == 0:
        victim = data.draw(st.sampled_from(sorted(place.iterdir())))
        victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    with ours_alone():
        log = BehaviorLog.read(place)
        assert np.isfinite(log.timestamps).all() and log.num_items > 0
        assert not any(title.strip() == "" for title in log.items.column("title").to_pylist())
        log.items.validate(full=True)
        log.interactions.validate(full=True)
        splits = log.split(by="user", valid=0.25, test=0.25)
        assert len(build_streams(splits.train, DOMAIN, tiny_tokenizer)) > 0


EVENT = {"title": "Heat", "genres": "Crime"}
REQUEST = {"history": [[dict(EVENT), "like"], ["i1", "dislike"]], "candidates": ["i0", dict(EVENT)], "user": {"age": 3}}


@fuzz
@given(
    request=changed(REQUEST) | trees().map(lambda tree: {"history": tree, "candidates": [dict(EVENT)], "user": None})
)
def test_a_request_is_scored_alike_by_torch_and_onnx_or_refused(request, scorers):
    request = request if isinstance(request, dict) else {}
    call = [request.get(name, default) for name, default in (("history", []), ("candidates", []), ("user", None))]
    found = []
    for scorer in scorers:
        with ours_alone():
            found.append(scorer.score(*call))
            assert np.isfinite(found[-1]).all()
            assert np.allclose(found[-1].sum(axis=1), 1)
    assert len(found) in (0, 2), "one scorer takes what the other refuses"
    if found:
        assert found[0].shape == found[1].shape
        assert np.abs(found[0] - found[1]).max(initial=0) < 1e-4


@pytest.fixture(scope="module")
def scorers(exported):
    """A scorer of a merged model and one of its export, on the same item table."""
    merged, onnx, _ = exported
    items = [{key: row[key] for key in ("item_id", "title", "genres")} for row in ITEMS]
    return Scorer.load(merged, items=pa.Table.from_pylist(items)), OnnxScorer.load(onnx, items=items, threads=1)


MANIFESTS = ("bundle/behavior.json", "bundle/adapter_config.json", "merged/behavior.json", "merged/config.json",
             "onnx/serving.json")  # fmt: skip
BINARIES = ("bundle/adapter_model.safetensors", "merged/model.safetensors", "onnx/model.onnx", "onnx/tokenizer.json",
            "merged/tokenizer.json", *MANIFESTS)  # fmt: skip


@fuzz
@given(data=st.data(), name=st.sampled_from(MANIFESTS))
def test_an_edited_manifest_is_refused_or_changes_nothing(data, name, copies):
    original = json.loads((copies.source / name).read_text("utf-8"))
    document = data.draw(changed(original, most=2))
    copies.check(name, json.dumps(document).encode("utf-8", "surrogatepass"))


@fuzz
@given(data=st.data(), name=st.sampled_from(BINARIES))
def test_a_damaged_file_is_refused_or_changes_nothing(data, name, copies):
    copies.check(name, data.draw(damaged((copies.source / name).read_bytes())))


class Copies:
    """A bundle, a merged model and an export, one file of which is replaced for each check."""

    def __init__(self, source: Path, place: Path) -> None:
        self.source, self.place = source, place
        self.expected = {kind: self.score(source, kind) for kind in ("bundle", "merged", "onnx")}

    def score(self, root: Path, kind: str) -> np.ndarray:
        """What the directory of a kind predicts for one request."""
        if kind == "onnx":
            return OnnxScorer.load(root / kind, threads=1).score([(EVENT, "like")], [EVENT])
        load_answering(root / kind)
        return Scorer.load(root / kind).score([(EVENT, "like")], [EVENT])

    def check(self, name: str, content: bytes) -> None:
        """The directory with this content in one file predicts as before, or is refused in one line."""
        kind = name.split("/")[0]
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.source / kind, self.place / kind)
        (self.place / name).write_bytes(content)
        with ours_alone():
            assert np.array_equal(self.score(self.place, kind), self.expected[kind])


@pytest.fixture(scope="module")
def copies(exported, tmp_path_factory):
    """See `Copies`; torch uses one thread, so that predictions are bit-equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Copies(exported[0].parent, tmp_path_factory.mktemp("copies") / "place")
    torch.set_num_threads(threads)


PLACES = {"--data.path": "d", "--output_dir": "o", "--bundle": "b", "--teacher": "t", "--requests": "r",
          "--bundles": '{"a": "b"}'}  # fmt: skip
NEEDED = {
    "evaluate": ("--bundle", "--data.path"),
    "merge": ("--bundle", "--output_dir"),
    "swap": ("--bundles", "--requests"),
    "distill": ("--teacher", "--data.path", "--output_dir"),
    "fuse": ("--bundle", "--data.path"),
    "recommend": ("--bundle", "--data.path", "--output_dir"),
}
"""Options that each recipe needs; the training recipes have a file for `movies`."""


@fuzz
@given(data=st.data(), recipe=st.sampled_from(sorted(CONFIGS)))
def test_a_configuration_is_read_or_refused(data, recipe, tmp_path_factory):
    file = [] if recipe in NEEDED else ["--config", f"recipes/configs/movies/{recipe}.yaml"]
    flags = [word for key in NEEDED.get(recipe, ("--data.path", "--output_dir")) for word in (key, PLACES[key])]
    document = yaml.safe_load(config_to_yaml(read_config(CONFIGS[recipe], [*file, *flags])))
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(_yaml(data.draw(changed(document))), "utf-8")
    with ours_alone():
        config = read_config(CONFIGS[recipe], ["--config", str(path)])
        assert yaml.safe_load(config_to_yaml(config)) is not None


def _yaml(document: Any) -> str:
    # JSON is YAML but for half surrogates, which a UTF-8 file cannot hold anyway.
    return json.dumps(document)


@fuzz
@given(value=scalars(), key=st.sampled_from(["event", "header", "marker", "name", "simultaneous"]))
def test_a_domain_is_read_or_refused(value, key):
    with ours_alone():
        domain = Domain.from_dict(DOMAIN.to_dict() | {key: value})
        assert Domain.from_dict(domain.to_dict()) == domain
