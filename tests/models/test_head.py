"""Where the head starts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.head import first_tokens
from llmrec_peft.models.tuning_options import METHODS, ModelOptions, QloraOptions, method_options


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

    from llmrec_peft.models import tuning_options as options

    tree = ast.parse(inspect.getsource(options))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for kind in (ModelOptions, *METHODS.values()):
        body = classes[kind.__name__].body
        for position, node in enumerate(body):
            if isinstance(node, ast.AnnAssign):
                following = body[position + 1]
                assert isinstance(following, ast.Expr) and isinstance(following.value.value, str), node.target.id


class TestTrainedHead:
    """A base that is a classifier already."""

    @pytest.fixture
    def merged(self, make, shake, tmp_path):
        """`merged(kind)`: (directory, classifier) of a trained model, LoRA merged, saved as a stock classifier."""

        def save(kind="llama"):
            classifier = shake(make(kind, "lora", r=4))
            stock = classifier.model.merge_and_unload()
            stock.save_pretrained(tmp_path / kind)
            classifier.tokenizer.save_pretrained(tmp_path / kind)
            return tmp_path / kind, stock

        return save

    @pytest.mark.parametrize("method", ["lora", "qlora", "adapter", "head", "full"])
    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_kept_and_trained_by_every_method(self, kind, method, merged, domain, answer, prompt):
        directory, stock = merged(kind)
        classifier = load_classifier(str(directory), domain, method)
        batch = {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}
        if method != "qlora":
            with torch.no_grad():
                expected = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            assert torch.allclose(answer(classifier, batch), expected, atol=1e-5)
        name = "classifier" if kind == "bert" else "score"
        assert any(key.startswith((name, f"base_model.model.{name}")) for key in classifier.trainable_state_dict())
        classifier(**batch).square().sum().backward()
        assert all(value.grad is not None for value in classifier.head.parameters() if value.requires_grad)

    @pytest.mark.parametrize("outcomes", [("like", "dislike"), ("skip", "click"), ("dislike", "like", "love")])
    def test_other_labels_start_again(self, outcomes, merged, domain):
        directory, stock = merged()
        domain["outcomes"] = dict(zip(outcomes, (" yes\n", " no\n", " click\n"), strict=False))
        classifier = load_classifier(str(directory), domain, "head")
        assert classifier.head.weight.shape == (len(outcomes), 32)
        assert torch.allclose(classifier.head.weight.sum(0), torch.zeros(32), atol=1e-6)  # the words' rows

    def test_zero_and_random_start_again(self, merged, domain):
        directory, stock = merged()
        assert not load_classifier(str(directory), domain, "head", head_init="zero").head.weight.any()
        random = load_classifier(str(directory), domain, "head", head_init="random").head.weight
        assert random.any() and not torch.allclose(random, stock.score.weight, atol=1e-2)


def test_zero_of_a_head_with_several_layers(tiny_roberta, domain):
    head = load_classifier(str(tiny_roberta), domain, "head", head_init="zero").head
    assert not head.out_proj.weight.any() and not head.out_proj.bias.any() and head.dense.weight.any()


def test_the_former_name_of_the_label_words_is_read():
    """Configurations and manifests of version 0.1 say `words`."""
    assert ModelOptions(head_init="words") == ModelOptions(head_init="label_words") == ModelOptions()
