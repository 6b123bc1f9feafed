"""Builds a classifier on a base: the stock model, the start of its head, and the modules of the tuning method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llmrec_peft.errors import ConfigError
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.base_model import load_model
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.head import start_head
from llmrec_peft.models.quantization import quantization_of
from llmrec_peft.models.stock_parts import fresh_modules_of, modules_named
from llmrec_peft.models.tuning_options import (
    AdapterOptions,
    FullOptions,
    LoraOptions,
    MethodOptions,
    ModelOptions,
    changes_base,
    method_name_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_classifier(
    model_options: ModelOptions,
    tuning: MethodOptions,
    outcomes: Mapping[str, str],
    *,
    trained: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    check: Callable[[PreTrainedModel], None] | None = None,
) -> BehaviorClassifier:
    """Build a classifier on a base.

    Args:
        model_options, tuning: options of the base and of the tuning method.
        outcomes: label -> word, in class order.
        trained: skip work whose result the tensors of a bundle will replace: the start of the head, and the
            initialisations of LoRA that read the base's weights.
        tokenizer: the base's tokenizer, if it is loaded already.
        check: called with the stock model before the modules of the method are added.

    A base that is a classifier of these labels already (a merged model) keeps its head under `head_init: label_words`.

    Raises:
        ConfigError: the method does not work in the dtype of the base.
    """
    if not trained:
        check_precision(model_options, tuning)
    base = resolve_base(model_options.base, model_options.gguf_file)
    if tokenizer is None:
        tokenizer = load_tokenizer(base, trust_remote_code=model_options.trust_remote_code)
    labels = list(outcomes)
    model = load_model(
        base,
        len(labels),
        id2label=dict(enumerate(labels)),
        dtype=model_options.dtype,
        attn_implementation=model_options.attn,
        quantization=quantization_of(tuning, model_options),
        trust_remote_code=model_options.trust_remote_code,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not trained:
        start_head(model, base, tokenizer, outcomes, model_options)
    if model_options.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if check is not None:
        check(model)
    classifier = with_method(model, tuning, labels, base, trained)
    classifier.tokenizer = tokenizer
    classifier.base = model_options.base
    classifier.model_options = model_options
    classifier.method_options = _resolved(tuning, classifier)
    return classifier.eval()


def _resolved(tuning: MethodOptions, classifier: BehaviorClassifier) -> MethodOptions:
    """The options as a bundle stores them: a pattern of modules becomes the list of names that it matched."""
    if not isinstance(tuning, LoraOptions) or not isinstance(tuning.target_modules, str):
        return tuning
    if tuning.target_modules == "all-linear":
        return tuning
    config = classifier.model.peft_config["default"]
    return dataclasses.replace(tuning, target_modules=sorted(config.target_modules))


def check_precision(model_options: ModelOptions, tuning: MethodOptions) -> None:
    """Raise ConfigError where updates would be lost to rounding: 8 bits of mantissa or fewer."""
    if model_options.dtype == "float32":
        return
    if isinstance(tuning, FullOptions):
        raise ConfigError(
            f"model.dtype must be float32 with method full, not {model_options.dtype!r}, which rounds most updates "
            "away; keep float32 and launch with --mixed_precision bf16 (under ZeRO: accelerate_configs/zero3_bf16.yaml)"
        )
    if isinstance(tuning, LoraOptions) and changes_base(tuning):
        raise ConfigError(
            f"init {tuning.init} needs model.dtype float32, not {model_options.dtype!r}, as it takes a part out of the "
            "base weights that must go back exactly; use float32, or init default"
        )


def with_method(
    model: PreTrainedModel, tuning: MethodOptions, labels: list[str], base: str, trained: bool
) -> BehaviorClassifier:
    """Freeze the base, add the modules of the tuning method, and wrap the stock model in a classifier."""
    method = method_name_of(tuning)
    if isinstance(tuning, LoraOptions):
        from llmrec_peft.models.lora import add_lora

        adapted, initial = add_lora(model, tuning, base, trained=trained)
        classifier = BehaviorClassifier(adapted, method, labels)
        classifier.initial_factors = initial
        return classifier
    model.requires_grad_(method == "full")
    if isinstance(tuning, AdapterOptions):
        from llmrec_peft.models.bottleneck import add_adapters

        add_adapters(model, tuning)
    for name in fresh_modules_of(model):
        for module in modules_named(model, name):
            module.requires_grad_(True)
    return BehaviorClassifier(model, method, labels)
