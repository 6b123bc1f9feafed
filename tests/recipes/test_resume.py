"""A run that was broken off ends where the unbroken one does, and what cannot be resumed is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from llmrec_peft.config.schema import LoraConfig, read_config
from llmrec_peft.data.simulate import write_simulated_shop
from llmrec_peft.runs.run_directory import begin_run, prepare_run
from tests.conftest import ROOT

LONGER = ["--train.max_steps=6", "--method.dropout=0.1"]
# Too high a rate: validation soon gets worse, and two worse ones stop the run.
STOPPING = ["--train.max_steps=8", "--train.eval_steps=1", "--train.early_stopping=2", "--train.learning_rate=0.5"]


@pytest.fixture(scope="module")
def unbroken(recipe, arguments, tmp_path_factory) -> Path:
    """A run of six steps with three checkpoints; the last two are kept."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    recipe("lora")([*arguments("lora", out), *LONGER])
    return out


@pytest.fixture(scope="module")
def stopped(recipe, arguments, tmp_path_factory) -> Path:
    """A run that stopped early, with all its checkpoints; it was moved since, so that no path in them holds."""
    from llmrec_peft.training import trainer

    place = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "rotate_checkpoints", lambda **_: None)
        recipe("lora")([*arguments("lora", place / "first"), *STOPPING])
    return (place / "first").rename(place / "moved")


def without_results(run: Path, out: Path) -> Path:
    """A copy of a run as a kill while answering the test targets leaves it."""
    shutil.copytree(run, out)
    for name in ("metrics.json", "predictions.parquet", "report.md"):
        (out / name).unlink()
    shutil.rmtree(out / "bundle")
    return out


def best_of(run: Path) -> int:
    """Step of the best checkpoint of a run, by its last one."""
    state = run / "checkpoints" / f"checkpoint-{max(steps_of(run))}" / "trainer_state.json"
    return json.loads(state.read_text("utf-8"))["best_global_step"]


def steps_of(out: Path) -> set[int]:
    return {int(path.parent.name.split("-")[1]) for path in out.glob("checkpoints/checkpoint-*/complete")}


def broken_off(unbroken: Path, out: Path) -> Path:
    """The state that a kill while saving the last checkpoint leaves: no results, and a checkpoint without its end."""
    without_results(unbroken, out)
    last = out / "checkpoints" / "checkpoint-6"
    (last / "complete").unlink()
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return out


def same_results(one: Path, other: Path) -> None:
    first, second = (load_file(path / "bundle" / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert pq.read_table(one / "predictions.parquet").equals(pq.read_table(other / "predictions.parquet"))
    left, right = (json.loads((path / "metrics.json").read_text("utf-8")) for path in (one, other))
    for name in ("before", "valid", "test", "calibration", "intervals_test"):
        assert left[name] == right[name]


def test_a_resumed_run_ends_where_the_unbroken_one_does(unbroken, recipe, arguments, tmp_path):
    out = broken_off(unbroken, tmp_path / "out")
    recipe("lora")([*arguments("lora", out), *LONGER, "--train.resume=true"])
    same_results(unbroken, out)
    assert (out / "config.yaml").read_text("utf-8").replace(str(out), str(unbroken)) == (
        unbroken / "config.yaml"
    ).read_text("utf-8")


def test_a_run_that_had_taken_all_steps_takes_no_further_one(unbroken, recipe, arguments, tmp_path):
    out = without_results(unbroken, tmp_path / "out")
    recipe("lora")([*arguments("lora", out), *LONGER, "--train.resume=true"])
    same_results(unbroken, out)
    assert steps_of(out) == steps_of(unbroken)
    assert "training targets" not in json.loads((out / "metrics.json").read_text("utf-8"))["cost"]


@pytest.mark.parametrize("last", [1, 2])
def test_early_stopping_counts_on_after_a_resume_elsewhere(last, stopped, recipe, arguments, tmp_path):
    """After one worse validation, one more must stop it; after two, it has stopped. The best weights are moved too."""
    best = best_of(stopped)
    assert max(steps_of(stopped)) == best + 2 < 8
    out = without_results(stopped, tmp_path / "out")
    if last == 1:
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{best + 2}")
    recipe("lora")([*arguments("lora", out), *STOPPING, "--train.resume=true"])
    same_results(stopped, out)
    assert max(steps_of(out)) == best + 2
    bundle = load_file(out / "bundle" / "adapter_model.safetensors")
    head = next(bundle[name] for name in bundle if "score" in name)
    for step in (best, best + 2):
        tensors = load_file(out / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        kept = next(tensors[name] for name in tensors if "score" in name)
        assert (head == kept).all() == (step == best)


def test_a_missing_best_checkpoint_is_named(stopped, recipe, arguments, tmp_path, capfd):
    out = without_results(stopped, tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / f"checkpoint-{best_of(out)}")
    with pytest.raises(SystemExit):
        recipe("lora")([*arguments("lora", out), *STOPPING, "--train.resume=true"])
    assert f"checkpoint-{best_of(stopped)}, is missing or incomplete" in capfd.readouterr().err.splitlines()[-1]


def test_without_a_complete_checkpoint_it_starts_again(unbroken, recipe, arguments, tmp_path, capfd):
    out = broken_off(unbroken, tmp_path / "out")
    for path in out.glob("checkpoints/checkpoint-*/complete"):
        path.unlink()
    recipe("lora")([*arguments("lora", out), *LONGER, "--train.resume=true"])
    assert "holds no complete checkpoint; training starts from the beginning" in capfd.readouterr().out
    same_results(unbroken, out)


def test_the_learning_rate_rises_and_falls(unbroken):
    """A warm-up of 0.05 of 6 steps is one step, at 0; the rate then falls to 0 in a line."""
    state = json.loads((unbroken / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text("utf-8"))
    rates = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    assert rates == pytest.approx([0, *(5e-4 * left / 5 for left in (5, 4, 3, 2, 1))])


@pytest.mark.slow
def test_a_killed_process_is_resumed(unbroken, arguments, tmp_path):
    """kill -9 as soon as the first checkpoint is whole, whatever the process is doing then."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "recipes" / "lora.py"), *arguments("lora", out), *LONGER]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoints" / "checkpoint-2" / "complete").is_file():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    subprocess.run([*command, "--train.resume=true"], check=True, capture_output=True)
    same_results(unbroken, out)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--train.learning_rate=0.5"], "train.learning_rate 0.0005, and now it is 0.5"),
        (["--domain.stream.targets=5"], "domain.stream.targets 6, and now it is 5"),
        (["--train.max_steps=8"], "train.max_steps 6, and now it is 8"),
        (["--evaluation.valid_targets=5"], "evaluation.valid_targets None, and now it is 5"),
        (["--train.select_metric=auc"], "train.select_metric 'logloss', and now it is 'auc'"),
        (["--model.head_init=zero"], "model.head_init 'label_words', and now it is 'zero'"),
    ],
)
def test_other_settings_are_refused(unbroken, flags, named, recipe, arguments, tmp_path, capfd):
    out = broken_off(unbroken, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        recipe("lora")([*arguments("lora", out), *LONGER, "--train.resume=true", *flags])
    assert stop.value.code == 2
    assert named in capfd.readouterr().err.splitlines()[-1]
    assert not (out / "metrics.json").exists()


def resumed(arguments, out: Path, *flags: str) -> LoraConfig:
    return read_config(LoraConfig, [*arguments("lora", out), *LONGER, "--train.resume=true", *flags])


@pytest.mark.parametrize(
    "flag",
    [
        "--evaluation.bootstrap=7", "--evaluation.metrics=[auc]", "--evaluation.test_targets=9",
        "--evaluation.calibrate=false", "--evaluation.before=false", "--train.report_to=[]", "--train.logging_steps=3",
        "--train.epochs=9", "--data.path=elsewhere", "--output_dir=OUT", "--model.activation_checkpointing=true",
    ],
)  # fmt: skip
def test_settings_that_leave_the_weights_alone_may_change(flag, unbroken, arguments, tmp_path):
    out = broken_off(unbroken, tmp_path / "out")
    run = prepare_run(resumed(arguments, out, flag.replace("OUT", str(out / ".." / "out"))))
    assert Path(run.checkpoint).name == "checkpoint-4"


def test_a_run_of_version_0_1_0_may_be_resumed(unbroken, arguments, tmp_path):
    """Its config.yaml has the former names of keys and values."""
    out = broken_off(unbroken, tmp_path / "out")
    settings = (out / "config.yaml").read_text("utf-8")
    assert "head_init: label_words" in settings
    (out / "config.yaml").write_text(settings.replace("label_words", "words"), "utf-8")
    assert Path(prepare_run(resumed(arguments, out)).checkpoint).name == "checkpoint-4"


def test_what_only_selection_reads_may_change_without_it(unbroken, arguments, tmp_path):
    out = broken_off(unbroken, tmp_path / "out")
    text = (out / "config.yaml").read_text("utf-8")
    (out / "config.yaml").write_text(text.replace("eval_steps: 2", "eval_steps: 0"), "utf-8")
    flags = ["--train.eval_steps=0", "--evaluation.valid_targets=5", "--evaluation.batch_tokens=77"]
    assert prepare_run(resumed(arguments, out, *flags, "--train.select_metric=auc", "--train.save_steps=3")).checkpoint


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_started_run_is_not_whole(resume, unbroken, arguments, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    record = json.loads((out / "checkpoints" / "streams.json").read_text("utf-8"))
    (out / "checkpoints" / "checkpoint-4" / "complete").unlink()
    begin_run(prepare_run(resumed(arguments, out, f"--train.resume={resume}")), record["streams"], record["launch"])
    assert not (out / "metrics.json").exists()
    assert steps_of(out) == ({6} if resume == "true" else set())
    assert not (out / "checkpoints" / "checkpoint-4").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_other_data_is_refused(whole, unbroken, recipe, arguments, tmp_path, capfd):
    out = broken_off(unbroken, tmp_path / "out")
    if not whole:
        (out / "checkpoints" / "checkpoint-4" / "complete").unlink()
    other = write_simulated_shop(tmp_path / "log", users=24, items=30, sessions=3, seed=9)
    with pytest.raises(SystemExit) as stop:
        recipe("lora")([*arguments("lora", out), *LONGER, "--train.resume=true", f"--data.path={other}"])
    assert stop.value.code == 2
    assert "trained on streams" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--train.resume=true"], "holds no run"),
        (["--train.save_steps=3"], "train.save_steps 3 must be 0 or equal train.eval_steps 2"),
        (["--train.report_to=[nosuch]"], "nosuch"),
        (["--method.target_modules=[nope]"], "target_modules"),
        (["--domain.stream.max_length=5000"], "positions"),
    ],
)
def test_what_cannot_run_leaves_nothing(flags, named, recipe, arguments, tmp_path, capfd):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        recipe("lora")([*arguments("lora", out), *flags])
    assert stop.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and named in error
    assert not out.exists()


def test_an_output_directory_that_is_a_file_is_refused(recipe, arguments, tmp_path, capfd):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        recipe("lora")(arguments("lora", tmp_path / "out"))
    assert stop.value.code == 2
    assert "output_dir" in capfd.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out").read_text() == "mine"
