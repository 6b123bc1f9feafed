"""Random hostile input for readers, requests, manifests and configurations.

Whatever comes in, the package either takes it or raises one of its own errors in one line. Each property runs a fixed
number of seeded examples; `LLMREC_PEFT_FUZZ_EXAMPLES` and `LLMREC_PEFT_FUZZ_SEED` set others for a longer search:

    LLMREC_PEFT_FUZZ_EXAMPLES=5000 LLMREC_PEFT_FUZZ_SEED=1 pytest tests/fuzz
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from llmrec_peft import BehaviorLog, Domain, Scorer, build_streams
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.config.schema import CONFIGS, config_to_yaml, read_config
from llmrec_peft.errors import LLMRecError
from llmrec_peft.serving.onnx_scorer import OnnxScorer
from tests.conftest import make_small_tables
from tests.fuzz.forms import FORMS
from tests.fuzz.strategies import changed, damaged, scalars, trees

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("LLMREC_PEFT_FUZZ_EXAMPLES", "150"))
SEED = int(os.environ.get("LLMREC_PEFT_FUZZ_SEED", "0"))

PLAIN_DOMAIN = {
    "name": "small",
    "event": "{title} ({genres})",
    "outcomes": {"skip": " no\n", "click": " yes\n"},
    "stream": {"context": 3, "targets": 4, "max_length": 400},
}
DOMAIN = Domain.from_dict(PLAIN_DOMAIN)


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


INTERACTIONS = make_small_tables(users=4, events=8, items=8)[0].to_pylist()
ITEMS = [{"item_id": f"i{n}", "title": f"Item number {n}", "genres": ("Drama", "Comedy")[n % 2]} for n in range(8)]


def write_log(place: Path, form: str, rows: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    """Write rows in one of the forms, in a directory of its own."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    FORMS[form][0](place, rows, items)


def read_streams(place: Path, form: str, tokenizer: Any) -> int:
    """Read a log and build its streams; returns how many streams there are."""
    log = BehaviorLog.read(place)
    assert np.isfinite(log.timestamps).all() and log.num_items > 0
    assert not any(title.strip() == "" for title in log.items.column("title").to_pylist())
    log.items.validate(full=True)
    log.interactions.validate(full=True)
    genres = " ({genres})" if "genres" in log.items.column_names else ""
    domain = Domain.from_dict({**PLAIN_DOMAIN, "event": "{title}" + genres, "label": FORMS[form][1]})
    splits = log.split(by="user", valid=0.25, test=0.25)
    return len(build_streams(splits.train, domain, tokenizer))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_as_it_is(form, tmp_path, tiny_tokenizer):
    """So the changes below meet readers, and no log that is refused anyway."""
    write_log(tmp_path / "log", form, INTERACTIONS, ITEMS)
    assert read_streams(tmp_path / "log", form, tiny_tokenizer) > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_reader_takes_a_log_or_names_what_is_wrong(form, tmp_path, tiny_tokenizer):
    taken = []

    @fuzz
    @given(data=st.data())
    def search(data):
        rows, items = INTERACTIONS, ITEMS
        if data.draw(st.booleans()):
            rows = [_row(row, INTERACTIONS[0]) for row in data.draw(changed(rows, most=2))]
        else:
            items = [_row(row, ITEMS[0]) for row in data.draw(changed(items, most=2))]
        if not rows or not items:
            return
        write_log(tmp_path / "log", form, rows, items)
        if data.draw(st.integers(0, 3)) == 0:
            victim = data.draw(st.sampled_from(sorted((tmp_path / "log").iterdir())))
            victim.write_bytes(data.draw(damaged(victim.read_bytes())))
        with ours_alone():
            taken.append(read_streams(tmp_path / "log", form, tiny_tokenizer))

    search()
    assert len(taken) > EXAMPLES / 30, "nearly all was refused, so little of the reader was tried"


def _row(row: Any, like: dict[str, Any]) -> dict[str, Any]:
    """A row with all columns, whatever stands in its place."""
    return dict.fromkeys(like) | (row if isinstance(row, dict) else {})


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
        load_trained(root / kind)
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
    "score": ("--bundles", "--requests"),
    "distill": ("--teacher", "--data.path", "--output_dir"),
    "index": ("--bundle", "--data.path"),
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
