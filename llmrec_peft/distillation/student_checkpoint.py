"""Saving a trained student: a stock checkpoint with the behavior.json of a merged model, which names the teacher."""

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
from llmrec_peft.checkpoints.stock_tokenizer import prepare_tokenizer
from llmrec_peft.distillation.content_embedding import merge_content
from llmrec_peft.distillation.distill_options import LossOptions, StudentOptions
from llmrec_peft.models.classifier import BehaviorClassifier

PACKAGES = ("llmrec_peft", "torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class StudentMetadata:
    """How a student was made.

    Attributes:
        options, loss: settings of the student and of its loss.
        teacher: `method`, `base`, `weights` (fingerprint), `targets` (number of targets that it predicted), as
            `TeacherOutputs.describe` gives it; None if no teacher ran.
        layers: numbers of the teacher's layers that a shallow student consists of; None for other kinds.
    """

    options: StudentOptions
    loss: LossOptions
    teacher: Mapping[str, Any] | None = None
    layers: list[int] | None = None


def save_student(
    directory: str | Path,
    classifier: BehaviorClassifier,
    domain: Mapping[str, Any],
    metadata: StudentMetadata,
    record: TrainingRecord | None = None,
) -> dict[str, Any]:
    """Write a student as a merged model, whole or not at all, and return its behavior.json. An earlier one is replaced.

    Item content is first merged into the embeddings, which leaves the logits as they are.

    Args:
        domain: the student's domain, as a mapping.
        record: calibration, counts and metrics of the training run.

    Raises:
        BundleError: the directory holds something else or cannot be written, or the tokenizer makes stock classes pool
            at another token than the marker.
    """
    directory = check_output(directory)
    merge_content(classifier)
    prepare_tokenizer(classifier.tokenizer, classifier.config, domain, encoder=classifier.encoder)
    content = {
        "merged_from": [],
        "combination": None,
        "base": {"name": metadata.options.base or metadata.options.kind},
        "dtype": "float32",
        **loading_notes(classifier, classifier.tokenizer),
        **domain_entries(domain),
        **(record or TrainingRecord()).entries(),
        "measured": {},
        "versions": installed(*PACKAGES),
        "student": {
            "options": dataclasses.asdict(metadata.options),
            "loss": dataclasses.asdict(metadata.loss),
            "teacher": None if metadata.teacher is None else dict(metadata.teacher),
            "layers": metadata.layers,
        },
    }
    with scratch_beside(directory) as scratch, writing(directory):
        save_merged(scratch, classifier.stock, classifier.tokenizer, max_shard_size="2GB")
        manifest = write_merged_manifest(scratch, content)
        (scratch / CARD).write_text(student_card(manifest), encoding="utf-8")
        publish(scratch, directory)
    return manifest
