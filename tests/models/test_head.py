"""Where the head starts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models import load_classifier
from llmrec_peft.models.head import first_tokens
from llmrec_peft.models.options import METHODS, ModelOptions, QloraOptions, method_options


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_words_start_gives_the_language_models_own_odds(kind, tiny_base, make, answer, prompt):
    classifier = make(kind, "head")
    ids = first_tokens(classifier.tokenizer, {"dislike": " no\n", "like": " yes\n"})
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_base(kind), dtype=torch.float32)
        words = model(prompt["input_ids"]).logits[0, -1, ids]
    logits = answer(classifier, prompt)[0]
    assert torch.allclose(logits[1] - logits[0], words[1] - words[0], atol=1e-4)
    assert torch.allclose(classifier.head.weight.sum(0), torch.zeros(32), atol=1e-6)


def test_head_scale_zero_and_random(make, answer, prompt):
    one, half = make("llama", "head"), make("llama", "head", head_scale=0.5)
    assert torch.allclose(answer(half, prompt), 0.5 * answer(one, prompt), atol=1e-6)
    assert not make("llama", "head", head_init="zero").head.weight.any()
    random = make("llama", "head", head_init="random").head.weight
    assert random.any() and not torch.equal(random, one.head.weight)


def test_encoder_zero(make):
    head = make("bert", "head", head_init="zero").head
    assert not head.weight.any() and not head.bias.any()


def test_three_labels(tiny_base, domain, prompt, answer):
    domain["outcomes"] = {"skip": " skip\n", "click": " click\n", "buy": " buy\n"}
    classifier = load_classifier(str(tiny_base("llama")), domain, "head")
    assert answer(classifier, prompt).shape == (1, 3)
    assert classifier.config.id2label == {0: "skip", 1: "click", 2: "buy"}


def test_words_that_start_alike_are_refused(tiny_base, domain):
    domain["outcomes"] = {"like": " yes\n", "love": " yes indeed\n"}
    with pytest.raises(ModelError, match="'like' and 'love' have the words ' yes.n' and ' yes indeed.n'.*same token"):
        load_classifier(str(tiny_base("llama")), domain)
    assert load_classifier(str(tiny_base("llama")), domain, head_init="zero").labels == ["like", "love"]
    domain["outcomes"] = {"like": " yes\n", "none": ""}
    with pytest.raises(ModelError, match="outcome 'none' has the word '', which has no token"):
        load_classifier(str(tiny_base("llama")), domain)


def test_model_options_are_checked():
    bad = {"base": " ", "dtype": "int8", "attn": "flex", "head_init": "ones", "head_scale": 0.0}
    for field, value in bad.items():
        with pytest.raises(ConfigError, match=f"^{field} must be .*change {field} in the configuration"):
            ModelOptions(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("alpha", 0), ("dropout", 1.0), ("target_modules", []), ("layers", []), ("layers", [-1]), ("bias", "x")],
)
def test_lora_options_are_checked(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be "):
        method_options("lora", {field: value})


def test_qlora_options_are_checked():
    for field, value in {"quant_type": "int4", "compute_dtype": "int8", "quant_storage": "int3"}.items():
        with pytest.raises(ConfigError, match=f"^{field} must be one of"):
            QloraOptions(**{field: value})


def test_every_method_has_documented_options():
    import ast
    import inspect

    from llmrec_peft.models import options

    tree = ast.parse(inspect.getsource(options))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for kind in (ModelOptions, *METHODS.values()):
        body = classes[kind.__name__].body
        for position, node in enumerate(body):
            if isinstance(node, ast.AnnAssign):
                following = body[position + 1]
                assert isinstance(following, ast.Expr) and isinstance(following.value.value, str), node.target.id
