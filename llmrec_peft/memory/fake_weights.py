"""Fake tensors, which have a shape and no memory, in the place of a model's weights on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Fake = Callable[[torch.Tensor], torch.Tensor]


def materialise(model: nn.Module) -> None:
    """Replace every parameter and buffer on the meta device by a fake tensor on the CPU; tied ones stay tied.

    Call it inside a `FakeTensorMode`.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            made[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return made[id(value)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else fake(value)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in parameters:
                parameters[id(parameter)] = _fake_parameter(parameter, fake)
            module._parameters[name] = None if parameter is None else parameters[id(parameter)]


def _fake_parameter(parameter: nn.Parameter, fake: Fake) -> nn.Parameter:
    made = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        # A fake tensor cannot be of bitsandbytes' class, but its layers read this attribute alone.
        setattr(made, "quant_state", _fake_state(state, fake))  # noqa: B010 (nn.Parameter declares no such attribute)
    return made


def _fake_state(state: QuantState, fake: Fake) -> QuantState:
    made = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name)
        setattr(made, name, None if value is None else fake(value))
    made.state2 = None if state.state2 is None else _fake_state(state.state2, fake)
    return made
