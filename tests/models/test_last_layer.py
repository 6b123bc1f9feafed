"""The last layer for the answers alone gives the answers of the whole layer."""

import numpy as np
import pytest
import torch

from llmrec_peft import load_classifier
from llmrec_peft.models.bottleneck import transformer_layers
from llmrec_peft.models.last_layer import TOKENWISE
from llmrec_peft.requests.batching import CandidateGroup
from llmrec_peft.scoring.adapter_layers import Bias
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter


def adapter_of(hidden: int, layers: dict) -> LoadedAdapter:
    adapter = LoadedAdapter.__new__(LoadedAdapter)
    head = torch.randn(2, hidden, generator=torch.Generator().manual_seed(1))
    vocabulary = type("Words", (), {"domain": type("Named", (), {"labels": ["a", "b"]})})
    for name, value in {"layers": layers, "head": head, "directory": "x", "vocabulary": vocabulary}.items():
        object.__setattr__(adapter, name, value)
    return adapter


def groups_of(adapter: LoadedAdapter, count: int) -> list[CandidateGroup]:
    rng = np.random.default_rng(0)
    sizes = ((3, 4, 5), (2, 6))[:count]
    return [
        CandidateGroup(
            adapter, tuple(rng.integers(5, 50, n) for n in prefix), [rng.integers(5, 50, n) for n in (3, 1, 6)]
        )
        for prefix in sizes
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("rows", [1, 2])
def test_markers_alone_equal_the_whole_layer(kind, rows, tiny_base, domain, monkeypatch):
    classifier = load_classifier(tiny_base(kind), domain, "head")
    engine = Engine(classifier, 0)
    layer = transformer_layers(classifier.stock)[-1]
    seen: dict[str, list[int]] = {}
    for name, module in layer.named_modules():
        if name in TOKENWISE:
            sizes = seen.setdefault(name, [])
            # Beside the engine's own hooks, and after them: what the module itself is given.
            module.register_forward_pre_hook(lambda _module, args, sizes=sizes: sizes.append(args[0].shape[1]))
    answers, adapter = [], adapter_of(classifier.config.hidden_size, {})
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(Engine, "_marker_places", lambda *_: None)
        groups = groups_of(adapter, rows)
        engine.predict(groups, 1000)
        answers.append(torch.from_numpy(np.concatenate([group.logits for group in groups])))
    torch.testing.assert_close(answers[0], answers[1], atol=1e-6, rtol=1e-5)
    assert answers[0].std() > 0.01
    assert set(seen) == ({"mlp"} if kind == "gpt2" else set(TOKENWISE))
    assert all(sizes == [3 * rows, 22] for sizes in seen.values())  # 3 + 4 + 5 tokens, then candidates of 3 + 1 + 6


def test_a_bundle_that_changes_the_last_layer_sees_all_of_it(tiny_base, domain):
    classifier = load_classifier(tiny_base("llama"), domain, "head")
    engine = Engine(classifier, 0)
    layer = transformer_layers(classifier.stock)[-1]
    path = next(path for path, module in classifier.stock.named_modules() if module is layer.mlp.down_proj)
    engine.install([path])
    shift = torch.full((classifier.config.hidden_size,), 0.5)
    plain = groups_of(adapter_of(classifier.config.hidden_size, {}), 1)
    changed = groups_of(adapter_of(classifier.config.hidden_size, {path: [Bias(shift)]}), 1)
    engine.predict(plain, 1000)
    engine.predict(changed, 1000)
    with torch.no_grad():
        layer.mlp.down_proj.bias = torch.nn.Parameter(shift)
    wanted = groups_of(adapter_of(classifier.config.hidden_size, {}), 1)
    engine.predict(wanted, 1000)
    np.testing.assert_allclose(changed[0].logits, wanted[0].logits, atol=1e-6, rtol=1e-5)
    assert np.abs(changed[0].logits - plain[0].logits).max() > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_part_inside_another_leaves_no_token_out_twice(tiny_base, domain):
    """PEFT wraps layers of a base that was a classifier before: both have the hooks."""
    from peft import LoraConfig, get_peft_model

    from llmrec_peft.models.classifier import BehaviorClassifier

    plain = load_classifier(tiny_base("llama"), domain, "head").eval()
    inputs = {"input_ids": torch.randint(5, 300, (2, 9)), "markers": torch.tensor([3, 8, 12, 17])}
    with torch.no_grad():
        wanted = plain(**inputs)
        wrapped = get_peft_model(plain.stock, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
        found = BehaviorClassifier(wrapped, "lora", plain.labels).eval()(**inputs)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
