"""The benchmark of retrieval runs on a small log, and places items as ranked lists do."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import retrieval
from llmrec_peft.evaluation import ranking_metrics as ranking

pytestmark = pytest.mark.slow


def test_places_are_those_of_ranked_lists():
    rng = np.random.default_rng(0)
    for _ in range(50):
        named, right = rng.permutation(150)[:100], int(rng.integers(150))
        above, tied = (np.array([one]) for one in retrieval.place_of(named, right, 150))
        scores = np.full(150, -1.0)
        scores[named] = np.arange(100, 0, -1)
        rows = ranking.rank_rows(scores, np.arange(150) == right, np.zeros(150, int))
        assert ranking.one_relevant(above, tied, 10)["ndcg@10"] == pytest.approx(ranking.ndcg(rows, 10)[0])
        assert ranking.one_relevant(above, tied, 100)["hr@100"] == pytest.approx(ranking.hit_rate(rows, 100)[0])


def test_it_runs_and_describes_itself(small_tables, tiny_base, tmp_path):
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
    with pytest.raises(SystemExit) as stopped:
        retrieval.main(["--data", str(tmp_path), "--logs", "retail", "--base", "none"])
    assert stopped.value.code == 2
