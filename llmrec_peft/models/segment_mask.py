"""The attention mask of rows with candidates: each candidate sees the prefix and itself, and no other candidate.

Shape letters: B rows, L tokens of a row, P cached tokens before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmrec_peft.errors import ModelError
from llmrec_peft.models import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def segment_mask(
    stock: PreTrainedModel,
    segment: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """4-D mask [B, 1, L, P + L] of allow(q, k) = k <= q and (segment[k] == 0 or segment[k] == segment[q]).

    Args:
        stock: the model that takes the mask, unchanged in every layer: boolean for sdpa, additive in the model's dtype
            for eager.
        segment: int64 [B, L]; 0 for the prefix, a number for each candidate, -1 at pad tokens.
        attention_mask: None, or int64 [B, L] with 0 at pad tokens.
        past_seen: None, or bool [B, P], which cached tokens are there; they belong to the prefix.

    A pad token (-1) sees only itself, so that its softmax has a term, and no real token sees it.
    """
    kind = stock.config._attn_implementation
    if kind not in ("sdpa", attention.NAME, "eager"):
        raise ModelError(f"attention {kind!r} cannot hide candidates from each other; set model.attn to sdpa")
    if attention_mask is not None:
        segment = segment.masked_fill(attention_mask == 0, -1)
    length = segment.shape[1]
    query, key = segment[:, :, None], segment[:, None, :]  # [B, L, 1], [B, 1, L]
    order = torch.arange(length, device=segment.device)
    allow = (key == 0) | ((key == query) & (key > 0))  # [B, L, L]
    allow = (allow & (order[None, :] <= order[:, None])) | (order[None, :] == order[:, None])
    if past_seen is not None:
        earlier = past_seen[:, None, :].expand(-1, length, -1) & (segment >= 0)[:, :, None]  # [B, L, P]
        allow = torch.cat([earlier, allow], dim=2)
    allow = allow[:, None]
    if kind != "eager":
        return allow
    additive = torch.zeros(allow.shape, dtype=stock.dtype, device=segment.device)
    return additive.masked_fill_(~allow, torch.finfo(stock.dtype).min)
