"""Losses against their formulas, one answer after another."""

from __future__ import annotations

import math

import pytest
import torch

from llmrec_peft.errors import ConfigError
from llmrec_peft.training.losses import LOSSES, BehaviorLoss, balanced_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[2, 3])
def batch(request):
    """Logits [40, C], labels [40] and lists [40] of uneven sizes."""
    generator = torch.Generator().manual_seed(request.param)
    logits = 3 * torch.randn(40, request.param, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, request.param, (40,), generator=generator)
    return logits, labels, torch.randint(0, 12, (40,), generator=generator)


def probabilities(logits):
    return [[math.exp(z - max(row)) / sum(math.exp(v - max(row)) for v in row) for z in row] for row in logits.tolist()]


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(batch, weights, smoothing):
    logits, labels, groups = batch
    count = logits.shape[1]
    weights = weights and weights[:count]
    w, total = weights or [1.0] * count, 0.0
    for row, label in zip(probabilities(logits), labels.tolist(), strict=True):
        total -= (1 - smoothing) * w[label] * math.log(row[label])
        total -= sum(smoothing / count * w[c] * math.log(row[c]) for c in range(count))
    loss = BehaviorLoss(class_weights=weights, label_smoothing=smoothing)
    assert loss(logits, labels, groups).item() == pytest.approx(total)
    assert loss.count(labels, groups, count) == 40


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 3.0]])
def test_focal(batch, gamma, weights):
    logits, labels, groups = batch
    weights = weights and weights[: logits.shape[1]]
    w = weights or [1.0] * logits.shape[1]
    rows = zip(probabilities(logits), labels.tolist(), strict=True)
    total = sum(-w[label] * (1 - row[label]) ** gamma * math.log(row[label]) for row, label in rows)
    loss = BehaviorLoss("focal", weights, focal_gamma=gamma)
    assert loss(logits, labels, groups).item() == pytest.approx(total)


def test_focal_without_a_focus_is_cross_entropy(batch):
    assert BehaviorLoss("focal", focal_gamma=0.0)(*batch).item() == pytest.approx(BehaviorLoss()(*batch).item())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_finite_gradients_on_certain_predictions(gamma):
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    BehaviorLoss("focal", focal_gamma=gamma)(logits, torch.tensor([0, 0]), torch.tensor([0, 1])).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[1].abs().sum() > 0


def naive_listwise(logits, labels, groups):
    """(sum over lists of the mean over positives of -log softmax of their scores, lists that count)."""
    positive, total, useful = logits.shape[1] - 1, 0.0, 0
    scores = [row[-1] - math.log(sum(math.exp(z) for z in row[:-1])) for row in logits.tolist()]
    for group in set(groups.tolist()):
        members = [n for n, value in enumerate(groups.tolist()) if value == group]
        liked = [n for n in members if labels[n] == positive]
        if liked and len(liked) < len(members):
            useful += 1
            whole = math.log(sum(math.exp(scores[n]) for n in members))
            total += sum(whole - scores[n] for n in liked) / len(liked)
    return total, useful


def test_listwise(batch):
    logits, labels, groups = batch
    total, useful = naive_listwise(*batch)
    loss = BehaviorLoss("listwise")
    assert 0 < useful < 12
    assert loss(*batch).item() == pytest.approx(total)
    assert loss.count(labels, groups, logits.shape[1]) == useful


def test_listwise_does_not_overflow():
    logits = torch.tensor([[0.0, 500.0], [0.0, -500.0], [500.0, 0.0]], requires_grad=True)
    value = BehaviorLoss("listwise")(logits, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]))
    value.backward()
    assert value.item() == pytest.approx(1000) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_listwise_without_a_useful_list_is_zero(labels):
    labels = torch.tensor(labels, dtype=torch.long)
    groups = torch.tensor([0, 0, 1][: len(labels)], dtype=torch.long)
    logits = torch.randn(len(labels), 2, requires_grad=True)
    loss = BehaviorLoss("listwise")
    value = loss(logits, labels, groups)
    value.backward()
    assert value.item() == 0 and loss.count(labels, groups, 2) == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_sums_add_up_over_parts(name, batch):
    """Cut between lists, a batch's loss is the sum of its parts'."""
    logits, labels, groups = batch
    loss, first = BehaviorLoss(name), groups < 5
    parts = sum(loss(logits[part], labels[part], groups[part]) for part in (first, ~first))
    assert parts.item() == pytest.approx(loss(logits, labels, groups).item())
    counts = sum(loss.count(labels[part], groups[part], logits.shape[1]) for part in (first, ~first))
    assert counts == loss.count(labels, groups, logits.shape[1])


def test_balanced_weights():
    weights = balanced_weights(torch.tensor([0, 1, 1, 1, 2, 2]), 3)
    assert weights == pytest.approx([6 / 3, 6 / 9, 6 / 6])
    with pytest.raises(ConfigError, match=r"needs every class in training; classes \[1, 3\] have no target"):
        balanced_weights(torch.tensor([0, 2, 2]), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hinge"}, "train.loss must be one of cross_entropy, focal, listwise; got 'hinge'"),
        ({"name": "listwise", "class_weights": [1.0, 1.0]}, "class_weights has no meaning for the listwise loss"),
        ({"name": "focal", "label_smoothing": 0.1}, "label_smoothing needs the loss cross_entropy; got loss 'focal'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ({"focal_gamma": -1.0}, "focal_gamma must be a finite number of at least 0; got -1.0"),
        ({"class_weights": [-1.0, 1.0]}, r"class_weights must be finite numbers of at least 0; got \[-1.0, 1.0\]"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        BehaviorLoss(**options)


def test_weights_for_another_number_of_labels(batch):
    with pytest.raises(ConfigError, match="needs one weight a label, [23]; got 5"):
        BehaviorLoss(class_weights=[1.0] * 5)(*batch)
