"""Calibration finds parameters that made the data, and never worsens what it was fitted on."""

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.evaluation.calibration import (
    Calibration,
    fit_calibration,
    fit_temperature,
    prior_bias,
    sampling_bias,
)
from llmrec_peft.evaluation.metrics import auc, logloss


def drawn(n=20_000, classes=2, temperature=1.0, bias=None, seed=0):
    """Labels drawn from softmax(logits / temperature + bias), and the logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes))
    p = softmax(logits / temperature + (0 if bias is None else np.asarray(bias)), axis=1)
    return logits, (rng.random((n, 1)) > p.cumsum(axis=1)[:, :-1]).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_is_recovered(temperature, classes):
    logits, labels = drawn(classes=classes, temperature=temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_temperature_is_the_minimum():
    logits, labels = drawn(n=500, temperature=2.0)
    best = fit_temperature(logits, labels)
    losses = [logloss(labels, Calibration(best * factor).apply(logits)) for factor in (0.98, 1.0, 1.02)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


@pytest.mark.parametrize("classes", [2, 4])
def test_bias_and_temperature_are_recovered_together(classes):
    bias = np.linspace(-0.8, 0.8, classes)
    logits, labels = drawn(n=40_000, classes=classes, temperature=1.5, bias=bias)
    found = fit_calibration(logits, labels)
    assert found.temperature == pytest.approx(1.5, rel=0.05)
    assert found.bias == pytest.approx(bias, abs=0.06)
    p = found.apply(logits)
    assert p.mean(axis=0) == pytest.approx(np.bincount(labels) / len(labels), abs=1e-4)
    assert logloss(labels, p) < logloss(labels, softmax(logits, axis=1))


def test_two_class_predictions_keep_their_order():
    logits, labels = drawn(n=300, temperature=4.0, bias=[-1, 1])
    found = fit_calibration(logits, labels)
    assert auc(labels, found.apply(logits)) == pytest.approx(auc(labels, softmax(logits, axis=1)), abs=1e-12)


def test_sampled_negatives_are_undone():
    """Keep one negative in ten, fit the ideal answer of the sample, and return to the share of the whole."""
    logits, labels = drawn(n=60_000, bias=[2.0, 0.0])
    whole = softmax(logits + [2.0, 0.0], axis=1)
    in_sample = logits + [2.0 + np.log(0.1), 0.0]
    restored = Calibration(1.0, sampling_bias([0.1, 1.0])).apply(in_sample)
    assert np.abs(restored - whole).max() < 1e-12
    assert logloss(labels, restored) < logloss(labels, softmax(in_sample, axis=1)) - 0.1


def test_prior_moves_the_fitted_share():
    assert np.diff(prior_bias([0.5, 0.5], [0.9, 0.1])) == pytest.approx(np.log(1 / 9))
    logits, labels = drawn(n=5_000)
    plain, moved = fit_calibration(logits, labels), fit_calibration(logits, labels, prior=[0.95, 0.05])
    share = labels.mean()
    shift = np.log(0.05 / 0.95) - np.log(share / (1 - share))
    assert np.diff(moved.bias) - np.diff(plain.bias) == pytest.approx(shift, abs=1e-9)
    assert moved.temperature == plain.temperature


def test_a_missing_class_leaves_the_predictions_unchanged():
    logits = np.random.default_rng(0).normal(size=(50, 3))
    for prior in (None, [0.2, 0.3, 0.5]):
        assert fit_calibration(logits, np.arange(50) % 2, prior) == Calibration()


def test_a_small_perfectly_ranked_set_does_not_make_predictions_certain():
    labels = np.arange(12) % 2
    logits = np.outer(2 * labels - 1, [-1.0, 1.0])
    assert fit_temperature(logits, labels) < 0.06
    found = fit_calibration(logits, labels)
    assert 0.2 < found.temperature < 1
    p = found.apply(logits)
    assert np.isfinite(p).all() and p.max() < 0.999
    assert log_loss(labels, p, labels=[0, 1]) <= log_loss(labels, softmax(logits, axis=1), labels=[0, 1])


def test_round_trip_through_json():
    found = Calibration(1.7, (0.25, -0.25))
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    logits = np.array([[1.0, 2.0]])
    assert (Calibration.from_dict(None).apply(logits) == softmax(logits, axis=1)).all()


@pytest.mark.parametrize(
    "mapping",
    [{}, {"temperature": "hot"}, {"temperature": 0}, {"temperature": float("nan")}, [1], {"temperature": 1, "bias": 3}],
)
def test_damaged_calibration_is_refused(mapping):
    with pytest.raises(BundleError, match="calibration .*save the bundle again"):
        Calibration.from_dict(mapping)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="logits must be finite, but 1 of 2 rows are not"):
        fit_temperature([[np.nan, 0], [0, 1]], [0, 1])
    with pytest.raises(DataError, match="from 0 to 1, got 0 to 2"):
        fit_temperature([[1, 0], [0, 1]], [0, 2])
    with pytest.raises(DataError, match=r"logits \[n, classes\] and labels \[n\], got \(2, 2\) and \(1,\)"):
        fit_calibration([[1, 0], [0, 1]], [0])
    with pytest.raises(DataError, match="calibration has 2 classes, got logits of shape"):
        Calibration(1.0, (0.0, 0.0)).apply(np.zeros((1, 3)))
    with pytest.raises(DataError, match="sampling rates must be one finite number > 0 a class"):
        sampling_bias([0.0, 1.0])
    with pytest.raises(DataError, match="prior has 3 classes, training has 2"):
        prior_bias([1, 1], [1, 1, 1])
