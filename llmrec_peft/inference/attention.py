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
    result = query.new_empty(query.shape[0], layout.total, value.shape[-1])
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
    q = query[:, layout.trunk :] * scale  # [H, R, D]
    own_q = q[:, layout.tokens].unflatten(0, (groups, share))  # [h, H / h, M * W, D]
    own_q = own_q.unflatten(2, (probes, longest)).transpose(1, 2)  # [h, M, H / h, W, D]
    own_k = key[:, seen:][:, layout.tokens].view(groups, probes, 1, longest, width)
    own_v = value[:, seen:][:, layout.tokens].view(groups, probes, 1, longest, -1)
    own = own_q @ own_k.transpose(-1, -2)  # [h, M, H / h, W, W]
    own = own.masked_fill(~layout.allow[:, None], float("-inf"))
    # Back to one row a token: [H, R, W].
    own = own.transpose(1, 2).reshape(query.shape[0], probes * longest, longest)[:, layout.flat]
    count = own.shape[1]
    scores = query.new_empty(query.shape[0], count, seen + longest)
    trunk = q.reshape(groups, share * count, width) @ key[:, :seen].transpose(1, 2)
    scores[:, :, :seen] = trunk.view(-1, count, seen)
    scores[:, :, seen:] = own
    weights = scores.softmax(-1)
    on_trunk = weights[:, :, :seen].reshape(groups, share * count, seen) @ value[:, :seen]
    on_own = query.new_zeros(query.shape[0], probes * longest, longest)
    on_own[:, layout.flat] = weights[:, :, seen:]
    on_own = on_own.view(groups, share, probes, longest, longest).transpose(1, 2) @ own_v  # [h, M, H / h, W, D]
    on_own = on_own.transpose(1, 2).reshape(query.shape[0], probes * longest, -1)[:, layout.flat]
    result[:, layout.trunk :] = on_trunk.view(query.shape[0], count, -1) + on_own
    return result
