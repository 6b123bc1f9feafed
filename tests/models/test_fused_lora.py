"""LoRA in one step gives PEFT's answers and gradients, and steps aside for what it does not know."""

import copy

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

from llmrec_peft import load_classifier
from llmrec_peft.models import fused_lora
from llmrec_peft.models.fused_lora import FusedLinear


def layers_of(classifier) -> list[FusedLinear]:
    return [module for module in classifier.modules() if isinstance(module, FusedLinear)]


@pytest.fixture
def classifier(tiny_base, domain):
    made = load_classifier(tiny_base("qwen2"), domain, "lora", r=4, alpha=8)  # q, k and v have a bias
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return made.train()


def gradients(classifier, forward=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    classifier.zero_grad()
    logits = classifier(input_ids=ids, markers=torch.tensor([3, 8, 12, 17]))
    logits.square().sum().backward()
    return logits.detach(), {
        name: value.grad.clone() for name, value in classifier.named_parameters() if value.requires_grad
    }


def test_predictions_and_gradients_are_those_of_peft(classifier, monkeypatch):
    calls, original = [], fused_lora._Fused.apply
    monkeypatch.setattr(fused_lora._Fused, "apply", lambda *args: calls.append(1) or original(*args))
    logits, found = gradients(classifier)
    layers = layers_of(classifier)
    assert len(layers) == 14 and len(calls) == 14
    for layer in layers:
        layer.__class__ = Linear
    wanted_logits, wanted = gradients(classifier)
    assert len(calls) == 14
    torch.testing.assert_close(logits, wanted_logits, atol=1e-6, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
        assert value.abs().max() > 0, name


def no_grad(layer, x):
    with torch.no_grad():
        return layer(x)


def disabled(layer, x):
    layer.enable_adapters(False)
    return layer(x)


def merged(layer, x):
    layer.merge()
    return layer(x)


def hooked(layer, x):
    layer.lora_A["default"].register_forward_hook(lambda _module, _inputs, output: output * 2)
    return layer(x)


def dropped(layer, x):
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    return layer(x)


def trained_base(layer, x):
    layer.base_layer.weight.requires_grad_(True)
    return layer(x)


def autocast(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def low_precision(layer, x):
    return layer.to(torch.bfloat16)(x.bfloat16())


@pytest.mark.parametrize("case", [no_grad, disabled, merged, hooked, dropped, trained_base, autocast, low_precision])
def test_the_rest_is_peft_s_own(case, classifier, monkeypatch):
    layer = layers_of(classifier)[0]
    x = torch.randn(2, 3, layer.in_features)
    assert layer._alone(x) == "default"
    monkeypatch.setattr(fused_lora._Fused, "apply", None)
    stock = copy.deepcopy(layer)
    stock.__class__ = Linear
    results = []
    for one in (layer, stock):
        torch.manual_seed(0)
        results.append(case(one, x))
    torch.testing.assert_close(*results)
