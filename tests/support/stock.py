"""Bases whose tokenizers frame or change a text in other ways, as published ones do, and what stock classes say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from llmrec_peft.checkpoints.loading import load_trained
from llmrec_peft.merging.synthetic_inputs import SyntheticStreams
from tests.conftest import SENTENCES, make_tiny_config, make_tokenizer

END, START = "<|endoftext|>", "<s>"


def framed(processor: Callable[[dict[str, int]], Any], **tokens: str) -> PreTrainedTokenizerFast:
    """The suite's tokenizer with another post-processor, made from its vocabulary."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processor(tokenizer.get_vocab())
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def template(single: str) -> Callable[[dict[str, int]], Any]:
    def make(vocabulary: dict[str, int]) -> Any:
        used = [(token, vocabulary[token]) for token in single.split() if token != "$A"]
        return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=used)

    return make


def in_sequence(single: str) -> Callable[[dict[str, int]], Any]:
    return lambda words: processors.Sequence([processors.ByteLevel(trim_offsets=False), template(single)(words)])


def as_roberta(vocabulary: dict[str, int]) -> Any:
    return processors.RobertaProcessing((END, vocabulary[END]), (START, vocabulary[START]), add_prefix_space=False)


def of_pieces(*, end: bool, lower: bool = False) -> PreTrainedTokenizerFast:
    """As SentencePiece's: a space before every text, one unknown token, no byte tokens; padded with its end token."""
    signs = sorted({sign for text in SENTENCES for sign in text} | set("abcdefghijklmnopqrstuvwxyz0123456789().▁:\n"))
    words = ["▁->", "▁yes", "▁no", "▁Heat", "▁Movies", "▁one", "▁viewer", "▁rated"]
    scores = [("<unk>", 0.0), ("</s>", 0.0), *((sign, -8.0) for sign in signs), *((word, -4.0) for word in words)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Lowercase() if lower else None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def write_base(directory: Path, tokenizer: Any, kind: str = "llama", config: Any = None) -> Path:
    """A tiny random decoder with this tokenizer."""
    config = config or make_tiny_config(kind, len(tokenizer), tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def prompts_of(bundle: Path, domain: Any, count: int = 6) -> tuple[list[str], torch.Tensor]:
    """Whole prompts as texts, and the bundle's logits at their markers, by this package."""
    loaded = load_trained(bundle)
    samples = SyntheticStreams(domain, loaded.tokenizer, independent=True)
    rows = []
    for number in range(count):
        ids = torch.from_numpy(samples[number].input_ids.astype(np.int64))[None]
        with torch.no_grad():
            rows.append(loaded.classifier(ids, markers=torch.from_numpy(samples[number].markers)))
    return samples.texts[:count], torch.cat(rows)


def stock_text_logits(directory: Path, texts: list[str], side: str | None = None) -> torch.Tensor:
    """Logits by Transformers alone: whole texts, special tokens as the tokenizer adds them, one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    sides = {} if side is None else {"padding_side": side}
    batch = tokenizer(texts, padding=True, return_tensors="pt", **sides)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        return model(**batch).logits.float()
