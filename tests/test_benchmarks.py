"""The benchmarks run, compare equal work, and say so; their speeds are not judged here."""

import importlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TRAIN_SPEED = ["--rounds", "2", "--batch-size", "2", "--peer-targets", "3", "--peer-batch-sizes", "1", "2"]


@pytest.fixture
def train_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_speed")


@pytest.fixture
def run(train_speed, tiny_base, small_tables, tmp_path):
    """`run(*arguments)`: the result of a short run on a tiny base and log; its file is result.json."""
    interactions, items = small_tables
    data = tmp_path / "log"
    data.mkdir()
    pq.write_table(interactions, data / "interactions.parquet")
    pq.write_table(items, data / "items.parquet")

    def short(*arguments: str) -> dict:
        return train_speed.main(
            ["--data", str(data), "--base", str(tiny_base("llama")), "--output", str(tmp_path / "result.json")]
            + [*TRAIN_SPEED, "--matmul-sizes", "32", *arguments]
        )

    return short


def test_train_speed_measures_both_sides_on_the_same_targets(run, tmp_path, capsys):
    result = run()
    assert result["answers_max_difference"] <= 1e-4
    assert len(result["rounds"]) == 2
    for entry in result["rounds"]:
        assert entry["plain"]["targets"] == 3
        assert entry["stream"]["steps"] == 1
        # Padding is never negative, and each side computed at least the tokens that it was given.
        assert all(entry[side]["computed_tokens"] >= entry[side]["tokens"] > 0 for side in ("stream", "plain"))
        assert entry["stream"]["tokens_per_target"] < entry["plain"]["tokens_per_target"]
        assert entry["ratio"] == entry["stream"]["targets_per_s"] / entry["plain"]["targets_per_s"]
    # Two layers of hidden size 32 (4 heads, 2 key-value heads, MLP of 64), three norms apart from what trains.
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert result["base_parameters"] == linear + 5 * 32
    assert result["flops_per_token"] == 4 * result["base_parameters"] + 6 * result["trained_parameters"]
    text = (tmp_path / "result.json").read_text()
    written = json.loads(text)
    assert written["summary"]["ratio"]["median"] == result["summary"]["ratio"]["median"]
    assert {"command", "date", "seed", "machine", "versions", "settings"} <= written.keys()
    assert str(tmp_path) not in text
    shown = capsys.readouterr().out
    assert "stream / plain" in shown and "padding" in shown


def test_train_speed_trains_all_targets_on_request(run):
    result = run("--peer-targets", "0", "--rounds", "1", "--batch-size", "1", "--peer-batch-sizes", "4")
    (entry,) = result["rounds"]
    assert entry["plain"]["targets"] == entry["stream"]["targets"]


def test_train_speed_refuses_sides_that_answer_differently(run, train_speed, monkeypatch, tmp_path, capsys):
    original = train_speed.plain_logits
    monkeypatch.setattr(train_speed, "plain_logits", lambda *args: original(*args) + torch.tensor([0.0, 2e-4]))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert "logits on the same targets differ by 0.0002" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_train_speed_says_how_to_get_the_log(train_speed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_speed.main(["--data", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "python -m llmrec_peft.data.download ml-latest-small" in capsys.readouterr().err


def test_batch_tokens_measures_every_size(run, train_speed, tiny_base, tmp_path):
    data = tmp_path / "log"
    batch_tokens = importlib.import_module("batch_tokens")
    result = batch_tokens.main(
        ["--data", str(data), "--base", str(tiny_base("llama")), "--output", str(tmp_path / "result.json")]
        + ["--rounds", "1", "--windows", "2", "--train", "300", "900", "--evaluate", "500"]
    )
    assert result["train"].keys() == {300, 900} and result["evaluate"].keys() == {500}
    assert all(entry["targets_per_s"]["min"] > 0 for entry in result["train"].values())
