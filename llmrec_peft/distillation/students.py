"""Students before training: stock classifiers, in a directory that any part of the package takes as a base.

- shallow: some of the teacher's layers, with its embeddings, its last norm and its head;
- ids: a tiny decoder that reads item ids, one token an event, in place of item texts.

A smaller base of the user's own needs no start: it is loaded as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from llmrec_peft.data.domain import ITEM_EVENT, Domain
from llmrec_peft.data.rendering import render
from llmrec_peft.data.vocabulary import UNKNOWN_ITEM
from llmrec_peft.distillation.distill_options import StudentOptions
from llmrec_peft.distillation.pruning import prune
from llmrec_peft.errors import ConfigError, DataError, ModelError
from llmrec_peft.merging.unload import fold
from llmrec_peft.models.bottleneck import transformer_layers
from llmrec_peft.models.classifier import BehaviorClassifier

PAD, BEGIN = "<pad>", "<s>"
NO_SHALLOW = "a bottleneck adapter has no place in a stock student; choose kind ids or small, or train lora"


# -- shallow -----------------------------------------------------------------------------------------


def chosen_layers(depth: int, layers: int, pick: str, pruned: bool = False) -> list[int]:
    """Numbers of the teacher's layers that a shallow student keeps, in order; all of them only where they are pruned.

    `first`: the first ones. `spread`: evenly spaced, the first and the last among them.

    Raises:
        ConfigError: more layers than the teacher has, or none.
    """
    if not 1 <= layers < depth + pruned:
        raise ConfigError(
            f"student.layers must be from 1 to {depth - 1 + pruned}, the teacher has {depth}; got {layers}"
        )
    if pick == "first":
        return list(range(layers))
    return [round(number * (depth - 1) / max(1, layers - 1)) for number in range(layers)]


def start_shallow(
    teacher: BehaviorClassifier, kept: list[int], directory: Path, mlp: float = 1.0, heads: float = 1.0
) -> None:
    """Write a student of some of the teacher's layers, with what was trained in their weights.

    The teacher's adapter is folded into its weights, so `teacher` cannot be used afterwards.

    Args:
        kept: numbers of the layers, by `chosen_layers`.
        mlp, heads: shares of each layer that stay, as `prune` takes them.

    Raises:
        ModelError: a teacher whose layers are not in one list, or a bottleneck adapter, which no stock model holds.
    """
    if teacher.method == "adapter":
        raise ModelError(NO_SHALLOW)
    model = fold(teacher, torch.float32)
    stack = transformer_layers(model)
    config, depth = model.config.get_text_config(), len(stack)
    chosen = [stack[number] for number in kept]
    del stack[len(kept) :]
    for place, layer in enumerate(chosen):
        stack[place] = layer
    config.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        # Kinds of the layers, such as layer_types.
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, [value[number] for number in kept])
    if mlp < 1 or heads < 1:
        prune(model, mlp, heads)
    model.save_pretrained(directory)
    teacher.tokenizer.save_pretrained(directory)


# -- ids ---------------------------------------------------------------------------------------------


def ids_tokenizer(item_ids: pa.Array | pa.ChunkedArray, domain: Domain) -> Any:
    """A tokenizer with one token an item and one an outcome, from the catalogue's ids [items] and the domain that
    `Domain.of_ids` gives.

    Item row r has the id `first_item(domain) + r`.

    Raises:
        DataError: two ids that are the same once line breaks and special tokens are taken out.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BEGIN, UNKNOWN_ITEM]
    forbidden = domain.forbidden(sorted(special, key=lambda text: (-len(text), text)))
    ids = item_ids.combine_chunks() if isinstance(item_ids, pa.ChunkedArray) else item_ids
    texts = render(ITEM_EVENT, {"item_id": ids}, forbidden).to_pylist()
    words = [*special, *domain.outcomes.values(), *texts]
    vocabulary = {word: number for number, word in enumerate(words)}
    if len(vocabulary) != len(words):
        twice = next(text for number, text in enumerate(words) if vocabulary[text] != number)
        raise DataError(f"{twice!r} stands for two items or an outcome in a student of item ids; rename one")
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_ITEM))
    tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, unk_token=UNKNOWN_ITEM,
        model_max_length=domain.stream.max_length,
    )  # fmt: skip


def first_item(domain: Domain) -> int:
    """Token of the first item in `ids_tokenizer`'s vocabulary."""
    return 3 + len(domain.outcomes)


def start_ids(
    item_ids: pa.Array | pa.ChunkedArray, domain: Domain, options: StudentOptions, seed: int, directory: Path
) -> None:
    """Write an untrained student of item ids and its tokenizer; `domain` is what `Domain.of_ids` gives."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = ids_tokenizer(item_ids, domain)
    labels = domain.labels
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=4 * options.width,
        num_hidden_layers=options.layers or 2, num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=domain.stream.max_length, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class ItemEmbedding(nn.Module):
    """Input embeddings of a student of item ids: weight + content @ projection, by token.

    `content` [tokens, d] is what the teacher makes of each item's text, zero for other tokens. In training the weight
    of an item is left out with chance `dropout`, so that content alone comes to serve for items that were never seen.
    `folded` gives the stock layer.
    """

    def __init__(self, embedding: nn.Embedding, content: torch.Tensor, seen: torch.Tensor, dropout: float) -> None:
        """seen: bool [tokens]; the weights of items outside it start, and stay, at zero: nothing trains them."""
        super().__init__()
        self.embedding, self.dropout = embedding, dropout
        self.register_buffer("content", content, persistent=False)
        self.register_buffer("is_item", content.abs().sum(1) > 0, persistent=False)
        self.projection = nn.Linear(content.shape[1], embedding.embedding_dim, bias=False)
        with torch.no_grad():
            nn.init.normal_(self.projection.weight, std=0.02 / content.shape[1] ** 0.5)
            embedding.weight[self.is_item & ~seen] = 0.0
            # What an item's own weight starts with is noise, which content would have to outgrow.
            embedding.weight[self.is_item & seen] *= 0.1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., width] of token ids [...]."""
        own = self.embedding(ids)
        if self.training and self.dropout:
            drop = (torch.rand(ids.shape, device=ids.device) < self.dropout) & self.is_item[ids]
            own = own.masked_fill(drop[..., None], 0.0)
        return own + self.projection(self.content[ids])

    @torch.no_grad()
    def folded(self) -> nn.Embedding:
        """The stock layer with the same answers."""
        result = nn.Embedding(*self.embedding.weight.shape, padding_idx=self.embedding.padding_idx)
        result.weight.copy_(self.embedding.weight + self.projection(self.content))
        return result


def give_content(
    classifier: BehaviorClassifier, content: torch.Tensor, seen: torch.Tensor, first: int, dropout: float
) -> None:
    """Let a student of item ids read what the teacher knows of the items.

    content: float32 [items, d]. seen: bool [items], those with training rows. first: token of the first item.
    """
    stock = classifier.stock
    embedding = stock.get_input_embeddings()
    rows = embedding.weight.shape[0]
    whole, known = torch.zeros(rows, content.shape[1]), torch.ones(rows, dtype=torch.bool)
    whole[first : first + len(content)] = content
    known[first : first + len(content)] = seen
    stock.set_input_embeddings(ItemEmbedding(embedding, whole, known, dropout))


def fold_content(classifier: BehaviorClassifier) -> None:
    """Put what `give_content` added into the stock embeddings."""
    embedding = classifier.stock.get_input_embeddings()
    if isinstance(embedding, ItemEmbedding):
        classifier.stock.set_input_embeddings(embedding.folded())
