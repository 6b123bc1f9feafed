"""Ranking metrics against ir-measures, by each of its providers that runs here and supports the measure.

With the `dev` extra these are pytrec_eval (nDCG@k, Success@k) and msmarco (RR@k).
"""

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, Success, nDCG

from llmrec_peft.evaluation.metrics import compute_metrics

CUTOFFS = [1, 3, 5, 10]
PROVIDERS = sorted(name for name, provider in ir_measures.providers.registry.items() if provider.is_available())
MEASURES = {"ndcg": nDCG, "hr": Success, "mrr": RR}


@pytest.fixture(scope="module")
def targets():
    """120 candidate sets of 2 to 30 candidates without ties; a fifth has nothing relevant."""
    rng = np.random.default_rng(0)
    sets = np.repeat(np.arange(120), rng.integers(2, 31, 120))
    score = rng.permutation(len(sets)) / len(sets)
    relevant = (rng.random(len(sets)) < 0.2) & (sets % 5 > 0)
    return relevant.astype(int), score, sets


def expected(provider, measures, targets):
    """Mean of each measure over the sets that have something relevant, which are those that we count."""
    relevant, score, sets = targets
    with_relevant = np.isin(sets, sets[relevant == 1])
    rows = [
        (str(s), str(number), int(r), float(p))
        for number, (s, r, p) in enumerate(zip(sets, relevant, score, strict=True))
        if with_relevant[number]
    ]
    judgements = [ir_measures.Qrel(query, item, gain) for query, item, gain, _ in rows]
    run = [ir_measures.ScoredDoc(query, item, chance) for query, item, _, chance in rows]
    return ir_measures.providers.registry[provider].calc_aggregate(measures, judgements, run)


def supported(provider, name, k):
    measure = MEASURES[name] @ k
    return ir_measures.providers.registry[provider].supports(measure)


CASES = [
    (provider, name, k) for provider in PROVIDERS for name in MEASURES for k in CUTOFFS if supported(provider, name, k)
]


@pytest.mark.parametrize(("provider", "name", "k"), CASES)
def test_equals_ir_measures(provider, name, k, targets):
    relevant, score, sets = targets
    found = compute_metrics(relevant, np.column_stack([1 - score, score]), candidate_sets=sets, names=[f"{name}@{k}"])
    measure = MEASURES[name] @ k
    assert found[f"{name}@{k}"] == pytest.approx(expected(provider, [measure], targets)[measure], abs=1e-6)


def test_every_metric_is_compared():
    """A missing provider must not empty the comparison."""
    assert {name for _, name, _ in CASES} == set(MEASURES)
    assert {(name, k) for _, name, k in CASES} >= {(name, k) for name in ("ndcg", "mrr", "hr") for k in CUTOFFS}
