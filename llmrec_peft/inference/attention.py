"""Attention of probes in two parts: to the trunk that all of them see, and each to itself.

One mask over everything would have every probe's scores with every other computed and thrown away. Here the trunk's
keys meet all probes in one dense product, each probe's own keys meet its own queries, and one softmax goes over both.

Shape letters: H heads, h key heads, D head width, P tokens before, N new trunk tokens, M probes, W the longest of them,
R tokens of all probes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmrec_peft.models.classifier import PROBE_ATTENTION as NAME


class ProbeLayout:
    """Where the trunk and the probes of one row lie.

    Args:
        trunk: N, new trunk tokens, which come first.
        sizes: tokens of each probe, in order.
        device: of the indices.
    """

    def __init__(self, trunk: int, sizes: list[int], device: torch.device) -> None:
        self.trunk, self.total = trunk, trunk + sum(sizes)
        widths = torch.tensor(sizes, device=device)
        places = torch.arange(int(widths.max()), device=device)
        starts = widths.cumsum(0) - widths
        self.real = places[None, :] < widths[:, None]  # [M, W]
        # Tokens of a probe by its place; what fills up repeats its first, and nothing of it is read.
        self.tokens = (starts[:, None] + places * self.real).flatten()  # [M * W]
        causal = places[None, :, None] >= places[None, None, :]
        self.allow = causal & self.real[:, None, :]  # [M, W, W]
        self.flat = self.real.flatten().nonzero()[:, 0]  # [R]


_active = threading.local()


@contextmanager
def laid_out(layout: ProbeLayout | None) -> Iterator[None]:
    """Inside, this thread's attention takes its one row to be laid out so."""
    _active.layout = layout
    try:
        yield
    finally:
        _active.layout = None


def install(model: nn.Module) -> bool:
    """Let a stock model's sdpa attention be this one; False where the model's code has no such choice.

    It is sdpa wherever no row of probes is being answered.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False

    def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **rest: Any):
        layout: ProbeLayout | None = getattr(_active, "layout", None)
        plain = all(rest.get(name) is None for name in ("softcap", "position_bias", "s_aux", "head_mask"))
        if layout is None or not plain or query.shape[0] != 1 or query.shape[2] != layout.total:
            return sdpa_attention_forward(module, query, key, value, mask, **rest)
        scale = rest.get("scaling")
        found = two_part(query[0], key[0], value[0], layout, query.shape[-1] ** -0.5 if scale is None else scale)
        return found.transpose(0, 1)[None], None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def two_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: ProbeLayout, scale: float
) -> torch.Tensor:
    """Answers [H, N + R, D] of queries [H, N + R, D] on keys and values [h, P + N + R, D].

    softmax over [q K_trunk^T, q K_own^T] equals attention under the mask allow(q, k) = k <= q and (k in the trunk or k
    in q's probe).
    """
    past = key.shape[1] - layout.total
    seen = past + layout.trunk
    # Token by token, as the layer reads it.
    result = query.new_empty(layout.total, query.shape[0], value.shape[-1]).transpose(0, 1)
    if layout.trunk:
        mask = None
        if past:
            order = torch.arange(seen, device=query.device)
            mask = order[None, :] <= order[past:, None]
        result[:, : layout.trunk] = F.scaled_dot_product_attention(
            query[None, :, : layout.trunk], key[None, :, :seen], value[None, :, :seen], mask, is_causal=not past,
            scale=scale, enable_gqa=True,
        )[0]  # fmt: skip
    groups, width = key.shape[0], query.shape[-1]
    share = query.shape[0] // groups
    probes, longest = layout.real.shape
    q = (query[:, layout.trunk :] * scale).contiguous().view(groups, share, -1, width)  # [h, H / h, R, D]
    # Each probe's scores with itself, [h * M, H / h * W, W].
    own_q = q.index_select(2, layout.tokens).view(groups, share, probes, longest, width).transpose(1, 2)
    own_q = own_q.reshape(groups * probes, share * longest, width)
    own_k = key[:, seen:].index_select(1, layout.tokens).view(groups * probes, longest, width)
    own_v = value[:, seen:].index_select(1, layout.tokens).view(groups * probes, longest, -1)
    own = (own_q @ own_k.transpose(1, 2)).view(groups, probes, share, longest, longest)
    own = own.masked_fill_(~layout.allow[:, None], float("-inf")).transpose(1, 2)
    own = own.reshape(groups, share, probes * longest, longest).index_select(2, layout.flat)
    # With W keys and values of zeros behind the trunk's, the scores have room for a probe's own, and the product of
    # the weights with the values leaves those out: neither is copied.
    room = key.new_zeros(groups, longest, width)
    scores = q.view(groups, -1, width) @ torch.cat([key[:, :seen], room], 1).transpose(1, 2)
    scores.view(groups, share, -1, seen + longest)[..., seen:] = own
    weights = scores.softmax(-1)  # [h, H / h * R, P + N + W]
    room = value.new_zeros(groups, longest, value.shape[-1])
    on_trunk = (weights @ torch.cat([value[:, :seen], room], 1)).view(groups, share, -1, value.shape[-1])
    own = weights.new_zeros(groups, share, probes * longest, longest)
    own[:, :, layout.flat] = weights.view(groups, share, -1, seen + longest)[..., seen:]
    own = own.view(groups, share, probes, longest, longest).transpose(1, 2)
    on_own = own.reshape(groups * probes, share * longest, longest) @ own_v
    on_own = on_own.view(groups, probes, share, longest, -1).transpose(1, 2)
    on_own = on_own.reshape(groups, share, probes * longest, -1).index_select(2, layout.flat)
    result[:, layout.trunk :] = (on_trunk + on_own).flatten(0, 1)
    return result
