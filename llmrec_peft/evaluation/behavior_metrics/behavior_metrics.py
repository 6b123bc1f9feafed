"""The `evaluate` module of llmrec_peft's metrics. Load it with `llmrec_peft.evaluation.load_metric()`."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

from llmrec_peft.evaluation.metrics import DEFAULT_NAMES, METRICS, compute_metrics, metric_names

_DESCRIPTION = "Metrics of a behaviour classifier (click, buy, like, skip), over targets of many users: " + "; ".join(
    f"{name}: {metric.summary}" for name, metric in METRICS.items()
)
_INPUTS = f"""
Args:
    predictions: probabilities of each target, one number a class in class order; or, for two classes, one number a
        target: the probability of class 1.
    references: class number of each target.
    users: id of each target's user, for gauc and its counts.
    candidate_sets: id of the candidate set of each target, for ndcg@k, hr@k and mrr@k.
    names: what to compute, of {", ".join(metric_names())}; by default {", ".join(DEFAULT_NAMES)}.
Returns:
    the requested values by name, NaN where a metric is undefined.
"""
_CITATION = """\
@inproceedings{zhu2017gauc, title={Optimized Cost per Click in Taobao Display Advertising},
  author={Zhu, Han and others}, booktitle={KDD}, year={2017}}
@inproceedings{he2014ne, title={Practical Lessons from Predicting Clicks on Ads at Facebook},
  author={He, Xinran and others}, booktitle={ADKDD}, year={2014}}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class BehaviorMetrics(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Interface to the package's metrics: the numbers come from `llmrec_peft.evaluation.metrics.compute_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        reference = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Sequence(number), "references": reference}),
                datasets.Features({"predictions": number, "references": reference}),
            ],
        )

    def _compute(
        self,
        predictions: ArrayLike,
        references: ArrayLike,
        users: ArrayLike | None = None,
        candidate_sets: ArrayLike | None = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, float | int]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        if probabilities.ndim == 1:
            probabilities = np.column_stack([1 - probabilities, probabilities])
        return compute_metrics(references, probabilities, users, candidate_sets, names)
