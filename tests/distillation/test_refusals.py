"""Students that cannot be made are refused before the log is read: here there is no log."""

from __future__ import annotations

import pytest

from llmrec_peft import Domain, distill
from llmrec_peft.config.schema import DistillConfig, read_config
from llmrec_peft.distillation.distill_options import LossOptions, StudentOptions
from llmrec_peft.distillation.item_id_student import write_item_id_student
from llmrec_peft.distillation.student_checkpoint import StudentMetadata, save_student
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.classifier import load_classifier
from tests.support.domains import DOMAINS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def out(tmp_path):
    """Where the student would go."""
    return tmp_path / "out"


@pytest.fixture
def teach(tmp_path, out):
    """`teach(teacher, **flags)`: distil on a log that is not there."""

    def run(teacher, **flags):
        values = {"teacher": teacher, "data.path": tmp_path / "no log", "output_dir": out, **flags}
        return distill(read_config(DistillConfig, [f"--{key}={value}" for key, value in values.items()]))

    return run


def test_a_bottleneck_teacher_has_no_shallow_student(bundle_of, teach, out):
    with pytest.raises(ModelError, match="a stock student cannot hold a bottleneck adapter"):
        teach(bundle_of("adapter"), **{"student.kind": "shallow"})
    assert not out.exists()


def test_layers_that_cannot_be_pruned(bundle_of, teach, out):
    flags = {"student.kind": "shallow", "student.layers": 2, "student.mlp": 0.5}
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification has no layers of gate, up"):
        teach(bundle_of(kind="gpt2"), **flags)
    assert not out.exists()


def test_an_encoder_cannot_learn_pairs(bundle_of, tiny_base, teach, out):
    flags = {"student.kind": "small", "student.base": tiny_base("bert"), "loss.pairs": 0.1}
    with pytest.raises(ConfigError, match=r"loss.pairs compares .* \(bert\) reads each target alone; set it to 0"):
        teach(bundle_of(), **flags)
    assert not out.exists()


def test_a_teacher_of_ids_has_no_student_of_texts(small_log, tiny_base, teach, out, tmp_path):
    domain, options = Domain.from_dict(DOMAINS["movies"]).of_ids(4, 6), StudentOptions(width=16, heads=2)
    write_item_id_student(small_log().items.column("item_id"), domain, options, 0, tmp_path / "start")
    classifier = load_classifier(str(tmp_path / "start"), domain, "full")
    save_student(tmp_path / "student", classifier, domain.to_dict(), StudentMetadata(options, LossOptions()))
    flags = {"student.kind": "small", "student.base": tiny_base()}
    with pytest.raises(ConfigError, match="student.kind small reads item texts, and teacher .* reads item ids; choose"):
        teach(tmp_path / "student", **flags)
    assert not out.exists()
