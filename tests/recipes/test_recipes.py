"""Recipes from their arguments to their files, on a tiny base and a small log; nothing is replaced."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from llmrec_peft.config.schema import CONFIGS, TrainRecipeConfig, read_config
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, compute_metrics
from tests.conftest import ROOT

METHODS = [name for name, kind in CONFIGS.items() if issubclass(kind, TrainRecipeConfig)]
COLUMNS = ["split", "user_id", "item_id", "timestamp", "label", "p_skip", "p_click"]


def metrics_of(directory: Path) -> dict:
    return json.loads((directory / "metrics.json").read_text("utf-8"))


def table_of(directory: Path, split: str | None = None):
    table = pq.read_table(directory / "predictions.parquet").to_pandas()
    return table if split is None else table[table["split"] == split].reset_index(drop=True)


def probabilities(table) -> np.ndarray:
    return table[["p_skip", "p_click"]].to_numpy()


def files_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")} if directory.exists() else set()


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_the_files_of_its_contract(method, trained):
    out = trained(method)
    files = files_below(out)
    wanted = {"bundle/README.md", "bundle/adapter_config.json", "bundle/adapter_model.safetensors",
              "bundle/behavior.json", "config.yaml", "metrics.json", "predictions.parquet", "report.md"}  # fmt: skip
    assert wanted <= files
    assert not [name for name in files if ".part" in name or ".tmp" in name]
    assert [name for name in files if name.startswith("logs/") and "tfevents" in name]
    assert [name for name in files if name.startswith("bundle/") and name not in wanted] == []
    manifest = json.loads((out / "bundle" / "behavior.json").read_text("utf-8"))
    assert manifest["method"] == method
    assert "click" in json.dumps(manifest["labels"])
    report = (out / "report.md").read_text("utf-8")
    assert report.startswith("# shop") and method in report
    for image in ("reliability.png", "learning_curve.png"):
        assert image in report and (out / image).stat().st_size > 1000


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_all_targets_and_give_the_metrics(method, trained, data):
    out = trained(method)
    splits, metrics, table = BehaviorLog.read(data).split(), metrics_of(out), table_of(out)
    assert list(table.columns) == COLUMNS
    for name, split in (("valid", splits.valid), ("test", splits.test)):
        part = table_of(out, name)
        assert len(part) == len(split.rows) == metrics[name]["targets"]
        log = split.log.interactions.take(split.rows).to_pandas()
        keys = ["user_id", "item_id", "timestamp"]
        assert part[keys].astype(str).equals(log[keys].astype(str))
        labels = (part["label"] == "click").to_numpy().astype(int)
        assert labels.tolist() == log["label"].tolist()
        again = compute_metrics(labels, probabilities(part), users=part["user_id"].to_numpy())
        for key in DEFAULT_NAMES:
            assert metrics[name][key] == pytest.approx(again[key], abs=1e-9), key
    assert len(table) == len(splits.valid.rows) + len(splits.test.rows)
    np.testing.assert_allclose(probabilities(table).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_tell_before_from_after(method, trained):
    metrics = metrics_of(trained(method))
    for key in ("before", "before_test", "valid", "valid_uncalibrated", "test", "test_uncalibrated"):
        assert set(DEFAULT_NAMES) <= set(metrics[key])
    # Without calibration, which alone would make a difference.
    for name in ("logloss", "ece"):  # the order of so few targets may stay, and AUC with it
        assert metrics["before_test"][name] != metrics["test_uncalibrated"][name]
    assert metrics["test_uncalibrated"]["auc"] == pytest.approx(metrics["test"]["auc"], abs=1e-12)
    assert metrics["test_uncalibrated"]["logloss"] != metrics["test"]["logloss"]
    change = metrics["test_uncalibrated"]["logloss"] - metrics["before_test"]["logloss"]
    assert metrics["differences_test"]["before"]["logloss"]["value"] == pytest.approx(change, abs=1e-9)
    assert metrics["before_test"]["targets"] == metrics["test"]["targets"]
    cost = metrics["cost"]
    assert cost["training targets"] > 0
    assert 0 < cost["training steps alone, seconds"] < cost["training, with validations and checkpoints, seconds"]
    assert set(metrics["baselines_test"]) >= {"item_rate", "user_rate", "both_rates"}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_the_written_configuration_gives_the_same_predictions(method, trained, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # put back what this run changes
    first, second = trained(method), tmp_path / "again"
    recipe(method)(["--config", str(first / "config.yaml"), "--output_dir", str(second)])
    assert table_of(second).equals(table_of(first))  # to the bit
    ours, theirs = (load_file(run / "bundle" / "adapter_model.safetensors") for run in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    for key in ("before", "valid", "test"):
        assert metrics_of(second)[key] == metrics_of(first)[key]
    configs = [read_config(CONFIGS[method], ["--config", str(run / "config.yaml")]) for run in (first, second)]
    assert configs[0].train == configs[1].train and configs[0].domain == configs[1].domain


def test_methods_train_their_parameters(trained):
    """The adapter files of the five methods hold different things; only `full` holds the base."""
    tensors = {method: load_file(trained(method) / "bundle" / "adapter_model.safetensors") for method in METHODS}
    assert all(any(name.endswith(("score.weight", "score")) for name in held) for held in tensors.values())
    assert len(tensors["head"]) == 1
    assert all("lora_" in name or "score" in name for name in tensors["lora"])
    assert tensors["qlora"].keys() == tensors["lora"].keys()
    assert any("embed_tokens" in name for name in tensors["full"])
    assert not any("embed_tokens" in name for method in METHODS if method != "full" for name in tensors[method])


# -- evaluate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_gives_the_runs_predictions_in_both_modes(method, trained, recipe, data, tmp_path, capfd):
    run = trained(method)
    tables = {}
    for mode, tokens in (("stream", 700), ("independent", 4000)):
        out = tmp_path / mode
        recipe("evaluate")([
            "--bundle", str(run / "bundle"), "--data.path", str(data), "--mode", mode,
            "--batch_tokens", str(tokens), "--output_dir", str(out),
        ])  # fmt: skip
        assert files_below(out) == {"metrics.json", "predictions.parquet"}
        tables[mode] = table_of(out)
        assert metrics_of(out)["test"]["auc"] == pytest.approx(metrics_of(run)["test"]["auc"], abs=1e-3)
    kept = table_of(run, "test")
    for table in tables.values():
        assert table[COLUMNS[:5]].equals(kept[COLUMNS[:5]])
        np.testing.assert_allclose(probabilities(table), probabilities(kept), atol=1e-4, rtol=0)
    assert "auc" in capfd.readouterr().out


def test_evaluate_limits_targets_and_takes_other_splits(trained, recipe, data, tmp_path):
    args = ["--bundle", str(trained("lora") / "bundle"), "--data.path", str(data), "--limit", "20", "--split", "valid"]
    recipe("evaluate")([*args, "--metrics", "[auc, logloss]", "--output_dir", str(tmp_path)])
    table, whole = table_of(tmp_path), table_of(trained("lora"), "valid")
    assert 20 <= len(table) < 20 + 6  # whole windows of at most six targets
    assert set(metrics_of(tmp_path)["valid"]) == {"auc", "logloss", "targets"}
    keys = ["user_id", "item_id", "timestamp"]
    both = table.merge(whole, on=keys, suffixes=("", "_run"))
    assert len(both) == len(table)
    np.testing.assert_allclose(both["p_click"], both["p_click_run"], atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------


def refused(main, args: list[str], capfd) -> str:
    """Run a recipe that must refuse: exit code 2 and one line, which is returned."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    lines = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_key_is_named(method, recipe, arguments, tmp_path, capfd):
    line = refused(recipe(method), [*arguments(method, tmp_path / "out"), "--train.max_step=3"], capfd)
    assert "--train.max_step;" in line and "--train.max_steps" in line
    assert files_below(tmp_path) == set()


def test_bad_inputs_are_refused_before_anything_is_written(recipe, arguments, tmp_path, capfd):
    main, good = recipe("lora"), arguments("lora", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("name: [unclosed\n", "utf-8")
    (tmp_path / "wrong.yaml").write_text('name: x\nevent: "{title}"\noutcomes: {"no": " no"}\n', "utf-8")
    (tmp_path / "column.yaml").write_text(
        'name: x\nevent: "{colour}"\noutcomes: {"no": " no", "yes": " yes"}\n', "utf-8"
    )
    before = files_below(tmp_path)
    cases = {
        "--data.path=nowhere": "nowhere",
        f"--data.path={tmp_path / 'empty'}": "empty directory",
        f"--domain={tmp_path / 'none.yaml'}": "none.yaml",
        f"--domain={tmp_path / 'broken.yaml'}": "broken.yaml",
        f"--domain={tmp_path / 'wrong.yaml'}": "two labels",
        f"--domain={tmp_path / 'column.yaml'}": "colour",
        f"--model.base={tmp_path / 'no-model'}": "no-model",
        "--train.learning_rate=0": "train.learning_rate",
        "--method.r=zero": "method.r",
    }
    for flag, named in cases.items():
        assert named in refused(main, [*good, flag], capfd), flag
        assert files_below(tmp_path) == before, flag


def test_a_missing_data_path_is_refused(recipe, arguments, tmp_path, capfd):
    args = [word for word in arguments("lora", tmp_path / "out") if not word.startswith("--data.path")]
    assert "data.path is required" in refused(recipe("lora"), args, capfd)


def test_a_refused_run_leaves_the_old_run_alone(trained, recipe, arguments, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(trained("head"), out)
    before = {name: (out / name).read_bytes() for name in files_below(out) if (out / name).is_file()}
    refused(recipe("head"), [*arguments("head", out), "--data.path", str(tmp_path / "nowhere")], capfd)
    assert {name: (out / name).read_bytes() for name in files_below(out) if (out / name).is_file()} == before


def test_evaluate_refuses_what_is_no_bundle(trained, recipe, data, tmp_path, capfd):
    main, place = recipe("evaluate"), ["--data.path", str(data), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    for bundle in ("none", "empty"):
        line = refused(main, ["--bundle", str(tmp_path / bundle), *place], capfd)
        assert bundle in line
    cut = tmp_path / "cut"
    shutil.copytree(trained("lora") / "bundle", cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "adapter_model.safetensors" in refused(main, ["--bundle", str(cut), *place], capfd)
    assert "--bundles" in refused(main, ["--bundles", "x", *place], capfd)
    assert not (tmp_path / "out").exists()


# -- through the launcher ----------------------------------------------------------------------


def test_a_recipe_runs_through_accelerate_launch(trained, arguments, tmp_path):
    """The command of the README, in a process of its own, gives what the call in this process gives."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "single_cpu.yaml"), str(ROOT / "recipes" / "head.py")]
    done = subprocess.run(
        [*launch, *arguments("head", tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "written to" in done.stdout
    ours, theirs = table_of(tmp_path / "out"), table_of(trained("head"))
    assert ours[COLUMNS[:5]].equals(theirs[COLUMNS[:5]])
    np.testing.assert_allclose(probabilities(ours), probabilities(theirs), atol=1e-5)
