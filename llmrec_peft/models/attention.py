"""Attention of rows with candidates, in blocks that leave out what the mask forbids, for float32 on a CPU.

PyTorch's kernel computes every score under a mask and throws the forbidden ones away: those of each candidate with
every other. Here the tokens are laid out prefix first, and a block of queries meets the prefix up to the last point
that one of them hangs off and its own tokens, and nothing else. The formulas are those of Vaswani et al., 2017, arXiv
1706.03762, section 3.2.1; the backward pass computes the weights W again, and with G the gradient of the answers

    W = softmax(Q K^T + mask),  dV = W^T G,  dW = G V^T,  dS = W * (dW - rowsum(W * dW)),  dQ = dS K,  dK = dS^T Q

Batches without candidates, short rows, other types of numbers and other devices keep Transformers' sdpa.

Shape letters: B rows, L tokens of a row, P tokens before them, H heads, h key heads, g = H / h heads that share one, D
head width; laid out, n queries and m keys; of a block, t queries and c keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

NAME = "llmrec_blocks"
"""Of this attention among Transformers'."""
STEP = 128
"""Queries of a block, at most: few enough that their weights stay in the cache."""
SHORT = 256
"""Tokens of a row from which blocks pay. Many short rows are faster in one call under one mask."""
_LATER = torch.ones(STEP, STEP, dtype=torch.bool).triu_(1)


class Block(NamedTuple):
    """Queries first:last. They look at the keys 0:prefix and at those of the tokens start:last, in this order.

    `hidden`, bool [t, at most c], says which of the last of these keys each query must not see.
    """

    first: int
    last: int
    prefix: int
    start: int
    hidden: torch.Tensor


class Layout:
    """How the tokens of one row are laid out, and in which blocks they are answered.

    Args:
        segment: int [L]; 0 for the prefix, a number for each candidate, -1 for tokens that nobody sees or reads.
        seen: bool [P], which earlier tokens are there; they belong to the prefix.

    Attributes:
        tokens: int64 [n], places in the row, prefix first; None where that is the row itself.
        keys: int64 [m], places in earlier and new tokens together; None where that is all of them.
        past: earlier tokens that are there; query i is key past + i.
    """

    def __init__(self, segment: np.ndarray, seen: np.ndarray | None = None) -> None:
        before = np.empty(0, np.int64) if seen is None else np.flatnonzero(seen)
        prefix, candidates = np.flatnonzero(segment == 0), np.flatnonzero(segment > 0)
        tokens = np.concatenate([prefix, candidates])
        places = np.concatenate([before, tokens + (0 if seen is None else len(seen))])
        self.past = len(before)
        self.tokens = self.keys = None
        if len(tokens) < len(segment) or (np.diff(tokens) != 1).any():
            self.tokens = torch.from_numpy(tokens)
        if len(places) < len(segment) + (0 if seen is None else len(seen)) or (np.diff(places) != 1).any():
            self.keys = torch.from_numpy(places)
        points = np.searchsorted(prefix, candidates)  # prefix tokens before each token of a candidate
        self.blocks = _prefix_blocks(self.past, len(prefix))
        self.blocks += _candidate_blocks(self.past, len(prefix), points, segment[candidates])


def _prefix_blocks(past: int, length: int) -> list[Block]:
    ends = [(first, min(first + STEP, length)) for first in range(0, length, STEP)]
    return [Block(first, last, past + first, first, _LATER[: last - first, : last - first]) for first, last in ends]


def _candidate_blocks(past: int, prefix: int, points: np.ndarray, numbers: np.ndarray) -> list[Block]:
    """Whole candidates, as many as fit in STEP tokens and hang off points less than STEP apart; a longer one is cut."""
    if not len(numbers):
        return []
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    groups, begin = [], 0
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        if start > begin and (end - begin > STEP or points[start] - points[begin] >= STEP):
            groups.append((begin, start))
            begin = start
    groups.append((begin, len(numbers)))
    blocks = []
    for start, end in groups:
        for first in range(start, end, STEP):
            last = min(first + STEP, end)
            at, own = points[first:last, None], numbers[start:last]
            apart = own != numbers[first:last, None]
            later = np.arange(start, last) > np.arange(first, last)[:, None]
            beyond = np.arange(at.min(), at.max()) >= at
            hidden = torch.from_numpy(np.concatenate([beyond, apart | later], axis=1))
            blocks.append(Block(prefix + first, prefix + last, past + int(at.max()), prefix + start, hidden))
    return blocks


class _Attend(torch.autograd.Function):
    """Answers [h, g, n, D] of scaled queries [h, g, n, D] on keys and values [h, m, D]."""

    @staticmethod
    def forward(ctx: Any, query, key, value, layout: Layout) -> torch.Tensor:
        heads, share, length, _ = query.shape
        # Token by token, as the layer reads it.
        result = query.new_empty(length, heads, share, value.shape[-1]).permute(1, 2, 0, 3)
        for block in layout.blocks:
            weights = _weights(_queries(query, block), _looked_at(key, block, layout.past), block)
            found = weights @ _looked_at(value, block, layout.past)
            result[:, :, block.first : block.last] = found.unflatten(1, (share, -1))
        ctx.save_for_backward(query, key, value)
        ctx.layout = layout
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        query, key, value = ctx.saved_tensors
        past, share = ctx.layout.past, query.shape[1]
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.layout.blocks:
            queries, grads = _queries(query, block), _queries(grad, block)
            keys, values = _looked_at(key, block, past), _looked_at(value, block, past)
            weights = _weights(queries, keys, block)
            _add(of_value, block, past, weights.transpose(1, 2) @ grads)
            of_weights = grads @ values.transpose(1, 2)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, :, block.first : block.last] = (of_scores @ keys).unflatten(1, (share, -1))
            _add(of_key, block, past, of_scores.transpose(1, 2) @ queries)
        return of_query, of_key, of_value, None


def _queries(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's part of [h, g, n, D], as [h, g * t, D]."""
    return tensor[:, :, block.first : block.last].flatten(1, 2)


def _weights(queries: torch.Tensor, keys: torch.Tensor, block: Block) -> torch.Tensor:
    """W [h, g * t, c]."""
    scores = queries @ keys.transpose(1, 2)
    by_query = scores.unflatten(1, (-1, block.last - block.first))
    by_query[..., scores.shape[-1] - block.hidden.shape[1] :].masked_fill_(block.hidden, float("-inf"))
    return scores.softmax(-1)


def _looked_at(tensor: torch.Tensor, block: Block, past: int) -> torch.Tensor:
    """Keys or values of a block, [h, c, D]."""
    if block.prefix == past + block.start:
        return tensor[:, : past + block.last]
    return torch.cat([tensor[:, : block.prefix], tensor[:, past + block.start : past + block.last]], 1)


def _add(total: torch.Tensor, block: Block, past: int, part: torch.Tensor) -> None:
    """Add to those of a block's keys or values, [h, c, D], in `total`."""
    total[:, : block.prefix] += part[:, : block.prefix]
    total[:, past + block.start : past + block.last] += part[:, block.prefix :]


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layouts: list[Layout], scale: float
) -> torch.Tensor:
    """Answers [B, L, H, D] of queries [B, H, L, D] on keys and values [B, h, P + L, D].

    Tokens that a row's layout leaves out get zeros.
    """
    results = []
    for layout, queries, keys, values in zip(layouts, query * scale, key, value, strict=True):
        if layout.tokens is not None:
            queries = queries.index_select(1, layout.tokens)
        if layout.keys is not None:
            keys, values = keys.index_select(1, layout.keys), values.index_select(1, layout.keys)
        found = _Attend.apply(queries.unflatten(0, (len(keys), -1)), keys, values, layout)
        found = found.flatten(0, 1).transpose(0, 1)  # [n, H, D]
        if layout.tokens is not None:
            found = found.new_zeros(query.shape[2], *found.shape[1:]).index_copy(0, layout.tokens, found)
        results.append(found)
    return torch.stack(results)


def lay_out(
    mask: torch.Tensor, segment: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: torch.Tensor | None
) -> None:
    """Let the 4-D mask of `BehaviorClassifier` carry its rows' layouts; who does not know them reads the mask itself.

    They differ in what nobody reads: a pad sees itself by the mask, and is left out of the layout. Short rows, and
    tensors of other devices or of a tracer, whose values cannot be read, carry none.
    """
    if type(segment) is not torch.Tensor or segment.device.type != "cpu" or segment.shape[1] < SHORT:
        return
    rows = segment if attention_mask is None else segment.masked_fill(attention_mask == 0, -1)
    seen = [None] * len(rows) if past_seen is None else past_seen.numpy()
    mask.layouts = [Layout(row, before) for row, before in zip(rows.numpy(), seen, strict=True)]


def install(model: nn.Module) -> bool:
    """Let a stock model's sdpa attention be this one; False where its code has no such choice.

    Where there is an accelerator the model stays as it is: it will run there, and Trainer asks for sdpa by its name.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    if torch.accelerator.is_available():
        return False

    # The mask's name is that of Transformers' own functions, as some layers pass it by name.
    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        layouts = _layouts(query, key, value, attention_mask, rest)
        if layouts is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        scale = rest.get("scaling")
        return block_attention(query, key, value, layouts, query.shape[-1] ** -0.5 if scale is None else scale), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def count_no_places(stock: nn.Module) -> None:
    """Leave what each token sees to the mask alone, where layers also count places in the row (GPT-Neo's windows).

    A row may hold many candidates, and be longer than the window and the positions that each of its prompts fits into
    (`check_positions`); there the layers' own causal buffer would hide what a prompt alone sees.
    """
    found = [module for module in stock.modules() if _is_causal_buffer(getattr(module, "bias", None))]
    if found:
        size = max(module.bias.shape[-1] for module in found) + _BEYOND
        causal = torch.ones(1, 1, size, size, dtype=torch.bool, device=found[0].bias.device).tril_()
        for module in found:
            module.bias = causal


def _is_causal_buffer(value: Any) -> bool:
    is_mask = isinstance(value, torch.Tensor) and value.dim() == 4 and not value.is_floating_point()
    return is_mask and value.shape[:2] == (1, 1) and value.shape[2] == value.shape[3]


_BEYOND = 2048
"""Tokens of candidates in a row beyond the positions of a base; the engine's rows hold fewer."""


def _layouts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, rest: dict) -> list | None:
    """The rows' layouts, where the mask carries them and blocks serve."""
    layouts = getattr(mask, "layouts", None)
    if layouts is None or mask.shape[-2:] != (query.shape[2], key.shape[2]):
        return None
    plain = not rest.get("dropout") and all(rest.get(name) is None for name in _NOT_PLAIN)
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (query, key, value))
    return layouts if plain and fits and not torch.is_autocast_enabled("cpu") else None


_NOT_PLAIN = ("softcap", "position_bias", "s_aux", "head_mask", "cache")
