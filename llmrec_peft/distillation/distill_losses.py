"""Loss terms of distillation: a teacher's distributions, its order of targets, and its hidden states.

All terms are sums over targets. The trainer divides by the number of targets of the global batch, so that one batch
gives one gradient, however it is split into micro-batches.

Shape letters: T targets, C labels, K layers, S the student's hidden width, H the teacher's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def soft_target_loss(
    logits_TC: torch.Tensor, teacher_TC: torch.Tensor, temperature: float, weights_T: torch.Tensor
) -> torch.Tensor:
    """Sum over targets of w tau^2 KL(softmax(teacher / tau) || softmax(student / tau)).

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531). Gradients of the divergence
    shrink by 1 / tau^2, which the factor tau^2 undoes.
    """
    student_TC = F.log_softmax(logits_TC / temperature, dim=-1)
    teacher_TC = F.log_softmax(teacher_TC / temperature, dim=-1)
    # KL(teacher || student): `kl_div` takes the student's log-probabilities first.
    divergence_T = F.kl_div(student_TC, teacher_TC, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (weights_T * divergence_T).sum()


def confidence(teacher_TC: torch.Tensor) -> torch.Tensor:
    """1 - H(p) / log C of the teacher's distributions p, [T]: 0 for a uniform one, 1 for a one-hot one."""
    log_p = F.log_softmax(teacher_TC, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return 1 - entropy / torch.log(torch.tensor(float(teacher_TC.shape[1]), device=log_p.device))


def target_weights(teacher_TC: torch.Tensor, labels_T: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weight of each target in the soft term [T], by `LossOptions.weighting`.

    `confidence` is the function above; `agreement` is the teacher's probability of the true label, and 1 for targets
    without a label (-1); `both` is their product; `none` is 1.
    """
    weights_T = torch.ones(len(teacher_TC), device=teacher_TC.device)
    if weighting in ("confidence", "both"):
        weights_T = weights_T * confidence(teacher_TC)
    if weighting in ("agreement", "both"):
        # gather needs a valid index: rows of label -1 read class 0 and are then set to 1.
        p_T = F.softmax(teacher_TC, dim=-1).gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
        weights_T = weights_T * torch.where(labels_T >= 0, p_T, torch.ones_like(p_T))
    return weights_T


def log_odds(logits_TC: torch.Tensor) -> torch.Tensor:
    """Log-odds of the last label against all others [T]: z_C - log(sum over c < C of exp(z_c))."""
    return logits_TC[:, -1] - torch.logsumexp(logits_TC[:, :-1], dim=-1)


def pairwise_margin_loss(
    logits_TC: torch.Tensor, teacher_TC: torch.Tensor, rows_T: torch.Tensor, gap: float, margin: float
) -> torch.Tensor:
    """Margin ranking loss on pairs of one stream that the teacher orders with confidence.

    Let s and t be the log-odds of the last label by student and teacher, and below(i) the targets j of the same stream
    with t_i - t_j >= gap. The loss is the sum over i of the mean over j in below(i) of max(0, margin - (s_i - s_j)).
    The hinge on score differences is that of Herbrich et al., "Large Margin Rank Boundaries for Ordinal Regression"
    (2000).

    Args:
        rows_T: number of the stream of each target. Only targets of one user are compared, as GAUC does.
    """
    student_T, teacher_T = log_odds(logits_TC), log_odds(teacher_TC)
    # Element (i, j) is the pair in which the teacher ranks target i above target j.
    same_stream_TT = rows_T[:, None] == rows_T[None, :]
    # The floor keeps a target from being compared with itself where gap is 0.
    above_TT = same_stream_TT & (teacher_T[:, None] - teacher_T[None, :] >= max(gap, 1e-6))
    miss_TT = F.relu(margin - (student_T[:, None] - student_T[None, :])) * above_TT
    # Mean over j, then sum over i; a target without pairs adds 0 / 1.
    return (miss_TT.sum(1) / above_TT.sum(1).clamp(min=1)).sum()


class HiddenStateLoss(nn.Module):
    """Distance from the student's hidden states, projected, to the teacher's.

    For one target and layer, with the projection y = P x and u(z) = z / rms(z), rms(z) = sqrt(mean(z^2)):

        1 - cos(y, t) + mean((u(y) - u(t))^2)

    P is one linear map a layer where the widths differ, and the identity where they agree: a regression to hidden
    states as in FitNets (Romero et al., ICLR 2015) and TinyBERT (Jiao et al., 2020). The maps train with the student
    and are not part of it.
    """

    def __init__(self, layers: int, student: int, teacher: int) -> None:
        super().__init__()
        same = student == teacher
        self.maps = nn.ModuleList(
            nn.Identity() if same else nn.Linear(student, teacher, bias=False) for _ in range(layers)
        )

    def forward(self, student_TKS: torch.Tensor, teacher_TKH: torch.Tensor) -> torch.Tensor:
        """Sum over targets of the mean over layers."""
        projected_TKH = torch.stack([own(student_TKS[:, k].float()) for k, own in enumerate(self.maps)], dim=1)
        teacher_TKH = teacher_TKH.float()  # cached in float16
        # Direction and shape of the states; their norms are not compared.
        cosine_TK = 1 - F.cosine_similarity(projected_TKH, teacher_TKH, dim=-1)
        error_TK = (_unit_rms(projected_TKH) - _unit_rms(teacher_TKH)).square().mean(-1)
        return (cosine_TK + error_TK).mean(1).sum()


def _unit_rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
