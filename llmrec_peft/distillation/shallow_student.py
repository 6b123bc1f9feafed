"""A shallow student: some of the teacher's layers, with its embeddings, its last norm and its head."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmrec_peft.distillation.pruning import prune
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.merging.unload import unload
from llmrec_peft.models.bottleneck import transformer_layers
from llmrec_peft.models.classifier import BehaviorClassifier

NO_SHALLOW = "a stock student cannot hold a bottleneck adapter; choose kind ids or small, or train lora"


def choose_layers(depth: int, layers: int, pick: str, pruned: bool = False) -> list[int]:
    """Numbers of the teacher's layers that a shallow student keeps, ascending.

    Args:
        depth: layers of the teacher.
        layers: how many to keep; all of them only if they are pruned.
        pick: `first` for the first ones, `spread` for evenly spaced ones: layer i of n is
            round(i (depth - 1) / (n - 1)), so the first and the last are among them.

    Raises:
        ConfigError: more layers than the teacher has, or none.
    """
    if not 1 <= layers < depth + pruned:
        raise ConfigError(
            f"student.layers must be from 1 to {depth - 1 + pruned}, the teacher has {depth}; got {layers}"
        )
    if pick == "first":
        return list(range(layers))
    return [round(number * (depth - 1) / max(1, layers - 1)) for number in range(layers)]


def write_shallow_student(
    teacher: BehaviorClassifier, kept: list[int], directory: Path, mlp: float = 1.0, heads: float = 1.0
) -> None:
    """Write a stock checkpoint of some of the teacher's layers, with the teacher's adapter merged into their weights.

    The teacher cannot be used afterwards.

    Args:
        kept: numbers of the layers, from `choose_layers`.
        mlp, heads: fractions of each layer to keep, as in `prune`.

    Raises:
        ModelError: a bottleneck adapter, which no stock model can hold, or a base whose layers are not in one list.
    """
    if teacher.method == "adapter":
        raise ModelError(NO_SHALLOW)
    model = unload(teacher, torch.float32)
    assert isinstance(model, PreTrainedModel)
    stack = transformer_layers(model)
    config, depth = model.config.get_text_config(), len(stack)
    chosen = [stack[number] for number in kept]
    del stack[len(kept) :]
    for place, layer in enumerate(chosen):
        stack[place] = layer
    config.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        # A list with an entry for each layer, such as layer_types.
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, [value[number] for number in kept])
    if mlp < 1 or heads < 1:
        prune(model, mlp, heads)
    model.save_pretrained(directory)
    teacher.tokenizer.save_pretrained(directory)
