"""Computes the last layer at the markers only.

Nothing reads the last layer's output at other tokens. Their keys and values are still needed, as the markers attend to
them; but queries, the attention's output projection and the feed-forward part act on each token separately, so they run
on the markers alone.

Shape letters: B rows, L tokens of a row, T markers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.bottleneck import transformer_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Submodules of a layer that act on each token separately, by Transformers' names; a layer may lack any of them."""

_active = threading.local()


class LastLayer:
    """The last layer of a stock classifier. Outside `only_at` it computes all tokens as before.

    Attributes:
        path: path of the layer in the classifier; empty if the model has no list of layers.
    """

    def __init__(self, stock: PreTrainedModel) -> None:
        self.path, self._stock = "", stock
        try:
            self._layer = transformer_layers(stock)[-1]
        except ModelError:
            return
        self.path = next(path for path, module in stock.named_modules() if module is self._layer)
        for name, module in self._layer.named_modules():
            if name in TOKENWISE and not getattr(module, "_leaves_tokens_out", False):
                module._leaves_tokens_out = True
                module.register_forward_pre_hook(_gather)
                module.register_forward_hook(_scatter)

    @property
    def runs_once(self) -> bool:
        """False if the backward pass runs the layer again outside of `only_at`, as activation checkpointing does."""
        if not self.path or transformer_layers(self._stock)[-1] is not self._layer:
            return False
        names = ("gradient_checkpointing", "activation_checkpointing")
        return not any(getattr(self._layer, name, False) for name in names)

    @contextmanager
    def only_at(self, places: torch.Tensor | None) -> Iterator[None]:
        """Inside, this thread computes the layer at `places` only, int64 [T] of b * L + l; None for all tokens."""
        _active.places, _active.part = places, None
        try:
            yield
        finally:
            _active.places = _active.part = None


def _gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hook before a part: inputs [B, L, width] -> [1, T, width]."""
    # A part may lie inside another part that has gathered already, such as a layer that an adapter wraps.
    if getattr(_active, "places", None) is None or getattr(_active, "part", None) is not None:
        return None
    _active.part, _active.shape = module, args[0].shape[:2]
    return (args[0].flatten(0, 1).index_select(0, _active.places)[None], *args[1:])


def _scatter(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    """Hook after a part: outputs [1, T, width] -> [B, L, width], zeros at all other tokens."""
    if getattr(_active, "part", None) is not module:
        return None
    _active.part = None
    found = output[0] if isinstance(output, tuple) else output  # [1, T, width]
    whole = found.new_zeros(_active.shape.numel(), found.shape[-1]).index_copy(0, _active.places, found[0])
    whole = whole.unflatten(0, tuple(_active.shape))
    return (whole, *output[1:]) if isinstance(output, tuple) else whole
