"""What a distillation can be told: the student, the loss and the teacher's answers. Read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec_peft.models.options import require


@dataclass(kw_only=True)
class StudentOptions:
    """The student."""

    kind: Literal["shallow", "small", "ids"] = "ids"
    """Some of the teacher's layers, another smaller base, or a tiny decoder of item ids."""
    layers: int | None = None
    """Layers of a shallow student (null: a third of the teacher's) or of one of ids (null: 2)."""
    pick: Literal["first", "spread"] = "first"
    """Which of the teacher's layers a shallow student keeps."""
    mlp: float = 1.0
    """Share of each MLP's neurons that a shallow student keeps."""
    heads_kept: float = 1.0
    """Share of each layer's groups of attention heads that a shallow student keeps."""
    base: str | None = None
    """Base of a small student: an embedded name, a Hub id or a directory."""
    width: int = 64
    """Width of the hidden states of a student of ids."""
    heads: int = 4
    """Attention heads of a student of ids."""
    context: int = 40
    """History events before the targets in a window of a student of ids."""
    targets: int = 60
    """Targets in a window of a student of ids."""
    content: bool = True
    """Give a student of ids what the teacher makes of each item's text, for items without training rows too."""
    content_width: int = 64
    """Principal components of it."""
    content_dropout: float = 0.2
    """Chance that an item is read by its content alone in training."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "targets", "content_width"):
            require(getattr(self, name) >= 1, f"student.{name}", "at least 1", getattr(self, name))
        require(self.layers is None or self.layers >= 1, "student.layers", "at least 1, or null", self.layers)
        require(self.context >= 0, "student.context", "at least 0", self.context)
        require(self.width % (2 * self.heads) == 0, "student.width", f"a multiple of twice student.heads {self.heads}",
                 self.width)  # fmt: skip
        require(0 <= self.content_dropout < 1, "student.content_dropout", "at least 0 and below 1",
                 self.content_dropout)  # fmt: skip
        for name in ("mlp", "heads_kept"):
            value = getattr(self, name)
            require(0 < value <= 1, f"student.{name}", "above 0 and at most 1", value)
            require(value == 1 or self.kind == "shallow", f"student.{name}", f"1 for kind {self.kind}", value)
        if self.kind == "small":
            require(bool(self.base), "student.base", "a smaller base for kind small", self.base)
        else:
            require(self.base is None, "student.base", f"null for kind {self.kind}", self.base)


@dataclass(kw_only=True)
class LossOptions:
    """Weights of the terms of a student's loss, and their settings."""

    hard: float = 0.5
    """Weight of the loss to the labels (train.loss)."""
    soft: float = 0.5
    """Weight of the Kullback-Leibler divergence from the teacher's answers."""
    temperature: float = 1.0
    """Both distributions of the soft term are softened by it; the term is multiplied by its square."""
    pairs: float = 0.0
    """Weight of the margin loss on pairs of one stream that the teacher is sure to order."""
    pair_gap: float = 1.0
    """Log-odds by which the teacher must tell a pair's answers apart."""
    pair_margin: float = 1.0
    """Log-odds by which the student should tell them apart."""
    hidden: float = 0.0
    """Weight of cosine distance and squared error to the teacher's hidden states; for students that read texts."""
    weighting: Literal["none", "confidence", "agreement", "both"] = "none"
    """Weight of each target in the soft term: the teacher's confidence, its probability of the true label, or both."""

    def __post_init__(self) -> None:
        for name in ("hard", "soft", "pairs", "pair_gap", "pair_margin", "hidden"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"loss.{name}", "a finite number of at least 0", value)
        require(0 < self.temperature < float("inf"), "loss.temperature", "a finite number above 0", self.temperature)
        require(bool(self.hard or self.needs_teacher), "loss", "above 0 in one of hard, soft, pairs and hidden", 0)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher's answers."""
        return bool(self.soft or self.pairs or self.hidden)


@dataclass(kw_only=True)
class AnswersOptions:
    """The teacher's answers."""

    path: str | None = None
    """Directory of the kept answers, which other students can read too; null for `teacher` in output_dir."""
    targets: int | None = 10000
    """Training targets that the teacher answers, at most, in whole windows drawn at random; null for all."""
    only: bool = False
    """Train on windows with a target that the teacher answered alone."""
    unlabelled: bool = False
    """Training rows that the domain leaves out (label.missing, label.map) are targets too, learnt from the teacher's
    answers alone."""
    batch_tokens: int = 4000
    """Tokens that the teacher reads at once, at most."""

    def __post_init__(self) -> None:
        require(self.targets is None or self.targets >= 1, "answers.targets", "at least 1, or null", self.targets)
        require(self.batch_tokens >= 1, "answers.batch_tokens", "at least 1", self.batch_tokens)
