"""The parts of a stock `AutoModelForSequenceClassification`: its backbone, its head and its layers.

"Stock classifier" means Transformers' own class, without code of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from llmrec_peft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEAD_NAMES = ("score", "classifier")
"""Attributes by which Transformers' sequence classifiers name their head."""


def is_encoder(config: PreTrainedConfig) -> bool:
    """True for bidirectional models (BERT-like): those with a masked-language-model class, unless set as a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in MASKED and not getattr(config, "is_decoder", False)


def find_backbone(model: PreTrainedModel) -> nn.Module | None:
    """The transformer under a stock classifier's head; None if the model has none under its prefix."""
    return getattr(model, model.base_model_prefix or "", None)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The transformer under a stock classifier's head. Raises ModelError if it is missing."""
    backbone = find_backbone(model)
    if backbone is None:
        raise ModelError(f"{type(model).__name__} has no backbone named {model.base_model_prefix!r}; use another base")
    return backbone


def head_name(model: nn.Module) -> str:
    """Attribute of a stock classifier that holds its head. Raises ModelError if it is missing."""
    for name in HEAD_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise ModelError(f"{type(model).__name__} has no head named {' or '.join(HEAD_NAMES)}; use another base")


def head_of(model: nn.Module) -> nn.Module:
    """The head of a stock classifier."""
    return cast(nn.Module, getattr(model, head_name(model)))


def fresh_modules_of(model: nn.Module) -> list[str]:
    """Names of the modules that the base's checkpoint lacks, the head among them (`load_model`)."""
    return cast("list[str]", model.fresh_modules)


def unread_tensors_of(model: nn.Module) -> list[str]:
    """Names of the tensors in the checkpoint that the model does not have (`load_model`)."""
    return cast("list[str]", model.unread)


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    """Modules whose path ends in `name`."""
    return [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
