"""What version 0.1.0 wrote still loads and gives the predictions that it gave: `tests/artifacts` was written by it.

An adapter bundle with its retrieval index, a bottleneck adapter's bundle, a merged model, a student, an ONNX export and
the resolved configurations of three runs, all on a tiny base of 16 hidden units.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmrec_peft import Scorer
from llmrec_peft.config.parsing import read_config
from llmrec_peft.config.schema import CONFIGS
from llmrec_peft.serving import OnnxScorer
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own call
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
ARTIFACTS = ROOT / "tests" / "artifacts"
EXPECTED = json.loads((ARTIFACTS / "expected.json").read_text("utf-8"))
HISTORY = [(event, label) for event, label in EXPECTED["history"]]


@pytest.mark.parametrize("name", ["bundle_lora", "bundle_adapter", "merged"])
def test_adapters_and_merged_models_predict_what_they_did(name):
    base = None if name == "merged" else str(ARTIFACTS / "base")
    scorer = Scorer.load(ARTIFACTS / name, ARTIFACTS / "log", base=base)
    found = scorer.score(HISTORY, EXPECTED["candidates"], user=EXPECTED["user"])
    np.testing.assert_allclose(found, EXPECTED[name.removeprefix("bundle_")], atol=1e-6)


def test_a_student_predicts_what_it_did():
    scorer = Scorer.load(ARTIFACTS / "student", ARTIFACTS / "log")
    ids = [event["item_id"] for event in EXPECTED["candidates"]]
    found = scorer.score([(event["item_id"], label) for event, label in HISTORY], ids)
    np.testing.assert_allclose(found, EXPECTED["student"], atol=1e-6)


def test_an_export_predicts_what_it_did():
    items = pq.read_table(ARTIFACTS / "log" / "items.parquet").to_pylist()
    found = OnnxScorer.load(ARTIFACTS / "export", items).score(HISTORY, EXPECTED["candidates"], user=EXPECTED["user"])
    np.testing.assert_allclose(found, EXPECTED["export"], atol=1e-6)


def test_a_retrieval_index_recommends_what_it_did():
    scorer = Scorer.load(ARTIFACTS / "bundle_lora", ARTIFACTS / "log", base=str(ARTIFACTS / "base"))
    found = scorer.recommend(HISTORY, 5, user=EXPECTED["user"], context={"hour": 10})
    assert [one.item_id for one in found] == [item for item, _ in EXPECTED["recommended"]]
    np.testing.assert_allclose([one.score for one in found], [score for _, score in EXPECTED["recommended"]], atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "adapter", "distill"])
def test_a_runs_configuration_is_read(name):
    config = read_config(CONFIGS[name], ["--config", str(ARTIFACTS / "configs" / f"{name}.yaml")])
    assert config.train.max_steps == 12 and config.output_dir == f"run_{name}"
