"""What no student can be made of is said before the log is read: here there is none."""

from __future__ import annotations

import pytest

from llmrec_peft import Domain, distill
from llmrec_peft.config import DistillConfig, read_config
from llmrec_peft.distillation.options import LossOptions, StudentOptions
from llmrec_peft.distillation.saving import Lesson, save_student
from llmrec_peft.distillation.students import start_ids
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models import load_classifier
from tests.inference.conftest import DOMAINS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refused(tmp_path):
    """`refused(kind, message, teacher, **flags)`: distilling on a log that is not there fails by something else."""

    def check(kind, message, teacher, **flags):
        values = {"teacher": teacher, "data.path": tmp_path / "no log", "output_dir": tmp_path / "out", **flags}
        config = read_config(DistillConfig, [f"--{key}={value}" for key, value in values.items()])
        with pytest.raises(kind, match=message):
            distill(config)
        assert not (tmp_path / "out").exists()

    return check


def test_a_bottleneck_teacher_has_no_shallow_student(bundle_of, refused):
    refused(ModelError, "bottleneck adapter has no place in a stock student", bundle_of("adapter"),
            **{"student.kind": "shallow"})  # fmt: skip


def test_layers_that_cannot_be_pruned(bundle_of, refused):
    flags = {"student.kind": "shallow", "student.layers": 2, "student.mlp": 0.5}
    refused(ModelError, "GPT2ForSequenceClassification has no layers of gate, up", bundle_of(kind="gpt2"), **flags)


def test_an_encoder_cannot_learn_pairs(bundle_of, tiny_base, refused):
    flags = {"student.kind": "small", "student.base": tiny_base("bert"), "loss.pairs": 0.1}
    refused(ConfigError, r"loss.pairs compares .* \(bert\) reads each target alone; set it to 0", bundle_of(), **flags)


def test_a_teacher_of_ids_has_no_student_of_texts(small_log, tiny_base, refused, tmp_path):
    domain, options = Domain.from_dict(DOMAINS["movies"]).of_ids(4, 6), StudentOptions(width=16, heads=2)
    start_ids(small_log().items.column("item_id"), domain, options, 0, tmp_path / "start")
    classifier = load_classifier(str(tmp_path / "start"), domain, "full")
    save_student(tmp_path / "student", classifier, domain.to_dict(), Lesson(options, LossOptions()))
    refused(ConfigError, "student.kind small reads item texts, and teacher .* reads item ids; choose ids or shallow",
            tmp_path / "student", **{"student.kind": "small", "student.base": tiny_base()})  # fmt: skip
