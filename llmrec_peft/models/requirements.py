"""What streams require of a base, by its configuration and its modules: positions, windows, layer kinds.

`selftest` measures the rest.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from llmrec_peft.errors import ModelError
from llmrec_peft.models.stock_parts import backbone_of, find_backbone, head_of, is_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PADDED_POSITIONS = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod",
    "longformer", "luke", "mpnet", "ibert", "esm", "lilt", "layoutlmv3", "markuplm",
)  # fmt: skip
"""Encoders that count positions from pad_token_id + 1, as RoBERTa does: the positions below hold no token."""

WINDOWS = (
    "sliding_window", "sliding_window_size", "sliding_windows", "attention_window", "attention_window_size",
    "local_attention", "local_attention_window_len", "attention_chunk_size", "window_size", "keep_window_size",
    "index_topk",
)  # fmt: skip
"""Configuration keys of attention windows: a number of tokens, or a list of one number for each layer."""
_LAYERS_OF = {
    "sliding_window": "slid", "sliding_window_size": "slid", "sliding_windows": "slid", "attention_chunk_size": "chunk",
    "window_size": "local", "index_topk": "index",
}  # fmt: skip
"""Which layer kinds a window belongs to, by a part of their names."""

LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
"""Configuration keys that name the kind of each layer."""
ATTENTION_KINDS = (
    "full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local", "full", "sliding",
    "moe", "mlp", "dense", "sparse",
)  # fmt: skip
"""Layers that hide what a mask forbids: softmax attention under the model's mask, and layers without attention, which
act on each token separately."""
_PATTERN = {"*": "attention", "-": "mlp", "E": "moe", "|": "moe", "M": "mamba", "D": "linear_attention"}
"""Letters of Nemotron-H's `hybrid_override_pattern`."""
_ATTENTION_PLACES = ("attn_layer_indices", "full_attn_idxs")
"""Configuration keys that list the layers with attention; the others have none."""
_RECURRENT_CLASSES = re.compile(
    r"Mamba|SSM|R[Ww][Kk][Vv]|Recurrent|RG?[Ll][Rr][Uu]|GatedDelta|DeltaNet|DeltaAttention|LinearAttention"
    r"|LightningAttention|Short[Cc]onv|Hyena|Retention|[msx]LSTM"
)


def check_positions(config: PreTrainedConfig, max_length: int) -> None:
    """Raise ModelError unless each of `max_length` tokens sees all tokens before it, whatever the length of the row."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in _PADDED_POSITIONS:
        positions -= (text.pad_token_id or 0) + 1
    if positions is not None and max_length > positions:
        raise ModelError(
            f"base has {positions} positions but max_length is {max_length}; "
            f"lower domain.stream.max_length to {positions} or use another base"
        )
    for kind, limit in _changing_ropes(text):
        if max_length > limit:
            raise ModelError(
                f"base has {kind} RoPE, whose frequencies change for all tokens of a pass beyond {limit} tokens, but "
                f"max_length is {max_length}; lower domain.stream.max_length to {limit} or use another base"
            )
    for name, window in _windows(config):
        if max_length > window:
            raise ModelError(
                f"base attends over a {name.replace('_', ' ')} of {window} tokens but max_length is {max_length}; "
                f"lower domain.stream.max_length to {window} or use another base"
            )


def _changing_ropes(text: Any) -> Iterator[tuple[str, int]]:
    """(kind, tokens) of rotary embeddings whose frequencies depend on the longest position of a pass."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nests = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    positions = getattr(text, "max_position_embeddings", None)
    original = getattr(text, "original_max_position_embeddings", None)
    for rope in nests:
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        own = rope.get("original_max_position_embeddings") or original
        limit = own or positions
        if kind in ("longrope", "su") and limit:
            yield "longrope", int(limit)
        elif "dynamic" in kind and (own or positions):
            yield kind, min(int(value) for value in (own, positions) if value)


def _windows(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """(key, tokens) of the windows that limit what a token sees.

    An encoder gets each prompt alone, as its stock model does, so its windows do not matter. But block-sparse attention
    chooses its blocks by the length of the padded batch.
    """
    text = config.get_text_config()
    if is_encoder(config):
        if getattr(text, "attention_type", None) == "block_sparse":
            # Shorter rows get full attention (Zaheer et al. 2020, as Transformers has it).
            yield "block_sparse", (5 + 2 * text.num_random_blocks) * text.block_size
        return
    kinds = {str(kind) for key in LAYER_KINDS for kind in getattr(text, key, None) or ()}
    for key in WINDOWS:
        value = getattr(text, key, None)
        belongs = _LAYERS_OF.get(key)
        if kinds and belongs and not any(belongs in kind or kind == "local" for kind in kinds):
            continue
        if key.startswith("sliding_window") and _own(text, "use_sliding_window") is False:
            continue
        sizes = value if isinstance(value, list | tuple) else [value]
        sizes = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size > 0]
        if sizes:
            yield key, min(sizes)


def _own(config: Any, key: str) -> Any:
    """A value that the configuration's class knows; None for one that only a file brought and no code reads."""
    value = getattr(config, key, None)
    return value if value is not None and key in inspect.signature(type(config)).parameters else None


def unfit_for_candidates(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> str | None:
    """Why candidates cannot be hidden from each other, by configuration and modules; None if they can."""
    odd = odd_layers(config, model)
    if odd:
        return f"layers of the kind {', '.join(odd)} do not follow a mask"
    return "ALiBi: positions cannot be given" if _own(config.get_text_config(), "alibi") else None


def odd_layers(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> list[str]:
    """Names of layer kinds that do not hide what a mask forbids: linear attention, mamba, conv, recurrent and such."""
    text = config.get_text_config()
    kinds = {str(kind) for key in LAYER_KINDS for kind in getattr(text, key, None) or ()}
    pattern = getattr(text, "hybrid_override_pattern", None) or ""
    kinds |= {_PATTERN.get(letter, letter) for letter in pattern}
    found = sorted(kinds - set(ATTENTION_KINDS))
    for key in _ATTENTION_PLACES:
        places = getattr(text, key, None)
        if not found and places is not None and len(set(places)) < text.num_hidden_layers:
            found = [f"layers beside {key}"]
    if found or model is None:
        return found
    backbone = backbone_of(model)
    classes = {
        type(module).__name__
        for module in backbone.modules()
        if isinstance(module, nn.Conv1d | nn.RNNBase) or _RECURRENT_CLASSES.search(type(module).__name__)
    }
    return sorted(classes - {type(backbone).__name__})


def candidates_of(domain: Any) -> str | None:
    """The rule of a domain, or of its mapping, that lets candidates stand side by side; None for prefixes alone."""
    per_positive = _rule(domain, "negatives", "per_positive")
    if per_positive:
        return f"negatives.per_positive is {per_positive}"
    if _rule(domain, "simultaneous") == "isolate":
        return "simultaneous is isolate"
    joining, labels = _rule(domain, "stream", "history_labels"), list(_rule(domain, "outcomes") or ())
    if joining is not None and set(labels) - set(joining):
        return f"stream.history_labels leaves out {min(set(labels) - set(joining))!r}"
    return None


def _rule(domain: Any, *path: str) -> Any:
    """A value of a domain or of its mapping; None where it is not there."""
    for key in path:
        domain = domain.get(key) if isinstance(domain, Mapping) else getattr(domain, key, None)
    return domain


def check_layout(base: str, model: PreTrainedModel) -> None:
    """Raise ModelError unless a stock classifier has a backbone and a head that streams can use."""
    kind, backbone = type(model).__name__, find_backbone(model)
    if backbone is None:
        raise ModelError(f"base {base}: {kind} has no backbone under its prefix; use another architecture")
    head = head_of(model)
    if is_encoder(model.config):
        return
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise ModelError(f"base {base}: the head of {kind} is not a linear layer without bias; use another base")
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise ModelError(
            f"base {base}: {type(backbone).__name__} takes no position_ids, which streams with candidates need; "
            "use a decoder with rotary or learned positions"
        )
