"""The head's start: outcome words, their tokens, and the rows of the language-model head that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.base import head_of, is_encoder, word_rows
from llmrec_peft.models.options import ModelOptions


def outcomes_of(domain: Any) -> dict[str, str]:
    """Label -> outcome word, in class order, of a `Domain` or its mapping."""
    outcomes = domain["outcomes"] if isinstance(domain, Mapping) else domain.outcomes
    if len(outcomes) < 2:
        raise ModelError(f"a classifier needs two outcomes or more, the domain has {list(outcomes)}; name them all")
    return {str(label): word for label, word in outcomes.items()}


def start_head(model: nn.Module, base: str, tokenizer: Any, outcomes: Mapping[str, str], options: ModelOptions) -> None:
    """Set the head's first weights in place; encoders keep their random start for `words`, as they predict no word."""
    head = head_of(model)
    if options.head_init == "zero" and isinstance(head, nn.Linear):
        with torch.no_grad():
            head.weight.zero_()
            if head.bias is not None:
                head.bias.zero_()
    elif options.head_init == "words" and not is_encoder(model.config):
        ids = first_tokens(tokenizer, outcomes)
        rows = word_rows(base, model, ids)  # [C, H]
        with torch.no_grad():
            head.weight.copy_(options.head_scale * (rows - rows.mean(0)))


def first_tokens(tokenizer: Any, outcomes: Mapping[str, str]) -> list[int]:
    """First token id of each outcome word. Raises ModelError if a word has none or two words share theirs."""
    seen: dict[int, str] = {}
    for label, word in outcomes.items():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(f"outcome {label!r} has the word {word!r}, which has no token; give it a word")
        if ids[0] in seen:
            other = seen[ids[0]]
            raise ModelError(
                f"outcomes {other!r} and {label!r} have the words {outcomes[other]!r} and {word!r}, which start with "
                "the same token; choose other words, or set model.head_init to zero"
            )
        seen[ids[0]] = label
    return list(seen)
