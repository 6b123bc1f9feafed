"""LoRA and QLoRA: PEFT's options, initialisations that keep the base's answers, and the 4-bit base."""

from __future__ import annotations

import pytest
import torch

from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.tuning_options import LoraOptions, QloraOptions

KINDS = ("llama", "qwen2", "mistral", "gpt2")


@pytest.mark.parametrize("kind", [*KINDS, "bert"])
def test_untrained_adapter_predicts_as_the_base(kind, make, answer, prompt):
    batch = {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}
    start = {"head_init": "label_words"} if kind != "bert" else {}
    adapted, base = make(kind, "lora", **start), make(kind, "head", **start)
    if kind == "bert":  # its pooler and head start at random; give both the same
        for name in ("classifier", "bert.pooler"):
            wrapped = adapted.stock.get_submodule(name).modules_to_save["default"]
            wrapped.load_state_dict(base.stock.get_submodule(name).state_dict())
    assert torch.allclose(answer(adapted, batch), answer(base, batch), atol=1e-6)


@pytest.mark.parametrize("init", ["default", "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal"])
def test_initialisations_start_at_the_base(init, make, answer, prompt):
    base, adapted = make("llama", "head"), make("llama", "lora", init=init, r=4)
    assert torch.allclose(answer(adapted, prompt), answer(base, prompt), atol=1e-4)
    moves_base = init.startswith("pissa") or init == "olora"
    assert bool(adapted.initial_factors) == moves_base


@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}])
def test_variants_differ_from_plain_lora(options, make, shake, answer, prompt):
    plain, variant = (shake(make("llama", r=4, **extra)) for extra in ({}, options))
    assert not torch.allclose(answer(plain, prompt), answer(variant, prompt), atol=1e-3)


def test_rslora_scale(make):
    layer = make("llama", r=4, alpha=8, rslora=True).stock.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4**0.5
    assert make("llama", r=4, alpha=8).stock.model.layers[0].self_attn.q_proj.scaling["default"] == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("llama", 7), ("gpt2", 4), ("bert", 6)],
)
def test_all_linear_adapts_every_linear_layer_and_no_head(kind, expected, make):
    classifier = make(kind)
    adapted = [name for name, module in classifier.stock.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 2 * expected
    assert not any("score" in name or "classifier" in name or "pooler" in name for name in adapted)


def test_layers_choose_which_layers_adapt(make):
    classifier = make("llama", layers=[1])
    adapted = [name for name, module in classifier.stock.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 7 and all(name.startswith("model.layers.1.") for name in adapted)
    with pytest.raises(ModelError, match="layer 2, but the base has 2; use 0 to 1"):
        make("llama", layers=[2])


def test_target_modules_by_name_and_by_pattern(make):
    for target in (["q_proj", "v_proj"], r".*\.(q|v)_proj"):
        classifier = make("llama", target_modules=target)
        adapted = [name for name, module in classifier.stock.named_modules() if hasattr(module, "lora_A")]
        assert len(adapted) == 4
    with pytest.raises(ModelError, match="LoRA cannot be added: No modules were targeted"):
        make("llama", target_modules=["no_such"])
    with pytest.raises(ModelError, match="layers cannot be set when target_modules is a pattern"):
        make("llama", target_modules=".*q_proj", layers=[0])


def test_dropout_is_no_kernel_at_zero(make, shake, prompt):
    classifier = shake(make("llama")).train()
    assert not any(isinstance(module, torch.nn.Dropout) for module in classifier.modules())
    assert torch.equal(classifier(**prompt), classifier(**prompt))
    dropping = shake(make("llama", dropout=0.5)).train()
    assert not torch.equal(dropping(**prompt), dropping(**prompt))


def test_bias_trains_where_there_is_one(make):
    classifier = make("gpt2", bias="all")
    assert any(
        value.requires_grad for name, value in classifier.named_parameters() if name.endswith("c_attn.base_layer.bias")
    )
    with pytest.raises(ModelError, match="have no bias; set it to none"):
        make("llama", bias="all")


def test_refused_initialisations(make):
    for name in ("eva", "corda"):
        with pytest.raises(ConfigError, match="activations of real batches"):
            LoraOptions(init=name)
    with pytest.raises(ConfigError, match="init must be one of default, gaussian"):
        LoraOptions(init="kaiming")
    with pytest.raises(ConfigError, match="even number with init orthogonal"):
        LoraOptions(init="orthogonal", r=3)
    with pytest.raises(ConfigError, match="on a 4-bit base, not 'pissa'"):
        QloraOptions(init="pissa")
    with pytest.raises(ModelError, match="use method qlora"):
        make("llama", init="loftq")
    with pytest.raises(ModelError, match="transposed weights"):
        make("gpt2", init="olora")


class TestQlora:
    """4-bit bases on the CPU."""

    @pytest.mark.parametrize("kind", [*KINDS, "bert"])
    def test_head_is_whole_and_layers_are_packed(self, kind, make):
        import bitsandbytes

        classifier = make(kind, "qlora", r=4)
        packed = [n for n, m in classifier.stock.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(packed) >= 8
        assert not any("score" in name or "classifier" in name or "pooler" in name for name in packed)
        weight = classifier.head.weight
        assert weight.dtype == torch.float32 and weight.shape == (2, 32)

    def test_predictions_are_near_those_of_the_whole_base(self, make, answer, prompt):
        whole, packed = make("llama", "head"), make("llama", "qlora")
        difference = (answer(whole, prompt) - answer(packed, prompt)).abs().max()
        assert 0 < difference < 2

    def test_counts_what_the_packed_weights_hold(self, make):
        assert make("llama", "qlora").trainable_parameters() == make("llama", "lora").trainable_parameters()

    @pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "gaussian"}, {"quant_type": "fp4"}])
    def test_gradients_reach_adapter_and_head(self, options, make, shake, prompt):
        classifier = shake(make("llama", "qlora", r=4, **options)).train()
        classifier(**prompt).square().sum().backward()
        grads = {name: value.grad for name, value in classifier.named_parameters() if value.requires_grad}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        assert all(name.find("lora_") > 0 or "score" in name for name in grads)

    def test_training_continues_after_predictions(self, make, shake, answer, prompt):
        classifier = shake(make("llama", "qlora", r=4))
        before = answer(classifier, prompt)
        for _ in range(2):
            classifier.train()
            classifier.zero_grad()
            classifier(**prompt).square().sum().backward()
            first = classifier.stock.model.layers[0].self_attn.q_proj.lora_A["default"].weight
            assert first.grad is not None and first.grad.abs().max() > 0
            assert torch.equal(answer(classifier, prompt), before)

    def test_storage_type(self, make):
        layer = make("llama", "qlora", quant_storage="float32").stock.model.layers[0].mlp.up_proj
        assert layer.base_layer.weight.dtype == torch.float32
        layer = make("llama", "qlora").stock.model.layers[0].mlp.up_proj
        assert layer.base_layer.weight.dtype == torch.uint8

    def test_loftq_comes_closer_to_the_whole_base(self, make):
        import bitsandbytes.functional as functional

        whole = make("llama", "head").stock.model.layers[0].mlp.up_proj.weight
        errors = {}
        for init in ("default", "loftq"):
            layer = make("llama", "qlora", r=8, alpha=16, init=init).stock.model.layers[0].mlp.up_proj
            packed = layer.base_layer.weight
            weight = functional.dequantize_4bit(packed.data, packed.quant_state) + layer.get_delta_weight("default")
            errors[init] = (weight - whole).norm().item()
        assert errors["loftq"] < 0.8 * errors["default"]

    def test_loftq_starts_dora_at_the_corrected_weights(self, make):
        import bitsandbytes.functional as functional

        layer = make("llama", "qlora", r=8, alpha=16, init="loftq", dora=True).stock.model.layers[0].mlp.up_proj
        packed = layer.base_layer.weight
        weight = functional.dequantize_4bit(packed.data, packed.quant_state) + layer.get_delta_weight("default")
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(magnitude, weight.norm(dim=1), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_need_float32(init, make):
    with pytest.raises(ConfigError, match=f"init {init} needs model.dtype float32, not 'bfloat16'"):
        make("llama", init=init, dtype="bfloat16")


def test_experts_that_stay_as_they_are_are_named(tmp_path, tiny_tokenizer, domain, caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    from llmrec_peft.checkpoints.loading import load_classifier

    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=1, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="llmrec_peft"):
        load_classifier(str(tmp_path), domain, "lora", r=2)
    assert "adapts no experts of this base" in caplog.text and "layers.N.mlp.experts.gate_up_proj" in caplog.text


def test_no_warning_without_experts(make, caplog):
    with caplog.at_level("WARNING", logger="llmrec_peft"):
        make("llama")
    assert "experts" not in caplog.text
