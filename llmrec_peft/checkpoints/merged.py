"""Writing merged models and students: a stock sequence classifier in a directory, and its behavior.json.

Transformers alone loads such a directory with `AutoModelForSequenceClassification`. Its `behavior.json` differs from a
bundle's: `kind` is "merged", and it has the fingerprint of all weights, those of the head included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec_peft.checkpoints.checksum import sha256
from llmrec_peft.checkpoints.manifest import write_manifest
from llmrec_peft.checkpoints.manifest_schema import MERGED, MODEL_CONFIG
from llmrec_peft.checkpoints.merged_checks import weights_files
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.end_token import save_tokenizer, tokens_around
from llmrec_peft.models.fingerprints import fingerprint, tokenizer_fingerprint
from llmrec_peft.models.safetensors_header import read_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def loading_notes(classifier: BehaviorClassifier, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Entries of a manifest that loading needs: the tokenizer's fingerprint and the attention kernel."""
    options = classifier.model_options
    return {
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            **tokens_around(tokenizer, encoder=classifier.encoder),
        },
        "attn": "eager" if options is not None and options.attn == "eager" else "sdpa",
    }


def save_merged(
    scratch: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_shard_size: str | int,
    trust_remote_code: bool = False,
) -> None:
    """Write a stock classifier and its tokenizer into a scratch directory, in weights files of `max_shard_size`."""
    model.save_pretrained(scratch, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, scratch, trust_remote_code=trust_remote_code)
    for path in weights_files(scratch):
        path.chmod(0o644)


def write_merged_manifest(scratch: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write behavior.json beside the files of `save_merged`; returns it.

    content: all entries but those that are computed from the files.
    """
    written = {
        "weights": {"fingerprint": fingerprint(read_headers(weights_files(scratch)))},
        "files": {MODEL_CONFIG: sha256(scratch / MODEL_CONFIG)},
    }
    return write_manifest(scratch, {**content, **written}, MERGED)
