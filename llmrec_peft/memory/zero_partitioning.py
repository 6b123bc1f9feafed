"""How weights, gradients and optimiser states are shared out over N processes (DDP and DeepSpeed's ZeRO).

ZeRO (Rajbhandari et al. 2020) shares out optimiser states (stage 1), gradients too (2), weights too (3), and leaves
activations whole. What is counted here is what DeepSpeed 0.19 allocates for float32 weights that train:

- Stages 1 and 2 copy the trained weights into one flat buffer, padded to 2 N elements, of which each process keeps a
  float32 copy of its N-th part (the master weights) and the states for it.
- Stage 1 keeps all gradients until the last micro-batch. Stage 2 keeps its part of the gradients, and while a backward
  pass runs, a second part that it is added to.
- Before a step, stages 1 and 2 flatten the part's gradients, stage 3 those of at most 1e9 elements at once.
- Stage 3 cuts each tensor by itself, padded to N elements, and keeps a second copy of the parts that train as master
  weights (it means to spare that in float32, but compares a device with its name, which are never equal). Tensors of at
  most 10 x hidden size elements stay whole too. Gathered weights stay until their next use is more than
  stage3_max_reuse_distance elements away: with 1e9, the last 5e8 elements of the model are whole between the forward
  and the backward pass.
- Gradients are exchanged in buckets of hidden size squared elements, by `"auto"` in the configuration.

DDP keeps a copy of all gradients in its buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmrec_peft.memory.memory_options import MemoryConfig

FLOAT = 4
REUSE = 1_000_000_000  # elements: stage3_max_reuse_distance
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at once


@dataclass(frozen=True)
class Tensors:
    """What a classifier holds: bytes of frozen tensors, and (elements, bytes an element) of each weight."""

    frozen_bytes: int
    frozen: Sequence[tuple[int, float]]
    trained: Sequence[tuple[int, float]]
    hidden: int

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights."""
        return _bytes(self.trained)


@dataclass(frozen=True)
class Shares:
    """Bytes of one process. `updates` are the sizes of the tensors that its optimiser holds, in elements."""

    frozen: int
    trained: int
    master: int
    gradients: int
    gathered: int
    buffers: int
    updates: tuple[int, ...]
    flattened: int
    """Gradients at the step beside those in `gradients`."""
    arriving: int
    """Gradients that fill up while activations are dropped."""


def _bytes(tensors: Sequence[tuple[int, float]]) -> int:
    return round(sum(count * size for count, size in tensors))


def part_of(elements: int, processes: int, alignment: int = 1) -> int:
    """Elements of one process's part, when a tensor is padded to a multiple of `alignment * processes` elements."""
    return alignment * math.ceil(elements / (alignment * processes))


def share_out(tensors: Tensors, config: MemoryConfig) -> Shares:
    """What one of `config.gpus` processes holds."""
    if config.zero == 3:
        return _stage3(tensors, config)
    if config.zero:
        return _stage12(tensors, config)
    trained = tensors.trained_bytes
    updates = tuple(count for count, _ in tensors.trained)
    buckets = trained if config.gpus > 1 else 0
    return Shares(tensors.frozen_bytes, trained, 0, trained, 0, buckets, updates, 0, 0)


def _stage12(tensors: Tensors, config: MemoryConfig) -> Shares:
    total = sum(count for count, _ in tensors.trained)
    part = part_of(total, config.gpus, alignment=2)
    return Shares(
        frozen=tensors.frozen_bytes,
        trained=part * config.gpus * FLOAT,
        master=part * FLOAT,
        gradients=(total if config.zero == 1 else part) * FLOAT,
        gathered=0,
        buffers=tensors.hidden**2 * FLOAT,
        updates=(part,),
        flattened=part * FLOAT,
        arriving=part * FLOAT if config.zero == 2 else 0,
    )


def _stage3(tensors: Tensors, config: MemoryConfig) -> Shares:
    persistent = 10 * tensors.hidden
    frozen, trained = (
        [(part_of(count, config.gpus), size) for count, size in kind] for kind in (tensors.frozen, tensors.trained)
    )
    weights = [*tensors.frozen, *tensors.trained]
    whole = [(count, size) for count, size in weights if count <= persistent]
    gathered = [(count, size) for count, size in weights if count > persistent]
    part = sum(count for count, _ in trained)
    groups = tuple(min(SUB_GROUP, part - start) for start in range(0, part, SUB_GROUP))
    return Shares(
        frozen=_bytes(frozen),
        trained=_bytes(trained),
        master=part * FLOAT,
        gradients=part * FLOAT,
        gathered=_bytes(whole) + _kept(gathered),
        buffers=tensors.hidden**2 * FLOAT,
        updates=groups,
        flattened=max(groups) * FLOAT,
        arriving=0,
    )


def _kept(weights: Sequence[tuple[int, float]]) -> int:
    """Bytes of the gathered weights that wait for the backward pass, and of the largest, which is in use."""
    total, all_bytes = sum(count for count, _ in weights), _bytes(weights)
    if total <= REUSE // 2:
        return all_bytes
    return round(all_bytes * (REUSE // 2) / total + max(count * size for count, size in weights))
