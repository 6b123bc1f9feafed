"""Where runs write, what they never delete, and in which order things are checked and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from llmrec_peft.errors import DataError
from llmrec_peft.files import replacing, write_json, write_parquet


def refused(main, args: list[str], capfd) -> str:
    """Run a recipe that must refuse; returns its one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# -- files -------------------------------------------------------------------------------------


def test_json_takes_numpy_and_writes_valid_json(tmp_path):
    content = {
        1: np.float32(0.5),
        "n": np.int64(3),
        "bad": [float("nan"), np.inf],
        "a": np.arange(2),
        "t": (True, None),
    }
    write_json(content, tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text("utf-8"))
    assert found == {"1": 0.5, "n": 3, "bad": [None, None], "a": [0, 1], "t": [True, None]}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), replacing(tmp_path / "x") as partial:
        fail(partial)
    assert contents(tmp_path) == {"x": b"old"}


# -- output directories ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bundle/mine.txt", "checkpoints/mine.txt", "logs/mine.txt", "report.md", "config.yaml"]
)
def test_somebody_elses_directory_is_left_alone(name, recipe, arguments, tmp_path, capfd):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine: 1\n")
    before = contents(out)
    line = refused(recipe("head"), arguments("head", out), capfd)
    assert f"holds {name.split('/')[0]}" in line
    assert contents(out) == before


def test_an_output_directory_below_a_file_is_refused(recipe, arguments, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    line = refused(recipe("head"), [*arguments("head", tmp_path / "file" / "out"), "--data.path=nowhere"], capfd)
    assert "output_dir" in line and "is not a directory" in line


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--train.save_steps=3", "train.save_steps 3 must be 0 or equal"),
        ("--train.report_to=[nosuch]", "nosuch"),
        ("--train.resume=true", "holds no run"),
        ("--domain.stream.max_length=5000", "positions"),
        ("--evaluation.metrics=[targets]", "evaluation.metrics must be null or a list with a metric"),
        ("--evaluation.metrics=[gauc_users, targets]", "evaluation.metrics must be null or a list with a metric"),
        ("--evaluation.prior=[0.5, 0.4]", "evaluation.prior must be one share above 0 a label, 1 in all"),
        ("--evaluation.prior=[0.5, 0.3, 0.2]", "evaluation.prior must be 2 numbers, for skip, click"),
    ],
)
def test_settings_are_checked_before_the_log_is_read(flag, named, recipe, arguments, tmp_path, capfd):
    args = [*arguments("head", tmp_path / "out"), "--data.path=nowhere", flag]
    assert named in refused(recipe("head"), args, capfd)
    assert not (tmp_path / "out").exists()


# -- what is saved -----------------------------------------------------------------------------


def test_a_report_that_fails_loses_neither_bundle_nor_predictions(recipe, arguments, tmp_path, monkeypatch):
    from llmrec_peft.runs import run_report

    def fail(*args, **kwargs):
        raise DataError("no report")

    monkeypatch.setattr(run_report, "write_report", fail)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # put back what this run changes
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        recipe("head")(arguments("head", out))
    assert (out / "bundle" / "behavior.json").is_file() and pq.read_table(out / "predictions.parquet").num_rows > 0
    assert not (out / "metrics.json").exists()


def with_labels(data: Path, out: Path, change) -> Path:
    """A copy of a log, its rows in the order of time, with `change` of its table."""
    shutil.copytree(data, out)
    table = pq.read_table(out / "interactions.parquet").sort_by("timestamp")
    write_parquet(change(table), out / "interactions.parquet")
    return out


def test_training_targets_of_one_label_are_refused(data, recipe, arguments, tmp_path, capfd):
    def early_clicks(table: pa.Table) -> pa.Table:
        early = pa.array(np.arange(len(table)) < 0.85 * len(table))
        label = pc.if_else(early, pa.scalar(1, table["label"].type), table["label"])
        return table.set_column(table.column_names.index("label"), "label", label)

    log = with_labels(data, tmp_path / "log", early_clicks)
    line = refused(recipe("head"), [*arguments("head", tmp_path / "out"), f"--data.path={log}"], capfd)
    assert "train of log" in line and "all labelled 'click'" in line
    assert not (tmp_path / "out").exists()


# -- evaluate ----------------------------------------------------------------------------------


def test_rows_that_were_trained_on_are_not_scored_as_test(trained, data, recipe, tmp_path, capfd):
    log = with_labels(data, tmp_path / "log", lambda table: table.slice(0, int(0.85 * len(table))))
    args = ["--bundle", str(trained("head") / "bundle"), "--data.path", str(log)]
    note = json.loads((trained("head") / "bundle" / "behavior.json").read_text("utf-8"))["counts"]["split"]
    assert note["by"] == "time" and note["boundaries"] == sorted(note["boundaries"])
    for split, boundary in zip(("valid", "test"), note["boundaries"], strict=True):
        line = refused(recipe("evaluate"), [*args, "--split", split], capfd)
        assert f"the bundle's {split} began at {boundary}" in line and "--split train" in line
    recipe("evaluate")([*args, "--split", "train"])
    assert "auc" in capfd.readouterr().out


def test_evaluate_checks_its_output_before_all_else(trained, recipe, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    args = ["--bundle", str(trained("head") / "bundle"), "--data.path", "nowhere"]
    before = contents(trained("head"))
    for place, named in ((tmp_path / "file" / "out", "is not a directory"), (trained("head"), "training run's")):
        assert named in refused(recipe("evaluate"), [*args, "--output_dir", str(place)], capfd)
    assert contents(trained("head")) == before


def test_evaluate_takes_other_ways_to_run_the_base(trained, data, recipe, tmp_path):
    args = ["--bundle", str(trained("head") / "bundle"), "--data.path", str(data)]
    recipe("evaluate")([*args, "--attn", "eager", "--output_dir", str(tmp_path / "eager")])
    recipe("evaluate")([*args, "--dtype", "bfloat16", "--output_dir", str(tmp_path / "half")])
    kept = pq.read_table(trained("head") / "predictions.parquet").to_pandas()
    kept = kept[kept["split"] == "test"]["p_click"].to_numpy()
    eager, half = (pq.read_table(tmp_path / name / "predictions.parquet")["p_click"].to_numpy()
                   for name in ("eager", "half"))  # fmt: skip
    np.testing.assert_allclose(eager, kept, atol=1e-4)
    assert 1e-6 < np.abs(half - kept).max() < 0.1


def test_evaluate_names_a_metric_list_of_counts(trained, recipe, capfd):
    args = ["--bundle", str(trained("head") / "bundle"), "--data.path", "nowhere", "--metrics", "[targets]"]
    assert "metrics must be null or a list with a metric" in refused(recipe("evaluate"), args, capfd)
