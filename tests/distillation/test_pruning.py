"""Pruning against the whole model with the pruned units set to zero."""

import copy

import numpy as np
import pytest

from llmrec_peft import load_classifier
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import build_streams
from llmrec_peft.distillation.pruning import prune
from llmrec_peft.distillation.shallow_student import write_shallow_student
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.predict import predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def logits_of(small_log, domains):
    """`logits_of(classifier)`: logits on the test streams."""

    def run(classifier):
        streams = build_streams(small_log().split().test, domains["movies"], classifier.tokenizer)
        collator = StreamCollator(classifier.tokenizer.pad_token_id, 500)
        return predict(classifier, streams, collator, batch_tokens=500).logits

    return run


def silence(classifier, mlp: int, group: int | None) -> None:
    """Set the weakest neurons' and the weakest head group's way out to zero, in every layer."""
    for layer in classifier.stock.model.layers:
        gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        score = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
        down.weight.data[:, score.argsort()[:mlp]] = 0
        if group is not None:
            o, v = layer.self_attn.o_proj, layer.self_attn.v_proj
            size = o.weight.shape[1] // 2
            strength = [v.weight[g * 8 : g * 8 + v.weight.shape[0] // 2].norm() for g in (0, 1)]
            out = [o.weight[:, g * size : (g + 1) * size].norm() for g in (0, 1)]
            weak = 0 if strength[0] * out[0] < strength[1] * out[1] else 1
            o.weight.data[:, weak * size : (weak + 1) * size] = 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_pruned_model_is_the_whole_one_with_the_rest_silent(kind, tiny_base, domains, logits_of, tmp_path):
    whole = load_classifier(str(tiny_base(kind)), domains["movies"], "full")
    before = logits_of(whole)
    silent = copy.deepcopy(whole)
    silent.tokenizer = whole.tokenizer
    silence(silent, 16, 0)
    wanted = logits_of(silent)
    assert np.abs(wanted - before).max() > 1e-3
    directory = tmp_path / "pruned"
    prune(whole.stock, mlp=0.75, heads=0.5)
    whole.stock.save_pretrained(directory)
    whole.tokenizer.save_pretrained(directory)
    pruned = load_classifier(str(directory), domains["movies"], "full")
    np.testing.assert_allclose(logits_of(pruned), wanted, atol=1e-5)
    config = pruned.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (48, 2, 1)
    assert config.head_dim == 8
    assert sum(p.numel() for p in pruned.stock.model.layers.parameters()) < 0.75 * sum(
        p.numel()
        for p in load_classifier(str(tiny_base(kind)), domains["movies"], "full").stock.model.layers.parameters()
    )


def test_a_shallow_student_can_be_pruned_too(tiny_base, domains, tmp_path):
    teacher = load_classifier(str(tiny_base("llama")), domains["movies"], "lora")
    write_shallow_student(teacher, [0, 1], tmp_path, mlp=0.5)
    student = load_classifier(str(tmp_path), domains["movies"], "full")
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 32)


def test_what_cannot_be_pruned_is_named(tiny_base, domains):
    model = load_classifier(str(tiny_base("gpt2")), domains["movies"], "full").stock
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification has no layers of gate, up"):
        prune(model, mlp=0.5)
    with pytest.raises(ConfigError, match="student.mlp must be above 0 and at most 1; got 0"):
        prune(model, mlp=0)
