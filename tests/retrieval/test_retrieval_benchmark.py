"""The benchmark of retrieval: its protocol against plain loops, and a run on a small log."""

import importlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmrec_peft.evaluation import ranking_metrics as ranking

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def retrieval(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("retrieval")


def test_metrics_are_those_of_ranked_lists(retrieval):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(0, 12, 150).astype(float)
        right = int(rng.integers(150))
        above, tied = retrieval.place(scores, right, np.empty(0, int))
        found = {k: v[0] for k, v in retrieval.metrics_of(np.array([above]), np.array([tied])).items()}
        rows = ranking.rank_rows(scores, np.arange(150) == right, np.zeros(150, int))
        assert found["ndcg@10"] == pytest.approx(ranking.ndcg(rows, 10)[0])
        assert found["hr@10"] == pytest.approx(ranking.hit_rate(rows, 10)[0])
        assert found["recall@100"] == pytest.approx(ranking.hit_rate(rows, 100)[0])


def test_targets_are_first_takes_and_candidates_leave_out_what_was_taken(retrieval, small_log):
    log = small_log(users=15, events=30)
    labels = log.column("label").to_numpy().astype(np.int8)
    rows = log.split().test.rows
    found, repeats = retrieval.targets_of(log, labels, rows, 10**6, 0)
    wanted, pairs = [], set()
    for row in rows.tolist():
        past = (log.user_codes == log.user_codes[row]) & (log.timestamps < log.timestamps[row])
        pair = (log.user_codes[row], log.item_codes[row])
        if labels[row] == 1 and log.item_codes[row] not in log.item_codes[past] and pair not in pairs:
            wanted.append(row)
            pairs.add(pair)
    assert found.tolist() == wanted and repeats == (labels[rows] == 1).sum() - len(wanted) > 0
    for row in found.tolist():
        mine = (log.user_codes == log.user_codes[row]) & (log.timestamps <= log.timestamps[row])
        expected = set(log.item_codes[mine].tolist()) - {int(log.item_codes[row])}
        assert set(retrieval.excluded(log, labels, row).tolist()) == expected
    few, _ = retrieval.targets_of(log, labels, rows, 3, 0)
    assert len(few) == 3 and set(few) <= set(found)


def test_it_runs_and_says_how(retrieval, small_tables, tiny_base, tmp_path, capsys):
    (tmp_path / "movies").mkdir()
    for name, table in zip(("interactions", "items"), small_tables, strict=True):
        pq.write_table(table, tmp_path / "movies" / f"{name}.parquet")
    output = tmp_path / "result.json"
    result = retrieval.main(
        ["--data", str(tmp_path), "--logs", "movies", "--base", str(tiny_base()), "--layers", "2", "--targets", "12"]
        + ["--output", str(output), "--split", "valid"]
    )
    (part,) = json.loads(output.read_text())["logs"].values()
    assert part["targets"] == result["logs"]["movies"]["targets"] > 0
    assert part["slices"]["all"].keys() >= {"popularity", "cooccurrence", "factors", "text", "merged"}
    assert part["merged_minus"]["text"].keys() == {"ndcg@10", "hr@10", "recall@100"}
    assert str(tmp_path) not in output.read_text()
    assert "merged" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        retrieval.main(["--data", str(tmp_path), "--logs", "retail", "--base", "none"])
    assert stopped.value.code == 2
