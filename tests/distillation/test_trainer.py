"""The trainer with a teacher: one gradient however a batch is split, and each term at work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import build_streams
from llmrec_peft.distillation.distill_options import LossOptions
from llmrec_peft.distillation.distill_trainer import DistillTrainer
from llmrec_peft.distillation.hidden_states import layer_pairs
from llmrec_peft.distillation.teacher_outputs import TeacherPredictions
from llmrec_peft.errors import ConfigError
from llmrec_peft.models.classifier import load_classifier
from tests.invariants.setup_run import DOMAIN, arguments, splits

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = {"hard": 0.3, "soft": 0.7, "temperature": 2.0, "pairs": 0.5, "pair_gap": 0.2, "weighting": "both"}


@pytest.fixture
def streams(tiny_tokenizer):
    return build_streams(splits().train, Domain.from_dict(DOMAIN), tiny_tokenizer)


def teacher_of(streams, share: float = 1.0, layers: int = 0) -> TeacherPredictions:
    """Random predictions for a share of the targets."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(streams.num_targets, 2)).astype(np.float32)
    logits[rng.random(len(logits)) >= share] = np.nan
    if not layers:
        return TeacherPredictions(logits)
    hidden = rng.normal(size=(streams.num_targets, layers, 24)).astype(np.float16)
    return TeacherPredictions(logits, (0, -1), hidden, np.arange(streams.num_targets))


@pytest.fixture
def make(tiny_base, streams, tmp_path):
    """`make(loss, teacher, **settings)`: a trainer of two steps that has trained."""

    def run(
        loss: dict, teacher: TeacherPredictions | None, layers=(), micro_tokens=10_000, **settings
    ) -> DistillTrainer:
        torch.manual_seed(0)
        classifier = load_classifier(str(tiny_base("llama")), DOMAIN, "full")
        options = {"max_steps": 2, "learning_rate": 0.01, **settings}
        trainer = DistillTrainer(
            classifier, arguments(tmp_path, **options), streams, tokenizer=classifier.tokenizer,
            micro_tokens=micro_tokens, teacher=teacher, distill_loss=LossOptions(**loss), layers=layers,
        )  # fmt: skip
        trainer.train()
        return trainer

    return run


def weights_of(trainer):
    return {name: value.numpy() for name, value in trainer.model.trainable_state_dict().items()}


def test_one_gradient_however_the_batch_is_cut(make, streams):
    teacher = teacher_of(streams, share=0.6)
    whole = weights_of(make(EVERY, teacher))
    cut = weights_of(make(EVERY, teacher, micro_tokens=150))
    accumulated = weights_of(
        make(EVERY, teacher, per_device_train_batch_size=2, gradient_accumulation_steps=4, micro_tokens=400)
    )
    for name, value in whole.items():
        np.testing.assert_allclose(cut[name], value, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(accumulated[name], value, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("term", ["soft", "pairs", "hidden", "weighting"])
def test_each_term_moves_the_weights(term, make, streams):
    plain = {"hard": 1.0, "soft": 1.0 if term == "weighting" else 0.0}
    changed = {**plain, term: "confidence" if term == "weighting" else 1.0}
    layers = (0, -1) if term == "hidden" else ()
    teacher = teacher_of(streams, layers=len(layers))
    before, after = weights_of(make(plain, teacher)), weights_of(make(changed, teacher, layers))
    assert max(np.abs(before[name] - after[name]).max() for name in before) > 1e-4


def test_a_target_without_a_prediction_is_learnt_from_its_label(make, streams):
    """Without predictions the soft term is zero; without a weight of labels the predictions alone teach."""
    empty = teacher_of(streams, share=0.0)
    alone, with_empty = weights_of(make({"soft": 0.0}, None)), weights_of(make({"soft": 0.5}, empty))
    for name, value in alone.items():
        np.testing.assert_allclose(with_empty[name], value, atol=1e-7)
    soft = weights_of(make({"hard": 0.0, "soft": 1.0}, teacher_of(streams)))
    assert max(np.abs(soft[name] - alone[name]).max() for name in soft) > 1e-3


def test_a_student_approaches_its_teacher(make, streams):
    teacher = TeacherPredictions(np.tile(np.float32([1.5, -0.5]), (streams.num_targets, 1)))
    trainer = make({"hard": 0.0, "soft": 1.0}, teacher, max_steps=20, optim="adamw_torch", learning_rate=5e-3)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert np.mean(losses[-4:]) < 0.2 * losses[0]


def test_projections_train_but_are_not_saved(make, streams):
    trainer = make({"hidden": 1.0}, teacher_of(streams, layers=2), (0, -1))
    own = list(trainer.hidden_loss.parameters())
    assert len(own) == 2 and all(value.grad is not None or value.requires_grad for value in own)
    held = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert {id(value) for value in own} <= held
    assert not any("map" in name for name in trainer.model.trainable_state_dict())


def test_missing_predictions_are_named(make, streams):
    with pytest.raises(ConfigError, match="no teacher predictions"):
        make({"soft": 1.0}, None)
    with pytest.raises(ConfigError, match="loss.hidden: the teacher's predictions have hidden states of layers"):
        make({"hidden": 1.0}, teacher_of(streams), (0, -1))


def test_layers_are_compared_with_those_of_the_same_depth():
    assert layer_pairs(10, 30, list(range(10))) == [(4, 4), (6, 6), (8, 8), (-1, -1)]
    assert layer_pairs(2, 2) == [(0, 0), (-1, -1)]
    for own, other in layer_pairs(6, 24)[:-1]:
        assert (own + 1) * 4 == other + 1
