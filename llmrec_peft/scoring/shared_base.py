"""A base model in memory that many adapters share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llmrec_peft.errors import ModelError
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.base_model import load_model
from llmrec_peft.models.base_weights import base_fingerprint
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import tokenizer_fingerprint
from llmrec_peft.models.quantization import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Attention: TypeAlias = Literal["sdpa", "eager"]


@dataclass(frozen=True)
class BaseOptions:
    """How a base is loaded.

    Attributes:
        dtype: number format; None for the one that the bundle was trained with.
        attn: attention kernel.
        device: such as "cuda"; None for the CPU.
        trust_remote_code: allow the base's own code to run.
    """

    dtype: Dtype | None = None
    attn: Attention = "sdpa"
    device: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SharedBase:
    """A base that adapters are checked against.

    Attributes:
        classifier: around the base; its own head is not used.
        name: as the user gave it.
        fingerprint, tokenizer_fingerprint: fingerprints of the base's files.
        precision: `dtype`, and `quantization` as a mapping or None.
    """

    classifier: BehaviorClassifier
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    precision: dict[str, Any]

    @property
    def pad_token_id(self) -> int:
        """Token that fills rows up."""
        return self.tokenizer.pad_token_id


def load_base(base: str, precision: dict[str, Any], options: BaseOptions, gguf_file: str | None = None) -> SharedBase:
    """Load a base for adapters to share.

    Args:
        base: an embedded name, a Hub id or a directory.
        precision: `dtype` and `quantization`; see `adapter_loading.precision_of`.
        options: attention kernel, device and trust; its dtype is not read.
        gguf_file: the file of weights where the base is GGUF.

    Raises:
        ModelError: a base that is not there, or another attention kernel.
    """
    if options.attn not in ("sdpa", "eager"):
        raise ModelError(
            f"attn must be sdpa or eager, not {options.attn!r}: candidates must not see each other; leave it out"
        )
    source, trusted = resolve_base(base, gguf_file), options.trust_remote_code
    tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    quantization = precision["quantization"]
    stock = load_model(
        source,
        2,
        id2label={0: "0", 1: "1"},
        dtype=precision["dtype"],
        attn_implementation=options.attn,
        quantization=None if quantization is None else Quantization(**quantization),
        trust_remote_code=trusted,
        pad_token_id=tokenizer.pad_token_id,
    )
    classifier = BehaviorClassifier(stock, "head", ["0", "1"])
    if options.device is not None:
        classifier.to(options.device)
    return SharedBase(
        classifier=classifier,
        tokenizer=tokenizer,
        name=base,
        fingerprint=base_fingerprint(source, trust_remote_code=trusted),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        precision=dict(precision),
    )
