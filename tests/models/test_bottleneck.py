"""Bottleneck adapters on the layouts of Llama, GPT-2 and BERT, and on a 4-bit base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.bottleneck import (
    BottleneckAdapter,
    ParallelBottleneck,
    adapters_of,
    add_adapters,
    find_layout,
    transformer_layers,
)
from llmrec_peft.models.tuning_options import AdapterOptions
from tests.support.pairwise import diagonal

PLACEMENTS = ("pfeiffer", "houlsby", "parallel")


def masked(prompt):
    return {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}


@pytest.mark.parametrize(("kind", "placement"), diagonal(("llama", "qwen2", "mistral", "gpt2", "bert"), PLACEMENTS))
def test_starts_at_the_base_and_moves_away(kind, placement, make, shake, answer, prompt):
    base = make(kind, "head")
    adapted = make(kind, "adapter", placement=placement, size=8)
    with torch.no_grad():  # BERT's pooler and head start at random, adapters are made after them
        for name, value in base.model.named_parameters():
            if value.requires_grad:
                adapted.model.get_parameter(name).copy_(value)
    before = answer(adapted, masked(prompt))
    assert torch.allclose(before, answer(base, masked(prompt)), atol=1e-6)
    for _, adapter in adapters_of(adapted.model):
        nn.init.normal_(adapter.up.weight, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(answer(adapted, masked(prompt)), before, atol=1e-3)
    count = sum(1 for _ in adapters_of(adapted.model))
    assert count == (4 if placement == "houlsby" else 2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_formula(placement, make, shake):
    classifier = shake(make("llama", "adapter", placement=placement, size=8, scale=0.5, activation="relu"))
    mlp = transformer_layers(classifier.stock)[0].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = mlp.sublayer(x)
        source = x if placement == "parallel" else y
        adapter = mlp.adapter
        inner = torch.relu(source @ adapter.down.weight.T + adapter.down.bias)
        expected = y + 0.5 * (inner @ adapter.up.weight.T + adapter.up.bias)
        assert torch.allclose(mlp(x), expected, atol=1e-6)


def test_houlsby_adapts_attention_output(make, shake):
    classifier = shake(make("llama", "adapter", placement="houlsby", size=8, activation="silu"))
    attention = transformer_layers(classifier.stock)[0].self_attn
    generator = torch.Generator().manual_seed(0)
    x, ones = torch.randn(1, 5, 32, generator=generator), torch.ones(1, 5, 8)
    inputs = {"hidden_states": x, "position_embeddings": (ones, 0 * ones), "attention_mask": None}
    with torch.no_grad():
        plain, adapted = attention.sublayer(**inputs), attention(**inputs)
        y = plain[0]
        adapter = attention.adapter
        inner = torch.nn.functional.silu(y @ adapter.down.weight.T + adapter.down.bias)
        expected = y + inner @ adapter.up.weight.T + adapter.up.bias
    assert isinstance(plain, tuple) and len(adapted) == len(plain)
    assert torch.allclose(adapted[0], expected, atol=1e-6) and not torch.allclose(y, expected, atol=1e-3)


def test_bert_parallel_adds_before_the_norm(make, shake):
    classifier = shake(make("bert", "adapter", placement="parallel", size=8))
    block = transformer_layers(classifier.stock)[0].output
    generator = torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(1, 3, 64, generator=generator), torch.randn(1, 3, 32, generator=generator)
    inner = block.sublayer
    with torch.no_grad():
        expected = inner.LayerNorm(inner.dense(hidden) + residual + block.adapter(residual))
        assert torch.allclose(block(hidden, residual), expected, atol=1e-6)


def test_only_adapters_and_head_train(make):
    classifier = make("llama", "adapter", size=8)
    names = [name for name, value in classifier.model.named_parameters() if value.requires_grad]
    assert all(".adapter." in name or name == "score.weight" for name in names)
    assert classifier.trainable_parameters()[0] == 2 * (32 * 8 + 8 + 8 * 32 + 32) + 2 * 32


def test_layers_choose_which_layers_adapt(make):
    classifier = make("llama", "adapter", layers=[1])
    assert [path for path, _ in adapters_of(classifier.model)] == ["model.layers.1.mlp.adapter"]
    with pytest.raises(ModelError, match="layer 5, but the base has 2"):
        make("llama", "adapter", layers=[0, 5])


def test_dropout_only_when_set(make):
    plain = [adapter.dropout for _, adapter in adapters_of(make("llama", "adapter").model)]
    assert all(isinstance(module, nn.Identity) for module in plain)
    dropping = [adapter.dropout for _, adapter in adapters_of(make("llama", "adapter", dropout=0.2).model)]
    assert all(module.p == 0.2 for module in dropping)


def test_low_precision_base_keeps_float32_adapters(make, prompt):
    classifier = make("llama", "adapter", dtype="bfloat16")
    assert {value.dtype for _, a in adapters_of(classifier.model) for value in a.parameters()} == {torch.float32}
    assert classifier(**prompt).isfinite().all()


def test_on_a_four_bit_base(tiny_base, shake, prompt):
    import bitsandbytes

    from llmrec_peft.models.base_model import load_model
    from llmrec_peft.models.classifier import BehaviorClassifier
    from llmrec_peft.models.quantization import Quantization

    names = {0: "dislike", 1: "like"}
    model = load_model(str(tiny_base("llama")), 2, id2label=names, quantization=Quantization())
    model.requires_grad_(False)
    add_adapters(model, AdapterOptions(placement="houlsby", size=8))
    classifier = shake(BehaviorClassifier(model, "adapter", list(names.values()))).train()
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in classifier.modules())
    classifier(**prompt).square().sum().backward()
    grads = [value.grad for _, adapter in adapters_of(model) for value in adapter.parameters()]
    assert len(grads) == 16 and all(grad is not None and grad.isfinite().all() for grad in grads)


def test_unknown_layout_names_what_it_found():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.channel = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ModelError, match="no place in a Odd, whose modules are mixer, channel; set the method to lora"):
        find_layout(Odd())


def test_options_are_checked():
    for field, value in {"placement": "before", "size": 0, "activation": "tanh", "dropout": 1.0, "scale": 0}.items():
        with pytest.raises(ConfigError, match=f"^{field} must be "):
            AdapterOptions(**{field: value})
    with pytest.raises(ConfigError, match="layers must be"):
        AdapterOptions(layers=[1, 1])


def test_adapter_module_is_zero_at_first():
    adapter = BottleneckAdapter(4, AdapterOptions(size=2))
    assert not adapter(torch.randn(3, 4)).any()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norms_after_the_sublayers(placement, tmp_path, tiny_tokenizer, domain, answer, prompt):
    """Gemma 2 normalises what a sublayer returns: a block in front of that norm would be no addition to the stream."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from llmrec_peft.checkpoints.loading import load_classifier

    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=1, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="set model.attn to eager$"):
        load_classifier(str(tmp_path), domain, "head")
    base = answer(load_classifier(str(tmp_path), domain, "head", attn="eager"), prompt)
    classifier = load_classifier(str(tmp_path), domain, "adapter", attn="eager", placement=placement, size=8)
    assert torch.equal(answer(classifier, prompt), base)
    wrapped = {path.split(".")[-2] for path, _ in adapters_of(classifier.model)}
    expected = {"pfeiffer": {"post_feedforward_layernorm"}, "parallel": {"mlp"}}
    assert wrapped == expected.get(placement, {"post_attention_layernorm", "post_feedforward_layernorm"})


def test_parallel_keeps_what_a_mixture_returns_beside_its_output():
    class Mixture(nn.Module):
        def forward(self, x):
            return 2 * x, "router"

    adapter = BottleneckAdapter(4, AdapterOptions(size=2))
    nn.init.ones_(adapter.up.bias)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    output, router = ParallelBottleneck(Mixture(), adapter, residual_input=False)(x)
    assert router == "router" and torch.equal(output, 2 * x + adapter(x)) and not torch.equal(output, 2 * x)
