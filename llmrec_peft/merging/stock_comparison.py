"""A merged checkpoint compared with Transformers alone: `AutoTokenizer` on whole texts, then the stock classifier.

Nothing of this package runs between a text and its logits here. A stock classifier pools the last token of a row that
is not the pad token; `checkpoints.stock_tokenizer` prepares the tokenizer for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import Stream
from llmrec_peft.data.streams import Streams, independent_prompts
from llmrec_peft.data.vocabulary import UNKNOWN_ITEM
from llmrec_peft.errors import BundleError
from llmrec_peft.merging.synthetic_inputs import SyntheticStreams

_PROMPTS = 8


class StockPrompts:
    """A few prompts of one prediction each, for stock classes.

    Attributes:
        tokens: their token ids.
        texts: the same as whole texts; None where the model reads item ids, and prompts come from `streams`.
        lengths: int64 [prompts], tokens of each.
    """

    def __init__(self, merged: Bundle, streams: Streams | None) -> None:
        self.texts: list[str] | None = None
        if streams is not None and merged.tokenizer.unk_token == UNKNOWN_ITEM:
            whole = independent_prompts(streams)
            self._rows = [whole[number] for number in range(min(_PROMPTS, len(whole)))]
        else:
            domain = Domain.of_manifest(merged.domain, source="the bundle's domain")
            inputs = SyntheticStreams(domain, merged.tokenizer, independent=True)
            # Of different lengths, and from different positions of their windows.
            numbers = np.linspace(0, len(inputs) - 1, min(_PROMPTS, len(inputs))).round().astype(int)
            self._rows = [inputs[number] for number in numbers]
            self.texts = [inputs.texts[number] for number in numbers]
        self.tokens = [row.input_ids for row in self._rows]
        self.lengths = np.array([len(row) for row in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Stream:
        return self._rows[number]


class StockModel:
    """A checkpoint and its tokenizer as Transformers loads them, in the checkpoint's own number format."""

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=trust_remote_code)
        self._model = model.eval()

    def of_tokens(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Logits [rows, labels] of token ids, padded on the right."""
        pad, longest = self._tokenizer.pad_token_id, max(map(len, rows))
        ids, seen = (torch.full((len(rows), longest), value) for value in (pad, 0))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
            seen[number, : len(row)] = 1
        return self._logits({"input_ids": ids, "attention_mask": seen})

    def of_texts(self, texts: Sequence[str], side: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [texts, labels] of whole texts with the tokenizer's own special tokens, and the tokens of each."""
        batch = self._tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt")
        ids, seen = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(bool)
        return self._logits(batch), [row[mask] for row, mask in zip(ids, seen, strict=True)]

    def _logits(self, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        with torch.no_grad():
            return self._model(**batch).logits.float().numpy()


def measure_stock(
    directory: Path,
    rows: Sequence[np.ndarray],
    texts: Sequence[str] | None,
    logits: np.ndarray,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Compare a merged model's logits with those of stock classes on the same prompts.

    Args:
        rows: the prompts' token ids, as this package builds them.
        texts: the same prompts as texts; None where a model reads item ids, which no text spells.
        logits: logits of the merged model at the markers, [prompts, labels].

    Returns:
        `stock_difference`: largest difference through our tokens. `stock_prompts`: how many. None without texts:
        `text_same_tokens`, how many of the texts give our tokens; `text_same_difference`, the largest of these (None
        where there is none), which must be rounding alone; `text_difference` and `text_mean_difference` through
        the tokenizer's; `text_left_difference`, the largest when they are padded on the left.
    """
    stock = StockModel(directory, trust_remote_code)
    found: dict[str, Any] = {
        "stock_prompts": len(rows),
        "stock_difference": float(np.abs(stock.of_tokens(rows) - logits).max()),
        "text_same_tokens": None,
        "text_same_difference": None,
        "text_difference": None,
        "text_mean_difference": None,
        "text_left_difference": None,
    }
    if texts is None:
        return found
    right, tokens = stock.of_texts(texts, "right")
    left, _ = stock.of_texts(texts, "left")
    same = [np.array_equal(ours, theirs) for ours, theirs in zip(rows, tokens, strict=True)]
    return found | {
        "text_same_tokens": int(sum(same)),
        "text_same_difference": float(np.abs(right - logits)[same].max()) if any(same) else None,
        "text_difference": float(np.abs(right - logits).max()),
        "text_mean_difference": float(np.abs(right - logits).mean()),
        "text_left_difference": float(np.abs(left - logits).max()),
    }


def check_stock(out: Path, measured: Mapping[str, Any], tolerance: float) -> None:
    """Raise BundleError where `measure_stock` found a difference that rounding does not explain."""
    if not measured["stock_difference"] <= tolerance:
        raise BundleError(
            f"merged model {out} differs in stock classes: on the same tokens logits differ by "
            f"{measured['stock_difference']:.3g} at most, over the tolerance {tolerance:.3g}, so it was not kept; "
            "stock classes must read the last token that is not the pad token, which a base's own code may change"
        )
    through_text = measured["text_same_difference"]
    if through_text is not None and not through_text <= tolerance:
        raise BundleError(
            f"merged model {out} differs in stock classes: where whole texts give our tokens, logits differ by "
            f"{through_text:.3g} at most, over the tolerance {tolerance:.3g}, so it was not kept; nothing else that "
            "the tokenizer returns, such as token types, may change the logits: correct model_input_names in its "
            "tokenizer_config.json"
        )
