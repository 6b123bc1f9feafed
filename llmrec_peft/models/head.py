"""Initial weights of the head: label words, their first tokens, and their rows of the language-model head.

Shape letters: C labels, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.base_weights import word_rows
from llmrec_peft.models.stock_parts import head_of, is_encoder
from llmrec_peft.models.tuning_options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrec_peft.data.domain import Domain


def outcomes_of(domain: Domain | Mapping[str, Any]) -> dict[str, str]:
    """Label -> outcome word, in class order, of a `Domain` or its mapping."""
    outcomes = domain["outcomes"] if isinstance(domain, Mapping) else domain.outcomes
    if len(outcomes) < 2:
        raise ModelError(f"a classifier needs two outcomes or more, the domain has {list(outcomes)}; name them all")
    return {str(label): word for label, word in outcomes.items()}


def start_head(
    model: PreTrainedModel,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    outcomes: Mapping[str, str],
    options: ModelOptions,
) -> None:
    """Set the head's first weights in place.

    With E [C, H] the rows of the language-model head for the first tokens of the C label words (the verbalizer of
    OpenPrompt), the weights of `label_words` are head_scale * (E - mean of E over the labels), [C, H]. An encoder's
    head starts at random, since an encoder predicts no next word. A base that is a classifier of the same labels in the
    same order, such as a merged model, keeps its trained head. `zero` and `random` initialise any head again; in a head
    of several layers, zero is for the last layer, since the others could not learn.
    """
    layers = [module for module in head_of(model).modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        if options.head_init == "zero":
            for value in layers[-1].parameters():
                value.zero_()
        elif options.head_init == "random" and model.trained_head:
            for layer in layers:
                layer.weight.normal_(std=getattr(model.config.get_text_config(), "initializer_range", 0.02))
                if layer.bias is not None:
                    layer.bias.zero_()
        elif options.head_init == "label_words" and not is_encoder(model.config) and not model.trained_head:
            ids = first_tokens(tokenizer, outcomes)
            rows = word_rows(base, model, ids)  # [C, H]
            layers[-1].weight.copy_(options.head_scale * (rows - rows.mean(0)))


def first_tokens(tokenizer: PreTrainedTokenizerBase, outcomes: Mapping[str, str]) -> list[int]:
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
