"""The `evaluate` module is found by path, offline, and gives the package's own numbers."""

from pathlib import Path

import numpy as np
import pytest

import llmrec_peft.evaluation
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation import load_metric
from llmrec_peft.evaluation.metrics import compute_metrics

DIRECTORY = Path(llmrec_peft.evaluation.__file__).parent / "behavior_metrics"


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A fresh modules cache, and no way to the Hub, before `evaluate` is asked for anything."""
    import evaluate.config
    import evaluate.loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))

        def no_network(*args, **kwargs):
            raise AssertionError("the module asked the network")

        patch.setattr("socket.create_connection", no_network)
        patch.setattr("socket.socket.connect", no_network)
        yield evaluate


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    p = rng.random(60).round(2)
    return (rng.random(60) < p).astype(int), np.column_stack([1 - p, p]), rng.integers(0, 9, 60)


@pytest.mark.parametrize("path", [DIRECTORY, DIRECTORY / "behavior_metrics.py"])
def test_loads_by_path_and_equals_the_package(offline, predictions, path):
    y, p, users = predictions
    metric = offline.load(str(path))
    assert metric.compute(predictions=p, references=y, users=users) == compute_metrics(y, p, users)
    assert "ndcg" in metric.description and "candidate set" in metric.inputs_description


def test_one_number_a_target_means_class_one(offline, predictions):
    y, p, _ = predictions
    found = load_metric().compute(predictions=p[:, 1].tolist(), references=y.tolist(), names=["auc", "logloss"])
    assert found == compute_metrics(y, np.column_stack([1 - p[:, 1], p[:, 1]]), names=["auc", "logloss"])


def test_batches_add_up(offline, predictions):
    y, p, users = predictions
    metric = load_metric()
    for start in range(0, 60, 25):
        metric.add_batch(predictions=p[start : start + 25], references=y[start : start + 25])
    assert metric.compute(users=users, candidate_sets=users, names=["gauc", "ndcg@2"]) == compute_metrics(
        y, p, users, users, names=["gauc", "ndcg@2"]
    )


def test_an_unknown_name_is_refused(offline, predictions):
    y, p, _ = predictions
    with pytest.raises(ConfigError, match="'acc' does not exist"):
        load_metric().compute(predictions=p, references=y, names=["acc"])
