"""Options of distillation: the student, the loss and the outputs of the teacher. Read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec_peft.fields import MAX_COUNT, MAX_TOKENS, check_fields, number, require


@dataclass(kw_only=True)
class StudentOptions:
    """Student model."""

    kind: Literal["shallow", "small", "ids"] = "ids"
    """Student: shallow (some layers of the teacher), small (another, smaller base), or ids (a tiny decoder of item
    ids)."""
    layers: int | None = number(None, 1, 1000)
    """Number of layers of a shallow student (null: a third of the teacher's) or of a student of ids (null: 2)."""
    pick: Literal["first", "spread"] = "first"
    """Layers of the teacher that a shallow student keeps: the first ones, or evenly spread ones."""
    mlp: float = number(1.0, 0, 1, above=True)
    """Fraction of the neurons of each MLP that a shallow student keeps."""
    attention: float = number(1.0, 0, 1, above=True)
    """Fraction of the attention head groups of each layer that a shallow student keeps."""
    base: str | None = None
    """Base model of a small student: an embedded name, a Hub id or a directory."""
    width: int = number(64, 1, 8192)
    """Hidden size of a student of ids."""
    heads: int = number(4, 1, 1024)
    """Number of attention heads of a student of ids."""
    context: int = number(40, 0, 10_000)
    """Number of history events before the targets in a window of a student of ids."""
    targets: int = number(60, 1, 10_000)
    """Number of targets in a window of a student of ids."""
    content: bool = True
    """Give a student of ids the teacher's embedding of each item's text, which covers items without training rows."""
    content_width: int = number(64, 1, 8192)
    """Number of principal components of the item embeddings."""
    content_dropout: float = number(0.2, 0, 1, below=True)
    """Probability that training hides an item's id and leaves its text embedding only."""

    def __post_init__(self) -> None:
        check_fields(self, "student.", brief=True)
        require(self.width % (2 * self.heads) == 0, "student.width", f"a multiple of twice student.heads {self.heads}",
                 self.width)  # fmt: skip
        for name in ("mlp", "attention"):
            value = getattr(self, name)
            require(value == 1 or self.kind == "shallow", f"student.{name}", f"1 for kind {self.kind}", value)
        if self.kind == "small":
            require(bool(self.base), "student.base", "a smaller base for kind small", self.base)
        else:
            require(self.base is None, "student.base", f"null for kind {self.kind}", self.base)


@dataclass(kw_only=True)
class LossOptions:
    """Terms of the distillation loss."""

    hard: float = number(0.5, 0, 1e6)
    """Weight of the loss on labels (train.loss)."""
    soft: float = number(0.5, 0, 1e6)
    """Weight of the Kullback-Leibler divergence from the teacher's predictions; 0 disables it."""
    temperature: float = number(1.0, 0, 1e4, above=True)
    """Temperature of both distributions in the soft term, which is multiplied by its square."""
    pairs: float = number(0.0, 0, 1e6)
    """Weight of the margin loss on pairs of targets of one stream that the teacher orders with confidence."""
    pair_gap: float = number(1.0, 0, 1e4)
    """Minimum difference of the teacher's log-odds for a pair to count."""
    pair_margin: float = number(1.0, 0, 1e4)
    """Margin between the student's log-odds of a pair."""
    hidden: float = number(0.0, 0, 1e6)
    """Weight of cosine distance plus squared error to the teacher's hidden states; for students that read text."""
    weighting: Literal["none", "confidence", "agreement", "both"] = "none"
    """Target weights in the soft term: the teacher's confidence, its probability of the true label, or both."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.")
        require(bool(self.hard or self.needs_teacher), "loss", "above 0 in one of hard, soft, pairs and hidden", 0)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher's predictions."""
        return bool(self.soft or self.pairs or self.hidden)


@dataclass(kw_only=True)
class TeacherOutputsOptions:
    """Cached outputs of the teacher."""

    path: str | None = None
    """Cache directory of the teacher's predictions, shared by several students; null for `teacher` in output_dir."""
    targets: int | None = number(10000, 1, MAX_COUNT)
    """Maximum number of training targets that the teacher predicts, in whole random windows; null for all."""
    only: bool = False
    """Train only on windows with a target that the teacher predicted."""
    unlabelled: bool = False
    """Train on rows that the domain leaves out (label.missing, label.map) too, with the teacher's predictions only."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Maximum tokens per forward pass of the teacher."""

    def __post_init__(self) -> None:
        check_fields(self, "teacher_outputs.", brief=True)
