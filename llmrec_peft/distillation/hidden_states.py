"""Hidden states at the markers, and which layers of a student and a teacher are compared.

Shape letters: B rows, L tokens of a row, T markers, K layers, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from llmrec_peft.models.bottleneck import transformer_layers
from llmrec_peft.models.classifier import BehaviorClassifier

HEAD_INPUT = -1
"""Number that stands for the input of the head, in place of a layer's number."""


class LayerOutputs:
    """Context manager that records the outputs of some layers in each forward pass, by hooks.

    A layer's output has the shape [B, L, H]. The input of the head is already [T, H]: the classifier gives the head
    the markers alone.
    """

    def __init__(self, classifier: BehaviorClassifier, layers: Sequence[int]) -> None:
        self._classifier, self._layers = classifier, tuple(layers)
        self._outputs: dict[int, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> LayerOutputs:
        if not self._layers:
            return self
        stack = transformer_layers(self._classifier.stock)
        for number in self._layers:
            if number == HEAD_INPUT:
                hook = self._classifier.head.register_forward_pre_hook(
                    lambda _module, inputs: self._record(HEAD_INPUT, inputs[0])
                )
            else:
                # n=number binds the number now; a closure would see the last one of the loop.
                hook = stack[number].register_forward_hook(lambda _m, _i, output, n=number: self._record(n, output))
            self._hooks.append(hook)
        return self

    def _record(self, number: int, output: Any) -> None:
        self._outputs[number] = output[0] if isinstance(output, tuple) else output

    def at(self, markers: torch.Tensor) -> torch.Tensor:
        """Outputs of the last forward pass at flat marker indices b * L + l, [T]: a tensor [T, K, H]."""
        return torch.stack([self._at(number, markers) for number in self._layers], dim=1)

    def _at(self, number: int, markers: torch.Tensor) -> torch.Tensor:
        output = self._outputs[number]
        return output if number == HEAD_INPUT else output.flatten(0, 1).index_select(0, markers)

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def layer_pairs(student: int, teacher: int, kept: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Pairs (student's layer, teacher's layer) whose outputs are compared; the last pair is the inputs of the heads.

    About four layers of the upper half of the student are compared.

    Args:
        student, teacher: numbers of layers.
        kept: the teacher's layers that a shallow student consists of, which are then compared with themselves. If
            None, layer i (from 1) of n is compared with the teacher's layer at the same relative depth,
            round(i * teacher / n).
    """
    pairs = []
    for own in range(max(0, student // 2 - 1), student - 1, max(1, student // 4)):
        other = kept[own] if kept is not None else round((own + 1) * teacher / student) - 1
        pairs.append((own, other))
    return [*pairs, (HEAD_INPUT, HEAD_INPUT)]
