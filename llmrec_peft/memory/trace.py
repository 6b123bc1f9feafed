"""Peak memory of a forward and backward pass, by running it on fake tensors, which have shapes but no memory.

The model itself runs, and each allocation is counted from when it is made until its last reference is gone, as an
allocator sees it. So what autograd saves, what checkpointing drops and what a pass needs for a moment follow from the
model's code, and no formula can drift from it. Not seen is what no operator returns: buffers inside one kernel, the
allocator's own rounding and fragments, and the device's context.

Shape letters: B rows of a micro-batch, L tokens of a row, T targets of a row.
"""

from __future__ import annotations

import logging

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrec_peft.errors import ModelError
from llmrec_peft.memory.fake_weights import materialise
from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.memory.storage_meter import StorageMeter
from llmrec_peft.memory.trace_patches import deepspeed_linear, no_value_reads
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.training.losses import BehaviorLoss


def trace_passes(classifier: BehaviorClassifier, config: MemoryConfig) -> int:
    """Peak bytes of a forward and backward pass beyond weights and gradients: what autograd saves, and temporaries.

    All gradients exist from the start, as in every micro-batch after the first. `classifier` is on the meta device, and
    on fake tensors afterwards.

    Raises:
        ModelError: a model whose code reads the values of tensors.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # the error below reports them
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)  # the masks of block attention are real constants
        with fake, StorageMeter() as meter, no_value_reads(config), deepspeed_linear(config):
            materialise(classifier)
            for parameter in classifier.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            static = meter.live
            _pass(classifier, config)
            return meter.peak - static
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ModelError(
            f"base {config.base} cannot be traced without weights: {' '.join(str(error).split())[:200]}; "
            "train a step of it with weights instead"
        ) from error


def _micro_batch(classifier: BehaviorClassifier, config: MemoryConfig) -> dict[str, torch.Tensor]:
    """Inputs of a micro-batch: int64 [B, L] each, but markers [B * T]."""
    shape = (config.rows, config.length)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if classifier.encoder:
        return {**batch, "attention_mask": torch.ones(shape, dtype=torch.int64)}
    batch["markers"] = torch.zeros(config.rows * config.targets, dtype=torch.int64)
    if config.candidates:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
        batch["segment"] = torch.zeros(shape, dtype=torch.int64)
    return batch


def _pass(classifier: BehaviorClassifier, config: MemoryConfig) -> None:
    batch = _micro_batch(classifier, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        # `BehaviorClassifier` runs an encoder's own forward after checks that read the markers' values.
        logits = classifier.stock(**batch).logits if classifier.encoder else classifier(**batch)
        labels = torch.zeros(len(logits), dtype=torch.int64)
        loss = BehaviorLoss()(logits, labels, labels) / len(labels)
    loss.backward()
