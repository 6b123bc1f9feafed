"""The merge recipe, from its arguments to a directory that `evaluate` and Transformers score as they do the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.config.schema import CONFIGS, MergeConfig, read_config
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import IndependentPrompts
from llmrec_peft.errors import ConfigError
from llmrec_peft.runs.split_streams import split_by_domain, streams_for_split

pytestmark = pytest.mark.usefixtures("one_thread")
MERGEABLE = ("lora", "qlora", "head", "full")


@pytest.fixture
def merge(recipe, trained, tmp_path):
    """`merge("lora", *flags)`: merge that run's bundle; returns the merged directory."""

    def run(method: str, *flags: str) -> Path:
        out = tmp_path / f"merged-{method}"
        recipe("merge")(["--bundle", str(trained(method) / "bundle"), "--output_dir", str(out), *flags])
        return out

    return run


def table_of(directory: Path):
    return pq.read_table(directory / "predictions.parquet").to_pandas()


def refused(main, args: list[str], capfd) -> str:
    """Run a recipe that must refuse: exit code 2, and one line of its own, which is returned."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("method", MERGEABLE)
def test_evaluate_scores_a_merged_model_as_its_bundle(method, merge, recipe, trained, data, tmp_path):
    merged = merge(method)
    kept = table_of(trained(method))
    kept = kept[kept["split"] == "test"].reset_index(drop=True)
    for mode in ("stream", "independent"):
        out = tmp_path / mode
        flags = ["--bundle", str(merged), "--data.path", str(data), "--mode", mode, "--output_dir", str(out)]
        recipe("evaluate")(flags)
        table = table_of(out)
        assert table["item_id"].equals(kept["item_id"]) and table["label"].equals(kept["label"])
        np.testing.assert_allclose(table["p_click"], kept["p_click"], atol=1e-4, rtol=0)
        metrics = json.loads((out / "metrics.json").read_text())["test"]
        ours = json.loads((trained(method) / "metrics.json").read_text())["test"]
        assert metrics.keys() == ours.keys() and metrics["auc"] == pytest.approx(ours["auc"], abs=1e-3)


def test_transformers_alone_scores_prompts_of_the_log(merge, trained, data):
    """Each target's history as one row, padded on the right, against the run's own calibrated answers."""
    merged = merge("lora")
    loaded = load_trained(merged)
    domain = Domain.from_dict(loaded.domain)
    streams = streams_for_split(split_by_domain(BehaviorLog.read(data), domain), "test", domain, loaded.tokenizer)
    prompts = IndependentPrompts(streams)
    rows = [prompts[number].input_ids.tolist() for number in range(12)]
    assert len({len(row) for row in rows}) > 1
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    with torch.no_grad():
        logits = model(**tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")).logits
    fit = loaded.calibration
    probabilities = (logits / fit["temperature"] + torch.tensor(fit["bias"])).softmax(-1)[:, 1].numpy()
    kept = table_of(trained("lora"))
    kept = kept[kept["split"] == "test"]["p_click"].to_numpy()[: len(rows)]
    np.testing.assert_allclose(probabilities, kept, atol=1e-4)
    assert model.config.id2label == {0: "skip", 1: "click"}


def test_a_log_gives_auc_of_both(merge, data, trained, capfd):
    merged = merge("lora", "--data.path", str(data), "--limit", "20", "--batch_tokens", "700")
    measured = read_manifest(merged)["measured"]
    assert measured["streams"].startswith("test of ") and 20 <= measured["answers"] < 20 + 6
    assert measured["auc_adapted"] == pytest.approx(measured["auc_merged"], abs=1e-3)
    printed = capfd.readouterr().out
    assert f"AUC {measured['auc_adapted']:.6f} adapted" in printed and "written to" in printed
    whole = merge("head", "--data.path", str(data), "--limit", "null")
    auc = json.loads((trained("head") / "metrics.json").read_text())["test_uncalibrated"]["auc"]
    assert read_manifest(whole)["measured"]["auc_merged"] == pytest.approx(auc, abs=1e-6)
    valid = merge("full", "--data.path", str(data), "--split", "valid")
    assert read_manifest(valid)["measured"]["streams"].startswith("valid of ")


def test_bfloat16_and_shards(merge, data):
    merged = merge("qlora", "--dtype", "bfloat16", "--max_shard_size", "20KB")
    manifest = read_manifest(merged)
    assert manifest["dtype"] == "bfloat16" and manifest["measured"]["max_difference"] > 1e-5
    assert len(list(merged.glob("model-*.safetensors"))) > 1


def test_a_weighted_merge(recipe, trained, data, tmp_path, capfd):
    bundle = trained("lora") / "bundle"
    out = tmp_path / "both"
    flags = ["--bundle", f"[{bundle}, {bundle}]", "--weights", "[0.75, 0.25]", "--combination", "cat"]
    recipe("merge")([*flags, "--output_dir", str(out), "--data.path", str(data)])
    manifest = read_manifest(out)
    assert [part["weight"] for part in manifest["merged_from"]] == [0.75, 0.25]
    assert manifest["calibration"] is None
    # Twice the same update, 1 in all, is that update.
    alone = tmp_path / "alone"
    recipe("merge")(["--bundle", str(bundle), "--output_dir", str(alone), "--data.path", str(data)])
    aucs = [read_manifest(place)["measured"]["auc_merged"] for place in (out, alone)]
    assert aucs[0] == pytest.approx(aucs[1], abs=1e-3)
    plus = [f"--bundle+={bundle}", f"--bundle+={bundle}", "--weights+=0.75", "--weights+=0.25"]
    other = read_config(MergeConfig, [*plus, "--output_dir", "x"])
    assert other.bundle == [str(bundle)] * 2 and other.weights == [0.75, 0.25]


def test_training_goes_on_from_a_merged_model(merge, recipe, trained, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # put back what this run changes
    merged = merge("lora")
    recipe("head")([*arguments("head", tmp_path / "out"), f"--model.base={merged}"])
    manifest = json.loads((tmp_path / "out" / "bundle" / "behavior.json").read_text())
    assert manifest["base"]["name"] == str(merged)
    # Before it trains, it answers as the merged model, whose head it has.
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "out", trained("lora")))
    assert ours["before_test"]["auc"] == pytest.approx(theirs["test_uncalibrated"]["auc"], abs=1e-3)
    assert ours["before_test"]["logloss"] == pytest.approx(theirs["test_uncalibrated"]["logloss"], abs=1e-5)
    assert ours["before_test"]["logloss"] != pytest.approx(theirs["before_test"]["logloss"], abs=1e-5)


def test_what_is_refused(merge, recipe, trained, data, tmp_path, capfd):
    main, place = recipe("merge"), ["--output_dir", str(tmp_path / "out")]
    lora = str(trained("lora") / "bundle")
    merged = str(merge("head"))
    cases = {
        "serve it in a DomainBank": ["--bundle", str(trained("adapter") / "bundle")],
        "is a merged model, not a bundle": ["--bundle", merged],
        "name the directory `bundle`": ["--bundle", str(trained("lora"))],
        "none has no behavior.json": ["--bundle", str(tmp_path / "none")],
        "over the tolerance": ["--bundle", lora, "--dtype", "bfloat16", "--tolerance", "1e-9"],
        "weights must be 2 numbers": ["--bundle", f"[{lora}, {lora}]"],
        "weights must be null": ["--bundle", lora, "--weights", "[1.0]"],
        "density must be above 0": ["--bundle", f"[{lora}]", "--weights", "[1]", "--combination", "ties"],
        "--output_dir": ["--bundle", lora, "--output_directory", "x"],
        "nowhere": ["--bundle", lora, "--data.path", "nowhere"],
        "is what is merged": ["--bundle", lora, "--output_dir", lora],
        "holds no merged model": ["--bundle", lora, "--output_dir", str(trained("lora"))],
    }
    for said, flags in cases.items():
        assert said in refused(main, [*place, *flags], capfd), flags
        assert not (tmp_path / "out").exists(), flags
    line = refused(
        recipe("evaluate"), ["--bundle", merged, "--data.path", str(data), "--base", str(trained("lora"))], capfd
    )
    assert "holds its base's weights already" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "limit must be at least 1"),
        (["--batch_tokens", "0"], "batch_tokens must be at least 1"),
        (["--max_shard_size", "2 gigabytes"], "max_shard_size must be a size such as 500MB"),
        (["--tolerance", "-1"], "tolerance must be a finite number"),
        (["--density", "0.5"], "density must be null for one bundle"),
        (["--dtype", "float16"], "dtype must be"),
        (["--combination", "mean"], "combination must be one of linear"),
    ],
)
def test_settings_out_of_range(flags, message):
    with pytest.raises(ConfigError, match=message):
        read_config(CONFIGS["merge"], ["--bundle", "B", "--output_dir", "M", *flags])
