"""Few-shot runs train on exactly the targets asked for, and are scored on the same test windows."""

import importlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmrec_peft import Domain
from llmrec_peft.pipeline.streams import build_splits

ROOT = Path(__file__).parent.parent
DOMAIN = ROOT / "recipes" / "configs" / "movies" / "domain.yaml"


@pytest.fixture
def few_shot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("few_shot")


def test_windows_drawn_hold_the_targets_asked_for(few_shot, small_log, tiny_tokenizer, capsys):
    import dataclasses

    domain = Domain.from_yaml(DOMAIN)
    domain = dataclasses.replace(domain, stream=dataclasses.replace(domain.stream, targets=4))
    train = build_splits(small_log(), domain, tiny_tokenizer).train
    parts = [few_shot.draw(train, 16, seed) for seed in (0, 0, 1)]
    assert parts[0].windows.tolist() == parts[1].windows.tolist() != parts[2].windows.tolist()
    for part in parts:
        assert sum(len(part[number].labels) for number in range(len(part))) == 16
        users = [train.log.user_codes[train.target_rows[train.target_offsets[w]]] for w in part.windows]
        assert len(set(users)) == 4
    with pytest.raises(SystemExit):
        few_shot.draw(train, 6, 0)
    assert "6 targets are no whole number of windows of 4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_run_is_scored_on_the_same_targets(few_shot, small_tables, tiny_base, tmp_path):
    interactions, items = small_tables
    pq.write_table(interactions, tmp_path / "interactions.parquet")
    pq.write_table(items, tmp_path / "items.parquet")
    result = few_shot.main([
        "--data", str(tmp_path), "--base", str(tiny_base("llama")), "--targets", "8", "16", "--seeds", "0", "1",
        "--window", "4", "--steps", "3", "--learning-rate", "0.01", "--bootstrap", "20", "--test-targets", "20",
        "--output", str(tmp_path / "result.json"),
    ])  # fmt: skip
    assert (tmp_path / "result.json").is_file() and result["test"]["targets"] >= 20
    assert [len(result["runs"][key]) for key in ("0", "8", "16")] == [1, 2, 2]
    values = {one["metrics"]["logloss"]["value"] for runs in result["runs"].values() for one in runs}
    assert len(values) == 5 and np.isfinite(list(values)).all()
    assert result["runs"]["0"][0]["seconds"] == 0 < result["runs"]["8"][0]["seconds"]
    for key, runs in result["runs"].items():
        assert result["summary"][key]["auc"]["median"] == pytest.approx(
            np.median([run["metrics"]["auc"]["value"] for run in runs])
        )
