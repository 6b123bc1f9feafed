"""Preparing a merged model's tokenizer and configuration, so that stock classes read a decoder at its marker.

No code of this package runs between a text and its logits here. A stock classifier pools the last token of a row that
is not the pad token. So nothing may follow a prompt's marker, and the marker must not end in the pad token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary, special_tokens_around
from llmrec_peft.errors import BundleError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, domain: Mapping[str, Any], *, encoder: bool
) -> None:
    """Change a merged model's tokenizer and configuration so that stock classes pool a decoder's marker.

    Padding is on the right, since learned positions count from the first token of a row, pads included. If the marker
    ends in the pad token, another special token becomes the pad token.

    Args:
        tokenizer, config: the model's; both are changed in place.
        domain: the domain's plain mapping.

    Raises BundleError where the tokenizer cannot leave its end token out, or has no other token to pad with.
    """
    if encoder:
        return
    suffix = special_tokens_around(tokenizer)[1]
    if len(suffix):
        raise BundleError(
            f"tokenizer {type(tokenizer).__name__} puts {tokenizer.convert_ids_to_tokens(suffix.tolist())} behind "
            "every text and cannot be told not to, so stock classes would read that token and not the marker; serve "
            "the bundle in a Scorer or a DomainBank, or train on a tokenizer without an end token"
        )
    tokenizer.padding_side = "right"
    marker = Vocabulary(Domain.of_manifest(dict(domain), source="the bundle's domain"), tokenizer).marker
    if not len(marker) or int(marker[-1]) != tokenizer.pad_token_id:
        return
    known = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    other = [token for token in known if tokenizer.convert_tokens_to_ids(token) != int(marker[-1])]
    if not other:
        raise BundleError(
            f"the marker ends in {tokenizer.pad_token!r}, which is the only token to pad with, and stock classes skip "
            "it; choose another marker, or set another pad_token in the base's tokenizer_config.json"
        )
    tokenizer.pad_token = other[0]
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
