"""The protocol's features know the past alone, and its table compares systems on the same targets."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.quality import count_features as features
from benchmarks.quality import protocol
from llmrec_peft import BehaviorLog, Domain
from llmrec_peft.evaluation.baselines import past_rates
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.runs.split_streams import build_split_streams

pytestmark = pytest.mark.slow
DOMAIN = {
    "name": "movies",
    "header": "Rated by {user_id}:\n",
    "event": "{title} ({genres})",
    "marker": " ->",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "stream": {"context": 3, "targets": 4, "max_length": 400},
}


def naive(log, marks, points, number, others=None):
    """Rows that may be counted of one target: of its user, and of its item, by plain loops."""
    user, item, time = points.users[number], points.items[number], points.times[number]
    rows = [row for row in range(len(log)) if marks[row] >= 0]
    own = [row for row in rows if log.user_codes[row] == user and log.timestamps[row] < time]
    if others is None:
        same = [row for row in rows if log.item_codes[row] == item and log.timestamps[row] < time]
    else:
        same = [row for row in others if log.item_codes[row] == item and log.user_codes[row] != user]
    return own, same


@pytest.mark.parametrize("by", ["time", "user"])
@pytest.mark.parametrize("negatives", [0, 2])
def test_features_are_counts_of_what_may_be_known(by, negatives, small_log, tiny_tokenizer):
    domain = Domain.from_dict({**DOMAIN, "split": {"by": by, "valid": 0.2, "test": 0.2},
                               "negatives": {"per_positive": negatives}})  # fmt: skip
    log = small_log()
    streams, marks = build_split_streams(log, domain, tiny_tokenizer), feedback(log, domain)
    train = streams.splits.train.rows
    counts = features.CountFeatures(log, domain, train, by)
    rates = past_rates(log.user_codes, log.item_codes, log.timestamps, marks, train_rows=train, by=by)
    others = train[marks[train] >= 0].tolist() if by == "user" else None  # without the duplicate that is dropped
    for name in ("train", "test"):
        points = features.Points.of(streams[name])
        frame = counts.frame(points)
        own_item = points.items == log.item_codes[points.rows]
        expected = rates.features(points.rows)[own_item]
        found = frame[["item_rate", "user_rate", "item_count", "user_count"]].to_numpy()[own_item]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert negatives == 0 or not own_item.all()
        for number in range(0, len(points), 7):
            own, same = naive(log, marks, points, number, others)
            row = frame.iloc[number]
            assert np.isclose(row["user_count"], np.log1p(len(own))) and np.isclose(
                row["item_count"], np.log1p(len(same))
            )
            assert row["pair_count"] == sum(log.item_codes[o] == points.items[number] for o in own)
            pause = points.times[number] - max((log.timestamps[o] for o in own), default=np.nan)
            assert np.isclose(row["user_pause"], np.log1p(pause), equal_nan=True)


def test_a_target_without_earlier_rows_has_no_pause():
    earlier = features.Earlier(np.array([0, 0, 1]), np.array([5, 7, 6]), rows=np.ones(3))
    keys, times = np.array([0, 0, 0, 1, 2]), np.array([5, 6, 8, 7, 9])
    assert earlier.sums("rows", keys, times).tolist() == [0, 1, 2, 1, 0]
    assert earlier.sums("rows", keys, times, newest=1).tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_array_equal(earlier.since(keys, times, last=True), [np.nan, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(earlier.since(keys, times, last=False), [np.nan, 1, 3, 1, np.nan])


def predicted(streams, directory: Path, p: np.ndarray, numbers: np.ndarray) -> Path:
    """A run's predictions of some test targets."""
    directory.mkdir()
    table = streams.describe(numbers).to_pandas()
    table["p_like"], table["p_dislike"] = p[numbers], 1 - p[numbers]
    table.to_parquet(directory / "predictions.parquet")
    (directory / "metrics.json").write_text(json.dumps({"cost": {"training targets": 3}}))
    return directory


def test_the_protocol_compares_on_the_same_targets(log_directory, tiny_base, tiny_tokenizer, tmp_path, capsys):
    domain = tmp_path / "domain.yaml"
    domain.write_text(json.dumps(DOMAIN))
    streams = build_split_streams(BehaviorLog.read(log_directory), Domain.from_yaml(domain), tiny_tokenizer)
    test, rng = streams.test, np.random.default_rng(0)
    truth = (test.target_labels == 1).astype(float)
    p = np.clip(0.5 + 0.2 * (truth - 0.5) + 0.2 * rng.normal(size=len(truth)), 0.01, 0.99)
    half = np.flatnonzero(np.arange(len(truth)) % 2 == 0)
    places = {
        "llm": predicted(test, tmp_path / "llm", p, half),
        "ids": predicted(test, tmp_path / "ids", p, np.arange(len(p))),
    }
    other_seed = predicted(test, tmp_path / "again", np.sqrt(p), half)
    (tmp_path / "again" / "config.yaml").write_text("train: {seed: 7}")
    result = protocol.main([
        "--data", str(log_directory), "--domain", str(domain), "--base", str(tiny_base("llama")), "--bootstrap", "20",
        "--output", str(tmp_path / "result.json"), *(f"{name}={place}" for name, place in places.items()),
        f"llm={other_seed}",
    ])  # fmt: skip
    fitted = {
        "item_rate",
        "user_rate",
        "both_rates",
        "lightgbm",
        "popularity",
        "co_occurrence",
        "matrix_factorisation",
        "text",
    }
    assert set(result["all"]["systems"]) == fitted | {"ids"}
    assert set(result["shared"]["systems"]) == fitted | {"ids", "llm"}
    assert result["all"]["targets"] == len(p) and result["shared"]["targets"] == len(half)
    users = streams.log.user_codes[test.target_rows]
    for part, numbers in (("all", np.arange(len(p))), ("shared", half)):
        known = compute_metrics(truth[numbers].astype(int), np.column_stack([1 - p, p])[numbers], users[numbers])
        found = result[part]["systems"]["ids"]["metrics"]
        assert found["auc"]["value"] == pytest.approx(known["auc"]) and found["gauc"]["value"] == pytest.approx(
            known["gauc"]
        )
    assert result["shared"]["systems"]["ids"]["minus_llm"]["auc"]["value"] == 0
    assert result["budgets"]["llm"] == {"targets": 3}
    again = result["seeds"]["llm"]
    assert again["seeds"] == [None, 7] and set(result["seeds"]) == {"llm"}
    first = result["shared"]["systems"]["llm"]["metrics"]
    # The order of the predictions is the first run's, their size is not.
    assert again["metrics"]["auc"] == [first["auc"]["value"]] * 2
    assert again["metrics"]["logloss"][0] == first["logloss"]["value"] != again["metrics"]["logloss"][1]
    assert "| LLM, LoRA | None, 7 |" in capsys.readouterr().out
    other = pd.read_parquet(tmp_path / "ids" / "predictions.parquet")
    other["timestamp"] += 1
    other.to_parquet(tmp_path / "ids" / "predictions.parquet")
    with pytest.raises(SystemExit):
        protocol.main(["--data", str(log_directory), "--domain", str(domain), "--base", str(tiny_base("llama")),
                       "--no-text", "--output", str(tmp_path / "none.json"), f"ids={tmp_path / 'ids'}"])  # fmt: skip
    assert "test predictions are for other targets" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
