"""Fusion: uses collaborative scores where they help, equals the LLM without them, and never sees test targets."""

import json

import numpy as np
import pytest
from scipy.special import expit, softmax

from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.evaluation.metrics import logloss
from llmrec_peft.retrieval.fusion import MIN_TARGETS, Fusion
from llmrec_peft.retrieval.pair_features import GATES, Features
from llmrec_peft.retrieval.stacking import cross_validate, fit_correction, log_odds

NAMES = ("taste", "noise", *GATES)


def targets(n=3000, seed=0, users=60):
    """Log-odds: the LLM knows new items, the collaborative score knows old ones."""
    rng = np.random.default_rng(seed)
    known = rng.random(n) < 0.5
    text, taste = rng.normal(0, 1.5, n), rng.normal(0, 1.5, n)
    labels = (rng.random(n) < expit(np.where(known, taste, text))).astype(int)
    z = text + 0.3 * rng.normal(size=n)
    logits = np.column_stack([-z / 2, z / 2]) + rng.normal(size=(n, 1))  # a shift of all classes means nothing
    gates = np.column_stack([rng.uniform(0, 4, n), np.where(known, 4.0, 0.0)])
    values = np.column_stack([np.where(known, taste, 0), rng.normal(size=n), gates])
    return logits, Features(NAMES, values), labels, rng.integers(0, users, n)


def test_fusion_beats_both_and_weighs_by_what_is_known():
    logits, features, labels, users = targets()
    fusion = Fusion.fit(logits, features, labels, users)
    assert fusion.strength is not None and fusion.loss < fusion.loss_alone
    logits, features, labels, users = targets(seed=1)
    fused, alone = fusion.apply(logits, features), softmax(logits, axis=1)
    assert fused.sum(axis=1) == pytest.approx(1)
    taste = expit(features.values[:, 0])
    assert logloss(labels, fused) < logloss(labels, alone) - 0.05
    assert logloss(labels, fused) < logloss(labels, np.column_stack([1 - taste, taste])) - 0.05
    known = features.values[:, -1] > 0
    # New items have no collaborative score, so the LLM's log-odds stay; known ones move far.
    moved = np.abs(fused - alone)[:, 1]
    assert moved[known].mean() > 4 * moved[~known].mean()


def test_without_gates_the_same_scores_do_worse():
    logits, features, labels, users = targets()
    blind = Features(NAMES, np.column_stack([features.values[:, :2], np.zeros((len(labels), 2))]))
    gated, plain = (Fusion.fit(logits, f, labels, users) for f in (features, blind))
    assert gated.loss < plain.loss - 0.02


def test_missing_features_get_the_llms_own_probabilities():
    logits, features, labels, users = targets()
    fusion = Fusion.fit(logits, features, labels, users)
    own = softmax(logits, axis=1)
    assert fusion.apply(logits, None) == pytest.approx(own, abs=1e-15)
    holes = features.values.copy()
    holes[::3, 1] = np.nan
    holes[1::3, 3] = np.inf
    mixed = fusion.apply(logits, Features(NAMES, holes))
    assert mixed[::3] == pytest.approx(own[::3], abs=1e-15) and mixed[1::3] == pytest.approx(own[1::3], abs=1e-15)
    assert mixed[2::3] == pytest.approx(fusion.apply(logits, features)[2::3], abs=1e-15)
    assert np.abs(mixed[2::3] - own[2::3]).max() > 0.1
    # Targets without features do not enter the fit either.
    kept = np.isfinite(holes).all(axis=1)
    part = Fusion.fit(logits[kept], Features(NAMES, holes[kept]), labels[kept], users[kept])
    assert Fusion.fit(logits, Features(NAMES, holes), labels, users) == part


def few(n):
    return lambda a: [a[0][:n], Features(NAMES, a[1].values[:n]), a[2][:n], a[3][:n]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (few(MIN_TARGETS - 1), f"not fitted: {MIN_TARGETS - 1} targets"),
        (few(0), "not fitted: 0 targets of 0 users, 0 of the minority class"),
        (lambda a: [*a[:2], np.ones_like(a[2]), a[3]], "0 of the minority class"),
        (lambda a: [*a[:3], np.zeros_like(a[3])], "targets of 1 users"),
        (lambda a: [a[0], Features(NAMES, a[1].values * np.nan), *a[2:]], "not fitted: 0 targets"),
    ],
)
def test_too_little_to_learn_from_leaves_the_llm_alone(change, why):
    arrays = targets()
    fusion = Fusion.fit(*change(arrays))
    assert fusion.strength is None and why in fusion.why
    assert fusion.apply(arrays[0], arrays[1]) == pytest.approx(softmax(arrays[0], axis=1), abs=1e-15)
    assert Fusion.from_dict(json.loads(json.dumps(fusion.to_dict()))) == fusion


def test_noise_that_does_not_help_is_not_taken():
    """The LLM is right and the collaborative scores are noise: the correction is none, or hardly any."""
    rng = np.random.default_rng(0)
    refused = 0
    for seed in range(4):
        logits, _, _, users = targets(400, seed)
        labels = (rng.random(400) < expit(log_odds(logits, (False, True)))).astype(int)
        noise = Features(NAMES, rng.normal(size=(400, 4)))
        fusion = Fusion.fit(logits, noise, labels, users)
        own = softmax(logits, axis=1)
        assert np.abs(fusion.apply(logits, noise) - own).mean() < 0.05
        refused += fusion.strength is None and fusion.loss >= fusion.loss_alone
    assert refused >= 2


def test_solution_is_the_penalised_least_logloss():
    """Against scikit-learn on a problem that it can state: an LLM that says nothing has no offset."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    columns = rng.normal(size=(500, 3))
    truth = (rng.random(500) < expit(columns @ [1.0, -0.5, 0])).astype(float)
    bias, weights = fit_correction(np.zeros(500), columns, truth, 4.0)
    # Here b is under the prior too, so it is a column there.
    other = LogisticRegression(C=1 / 4.0, fit_intercept=False, tol=1e-9, max_iter=1000)
    other.fit(np.column_stack([np.ones(500), columns]), truth)
    assert [bias, *weights] == pytest.approx(other.coef_[0], abs=1e-4)
    far = fit_correction(np.zeros(500), columns, truth, 1e9)
    assert abs(far[0]) < 1e-6 and np.abs(far[1]).max() < 1e-6


def test_folds_never_part_a_user():
    """A feature that names the user tells all about seen users and nothing about others, so it must not be trusted."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 25)
    mood = rng.normal(0, 2, 40)[users]
    truth = (rng.random(1000) < expit(mood)).astype(float)
    columns = np.eye(40)[users]
    losses = cross_validate(np.zeros(1000), columns, truth, users, 0)
    apart = cross_validate(np.zeros(1000), columns, truth, np.arange(1000), 0)
    assert min(losses.values()) > 0.68 and min(apart.values()) < 0.55


def test_values_beyond_validation_are_held_at_its_edge():
    logits, features, labels, users = targets()
    fusion = Fusion.fit(logits, features, labels, users)
    edge = features.values.max(axis=0)
    wild, held = (Features(NAMES, row[None, :]) for row in (edge + 1e6, edge))
    assert fusion.apply(logits[:1], wild) == pytest.approx(fusion.apply(logits[:1], held))


def test_one_targets_prediction_does_not_depend_on_the_others():
    logits, features, labels, users = targets()
    fusion = Fusion.fit(logits, features, labels, users)
    whole = fusion.apply(logits, features)
    for row in (0, 7, 99):
        one = fusion.apply(logits[[row]], Features(NAMES, features.values[[row]]))
        assert one[0] == pytest.approx(whole[row], abs=1e-12)
    assert fusion.apply(logits[:0], Features(NAMES, features.values[:0])).shape == (0, 2)


def test_many_labels_keep_their_shares_inside_each_side():
    logits, features, labels, users = targets()
    rng = np.random.default_rng(2)
    four = np.column_stack([logits, rng.normal(size=(len(labels), 2))])
    side = (True, False, True, False)
    classes = np.where(labels == 1, rng.choice([0, 2], len(labels)), rng.choice([1, 3], len(labels)))
    fusion = Fusion.fit(four, features, classes, users, positive=side)
    assert fusion.strength is not None
    own, fused = softmax(four, axis=1), fusion.apply(four, features)
    assert fused.sum(axis=1) == pytest.approx(1)
    assert fused[:, 0] / fused[:, 2] == pytest.approx(own[:, 0] / own[:, 2])
    assert fused[:, 1] / fused[:, 3] == pytest.approx(own[:, 1] / own[:, 3])
    assert np.abs(fused - own).max() > 0.1
    yes = fused[:, [0, 2]].sum(axis=1)
    assert logloss(labels, np.column_stack([1 - yes, yes])) < logloss(
        labels, np.column_stack([own[:, [1, 3]].sum(axis=1), own[:, [0, 2]].sum(axis=1)])
    )


def test_two_labels_are_the_plain_log_odds():
    logits = np.array([[0.3, 1.7], [900.0, -900.0]])
    assert log_odds(logits, (False, True)) == pytest.approx([1.4, -1800.0])
    assert log_odds(logits, (True, False)) == pytest.approx([-1.4, 1800.0])


def test_extreme_logits_stay_finite():
    logits, features, labels, users = targets()
    fusion = Fusion.fit(logits, features, labels, users)
    found = fusion.apply(np.array([[900.0, -900.0], [-900.0, 900.0]]), Features(NAMES, features.values[:2]))
    assert np.isfinite(found).all() and found.sum(axis=1) == pytest.approx(1)
    # A broken row is passed on as it is, not hidden.
    assert np.isnan(fusion.apply(np.array([[np.nan, 0.0]]), Features(NAMES, features.values[:1]))).all()


def test_same_seed_same_fusion_through_json():
    logits, features, labels, users = targets()
    fusion, again = (Fusion.fit(logits, features, labels, users, seed=3) for _ in range(2))
    assert fusion == again
    back = Fusion.from_dict(json.loads(json.dumps(fusion.to_dict(), allow_nan=False)))
    assert back == fusion and (back.apply(logits, features) == fusion.apply(logits, features)).all()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    other = Fusion.fit(logits[shuffled], Features(NAMES, features.values[shuffled]), labels[shuffled], users[shuffled])
    first = Fusion.fit(logits, features, labels, users)
    assert other.apply(logits, features) == pytest.approx(first.apply(logits, features), abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1.0]},
        {"bias": None},
        {"bias": float("nan")},
        {"bias": "1"},
        {"scale": [0.0] * 5},
        {"scale": [1.0] * 4},
        {"names": ["taste", "noise", "a", "b"]},
        {"positive": [True, True]},
        {"positive": [0, 1]},
        {"extra": 1},
        {"centre": 3},
    ],
)
def test_tampered_numbers_are_refused(change):
    mapping = Fusion.fit(*targets(600)).to_dict()
    Fusion.from_dict(mapping)
    with pytest.raises(BundleError, match="fusion is not what Fusion.to_dict writes"):
        Fusion.from_dict(mapping | change)
    del mapping["scale"]
    with pytest.raises(BundleError, match="other keys"):
        Fusion.from_dict(mapping)


def test_arrays_that_do_not_match_are_refused():
    logits, features, labels, users = targets(300)
    fusion = Fusion.fit(logits, features, labels, users)
    with pytest.raises(DataError, match="fitted for 2 classes, got logits of shape"):
        fusion.apply(np.zeros((3, 3)), None)
    other = Features(("other", "noise", *GATES), features.values)
    with pytest.raises(DataError, match="fusion needs the features taste, noise"):
        fusion.apply(logits, other)
    with pytest.raises(DataError, match="of 5 targets, got .* of 300"):
        fusion.apply(logits[:5], features)
    with pytest.raises(DataError, match="got lengths"):
        Fusion.fit(logits, features, labels[:-1], users)
    with pytest.raises(DataError, match="labels must be class numbers 0 to 1"):
        Fusion.fit(logits, features, labels + 1, users)
    with pytest.raises(DataError, match="1 of 300 targets have logits that are not finite"):
        Fusion.fit(np.where(np.arange(600).reshape(300, 2) == 4, np.inf, logits), features, labels, users)
    with pytest.raises(DataError, match="both must occur"):
        Fusion.fit(logits, features, labels, users, positive=(True, True))
    with pytest.raises(DataError, match="last, got"):
        Features(("a", "b"), np.zeros((3, 2)))
