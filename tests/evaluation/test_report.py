"""The report prints what the metrics say, in tables that hold together, with pictures that open."""

import re

import numpy as np
import pytest
from sklearn.metrics import classification_report

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.evaluation.plots import plot_learning_curve
from llmrec_peft.evaluation.report import write_report
from llmrec_peft.evaluation.report_content import ReportContent, count_slices

HISTORY = [
    {"loss": 0.7, "step": 1},
    {"loss": 0.6, "step": 2},
    {"eval_logloss": 0.65, "eval_auc": 0.6, "eval_gauc": float("nan"), "step": 2},
    {"train_runtime": 3.0, "step": 2},
]


def content(classes=2, n=240, **changes):
    rng = np.random.default_rng(0)
    labels, users = rng.integers(0, classes, n), rng.integers(0, 20, n)

    def answers(strength):
        raw = rng.random((n, classes)) + strength * (labels[:, None] == np.arange(classes))
        return raw / raw.sum(axis=1, keepdims=True)

    p = answers(0.1)
    fields = {
        "title": "shop: lora",
        "class_names": ["skip", "click", "buy"][:classes],
        "labels": labels,
        "users": users,
        "before": answers(0.0),
        "after": answers(0.8),
        "uncalibrated": answers(0.7),
        "baselines": {"item_rate": p[:, 1] if classes == 2 else p},
        "slices": {"history": count_slices(rng.integers(0, 30, n), [1, 5], "earlier events")},
        "log_history": HISTORY,
        "run": {"base": "tiny", "resumed": False},
        "data": {"interactions": 12345, "train": {"targets": 700}, "test": {"targets": n, "users": 20}},
        "cost": {"targets/s": 12.345},
    }
    return ReportContent(**{**fields, **changes})


def cells(text, heading):
    """Rows of the first table under a heading, as lists of cells, with the divider left out."""
    section = re.split(r"\n## ", text.split(f"## {heading}\n", 1)[1])[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows if set("".join(row)) - set("- |")]


def test_numbers_are_those_of_the_metrics(tmp_path):
    given = content()
    found = write_report(tmp_path, given, samples=50)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    plain = compute_metrics(given.labels, given.after, given.users)
    table = {row[0]: row for row in cells(text, "Before and after, on test")}
    assert table["metric"] == ["metric", "better", "before", "after, uncalibrated", "after",
                               "uncalibrated after - before"]  # fmt: skip
    for name in ("auc", "gauc", "logloss", "ne", "ece", "po_ratio", "accuracy", "f1"):
        interval = found["intervals"]["after"][name]
        assert interval["value"] == pytest.approx(plain[name], abs=1e-12)
        assert table[name][4] == f"{plain[name]:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
        gap = found["differences"]["before"][name]
        both = [found["intervals"][system][name]["value"] for system in ("uncalibrated", "before")]
        assert gap["value"] == pytest.approx(both[0] - both[1], abs=1e-12)
        assert table[name][5].startswith(f"{gap['value']:+.4f} [")
    assert [table[name][1] for name in ("auc", "logloss", "po_ratio")] == ["higher", "lower", "1"]
    assert f"240 test targets of 20 users: auc {plain['auc']:.4f} [" in text
    assert "the best counting baseline" in text
    assert set(found["intervals"]) == {"before", "uncalibrated", "after", "item_rate"}


def test_class_report_slices_and_facts(tmp_path):
    given = content()
    write_report(tmp_path, given, samples=20)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    wanted = classification_report(given.labels, given.after[:, 1] > 0.5, target_names=["skip", "click"], digits=3)
    assert wanted.rstrip() in text
    slices = {row[0]: row for row in cells(text, "By history")[1:]}
    assert list(slices) == ["0 earlier events", "1 to 4 earlier events", "5 or more earlier events"]
    assert sum(int(row[1]) for row in slices.values()) == 240
    mask = dict(given.slices["history"])["5 or more earlier events"]
    some = compute_metrics(given.labels[mask], given.after[mask], given.users[mask])
    assert slices["5 or more earlier events"][4:6] == [f"{some['auc']:.4f}", f"{some['gauc']:.4f}"]
    assert slices["5 or more earlier events"][2] == str(len(np.unique(given.users[mask])))
    assert "| interactions | 12,345 |" in text and "| targets/s | 12.35 |" in text and "| resumed | no |" in text
    assert "| targets | 700 | 240 |" in text and "| users |  | 20 |" in text


def test_pictures_are_whole_and_nothing_is_left_over(tmp_path):
    from matplotlib.image import imread

    write_report(tmp_path / "new", content(), samples=5)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "report.md",
        "reliability.png",
        "learning_curve.png",
    }
    for name in ("reliability.png", "learning_curve.png"):
        picture = imread(tmp_path / "new" / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 800 and picture[..., :3].std() > 0.05
        assert f"({name})" in (tmp_path / "new" / "report.md").read_text(encoding="utf-8")


def test_the_same_predictions_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, content(), samples=20, seed=1)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_many_classes_and_only_the_predictions(tmp_path):
    given = content(classes=3, before=None, uncalibrated=None, log_history=[], data={}, cost={}, run={})
    write_report(tmp_path, given, samples=10)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## On test" in text and "most probable class" in text and "after - before" not in text
    assert "Learning curve" not in text and not (tmp_path / "learning_curve.png").exists()
    assert "## Cost" not in text and "## Data" not in text
    assert [row[0] for row in cells(text, "On test")[1:]][:2] == ["auc", "gauc"]


def test_without_the_bootstrap_there_are_no_brackets(tmp_path):
    found = write_report(tmp_path, content(), samples=0, names=["logloss", "targets"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "[" not in text.split("## By class")[0] and "bootstrap" not in text
    assert [row[0] for row in cells(text, "Before and after, on test")] == ["metric", "logloss"]
    gap = found["intervals"]["uncalibrated"]["logloss"]["value"] - found["intervals"]["before"]["logloss"]["value"]
    assert found["differences"]["before"]["logloss"]["value"] == pytest.approx(gap)


def test_without_calibration_after_is_compared_as_it_is(tmp_path):
    found = write_report(tmp_path, content(uncalibrated=None), samples=0)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    gap = found["intervals"]["after"]["auc"]["value"] - found["intervals"]["before"]["auc"]["value"]
    assert found["differences"]["before"]["auc"]["value"] == pytest.approx(gap)
    assert "| after - before |" in text and "calibrated" not in text.replace("expected calibration", "")


@pytest.mark.parametrize(
    ("split_by", "said"), [("time", "counted over strictly earlier rows"), ("user", "training rows of other users")]
)
def test_counting_is_explained_as_it_was_done(split_by, said, tmp_path):
    write_report(tmp_path, content(split_by=split_by), samples=0)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert said in text
    assert ("at any time" in text) == (split_by == "user")


def test_one_user_has_no_interval(tmp_path):
    found = write_report(tmp_path, content(users=np.zeros(240, dtype=int)), samples=20)
    assert np.isnan(found["intervals"]["after"]["auc"]["low"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert {row[0]: row[4] for row in cells(text, "Before and after, on test")}["auc"].count("[") == 0


def test_one_class_only_is_called_undefined(tmp_path):
    given = content()
    write_report(tmp_path, content(labels=np.ones_like(given.labels)), samples=10)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert {row[0]: row[4] for row in cells(text, "Before and after, on test")}["auc"] == "undefined"
    assert "nan" not in text.lower().split()


def test_names_cannot_break_the_page(tmp_path):
    given = content(title="a\n# b", class_names=["no", "y|e`s $\\x$\n``` $" + "long" * 20], run={"pa|th": "x<b>\ny"})
    write_report(tmp_path, given, samples=5)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# a # b" and "| pa\\|th | x\\<b> y |" in lines
    assert sum(line.startswith("```") for line in lines) == 2
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|") and "share of" in line}
    assert widths == {10}


def test_predictions_that_do_not_fit_leave_nothing_behind(tmp_path):
    with pytest.raises(DataError, match=r"labels must be \[239\]"):
        write_report(tmp_path / "out", content(before=content().before[1:]), samples=5)
    with pytest.raises(ConfigError, match="'aucc' does not exist"):
        write_report(tmp_path / "out", content(), names=["aucc"])
    assert not (tmp_path / "out").exists()


def test_a_history_without_points_draws_nothing(tmp_path):
    assert plot_learning_curve(tmp_path / "x.png", [{"loss": float("nan"), "step": 1}, {"epoch": 1.0}]) is None
    assert plot_learning_curve(tmp_path / "x.png", [{"eval_auc": 0.5, "step": 3}]) == tmp_path / "x.png"


def test_slices_cover_every_target_once():
    counts = np.array([0, 1, 4, 5, 99])
    slices = count_slices(counts, [1, 5, 20], "events")
    assert [name for name, _ in slices] == ["0 events", "1 to 4 events", "5 to 19 events", "20 or more events"]
    assert np.sum([mask for _, mask in slices], axis=0).tolist() == [1] * 5
    assert [name for name, _ in count_slices([7], [1, 5], "events")] == ["5 or more events"]
