"""Item embeddings, by which retrieval finds items of similar meaning: the mean of the base's own token embeddings.

They cost one lookup for each token and no forward pass, so new items have an embedding as soon as the table is read,
and nothing has to be stored.
"""

from __future__ import annotations

import numpy as np
import torch

from llmrec_peft.data.rendering import render
from llmrec_peft.requests.item_table import ItemTable
from llmrec_peft.requests.request_encoder import RequestEncoder

AT_ONCE = 4096
"""Items of one block."""


@torch.no_grad()
def embed_items(items: ItemTable, encoder: RequestEncoder, weight: torch.Tensor) -> np.ndarray:
    """Mean of the token embeddings `weight` [tokens, d] over each item's text, float16 [items, d]; zeros for no text.

    The text is made of the columns that the domain's event takes from the item table, or of the title without any.
    """
    vocabulary = encoder.vocabulary
    names = [name for name in encoder.domain.event_columns if name in items.column_names] or ["title"]
    template = " ".join(f"{{{name}}}" for name in names)
    found = np.zeros((len(items), weight.shape[1]), np.float16)
    for start in range(0, len(found), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(found)))
        texts = render(template, {name: items.take(name, rows) for name in names}, vocabulary.forbidden)
        flat, offsets = vocabulary.tokens([text.strip() for text in texts.to_pylist()])
        tokens = torch.as_tensor(flat, dtype=torch.long, device=weight.device)
        sizes = torch.from_numpy(np.diff(offsets))
        sums = torch.zeros(len(rows), weight.shape[1], dtype=torch.float32)  # float16 would round each addition
        sums.index_add_(0, torch.arange(len(rows)).repeat_interleave(sizes), weight[tokens].float().cpu())
        found[rows] = (sums / sizes.clamp(min=1)[:, None]).numpy()
    return found
