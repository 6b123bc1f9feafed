"""Losses as sums over targets, which the trainer divides by the count of the global batch.

A mean inside the loss would weight the targets of a small micro-batch more than those of a large one.

Shape suffixes: T targets, C classes (labels), G groups of candidates that compete at one moment. `groups_T` holds the
group number of each target.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmrec_peft.errors import ConfigError

LossSum = Callable[["BehaviorLoss", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(options, logits_TC, labels_T, groups_T) to a scalar."""


def cross_entropy(
    loss: "BehaviorLoss", logits_TC: torch.Tensor, labels_T: torch.Tensor, _: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy with label smoothing.

    Formula, for smoothing e, weights w and label y of target t:
        sum_t [(1 - e) * w_y * (-log p_ty) + e / C * sum_c w_c * (-log p_tc)]
    """
    return F.cross_entropy(
        logits_TC, labels_T, weight=loss.weights(logits_TC), label_smoothing=loss.label_smoothing, reduction="sum"
    )


def focal(loss: "BehaviorLoss", logits_TC: torch.Tensor, labels_T: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Focal loss: sum_t w_y * (1 - p_ty)^gamma * (-log p_ty) (Lin et al. 2017, arXiv 1708.02002, eq. 4 and 5)."""
    log_p_T = F.log_softmax(logits_TC, dim=-1).gather(1, labels_T[:, None])[:, 0]
    # 1 - p_y, by expm1 since p_y is near 1 where it matters. The clamp keeps it off 0, where the derivative of
    # x^gamma is infinite for gamma < 1.
    miss_T = (-torch.expm1(log_p_T)).clamp(min=torch.finfo(log_p_T.dtype).tiny)
    terms_T = -(miss_T**loss.focal_gamma) * log_p_T
    weights_C = loss.weights(logits_TC)
    return (terms_T if weights_C is None else terms_T * weights_C[labels_T]).sum()


def listwise(
    loss: "BehaviorLoss", logits_TC: torch.Tensor, labels_T: torch.Tensor, groups_T: torch.Tensor
) -> torch.Tensor:
    """ListNet's top-one cross-entropy (Cao et al. 2007) with equal weight on each positive of a group.

    Formula, with the score s = log-odds of the last class and P_g the positives of group g:
        sum_g 1 / |P_g| * sum_{t in P_g} -(s_t - log sum_{u in g} exp(s_u))
    A group without both a positive and a negative has no order to learn and adds 0.
    """
    # Log-odds of the last class against all others.
    scores_T = logits_TC[:, -1] - torch.logsumexp(logits_TC[:, :-1], dim=-1)
    positive_T = labels_T == logits_TC.shape[1] - 1
    positives_G, useful_G = _list_counts(positive_T, groups_T)
    # A log-softmax within each group. The maximum is subtracted against overflow; no gradient flows through it, since
    # it cancels in the formula.
    top_G = scores_T.detach().new_full(positives_G.shape, -torch.inf)
    top_G = top_G.scatter_reduce(0, groups_T, scores_T.detach(), "amax")
    shifted_T = scores_T - top_G[groups_T]
    sums_G = torch.zeros_like(top_G).index_add(0, groups_T, shifted_T.exp())
    log_p_T = shifted_T - sums_G[groups_T].log()
    # 1 / |P_g| for the positives of useful groups, 0 for all other targets.
    share_T = (positive_T & useful_G[groups_T]) / positives_G[groups_T].clamp(min=1)
    return -(share_T * log_p_T).sum()


def _list_counts(positive_T: torch.Tensor, groups_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of positives in each group [G], and whether the group has both a positive and a negative [G]."""
    count = int(groups_T.max()) + 1 if len(groups_T) else 0
    sizes_G = torch.bincount(groups_T, minlength=count)
    positives_G = torch.zeros_like(sizes_G).index_add(0, groups_T, positive_T.to(sizes_G.dtype))
    return positives_G, (positives_G > 0) & (positives_G < sizes_G)


LOSSES: dict[str, LossSum] = {"cross_entropy": cross_entropy, "focal": focal, "listwise": listwise}


@dataclass
class BehaviorLoss:
    """A named loss with its options.

    Raises:
        ConfigError: an unknown name, or options that the named loss does not take.
    """

    name: str = "cross_entropy"
    class_weights: list[float] | None = None
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ConfigError(f"train.loss must be one of {', '.join(LOSSES)}; got {self.name!r}")
        if self.name == "listwise" and self.class_weights is not None:
            raise ConfigError("train.class_weights has no meaning for the listwise loss; leave it out")
        if self.label_smoothing and self.name != "cross_entropy":
            raise ConfigError(f"train.label_smoothing needs the loss cross_entropy; got loss {self.name!r}")
        if not 0 <= self.focal_gamma < float("inf"):
            raise ConfigError(f"train.focal_gamma must be a finite number of at least 0; got {self.focal_gamma}")
        if self.class_weights is not None and not all(0 <= weight < float("inf") for weight in self.class_weights):
            raise ConfigError(f"train.class_weights must be finite numbers of at least 0; got {self.class_weights}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"train.label_smoothing must be in [0, 1); got {self.label_smoothing}")

    def weights(self, like: torch.Tensor) -> torch.Tensor | None:
        """Class weights [C] on the device and dtype of the logits."""
        if self.class_weights is None:
            return None
        if len(self.class_weights) != like.shape[-1]:
            raise ConfigError(
                f"train.class_weights needs one weight a label, {like.shape[-1]}; got {len(self.class_weights)}"
            )
        # Made for each call: the loss has no device of its own.
        return torch.tensor(self.class_weights, dtype=like.dtype, device=like.device)

    def __call__(self, logits_TC: torch.Tensor, labels_T: torch.Tensor, groups_T: torch.Tensor) -> torch.Tensor:
        """Sum of the loss over targets (over groups, for listwise); a scalar."""
        return LOSSES[self.name](self, logits_TC, labels_T, groups_T)

    def count(self, labels_T: torch.Tensor, groups_T: torch.Tensor, num_labels: int) -> int:
        """The divisor of the sum: targets, or for listwise the groups that have an order to learn."""
        if self.name != "listwise":
            return len(labels_T)
        return int(_list_counts(labels_T == num_labels - 1, groups_T)[1].sum())


def balanced_weights(labels: torch.Tensor, num_labels: int) -> list[float]:
    """Class weights [C] from labels [n]: w_c = n / (C * n_c).

    All classes then have the same total weight n / C, and the mean weight of a target is 1.

    Raises:
        ConfigError: a class has no training target.
    """
    counts = torch.bincount(labels, minlength=num_labels)
    if (counts == 0).any():
        empty = torch.nonzero(counts == 0).flatten().tolist()
        raise ConfigError(f"class_weights 'balanced' needs every class in training; classes {empty} have no target")
    return (len(labels) / (num_labels * counts)).tolist()  # n / (C * n_c)
