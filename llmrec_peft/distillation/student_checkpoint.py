"""Writing a trained student: a stock checkpoint with the behavior.json of a merged model, which says who taught it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.bundle import TrainingRecord, domain_entries
from llmrec_peft.checkpoints.manifest import installed
from llmrec_peft.checkpoints.merged import loading_notes, save_merged, write_merged_manifest
from llmrec_peft.checkpoints.model_card import CARD, student_card
from llmrec_peft.checkpoints.output_directory import check_output, publish, scratch_beside, writing
from llmrec_peft.checkpoints.stock_loading import prepare_tokenizer
from llmrec_peft.distillation.distill_options import LossOptions, StudentOptions
from llmrec_peft.distillation.students import fold_content
from llmrec_peft.models.classifier import BehaviorClassifier

PACKAGES = ("llmrec_peft", "torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class StudentMetadata:
    """How a student was made.

    Attributes:
        options, loss: its settings.
        teacher: `method`, `base`, `weights` (fingerprint), `targets` (how many it answered); None if it was not asked.
        layers: of a shallow student, the teacher's layers that it kept.
    """

    options: StudentOptions
    loss: LossOptions
    teacher: Mapping[str, Any] | None = None
    layers: list[int] | None = None


def save_student(
    directory: str | Path,
    classifier: BehaviorClassifier,
    domain: Mapping[str, Any],
    lesson: StudentMetadata,
    record: TrainingRecord | None = None,
) -> dict[str, Any]:
    """Write a student as a merged model, whole or not at all; returns its behavior.json. An earlier one is replaced.

    What `give_content` added is folded into the embeddings first, which leaves the answers as they are.

    Raises:
        BundleError: the directory holds something else, or cannot be written; or a tokenizer that stock classes would
            read at another token than the marker.
    """
    directory = check_output(directory)
    fold_content(classifier)
    prepare_tokenizer(classifier.tokenizer, classifier.config, domain, encoder=classifier.encoder)
    content = {
        "merged_from": [],
        "combination": None,
        "base": {"name": lesson.options.base or lesson.options.kind},
        "dtype": "float32",
        **loading_notes(classifier, classifier.tokenizer),
        **domain_entries(domain),
        **(record or TrainingRecord()).entries(),
        "measured": {},
        "versions": installed(*PACKAGES),
        "student": {
            "options": dataclasses.asdict(lesson.options),
            "loss": dataclasses.asdict(lesson.loss),
            "teacher": None if lesson.teacher is None else dict(lesson.teacher),
            "layers": lesson.layers,
        },
    }
    with scratch_beside(directory) as scratch, writing(directory):
        save_merged(scratch, classifier.stock, classifier.tokenizer, max_shard_size="2GB")
        manifest = write_merged_manifest(scratch, content)
        (scratch / CARD).write_text(student_card(manifest), encoding="utf-8")
        publish(scratch, directory)
    return manifest
