"""A student of item ids: a tiny decoder that reads one token an item and one an outcome, in place of item texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from llmrec_peft.data.domain import ITEM_EVENT, Domain
from llmrec_peft.data.rendering import render
from llmrec_peft.data.vocabulary import UNKNOWN_ITEM
from llmrec_peft.distillation.distill_options import StudentOptions
from llmrec_peft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN = "<pad>", "<s>"


def item_id_tokenizer(item_ids: pa.Array | pa.ChunkedArray, domain: Domain) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is: 3 special tokens, one token an outcome, one token an item.

    The token of item row r is `first_item(domain) + r`.

    Args:
        item_ids: ids of the catalogue [items].
        domain: a domain of item ids, from `Domain.of_ids`.

    Raises:
        DataError: two ids that are equal once line breaks and special tokens are removed.
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
    """Token of the first item in the vocabulary of `item_id_tokenizer`."""
    return 3 + len(domain.outcomes)


def write_item_id_student(
    item_ids: pa.Array | pa.ChunkedArray, domain: Domain, options: StudentOptions, seed: int, directory: Path
) -> None:
    """Write the stock checkpoint of an untrained student and its tokenizer; `domain` is one of `Domain.of_ids`."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = item_id_tokenizer(item_ids, domain)
    labels = domain.labels
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=4 * options.width,
        num_hidden_layers=options.layers or 2, num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=domain.stream.max_length, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None,
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification",
    )  # fmt: skip
    # The seed of the new weights must not change the random state of the run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
