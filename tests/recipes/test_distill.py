"""The distill recipe: a tiny teacher into students of each kind, and what they can be used for afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec_peft import BehaviorLog, Scorer, distill
from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.data.simulate import write_simulated_shop
from llmrec_peft.errors import BundleError, ConfigError, DataError, ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flags(trained, data):
    """`flags(out, **changes)`: a small run's arguments."""

    def make(out: Path, **changes) -> list[str]:
        values = {
            "teacher": trained("lora") / "bundle",
            "data.path": data,
            "output_dir": out,
            "student.width": 16,
            "student.heads": 2,
            "student.context": 4,
            "student.targets": 6,
            "student.content_width": 8,
            "loss.pairs": 0.2,
            "teacher_outputs.targets": 60,
            "train.max_steps": 4,
            "train.batch_size": 4,
            "train.micro_tokens": 600,
            "train.learning_rate": 1e-2,
            "evaluation.bootstrap": 20,
            **changes,
        }
        return [f"--{key}={value}" for key, value in values.items()]

    return make


@pytest.fixture(scope="module")
def students(recipe, flags, tiny_base, tmp_path_factory):
    """`students("ids")`: the output directory of a small run; read-only."""
    made: dict[str, Path] = {}
    extra = {
        "ids": {},
        "shallow": {"student.layers": 1, "loss.hidden": 0.5},
        "small": {"student.base": tiny_base("qwen2"), "loss.hidden": 0.5},
        "encoder": {
            "student.kind": "small",
            "student.base": tiny_base("bert"),
            "teacher_outputs.only": "true",
            "loss.pairs": 0,
        },
    }

    def factory(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp("distilled") / kind
            recipe("distill")(flags(out, **{"student.kind": kind, **extra[kind]}))
            made[kind] = out
        return made[kind]

    return factory


@pytest.mark.parametrize("kind", ["ids", "shallow", "small", "encoder"])
def test_a_run_leaves_a_student_that_evaluates_as_it_was_measured(kind, students, recipe, data, tmp_path):
    out = students(kind)
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("student", "report.md", "config.yaml", "predictions.parquet", "logs"):
        assert (out / name).exists()
    assert {"before", "valid", "test"} <= metrics.keys()
    manifest = read_manifest(out / "student")
    assert manifest["student"]["options"]["kind"] == ("small" if kind == "encoder" else kind)
    assert manifest["student"]["teacher"]["targets"] >= 60
    again = tmp_path / "again"
    recipe("evaluate")(["--bundle", str(out / "student"), "--data.path", str(data), "--output_dir", str(again)])
    kept = pq.read_table(out / "predictions.parquet").to_pandas()
    kept = kept[kept["split"] == "test"].reset_index(drop=True)
    found = pq.read_table(again / "predictions.parquet").to_pandas()
    np.testing.assert_allclose(found["p_click"], kept["p_click"], atol=1e-4)
    assert kept["p_click"].std() > 1e-3
    card = (out / "student" / "README.md").read_text()
    assert "## Teacher" in card and "distilled" in card


def test_the_configuration_that_is_left_gives_the_same_student(students, recipe, tmp_path):
    out = students("ids")
    recipe("distill")(["--config", str(out / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    first, again = (read_manifest(path / "student") for path in (out, tmp_path / "again"))
    assert first["weights"] == again["weights"]


def test_cached_predictions_serve_another_student(students, recipe, flags, tmp_path):
    """The second student's run reads the cache of the first, and adds no shard to it."""
    cache = students("ids") / "teacher"
    shards = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    recipe("distill")(
        flags(tmp_path / "other", **{"teacher_outputs.path": cache, "student.kind": "shallow", "student.layers": 1})
    )
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == shards
    assert not (tmp_path / "other" / "teacher").exists()


def test_a_run_without_a_teacher_caches_nothing(recipe, flags, tmp_path):
    out = tmp_path / "alone"
    changes = {"loss.soft": 0, "loss.pairs": 0, "student.content": "false"}
    recipe("distill")(flags(out, **changes))
    assert not (out / "teacher").exists()
    manifest = read_manifest(out / "student")
    assert manifest["student"]["teacher"] is None
    assert "Trained without a teacher" in (out / "student" / "README.md").read_text()


@pytest.fixture
def gaps(data, tmp_path) -> Path:
    """The log with every other outcome taken out of its first half."""
    path = tmp_path / "gaps"
    shutil.copytree(data, path)
    (file,) = path.glob("interactions.*")
    table = pq.read_table(file)
    gone = (np.arange(len(table)) % 2 == 0) & (np.arange(len(table)) < len(table) // 2)
    place = table.column_names.index("label")
    values = pa.array(table["label"].to_pylist(), table["label"].type, mask=gone)
    pq.write_table(table.set_column(place, "label", values), file)
    return path


def test_rows_without_a_label_are_learnt_from_the_teacher(recipe, flags, gaps, tmp_path):
    """Targets without a label get predictions and change the student; without the option they are an error."""
    from llmrec_peft.config.schema import DistillConfig, read_config

    with pytest.raises(DataError, match="has None, .*; give it a label, or set label.missing to leave_out"):
        distill(read_config(DistillConfig, flags(tmp_path / "refused", **{"data.path": gaps})))
    changes = {"data.path": gaps, "teacher_outputs.targets": "null", "teacher_outputs.unlabelled": "true"}
    weights = {}
    for hard in (0.5, 0.0):
        out = tmp_path / f"hard{hard}"
        recipe("distill")(flags(out, **changes, **{"loss.hard": hard}))
        manifest = read_manifest(out / "student")
        counts = manifest["counts"]["train"]
        assert counts["targets without a label"] > 20
        assert manifest["student"]["teacher"]["targets"] == counts["targets"]
        assert manifest["domain"]["label"]["missing"] == "leave_out"
        weights[hard] = manifest["weights"]["fingerprint"]
    assert weights[0.5] != weights[0.0]
    again = tmp_path / "again"
    recipe("evaluate")(["--bundle", str(tmp_path / "hard0.0/student"), "--data.path", str(gaps),
                        "--output_dir", str(again)])  # fmt: skip
    assert (again / "metrics.json").is_file()


def test_a_student_of_ids_scores_histories_by_item_id(students, data):
    log = BehaviorLog.read(data)
    scorer = Scorer.load(students("ids") / "student", log)
    ids = log.items.column("item_id").to_pylist()
    history = [(ids[0], "click"), (ids[1], "skip"), (ids[2], "click")]
    found = scorer.score(history, ids)
    assert found.shape == (len(ids), 2) and found[:, 1].std() > 1e-4
    one = scorer.score(history, [ids[5]])
    np.testing.assert_allclose(one[0], found[5], atol=1e-5)
    np.testing.assert_allclose(scorer.score(history, [{"item_id": ids[5]}]), one, atol=1e-6)
    flipped = scorer.score([(item, "skip") for item, _ in history], ids)
    assert np.abs(flipped - found).max() > 1e-4
    with pytest.raises(DataError, match="'item brand new' is unknown to this model of item ids"):
        scorer.score(history, [{"item_id": "brand new"}])
    assert len(scorer.recommend(history, k=3)) == 3


def test_a_student_resumes_where_it_was_killed(recipe, flags, tmp_path):
    """Six steps at once, and four of them again after the run was cut off in between."""
    changes = {"train.max_steps": 6, "train.save_steps": 2}
    recipe("distill")(flags(tmp_path / "whole", **changes))
    recipe("distill")(flags(tmp_path / "cut", **changes))
    (tmp_path / "cut" / "metrics.json").unlink()
    for step in (4, 6):
        for path in (tmp_path / "cut" / "checkpoints" / f"checkpoint-{step}").glob("complete"):
            path.unlink()
    recipe("distill")(flags(tmp_path / "cut", **changes, **{"train.resume": "true"}))
    whole, cut = (read_manifest(tmp_path / name / "student")["weights"] for name in ("whole", "cut"))
    assert whole == cut


def test_the_library_call_is_the_recipe(trained, data, tmp_path):
    found = distill(
        teacher=str(trained("lora") / "bundle"),
        data={"path": str(data)},
        student={"kind": "ids", "width": 16, "heads": 2, "content": False},
        loss={"soft": 0.0},
        train={"max_steps": 2, "report_to": []},
        evaluation={"bootstrap": 0, "before": False},
        output_dir=str(tmp_path / "out"),
    )
    assert 0 < found["test"]["auc"] < 1
    assert load_trained(tmp_path / "out" / "student").classifier.config.hidden_size == 16


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"student.kind": "shallow", "student.layers": 2}, ConfigError, "student.layers must be from 1 to 1"),
        ({"student.kind": "small"}, ConfigError, "student.base must be a smaller base"),
        (
            {"teacher_outputs.unlabelled": "true", "loss.soft": 0, "loss.pairs": 0},
            ConfigError,
            "teacher_outputs.unlabelled must be fal",
        ),
        ({"loss.hidden": 1}, ConfigError, "loss.hidden must be 0 for a student of item ids"),
        ({"student.width": 10}, ConfigError, "student.width must be a multiple of twice student.heads 2"),
        ({"teacher": "/nowhere"}, BundleError, "bundle /nowhere has no behavior.json"),
    ],
)
def test_what_cannot_be_done_is_named(changes, kind, message, flags, tmp_path):
    from llmrec_peft.config.schema import DistillConfig, read_config

    with pytest.raises(kind, match=message):
        distill(read_config(DistillConfig, flags(tmp_path / "out", **changes)))
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_hold_the_window_is_named(flags, tiny_base, tmp_path):
    from llmrec_peft.config.schema import DistillConfig, read_config

    short = tmp_path / "short"
    short.mkdir()
    for path in tiny_base("llama").iterdir():
        (short / path.name).write_bytes(path.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    changes = {"student.kind": "small", "student.base": short}
    with pytest.raises(
        ModelError, match="cannot hold the teacher's windows: base has 64 positions .*; choose another base"
    ):
        distill(read_config(DistillConfig, flags(tmp_path / "out", **changes)))


def test_a_log_that_the_student_cannot_read_is_refused_before_the_teacher_runs(flags, data, tmp_path):
    """Ids that differ by a tab alone are two items for the teacher, and one token for a student of ids."""
    from llmrec_peft.config.schema import DistillConfig, read_config

    path = tmp_path / "log"
    shutil.copytree(data, path)
    (file,) = path.glob("items.*")
    table = pq.read_table(file)
    ids = [*table["item_id"].to_pylist(), "one item", "one\titem"]
    table = pa.concat_tables([table, table.slice(0, 2)])
    pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", pa.array(ids)), file)
    with pytest.raises(DataError, match="stands for two items"):
        distill(read_config(DistillConfig, flags(tmp_path / "out", **{"data.path": path})))
    assert not (tmp_path / "out").exists()


def test_stale_predictions_are_refused_before_any_work(students, trained, flags, tmp_path):
    from llmrec_peft.config.schema import DistillConfig, read_config

    cache = students("ids") / "teacher"
    changes = {"teacher_outputs.path": cache, "teacher": trained("head") / "bundle"}
    with pytest.raises(DataError, match="stale teacher outputs: they are another teacher's"):
        distill(read_config(DistillConfig, flags(tmp_path / "out", **changes)))
    assert not (tmp_path / "out").exists()


def test_a_catalogue_that_grew_is_named(students, recipe, tmp_path, capfd):
    grown = write_simulated_shop(tmp_path / "grown", users=24, items=40, sessions=3)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        recipe("evaluate")(["--bundle", str(students("ids") / "student"), "--data.path", str(grown)])
    assert stopped.value.code == 2
    assert "unknown to this model of item ids" in capfd.readouterr().err
