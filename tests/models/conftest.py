"""What the model tests share: a domain's mapping, rows with candidates, and weights that training might have left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.models.classifier import BehaviorClassifier

DOMAIN: dict[str, Any] = {
    "name": "movies",
    "header": "Movies one viewer rated:\n",
    "event": "{title}",
    "marker": " ->",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "stream": {"context": 2, "targets": 3, "max_length": 128},
}
PROMPT = "Movies one viewer rated:\nToy Story (Animation, Children) -> yes\nHeat (Action, Crime) ->"


@pytest.fixture
def domain() -> dict[str, Any]:
    """A domain as a plain mapping, with two outcomes."""
    return {**DOMAIN, "outcomes": dict(DOMAIN["outcomes"]), "stream": dict(DOMAIN["stream"])}


@pytest.fixture
def shake() -> Callable[..., BehaviorClassifier]:
    """`shake(classifier, scale=0.3)`: add seeded noise to all that trains, as training would move it."""

    def apply(classifier: BehaviorClassifier, scale: float = 0.3, seed: int = 5) -> BehaviorClassifier:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in classifier.parameters():
                if value.requires_grad:
                    value.add_(scale * torch.randn(value.shape, generator=generator))
        return classifier

    return apply


@pytest.fixture
def make(tiny_base, domain) -> Callable[..., BehaviorClassifier]:
    """`make(kind="llama", method="lora", **options)`: a classifier on a tiny base, always from the same seed."""

    def factory(kind: str = "llama", method: str = "lora", **options: Any) -> BehaviorClassifier:
        torch.manual_seed(0)
        return load_classifier(str(tiny_base(kind)), domain, method, **options)

    return factory


@pytest.fixture
def prompt(tiny_tokenizer) -> dict[str, torch.Tensor]:
    """Batch of one row with one marker, at its last token."""
    ids = torch.tensor([tiny_tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    return {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1])[None],
        "markers": torch.tensor([ids.shape[1] - 1]),
    }


@pytest.fixture
def answer() -> Callable[..., torch.Tensor]:
    """`answer(classifier, batch)`: logits in eval mode without gradients; encoders get the mask that they need."""

    def run(classifier: BehaviorClassifier, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return classifier.eval()(**batch)

    return run


@pytest.fixture
def tiny_roberta(tmp_path, tiny_tokenizer):
    """A directory with a tiny random RoBERTa of 66 positions, whose head has two layers."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=66, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    tiny_tokenizer.save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"
