"""The loss terms of distillation against plain sums."""

import math

import numpy as np
import pytest
import torch

from llmrec_peft.distillation.distill_losses import (
    HiddenStateLoss,
    confidence,
    log_odds,
    pairwise_margin_loss,
    soft_target_loss,
    target_weights,
)
from llmrec_peft.distillation.distill_options import LossOptions
from llmrec_peft.errors import ConfigError


@pytest.fixture
def logits():
    torch.manual_seed(1)
    return torch.randn(7, 3, dtype=torch.float64), 2 * torch.randn(7, 3, dtype=torch.float64)


def test_soft_targets_are_the_scaled_divergence(logits):
    student, teacher = logits
    weights = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    tau, total = 2.5, 0.0
    for s, t, w in zip(student.numpy(), teacher.numpy(), weights.tolist(), strict=True):
        p = np.exp(t / tau) / np.exp(t / tau).sum()
        q = np.exp(s / tau) / np.exp(s / tau).sum()
        total += w * tau**2 * float((p * np.log(p / q)).sum())
    assert float(soft_target_loss(student, teacher, tau, weights)) == pytest.approx(total, rel=1e-9)
    assert float(soft_target_loss(teacher + 3.0, teacher, tau, weights)) == pytest.approx(0, abs=1e-9)


def test_confidence_runs_from_nothing_to_certain():
    found = confidence(torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, math.log(3.0)]]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1 - entropy / math.log(2)]))


def test_weights_follow_confidence_and_agreement(logits):
    teacher = logits[1].float()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    p = teacher.softmax(-1)
    agreement = torch.cat([p[torch.arange(6), labels[:6]], torch.ones(1)])
    torch.testing.assert_close(target_weights(teacher, labels, "none"), torch.ones(7))
    torch.testing.assert_close(target_weights(teacher, labels, "confidence"), confidence(teacher))
    torch.testing.assert_close(target_weights(teacher, labels, "agreement"), agreement)
    torch.testing.assert_close(target_weights(teacher, labels, "both"), confidence(teacher) * agreement)


def test_pairs_are_those_of_one_row_that_the_teacher_orders(logits):
    student, teacher = logits
    rows = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    gap, margin, total, pairs = 0.8, 1.2, 0.0, 0
    s, t = log_odds(student), log_odds(teacher)
    for i in range(7):
        below = [j for j in range(7) if rows[i] == rows[j] and t[i] - t[j] >= gap]
        pairs += len(below)
        if below:
            total += sum(max(0.0, margin - float(s[i] - s[j])) for j in below) / len(below)
    assert 0 < pairs < 21
    assert float(pairwise_margin_loss(student, teacher, rows, gap, margin)) == pytest.approx(total, rel=1e-9)
    # No target is compared with one of another row, nor with itself.
    apart = torch.arange(7)
    assert float(pairwise_margin_loss(student, teacher, apart, 0.0, margin)) == 0.0


def test_hidden_states_that_point_the_same_way_cost_nothing():
    torch.manual_seed(0)
    teacher = torch.randn(5, 2, 8)
    match = HiddenStateLoss(2, 8, 8)
    assert not list(match.parameters())
    assert float(match(3.0 * teacher, teacher)) == pytest.approx(0, abs=1e-5)
    # Opposite: cosine distance 2, and unit vectors 2 apart, squared.
    assert float(match(-teacher, teacher)) == pytest.approx(5 * (2 + 4), rel=1e-4)
    wider = HiddenStateLoss(2, 4, 8)
    assert [tuple(value.shape) for value in wider.parameters()] == [(8, 4), (8, 4)]
    assert float(wider(torch.randn(5, 2, 4), teacher).detach()) > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hard": 0, "soft": 0}, "loss must be above 0 in one of"),
        ({"temperature": 0}, "loss.temperature must be a finite number above 0, not 0"),
        ({"soft": -1}, "loss.soft must be a finite number of at least 0, not -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LossOptions(**values)
