"""Peak memory of a training step, by running it on fake tensors, which have shapes but no memory.

The model itself runs forward and backward, and the optimiser its step; each allocation is added up when it is made and
taken off when its last reference goes, as an allocator would see it. So what autograd keeps, what checkpointing drops
and what a step needs for a moment follow from the model's code, and no formula can drift from it. What no operator
returns is not seen: buffers inside one kernel, the allocator's own rounding and fragments, and the device's context.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmrec_peft.errors import ModelError
from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.memory.meta_model import bytes_of
from llmrec_peft.models import attention
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.training.losses import BehaviorLoss


class StorageMeter(TorchDispatchMode):
    """Adds up the storages that are alive, in bytes: `live` now, `peak` at most since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(value for value in tree_leaves(result) if isinstance(value, torch.Tensor))
        return result

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors, those too that were there before."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = id(storage), storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, functools.partial(self._part, key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _part(self, key: int, size: int, _: weakref.ref) -> None:
        del self._known[key]
        self.live -= size


def trace_passes(classifier: BehaviorClassifier, config: MemoryConfig) -> int:
    """Peak bytes of a forward and backward pass beyond weights and gradients: what autograd keeps, and temporaries.

    All gradients are there from the start, as in every micro-batch after the first. `classifier` lies on the meta
    device, and on fake tensors afterwards. Raises ModelError for a model whose code asks for the values of tensors.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # errors are told below, in a line
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)  # masks of attention in blocks are constants
        with fake, StorageMeter() as meter, _places_known(config), _linear_of(config):
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


def trace_optimizer(sizes: Sequence[int], config: MemoryConfig, device: str) -> tuple[int, int]:
    """(bytes of the optimiser's states, peak bytes beyond them of clipping and a step) for tensors of these sizes.

    Weights and gradients are float32; each size is a tensor's number of elements. `device`: gpu or cpu.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), StorageMeter() as meter:
        tensors = [nn.Parameter(torch.empty(size)) for size in sizes]
        for tensor in tensors:
            tensor.grad = torch.empty_like(tensor)
        optimizer = _optimizer(tensors, config.optimizer, device)
        _step(tensors, optimizer)
        found = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        static = meter.peak = meter.live
        _step(tensors, optimizer)
        return bytes_of(found), meter.peak - static


def _optimizer(tensors: list[nn.Parameter], name: str, device: str) -> torch.optim.Optimizer:
    """The optimiser that Trainer makes by this name; on a GPU it updates all tensors at once."""
    if name == "sgd":
        return torch.optim.SGD(tensors, lr=1e-3, foreach=device == "gpu")
    if name == "adamw":
        return torch.optim.AdamW(tensors, foreach=device == "gpu")
    import bitsandbytes

    with unset_fake_temporarily():  # it reads the values of its tables
        return bitsandbytes.optim.AdamW8bit(tensors)


def _step(tensors: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(tensors, 1.0)
    optimizer.step()


def _micro_batch(classifier: BehaviorClassifier, config: MemoryConfig) -> dict[str, torch.Tensor]:
    shape = (config.rows, config.length)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    answers = config.rows * config.targets
    if classifier.encoder:
        return {**batch, "attention_mask": torch.ones(shape, dtype=torch.int64)}
    batch["markers"] = torch.zeros(answers, dtype=torch.int64)
    if config.candidates:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
        batch["segment"] = torch.zeros(shape, dtype=torch.int64)
    return batch


def _pass(classifier: BehaviorClassifier, config: MemoryConfig) -> None:
    batch = _micro_batch(classifier, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        # An encoder's own forward is what `BehaviorClassifier` runs, after checks that read the markers' values.
        logits = classifier.stock(**batch).logits if classifier.encoder else classifier(**batch)
        labels = torch.zeros(len(logits), dtype=torch.int64)
        loss = BehaviorLoss()(logits, labels, labels) / len(labels)
    loss.backward()


def materialise(model: nn.Module) -> None:
    """Give every parameter and buffer on the meta device a fake tensor on the CPU, tied ones the same one."""
    made: dict[int, torch.Tensor] = {}

    def fake(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            made[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return made[id(value)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else fake(value)
        for name, value in module._parameters.items():
            if value is not None and id(value) not in parameters:
                parameters[id(value)] = _like(value, fake)
            module._parameters[name] = None if value is None else parameters[id(value)]


def _like(parameter: nn.Parameter, fake: Any) -> nn.Parameter:
    made = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # a fake tensor cannot be of bitsandbytes' class, whose layers ask for this attribute alone
        made.quant_state = _like_state(state, fake)
    return made


def _like_state(state: Any, fake: Any) -> Any:
    made = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name)
        setattr(made, name, None if value is None else fake(value))
    made.state2 = None if state.state2 is None else _like_state(state.state2, fake)
    return made


def segment_of(length: int, candidates: int) -> np.ndarray:
    """Segments, int64 [length], of a row: half of it prefix, then `candidates` candidates of like sizes."""
    places = np.arange(length)
    return np.where(places < length // 2, 0, 1 + (places - length // 2) * candidates // (length - length // 2))


@contextlib.contextmanager
def _places_known(config: MemoryConfig) -> Iterator[None]:
    """Tell Transformers that no rows are packed, and attention in blocks where candidates lie: both read values.

    `BehaviorClassifier` gives positions 0, 1, 2, ... to rows without candidates, and a mask to others.
    """
    from transformers import masking_utils

    def lay_out(mask: torch.Tensor, segment: torch.Tensor, *_rest: Any) -> None:
        if segment.shape[1] >= attention.SHORT:
            row = segment_of(segment.shape[1], config.targets)
            mask.layouts = [attention.Layout(row) for _ in range(len(segment))]

    packed, layouts = masking_utils.find_packed_sequence_indices, attention.lay_out
    masking_utils.find_packed_sequence_indices = lambda *_args, **_kwargs: None
    attention.lay_out = lay_out
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, attention.lay_out = packed, layouts


class _KeepsItsInput(torch.autograd.Function):
    """A linear layer that keeps its input even where its weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.matmul(x, weight.t()) if bias is None else torch.matmul(x, weight.t()).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            grad.matmul(weight) if of_x else None,
            flat.t().matmul(x.reshape(-1, x.shape[-1])) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )


@contextlib.contextmanager
def _linear_of(config: MemoryConfig) -> Iterator[None]:
    """Under ZeRO-3 the linear layer of DeepSpeed (memory_efficient_linear), which keeps every input."""
    original = nn.functional.linear
    if config.zero == 3:
        nn.functional.linear = lambda x, weight, bias=None: _KeepsItsInput.apply(x, weight, bias)
    try:
        yield
    finally:
        nn.functional.linear = original
