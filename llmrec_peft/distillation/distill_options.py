"""What a distillation can be told: the student, the loss and the teacher's answers. Read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec_peft.fields import MAX_COUNT, MAX_TOKENS, check_fields, number, require


@dataclass(kw_only=True)
class StudentOptions:
    """The student."""

    kind: Literal["shallow", "small", "ids"] = "ids"
    """Some of the teacher's layers, another smaller base, or a tiny decoder of item ids."""
    layers: int | None = number(None, 1, 1000)
    """Layers of a shallow student (null: a third of the teacher's) or of one of ids (null: 2)."""
    pick: Literal["first", "spread"] = "first"
    """Which of the teacher's layers a shallow student keeps."""
    mlp: float = number(1.0, 0, 1, above=True)
    """Share of each MLP's neurons that a shallow student keeps."""
    heads_kept: float = number(1.0, 0, 1, above=True)
    """Share of each layer's groups of attention heads that a shallow student keeps."""
    base: str | None = None
    """Base of a small student: an embedded name, a Hub id or a directory."""
    width: int = number(64, 1, 8192)
    """Width of the hidden states of a student of ids."""
    heads: int = number(4, 1, 1024)
    """Attention heads of a student of ids."""
    context: int = number(40, 0, 10_000)
    """History events before the targets in a window of a student of ids."""
    targets: int = number(60, 1, 10_000)
    """Targets in a window of a student of ids."""
    content: bool = True
    """Give a student of ids what the teacher makes of each item's text, for items without training rows too."""
    content_width: int = number(64, 1, 8192)
    """Principal components of it."""
    content_dropout: float = number(0.2, 0, 1, below=True)
    """Chance that an item is read by its content alone in training."""

    def __post_init__(self) -> None:
        check_fields(self, "student.", brief=True)
        require(self.width % (2 * self.heads) == 0, "student.width", f"a multiple of twice student.heads {self.heads}",
                 self.width)  # fmt: skip
        for name in ("mlp", "heads_kept"):
            value = getattr(self, name)
            require(value == 1 or self.kind == "shallow", f"student.{name}", f"1 for kind {self.kind}", value)
        if self.kind == "small":
            require(bool(self.base), "student.base", "a smaller base for kind small", self.base)
        else:
            require(self.base is None, "student.base", f"null for kind {self.kind}", self.base)


@dataclass(kw_only=True)
class LossOptions:
    """Weights of the terms of a student's loss, and their settings."""

    hard: float = number(0.5, 0, 1e6)
    """Weight of the loss to the labels (train.loss)."""
    soft: float = number(0.5, 0, 1e6)
    """Weight of the Kullback-Leibler divergence from the teacher's answers."""
    temperature: float = number(1.0, 0, 1e4, above=True)
    """Both distributions of the soft term are softened by it; the term is multiplied by its square."""
    pairs: float = number(0.0, 0, 1e6)
    """Weight of the margin loss on pairs of one stream that the teacher is sure to order."""
    pair_gap: float = number(1.0, 0, 1e4)
    """Log-odds by which the teacher must tell a pair's answers apart."""
    pair_margin: float = number(1.0, 0, 1e4)
    """Log-odds by which the student should tell them apart."""
    hidden: float = number(0.0, 0, 1e6)
    """Weight of cosine distance and squared error to the teacher's hidden states; for students that read texts."""
    weighting: Literal["none", "confidence", "agreement", "both"] = "none"
    """Weight of each target in the soft term: the teacher's confidence, its probability of the true label, or both."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.")
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
    targets: int | None = number(10000, 1, MAX_COUNT)
    """Training targets that the teacher answers, at most, in whole windows drawn at random; null for all."""
    only: bool = False
    """Train on windows with a target that the teacher answered alone."""
    unlabelled: bool = False
    """Training rows that the domain leaves out (label.missing, label.map) are targets too, learnt from the teacher's
    answers alone."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Tokens that the teacher reads at once, at most."""

    def __post_init__(self) -> None:
        check_fields(self, "answers.", brief=True)
