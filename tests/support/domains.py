"""What the inference tests share: bundles on tiny bases, as a training run would leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec_peft import Domain, load_classifier
from llmrec_peft.checkpoints.bundle import TrainingRecord, save_bundle

DOMAINS: dict[str, dict[str, Any]] = {
    "movies": {
        "name": "movies",
        "header": "Movies one viewer rated:\n",
        "event": "{title} ({genres})",
        "outcomes": {"dislike": " no\n", "like": " yes\n"},
        "stream": {"context": 3, "targets": 4, "max_length": 400},
    },
    "shop": {
        "name": "shop",
        "header": "Products shown to a {age} year old:\n",
        "event": "{title} at {price:.2f}",
        "marker": " =>",
        "outcomes": {"skip": " skip\n", "click": " click\n", "buy": " buy\n"},
        "stream": {"context": 2, "targets": 3, "max_length": 300, "history_labels": ["click", "buy"]},
    },
}


@pytest.fixture
def domains() -> dict[str, Domain]:
    """Two domains: movies of two labels, and shop of three with a header of columns and labels that leave no trace."""
    return {name: Domain.from_dict(values) for name, values in DOMAINS.items()}


@pytest.fixture
def items(small_log):
    """Item table of `small_log`, for the movies domain."""
    return small_log().items


@pytest.fixture
def bundle_of(tiny_base, domains, tmp_path) -> Callable[..., Path]:
    """`bundle_of(method="lora", domain="movies", kind="llama", seed=0, calibration=None, **options)`: a directory.

    All that trains is moved from where it started, as training would move it.
    """
    made: list[Path] = []

    def factory(
        method: str = "lora",
        domain: str = "movies",
        kind: str = "llama",
        seed: int = 0,
        calibration: dict[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        torch.manual_seed(seed)
        classifier = load_classifier(str(tiny_base(kind)), domains[domain], method, **options)
        with torch.no_grad():
            for value in classifier.parameters():
                if value.requires_grad:
                    value.add_(0.2 * torch.randn(value.shape))
        directory = tmp_path / f"bundle-{len(made)}"
        save_bundle(directory, classifier, classifier.tokenizer, domains[domain].to_dict(), TrainingRecord(calibration))
        made.append(directory)
        return directory

    return factory
