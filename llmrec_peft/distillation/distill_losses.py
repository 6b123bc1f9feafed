"""What a student learns from: labels, and a teacher's answers, order and hidden states.

T answers, C labels, K layers, S the student's hidden width, H the teacher's. All terms are sums over answers, which the
trainer divides by the global batch's count, so that one batch gives one gradient however it is split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def soft_targets(
    logits_TC: torch.Tensor, teacher_TC: torch.Tensor, temperature: float, weights_T: torch.Tensor
) -> torch.Tensor:
    """Sum of w tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) (Hinton et al. 2015, arXiv 1503.02531)."""
    student = F.log_softmax(logits_TC / temperature, dim=-1)
    teacher = F.log_softmax(teacher_TC / temperature, dim=-1)
    divergence_T = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (weights_T * divergence_T).sum()


def confidence(teacher_TC: torch.Tensor) -> torch.Tensor:
    """1 - H(p) / log C of the teacher's answers [T]: 0 for one that says nothing, 1 for a certain one."""
    log_p = F.log_softmax(teacher_TC, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return 1 - entropy / torch.log(torch.tensor(float(teacher_TC.shape[1]), device=log_p.device))


def target_weights(teacher_TC: torch.Tensor, labels_T: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weight of each target in the soft term [T], by `LossOptions.weighting`; unlabelled targets (-1) agree fully."""
    weights = torch.ones(len(teacher_TC), device=teacher_TC.device)
    if weighting in ("confidence", "both"):
        weights = weights * confidence(teacher_TC)
    if weighting in ("agreement", "both"):
        p = F.softmax(teacher_TC, dim=-1).gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
        weights = weights * torch.where(labels_T >= 0, p, torch.ones_like(p))
    return weights


def log_odds(logits_TC: torch.Tensor) -> torch.Tensor:
    """Log-odds of the last label against all others [T]."""
    return logits_TC[:, -1] - torch.logsumexp(logits_TC[:, :-1], dim=-1)


def sure_pairs(
    logits_TC: torch.Tensor, teacher_TC: torch.Tensor, rows_T: torch.Tensor, gap: float, margin: float
) -> torch.Tensor:
    """Sum over answers of the mean, over the answers of their row that the teacher puts at least `gap` log-odds below
    them, of max(0, margin - (s_i - s_j)); s is the student's log-odds of the last label.

    rows_T: number of the stream that each answer stands in. Answers of one user are compared, as GAUC does.
    """
    student, teacher = log_odds(logits_TC), log_odds(teacher_TC)
    above = (rows_T[:, None] == rows_T[None, :]) & (teacher[:, None] - teacher[None, :] >= max(gap, 1e-6))
    miss = F.relu(margin - (student[:, None] - student[None, :])) * above
    return (miss.sum(1) / above.sum(1).clamp(min=1)).sum()


class HiddenMatch(nn.Module):
    """Cosine distance plus mean squared error from the student's hidden states, projected, to the teacher's.

    One linear map a layer where the widths differ (none where they agree); it is not part of the student.
    """

    def __init__(self, layers: int, student: int, teacher: int) -> None:
        super().__init__()
        same = student == teacher
        self.maps = nn.ModuleList(
            nn.Identity() if same else nn.Linear(student, teacher, bias=False) for _ in range(layers)
        )

    def forward(self, student_TKS: torch.Tensor, teacher_TKH: torch.Tensor) -> torch.Tensor:
        """Sum over answers of the mean over layers. Both are brought to unit root mean square first."""
        projected = torch.stack([own(student_TKS[:, k].float()) for k, own in enumerate(self.maps)], dim=1)
        teacher = teacher_TKH.float()
        distance = 1 - F.cosine_similarity(projected, teacher, dim=-1)
        error = (_unit(projected) - _unit(teacher)).square().mean(-1)
        return (distance + error).mean(1).sum()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
