"""The trainer: resuming, checkpoints, selection, stopping, evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import EarlyStoppingCallback

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import build_streams
from llmrec_peft.errors import ConfigError
from llmrec_peft.training.resume import last_checkpoint
from tests.invariants.setup_run import DOMAIN, make_trainer, splits, trained

pytestmark = pytest.mark.usefixtures("one_thread")

SAVING = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "learning_rate": 1e-2, "max_steps": 8,
          "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1.0}  # fmt: skip


@pytest.fixture
def make(tiny_base, tiny_tokenizer):
    """`make(directory, **settings)`: a trainer that has not trained."""
    return lambda directory, **settings: make_trainer(tiny_base(), tiny_tokenizer, directory, **settings)


@pytest.fixture
def valid(tiny_tokenizer):
    """Streams of the validation split."""
    return build_streams(splits().valid, Domain.from_dict(DOMAIN), tiny_tokenizer)


def scripted(*values):
    """A metric that takes given values, evaluation by evaluation."""
    following = iter(values)
    return lambda predictions: {"logloss": next(following), "targets": len(predictions.targets)}


def steps_of(trainer):
    """What was logged at each step, without timings."""
    return [line for line in trainer.state.log_history if "loss" in line]


def flat(state, prefix=""):
    """Every number and tensor of an optimizer's state by its path."""
    if isinstance(state, dict | list):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for name, part in pairs for key, value in flat(part, f"{prefix}/{name}").items()}
    return {prefix: state.tolist() if torch.is_tensor(state) else state}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_ends_bit_equal_to_the_unbroken_one(dropout, make, tmp_path):
    settings = {**SAVING, "options": {"dropout": dropout}}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    assert whole.state.num_train_epochs == 2 and len(steps_of(whole)) == 8
    for step in (3, 6):  # both in the middle of an epoch
        resumed = make(tmp_path / f"resumed-{step}", **settings)
        before = trained(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, value in trained(whole).items():
            assert np.array_equal(value, trained(resumed)[name]), (step, name)
        assert any(not np.array_equal(before[name], value) for name, value in trained(resumed).items())
        assert flat(resumed.optimizer.state_dict()) == flat(whole.optimizer.state_dict())
        assert steps_of(resumed) == steps_of(whole)


def test_dropout_is_at_work(make, tmp_path):
    """Were it not, the test above would say nothing about the random state."""
    ends = []
    for seed in (3, 4):
        trainer = make(tmp_path, max_steps=2, options={"dropout": 0.3}, seed=seed, data_seed=3)
        trainer.train()
        ends.append(trained(trainer))
    assert any(not np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_unfinished_checkpoint_is_passed_over(make, tmp_path):
    make(tmp_path, **{**SAVING, "save_steps": 2}).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "complete").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-10").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert last_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_are_compared_as_numbers(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_holds_the_trained_tensors_alone(make, tmp_path):
    trainer = make(tmp_path, **{**SAVING, "max_steps": 3})
    trainer.train()
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == trained(trainer).keys()
    assert all("lora_" in name or "score" in name for name in saved) and any("score" in name for name in saved)
    for name, value in trained(trainer).items():
        assert np.array_equal(saved[name].numpy(), value)


def test_old_checkpoints_go_and_the_best_stays(make, valid, tmp_path):
    settings = {**SAVING, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2,
                "load_best_model_at_end": True, "metric_for_best_model": "logloss",
                "greater_is_better": False}  # fmt: skip
    trainer = make(tmp_path, valid_streams=valid, compute_metrics=scripted(0.9, 0.2, 0.4, 0.6), **settings)
    trainer.train()
    left = {path.parent.name for path in tmp_path.glob("checkpoint-*/complete")}
    assert left == {"checkpoint-4", "checkpoint-8"} == {path.name for path in tmp_path.glob("checkpoint-*")}
    assert trainer.state.best_metric == 0.2 and Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    best, last = (safetensors.torch.load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (4, 8))
    now = trained(trainer)
    assert all(np.array_equal(best[name].numpy(), value) for name, value in now.items())
    assert any(not np.array_equal(last[name].numpy(), value) for name, value in now.items())


def test_early_stopping_stops(make, valid, tmp_path):
    settings = {**SAVING, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1,
                "load_best_model_at_end": True, "metric_for_best_model": "logloss",
                "greater_is_better": False}  # fmt: skip
    measure = scripted(0.9, 0.5, 0.6, 0.7, 0.1)
    trainer = make(tmp_path, valid_streams=valid, compute_metrics=measure, callbacks=[EarlyStoppingCallback(2)],
                   **settings)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_metric == 0.5


def test_evaluation_predicts_every_target_once_and_names_its_metrics(make, valid, tmp_path):
    seen = []
    trainer = make(
        tmp_path, valid_streams=valid, compute_metrics=lambda p: seen.append(p) or {"auc": 0.5, "targets": 1}
    )
    trainer.train()
    assert trainer.evaluate() == {"eval_auc": 0.5, "eval_targets": 1, "epoch": 1.0}
    assert trainer.evaluate(metric_key_prefix="last") == {"last_auc": 0.5, "last_targets": 1, "epoch": 1.0}
    for predictions in seen:
        assert predictions.targets.tolist() == list(range(valid.num_targets))
        assert predictions.labels.tolist() == valid.target_labels.tolist()
        assert predictions.logits.shape == (valid.num_targets, 2) and np.isfinite(predictions.logits).all()
    assert any("eval_auc" in line for line in trainer.state.log_history)


def test_evaluation_does_not_disturb_training(make, valid, tmp_path):
    plain = make(tmp_path, options={"dropout": 0.3})
    plain.train()
    watched = make(tmp_path, options={"dropout": 0.3}, valid_streams=valid, compute_metrics=lambda p: {"auc": 0.5},
                   eval_strategy="steps", eval_steps=1)  # fmt: skip
    watched.train()
    assert all(np.array_equal(value, trained(watched)[name]) for name, value in trained(plain).items())


def test_validation_without_metrics_is_refused(make, valid, tmp_path):
    with pytest.raises(ConfigError, match="valid_streams but no compute_metrics; give both or neither"):
        make(tmp_path, valid_streams=valid)


def test_every_training_target_is_seen_once_an_epoch(make, tmp_path):
    trainer = make(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=5)
    trainer.train()
    assert trainer.targets_seen == 2 * trainer.train_dataset.num_targets


def test_only_trained_tensors_change(make, tmp_path):
    trainer = make(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.{name}" for name in trained(trainer)}


def test_a_share_of_warm_up_is_counted_in_steps(make, tmp_path):
    """`warmup_steps` below 1 is a share: of 8 steps, a quarter is two, and the rate then falls to 0."""
    trainer = make(tmp_path, **{**SAVING, "save_strategy": "no", "warmup_steps": 0.25, "logging_steps": 1})
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * share for share in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
