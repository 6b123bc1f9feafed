"""How N processes partition weights, gradients and optimiser states: DDP, and DeepSpeed's ZeRO.

ZeRO (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, arXiv
1910.02054) partitions optimiser states (stage 1), gradients too (stage 2), and weights too (stage 3); activations stay
whole. Its figure 1, written for float32 (the paper has mixed precision), gives for each process, with W elements that
train and K bytes of optimiser states an element (8 for Adam):

    DDP      4 W + 4 W + K W           weights, gradients, states
    stage 1  4 W + 4 W + K W / N
    stage 2  4 W + 4 W / N + K W / N
    stage 3  (4 W + 4 W + K W) / N

DeepSpeed 0.19 allocates more than that, and what it allocates is what is counted here:

- Stages 1 and 2 copy the trained weights into one flat buffer, padded to a multiple of 2 N elements. Each process keeps
  a float32 copy of its N-th part (the master weights), and the states for it.
- Stage 1 keeps all gradients until the last micro-batch. Stage 2 keeps its own part of the gradients, and during a
  backward pass a second part that it adds to the first.
- Before a step, stages 1 and 2 flatten the part's gradients; stage 3 flattens those of at most 1e9 elements at a time.
- Stage 3 cuts each tensor separately, padded to a multiple of N elements, and keeps a second copy of the trained parts
  as master weights. (It means to avoid the copy in float32, but compares a device with its name, which are never
  equal.) Tensors of at most 10 x hidden size elements stay whole as well. A gathered weight stays until its next use is
  more than `stage3_max_reuse_distance` elements away: with 1e9, the last 5e8 elements of the model stay whole between
  the forward and the backward pass.
- Gradients are exchanged in buckets of (hidden size)^2 elements, by `"auto"` in the configuration.

DDP keeps a copy of all gradients in its buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmrec_peft.memory.memory_options import MemoryConfig

FLOAT = 4  # bytes of a float32
REUSE = 1_000_000_000  # elements: stage3_max_reuse_distance
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at a time


@dataclass(frozen=True)
class ModelTensors:
    """Sizes of a classifier's tensors.

    Attributes:
        frozen_bytes: bytes of all frozen tensors, with quantisation constants and buffers.
        frozen, trained: (elements, bytes an element) of each parameter.
        hidden: hidden size, which sets DeepSpeed's bucket sizes.
    """

    frozen_bytes: int
    frozen: Sequence[tuple[int, float]]
    trained: Sequence[tuple[int, float]]
    hidden: int

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights."""
        return _bytes(self.trained)


@dataclass(frozen=True)
class Partition:
    """What one process holds, in bytes.

    Attributes:
        frozen, trained: its weights.
        master: its float32 copy of the trained weights.
        gradients: kept between micro-batches.
        gathered: weights of stage 3 that are whole for a while.
        buffers: buckets of the gradient exchange.
        updates: elements of each tensor that its optimiser updates.
        flattened: gradients in the flat buffer of the step, beside `gradients`.
        arriving: gradients of the running backward pass, which grow while activations are freed.
    """

    frozen: int
    trained: int
    master: int
    gradients: int
    gathered: int
    buffers: int
    updates: tuple[int, ...]
    flattened: int
    arriving: int


def _bytes(tensors: Sequence[tuple[int, float]]) -> int:
    return round(sum(count * size for count, size in tensors))


def partition_size(elements: int, processes: int, alignment: int = 1) -> int:
    """Elements of one process's part: a ceil(elements / (a N)), for N processes and the alignment a.

    The tensor is padded to a multiple of a N elements.
    """
    return alignment * math.ceil(elements / (alignment * processes))


def partition(tensors: ModelTensors, config: MemoryConfig) -> Partition:
    """What one of `config.gpus` processes holds at ZeRO stage `config.zero`; stage 0 is one process, or DDP."""
    if config.zero == 3:
        return _stage3(tensors, config)
    if config.zero:
        return _stage12(tensors, config)
    trained = tensors.trained_bytes
    return Partition(
        frozen=tensors.frozen_bytes,
        trained=trained,
        master=0,
        gradients=trained,
        gathered=0,
        buffers=trained if config.gpus > 1 else 0,
        updates=tuple(count for count, _ in tensors.trained),
        flattened=0,
        arriving=0,
    )


def _stage12(tensors: ModelTensors, config: MemoryConfig) -> Partition:
    total = sum(count for count, _ in tensors.trained)
    part = partition_size(total, config.gpus, alignment=2)
    return Partition(
        frozen=tensors.frozen_bytes,
        trained=part * config.gpus * FLOAT,  # the flat buffer, padding included
        master=part * FLOAT,
        gradients=(total if config.zero == 1 else part) * FLOAT,
        gathered=0,
        buffers=tensors.hidden**2 * FLOAT,
        updates=(part,),
        flattened=part * FLOAT,
        arriving=part * FLOAT if config.zero == 2 else 0,
    )


def _stage3(tensors: ModelTensors, config: MemoryConfig) -> Partition:
    persistent = 10 * tensors.hidden
    frozen, trained = (
        [(partition_size(count, config.gpus), size) for count, size in kind]
        for kind in (tensors.frozen, tensors.trained)
    )
    weights = [*tensors.frozen, *tensors.trained]
    whole = [(count, size) for count, size in weights if count <= persistent]
    gathered = [(count, size) for count, size in weights if count > persistent]
    part = sum(count for count, _ in trained)
    groups = tuple(min(SUB_GROUP, part - start) for start in range(0, part, SUB_GROUP))
    return Partition(
        frozen=_bytes(frozen),
        trained=_bytes(trained),
        master=part * FLOAT,
        gradients=part * FLOAT,
        gathered=_bytes(whole) + _gathered_bytes(gathered),
        buffers=tensors.hidden**2 * FLOAT,
        updates=groups,
        flattened=max(groups) * FLOAT,
        arriving=0,
    )


def _gathered_bytes(weights: Sequence[tuple[int, float]]) -> int:
    """Bytes of the gathered weights that stay for the backward pass, and of the largest one, which is in use.

    A weight at distance x from the end of the model is used again after 2 x elements, so the last REUSE / 2 stay.
    """
    total, all_bytes = sum(count for count, _ in weights), _bytes(weights)
    if total <= REUSE // 2:
        return all_bytes
    return round(all_bytes * (REUSE // 2) / total + max(count * size for count, size in weights))
