"""Tree attention of rows with candidates, in blocks that skip what the mask forbids, for float32 on a CPU.

PyTorch's kernel computes every score under a mask and discards the forbidden ones: those of each candidate with every
other candidate. Here the tokens of a row are reordered, prefix first. A block of queries attends to the prefix, up to
the last token that one of its queries may see, and to its own tokens. With inputs Q, K, V, and G the gradient of the
output O, the formulas are those of Vaswani et al., 2017, arXiv 1706.03762, section 3.2.1:

    W = softmax(Q K^T + mask),  O = W V
    dV = W^T G,  dW = G V^T,  dS = W * (dW - rowsum(W * dW)),  dQ = dS K,  dK = dS^T Q

The backward pass computes W again instead of storing it. Q is scaled before it comes here.

Batches without candidates, short rows, other number formats and other devices use Transformers' sdpa.

Shape letters: B rows, L tokens of a row, P cached tokens before them, H query heads, h key heads, g = H / h query heads
for each key head, D head width; after reordering, n queries and m keys; in a block, t queries and c keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "llmrec_blocks"
"""Name by which Transformers knows this attention."""
STEP = 128
"""Queries of a block, at most: few enough that their weights stay in the CPU's cache."""
SHORT = 256
"""Rows of fewer tokens use sdpa: many short rows are faster in one call under one mask."""
_LATER = torch.ones(STEP, STEP, dtype=torch.bool).triu_(1)


class Block(NamedTuple):
    """Queries first:last. They attend to the keys 0:prefix and to the keys of the tokens start:last, in this order.

    `hidden`, bool [t, k] with k <= c, says which of the last k of these keys each query must not see.
    """

    first: int
    last: int
    prefix: int
    start: int
    hidden: torch.Tensor


class Layout:
    """Order of the tokens of one row, and the blocks that compute their attention.

    Args:
        segment: int [L]; 0 for the prefix, a number for each candidate, -1 for tokens that no query sees.
        seen: bool [P], which cached tokens are there; they belong to the prefix.

    Attributes:
        tokens: int64 [n], indices into the row, prefix first; None if they are 0 to L - 1 in order.
        keys: int64 [m], indices into cached and new tokens together; None if they are all of these in order.
        past: number of cached tokens that are there; query i has the key past + i.
    """

    def __init__(self, segment: np.ndarray, seen: np.ndarray | None = None) -> None:
        before = np.empty(0, np.int64) if seen is None else np.flatnonzero(seen)
        prefix, candidates = np.flatnonzero(segment == 0), np.flatnonzero(segment > 0)
        tokens = np.concatenate([prefix, candidates])
        places = np.concatenate([before, tokens + (0 if seen is None else len(seen))])
        self.past = len(before)
        self.tokens: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None
        if len(tokens) < len(segment) or (np.diff(tokens) != 1).any():
            self.tokens = torch.from_numpy(tokens)
        if len(places) < len(segment) + (0 if seen is None else len(seen)) or (np.diff(places) != 1).any():
            self.keys = torch.from_numpy(places)
        points = np.searchsorted(prefix, candidates)  # prefix tokens before each token of a candidate
        self.blocks = _prefix_blocks(self.past, len(prefix))
        self.blocks += _candidate_blocks(self.past, len(prefix), points, segment[candidates])


def _prefix_blocks(past: int, length: int) -> list[Block]:
    """Causal blocks of at most STEP queries of the prefix."""
    ends = [(first, min(first + STEP, length)) for first in range(0, length, STEP)]
    return [Block(first, last, past + first, first, _LATER[: last - first, : last - first]) for first, last in ends]


def _candidate_blocks(past: int, prefix: int, points: np.ndarray, numbers: np.ndarray) -> list[Block]:
    """Blocks of whole candidates: as many as fit in STEP tokens and are attached less than STEP prefix tokens apart.

    A longer candidate is cut.

    Args:
        points: int64 [candidate tokens], how many prefix tokens each token may see.
        numbers: int [candidate tokens], the candidate of each token.
    """
    if not len(numbers):
        return []
    starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    groups: list[tuple[int, int]] = []
    begin = 0
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        if start > begin and (end - begin > STEP or points[start] - points[begin] >= STEP):
            groups.append((begin, start))
            begin = start
    groups.append((begin, len(numbers)))
    blocks = []
    for start, end in groups:
        for first in range(start, end, STEP):
            last = min(first + STEP, end)
            at, own = points[first:last, None], numbers[start:last]  # [t, 1], [own keys]
            apart = own != numbers[first:last, None]  # [t, own keys]
            later = np.arange(start, last) > np.arange(first, last)[:, None]
            # All queries see the prefix up to the lowest of their points; beyond it, each up to its own.
            lowest, highest = int(at.min()), int(at.max())
            beyond = np.arange(lowest, highest) >= at  # [t, highest - lowest]
            hidden = torch.from_numpy(np.concatenate([beyond, apart | later], axis=1))
            blocks.append(Block(prefix + first, prefix + last, past + highest, prefix + start, hidden))
    return blocks


class _Attend(torch.autograd.Function):
    """Outputs [h, g, n, D] of scaled queries [h, g, n, D] on keys and values [h, m, D]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout) -> torch.Tensor:
        heads, share, length, _ = query.shape
        # In memory [n, h, g, D], since the layer reads token by token.
        result = query.new_empty(length, heads, share, value.shape[-1]).permute(1, 2, 0, 3)
        for block in layout.blocks:
            weights = _weights(_queries(query, block), _seen_by(key, block, layout.past), block)  # [h, g * t, c]
            found = weights @ _seen_by(value, block, layout.past)  # [h, g * t, D]
            result[:, :, block.first : block.last] = found.unflatten(1, (share, -1))
        ctx.save_for_backward(query, key, value)
        ctx.layout = layout
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value = ctx.saved_tensors
        past, share = ctx.layout.past, query.shape[1]
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.layout.blocks:
            queries, grads = _queries(query, block), _queries(grad, block)
            keys, values = _seen_by(key, block, past), _seen_by(value, block, past)
            weights = _weights(queries, keys, block)  # W
            _add(of_value, block, past, weights.transpose(1, 2) @ grads)  # dV = W^T G
            of_weights = grads @ values.transpose(1, 2)  # dW = G V^T
            # dS = W * (dW - rowsum(W * dW)); hidden keys have W = 0, so their dS is 0 too.
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, :, block.first : block.last] = (of_scores @ keys).unflatten(1, (share, -1))  # dQ = dS K
            _add(of_key, block, past, of_scores.transpose(1, 2) @ queries)  # dK = dS^T Q
        return of_query, of_key, of_value, None


def _queries(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """The queries of a block in [h, g, n, D], as [h, g * t, D]."""
    return tensor[:, :, block.first : block.last].flatten(1, 2)


def _weights(queries: torch.Tensor, keys: torch.Tensor, block: Block) -> torch.Tensor:
    """W = softmax(Q K^T + mask), [h, g * t, c]."""
    scores = queries @ keys.transpose(1, 2)
    by_query = scores.unflatten(1, (-1, block.last - block.first))  # a view, [h, g, t, c], masked in place
    by_query[..., scores.shape[-1] - block.hidden.shape[1] :].masked_fill_(block.hidden, float("-inf"))
    return scores.softmax(-1)


def _seen_by(tensor: torch.Tensor, block: Block, past: int) -> torch.Tensor:
    """Keys or values that a block attends to, [h, c, D], out of [h, m, D]."""
    if block.prefix == past + block.start:  # the two ranges touch: a view, no copy
        return tensor[:, : past + block.last]
    return torch.cat([tensor[:, : block.prefix], tensor[:, past + block.start : past + block.last]], 1)


def _add(total: torch.Tensor, block: Block, past: int, part: torch.Tensor) -> None:
    """Add gradients [h, c, D] of a block's keys or values to `total`, [h, m, D], in place."""
    total[:, : block.prefix] += part[:, : block.prefix]
    total[:, past + block.start : past + block.last] += part[:, block.prefix :]


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layouts: list[Layout], scale: float
) -> torch.Tensor:
    """Outputs [B, L, H, D] of queries [B, H, L, D] on keys and values [B, h, P + L, D].

    Tokens that are not in a row's layout get zeros.
    """
    results = []
    for layout, queries, keys, values in zip(layouts, query * scale, key, value, strict=True):
        if layout.tokens is not None:
            queries = queries.index_select(1, layout.tokens)
        if layout.keys is not None:
            keys, values = keys.index_select(1, layout.keys), values.index_select(1, layout.keys)
        found = _Attend.apply(queries.unflatten(0, (len(keys), -1)), keys, values, layout)  # [h, g, n, D]
        found = found.flatten(0, 1).transpose(0, 1)  # [n, H, D]
        if layout.tokens is not None:
            found = found.new_zeros(query.shape[2], *found.shape[1:]).index_copy(0, layout.tokens, found)
        results.append(found)
    return torch.stack(results)


def lay_out(
    mask: torch.Tensor, segment: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: torch.Tensor | None
) -> None:
    """Attach the rows' layouts to the 4-D mask as `mask.layouts`; other attention kernels read the mask itself.

    The two differ only at pad tokens: by the mask a pad token sees itself, and no layout contains it. Short rows, other
    devices and tracers, whose values cannot be read, get no layouts.
    """
    if type(segment) is not torch.Tensor or segment.device.type != "cpu" or segment.shape[1] < SHORT:
        return
    rows = segment if attention_mask is None else segment.masked_fill(attention_mask == 0, -1)
    seen = [None] * len(rows) if past_seen is None else list(past_seen.numpy())
    layouts = [Layout(row, before) for row, before in zip(rows.numpy(), seen, strict=True)]
    mask.layouts = layouts  # type: ignore[attr-defined]  # an attribute of our own


def install(model: PreTrainedModel) -> bool:
    """Replace a stock model's sdpa attention by this one; False if the model's code does not allow it.

    If there is an accelerator, the model stays as it is: it will run there, and Trainer selects sdpa by name.
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

    # Some layers pass the mask by keyword, so its name must be that of Transformers' own functions.
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
    """Make the given mask the only one, in models whose layers also hide tokens by their index in the row (GPT-Neo).

    A row with many candidates may be longer than the window and the positions that each of its prompts fits into
    (`check_positions`). There the layers' own causal buffer would hide tokens that a prompt alone sees.
    """
    found = [(module, module.bias) for module in stock.modules() if _is_causal_buffer(getattr(module, "bias", None))]
    buffers = [buffer for _, buffer in found if isinstance(buffer, torch.Tensor)]
    if buffers:
        size = max(buffer.shape[-1] for buffer in buffers) + _BEYOND
        causal = torch.ones(1, 1, size, size, dtype=torch.bool, device=buffers[0].device).tril_()
        for module, _ in found:
            module.bias = causal


def _is_causal_buffer(value: object) -> bool:
    """Whether a value is a causal mask, [1, 1, size, size] of booleans or integers."""
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.is_floating_point():
        return False
    return value.shape[:2] == (1, 1) and value.shape[2] == value.shape[3]


_BEYOND = 2048
"""Tokens by which a row may exceed the positions of a base; the rows of the scoring engine exceed them by fewer."""


def _layouts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, rest: dict[str, Any]
) -> list[Layout] | None:
    """The rows' layouts; None if the mask has none, or if this attention does not support the call."""
    layouts = getattr(mask, "layouts", None)
    if layouts is None or mask.shape[-2:] != (query.shape[2], key.shape[2]):
        return None
    plain = not rest.get("dropout") and all(rest.get(name) is None for name in _NOT_PLAIN)
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (query, key, value))
    return layouts if plain and fits and not torch.is_autocast_enabled("cpu") else None


_NOT_PLAIN = ("softcap", "position_bias", "s_aux", "head_mask", "cache")
