"""Vectors of items' texts, by which retrieval finds what is near in meaning: the base's own token embeddings, averaged.

They cost one look-up a token and no pass through the model, so that a table's new items have theirs as soon as it is
read, and nothing of them needs to be kept.
"""

from __future__ import annotations

import numpy as np
import torch

from llmrec_peft.data.rendering import render
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.scoring.item_table import Catalogue

AT_ONCE = 4096  # items


@torch.no_grad()
def embed_items(catalogue: Catalogue, vocabulary: Vocabulary, weight: torch.Tensor) -> np.ndarray:
    """float16 [items, d]: mean of the token embeddings `weight` [tokens, d] over each item's text; zeros for no text.

    The text is what the domain's event takes from the item table, or the title where it takes nothing.
    """
    names = [name for name in vocabulary.domain.event_columns if name in catalogue.column_names] or ["title"]
    template = " ".join(f"{{{name}}}" for name in names)
    found = np.zeros((len(catalogue), weight.shape[1]), np.float16)
    for start in range(0, len(found), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(found)))
        texts = render(template, {name: catalogue.take(name, rows) for name in names}, vocabulary.forbidden)
        flat, offsets = vocabulary.tokens([text.strip() for text in texts.to_pylist()])
        tokens = torch.as_tensor(flat, dtype=torch.long, device=weight.device)
        sizes = torch.from_numpy(np.diff(offsets))
        sums = torch.zeros(len(rows), weight.shape[1], dtype=torch.float32)
        sums.index_add_(0, torch.arange(len(rows)).repeat_interleave(sizes), weight[tokens].float().cpu())
        found[rows] = (sums / sizes.clamp(min=1)[:, None]).numpy()
    return found
