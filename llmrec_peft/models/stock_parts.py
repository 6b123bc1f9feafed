"""The parts of a stock `AutoModelForSequenceClassification`: its backbone and its head."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmrec_peft.errors import ModelError

HEAD_NAMES = ("score", "classifier")
"""What Transformers calls a sequence classifier's head."""


def is_encoder(config: Any) -> bool:
    """True for bidirectional models (BERT-like): those with a masked-language-model class, unless set as a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in MASKED and not getattr(config, "is_decoder", False)


def backbone_of(model: nn.Module, missing_ok: bool = False) -> nn.Module | None:
    """The transformer under a stock classifier's head."""
    backbone = getattr(model, model.base_model_prefix or "", None)
    if backbone is None and not missing_ok:
        raise ModelError(f"{type(model).__name__} has no backbone named {model.base_model_prefix!r}; use another base")
    return backbone


def head_name(model: nn.Module) -> str:
    """Attribute of a stock classifier that holds its head. Raises ModelError if there is none."""
    for name in HEAD_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise ModelError(f"{type(model).__name__} has no head named {' or '.join(HEAD_NAMES)}; use another base")


def head_of(model: nn.Module) -> nn.Module:
    """The head of a stock classifier."""
    return getattr(model, head_name(model))


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    """Modules whose path ends in `name`."""
    return [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
