"""Item content in a student of item ids: the teacher's item embeddings, projected and added to the student's own.

Shape letters: V tokens of the vocabulary, I items, D dimensions of the content, W the student's width.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.distillation.distill_options import StudentOptions
from llmrec_peft.distillation.item_id_student import first_item
from llmrec_peft.distillation.teacher_item_embeddings import principal_components
from llmrec_peft.models.classifier import BehaviorClassifier


class ContentEmbedding(nn.Module):
    """Input embeddings of a student of item ids: E[token] + content[token] @ P.

    In training, an item's own weight E[token] is dropped with probability `dropout`, so that the model learns to use
    the content alone, which is all that it has for items without training rows (cold start, as in DropoutNet: Volkovs
    et al., NeurIPS 2017). `merged` gives the stock layer.

    Args:
        embedding: the stock layer, weight [V, W].
        content: float32 [V, D]; zero for tokens that are not items.
        seen: bool [V]; items outside it start at weight zero and stay there, as no gradient reaches them.
        dropout: probability in [0, 1).
    """

    content: torch.Tensor
    is_item: torch.Tensor

    def __init__(self, embedding: nn.Embedding, content: torch.Tensor, seen: torch.Tensor, dropout: float) -> None:
        super().__init__()
        self.embedding, self.dropout = embedding, dropout
        # Not persistent: a checkpoint of the student need not hold the teacher's content.
        self.register_buffer("content", content, persistent=False)
        self.register_buffer("is_item", content.abs().sum(1) > 0, persistent=False)
        self.projection = nn.Linear(content.shape[1], embedding.embedding_dim, bias=False)
        with torch.no_grad():
            nn.init.normal_(self.projection.weight, std=0.02 / content.shape[1] ** 0.5)
            embedding.weight[self.is_item & ~seen] = 0.0
            # An item's initial weight is noise; scaled down, it does not drown the content.
            embedding.weight[self.is_item & seen] *= 0.1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., W] of token ids [...]."""
        own: torch.Tensor = self.embedding(ids)
        if self.training and self.dropout:
            drop = (torch.rand(ids.shape, device=ids.device) < self.dropout) & self.is_item[ids]
            own = own.masked_fill(drop[..., None], 0.0)
        return own + self.projection(self.content[ids])

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """The stock layer with the same output: weight E + content @ P."""
        vocabulary, width = self.embedding.weight.shape
        result = nn.Embedding(vocabulary, width, padding_idx=self.embedding.padding_idx)
        result.weight.copy_(self.embedding.weight + self.projection(self.content))
        return result


def add_content(
    classifier: BehaviorClassifier, content: torch.Tensor, seen: torch.Tensor, first: int, dropout: float
) -> None:
    """Replace the input embeddings of a student of item ids by a `ContentEmbedding`.

    Args:
        content: float32 [I, D].
        seen: bool [I], items with training rows.
        first: token of the first item.
        dropout: as in `ContentEmbedding`.
    """
    stock = _stock(classifier)
    embedding = cast(nn.Embedding, stock.get_input_embeddings())
    vocabulary = embedding.weight.shape[0]
    content_VD, seen_V = torch.zeros(vocabulary, content.shape[1]), torch.ones(vocabulary, dtype=torch.bool)
    content_VD[first : first + len(content)] = content
    seen_V[first : first + len(content)] = seen
    stock.set_input_embeddings(ContentEmbedding(embedding, content_VD, seen_V, dropout))


def add_teacher_content(
    classifier: BehaviorClassifier,
    item_embeddings: np.ndarray,
    train: StreamDataset,
    train_rows: np.ndarray,
    domain: Domain,
    options: StudentOptions,
) -> None:
    """`add_content` with the principal components of the teacher's item embeddings, float32 [I, K * H].

    Items count as seen if a training row of the log (`train_rows`) or a training target, such as a sampled negative,
    names them. `domain` is the student's.
    """
    seen = np.zeros(len(item_embeddings), bool)
    seen[train.log.item_codes[train_rows]] = True
    seen[train.target_items] = True
    content = torch.from_numpy(principal_components(item_embeddings, options.content_width))
    add_content(classifier, content, torch.from_numpy(seen), first_item(domain), options.content_dropout)


def merge_content(classifier: BehaviorClassifier) -> None:
    """Replace a `ContentEmbedding` by the stock layer with the same output; other models stay as they are."""
    stock = _stock(classifier)
    embedding = stock.get_input_embeddings()
    if isinstance(embedding, ContentEmbedding):
        stock.set_input_embeddings(embedding.merged())


def _stock(classifier: BehaviorClassifier) -> PreTrainedModel:
    stock = classifier.stock
    assert isinstance(stock, PreTrainedModel)
    return stock
