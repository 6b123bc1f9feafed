"""The weights of a base as they lie on disk: where each tensor is, and the fingerprint of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from llmrec_peft.documents import read_mapping
from llmrec_peft.errors import ModelError
from llmrec_peft.models.base import base_errors, load_config, resolve_base
from llmrec_peft.models.fingerprints import fingerprint_of
from llmrec_peft.models.safetensors_header import TensorEntry, read_headers
from llmrec_peft.models.sharding import gathered
from llmrec_peft.models.tensor_files import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NOT_BACKBONE = ("score.", "classifier.", "lm_head.", "cls.", "embed_out.")
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "embeddings.position_ids")


def base_fingerprint(base: str | Path, *, trust_remote_code: bool = False) -> str:
    """SHA-256 of the backbone's weights as they lie on disk (`fingerprint`) and of what its config computes.

    Heads are left out. The result does not depend on sharding, on how the model is loaded, or on whether the checkpoint
    is a language model or a classifier: names are taken without the backbone's prefix. The prefix "sampled-" says that
    the weights were too many to be read whole. The fingerprint of a large checkpoint is cached until the path, size or
    time of change of one of its files differs.
    """
    config = load_config(str(base), trust_remote_code=trust_remote_code)
    return fingerprint_of(backbone_entries(str(base), trust_remote_code=trust_remote_code), config)


def backbone_entries(base: str, *, trust_remote_code: bool = False) -> dict[str, TensorEntry]:
    """Where the backbone's tensors lie on disk, by their names without the backbone's prefix."""
    prefix = _backbone_prefix(load_config(base, trust_remote_code=trust_remote_code))
    entries = {
        name.removeprefix(prefix): entry
        for name, entry in weight_entries(base).items()
        if not name.startswith(_NOT_BACKBONE) and not name.endswith(_BUFFERS)
    }
    if not entries:
        raise ModelError(f"base {base} holds no backbone weights; use a complete checkpoint")
    return entries


def word_rows(base: str, model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Rows of the base's language-model head for some tokens, float32 [len(token_ids), hidden].

    A stock classifier has no such head. If the head is tied, its rows are those of the input embedding; else they are
    read from the checkpoint's lm_head.weight.
    """
    if model.config.get_text_config().tie_word_embeddings:
        embedding = cast(nn.Parameter, model.get_input_embeddings().weight)
        with gathered([embedding]):
            return embedding.detach()[token_ids].float()
    entries = weight_entries(base)
    for name in ("lm_head.weight", "embed_out.weight"):
        if name in entries:
            return read_rows(entries[name], token_ids)
    raise ModelError(f"base {base} has no language-model head to start the head from; set model.head_init to zero")


def _backbone_prefix(config: PreTrainedConfig) -> str:
    from transformers import AutoModelForSequenceClassification

    kinds = AutoModelForSequenceClassification._model_mapping
    kind = cast("type[PreTrainedModel] | None", kinds.get(type(config), None))
    return f"{kind.base_model_prefix}." if kind is not None and kind.base_model_prefix else "model."


def weight_entries(base: str) -> dict[str, TensorEntry]:
    try:
        return read_headers(_weight_files(base))
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"base {base}: {error}; download or save it again") from None


def _weight_files(base: str) -> list[Path]:
    """Safetensors files of a base, downloaded if it is a Hub id."""
    from transformers.utils.hub import cached_file

    source = resolve_base(base)
    with base_errors(base):
        options = {"_raise_exceptions_for_missing_entries": False}
        single = cached_file(source, "model.safetensors", **options)
        if single is not None:
            return [Path(single)]
        index = cached_file(source, "model.safetensors.index.json", **options)
        if index is None:
            raise ModelError(f"base {base} has no model.safetensors; save it as safetensors (no pickle is read)")
        named = read_mapping(index, error=ModelError).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
            raise ModelError(f"base {base}: {index} has no weight_map from tensors to files; download or save it again")
        shards = sorted(set(named.values()))
        found = [cached_file(source, shard) for shard in shards]  # never None here: a missing shard is an error
        return [Path(path) for path in found if path is not None]
