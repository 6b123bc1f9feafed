"""What the tests of merging share: bundles as training might have left them, and their answers by stock classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmrec_peft.checkpoints.bundle import Bundle, TrainingRecord, save_bundle
from llmrec_peft.checkpoints.loading import load_classifier, load_trained
from llmrec_peft.checkpoints.manifest_schema import MANIFEST

DOMAIN: dict[str, Any] = {
    "name": "movies",
    "header": "Movies one viewer rated:\n",
    "event": "{title} ({year:.0f})",
    "marker": " ->",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "stream": {"context": 2, "targets": 3, "max_length": 128},
}
PROMPTS = (
    "Movies one viewer rated:\nToy Story (Animation, Children) -> yes\nHeat (Action, Crime) ->",
    "Movies one viewer rated:\nHeat (Action, Crime) ->",
    "The Usual Suspects (Thriller) -> no\nHeat (Action, Crime) -> yes\nToy Story (Animation) ->",
)


def write_bundle(
    directory: Path, base: Path | str, method: str = "lora", *, domain: dict | None = None, seed: int = 5,
    scale: float = 0.1, calibration: dict | None = None, **options: Any,
) -> Path:  # fmt: skip
    """A bundle of a classifier whose trained weights were moved by seeded noise."""
    domain = domain or DOMAIN
    torch.manual_seed(0)
    classifier = load_classifier(str(base), domain, method, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in classifier.parameters():
            if value.requires_grad:
                value.add_(scale * torch.randn(value.shape, generator=generator))
    return save_bundle(
        directory, classifier, classifier.tokenizer, domain,
        TrainingRecord(calibration, {"split": {"by": "time", "boundaries": None}}, {"test": {"auc": 0.7}}),
    )  # fmt: skip


def answers(loaded: Bundle | Path) -> torch.Tensor:
    """Logits of `PROMPTS`, one row each, by the package."""
    loaded = loaded if isinstance(loaded, Bundle) else load_trained(loaded)
    classifier, tokenizer = loaded.classifier, loaded.tokenizer
    rows = []
    for prompt in PROMPTS:
        batch = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        length = batch["input_ids"].shape[1]
        mask = batch["attention_mask"] if classifier.encoder else None
        with torch.no_grad():
            rows.append(classifier(batch["input_ids"], markers=torch.tensor([length - 1]), attention_mask=mask))
    return torch.cat(rows)


def stock_answers(directory: Path, **options: Any) -> torch.Tensor:
    """Logits of `PROMPTS` by Transformers alone, in one batch padded on the right."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, **options)
    batch = tokenizer(list(PROMPTS), add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def edit_manifest(directory: Path, change: Callable[[dict], Any]) -> None:
    """Change behavior.json in place."""
    edit(directory / MANIFEST, change)
