"""Options of the base model and of each tuning method.

The string under a field is its help text on the command line, and is written nowhere else. Values are checked when an
object is made, so that a bad one fails before any weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmrec_peft.errors import ConfigError, one_line
from llmrec_peft.fields import check_fields, key_of, number, require
from llmrec_peft.messages import shortened

# What LoRA's `init` may be, and the advice for PEFT's schemes that need activations of real batches first.
LORA_INITS = ("default", "gaussian", "olora", "pissa", "loftq", "orthogonal")
_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")
_DATA_INITS = ("eva", "corda")

MAX_RANK = 4096
"""Rank of a low-rank update, at most: the width of a layer of 7 billion weights."""
MAX_LAYERS = 10_000
"""Layers of a base, at most."""


def _layers() -> Any:
    """The field of layer numbers."""
    return number(None, 0, MAX_LAYERS)


def _check_layers(layers: list[int] | None) -> None:
    different = layers is None or (len(layers) > 0 and len(set(layers)) == len(layers))
    require(different, "layers", "null or a list of different layer numbers from 0", layers)


def _check_targets(targets: str | list[str]) -> None:
    """A text other than all-linear is a regular expression, which must be one that a linear-time matcher knows."""
    require(bool(targets), "target_modules", "all-linear or a list of names", targets)
    if not isinstance(targets, str) or targets == "all-linear":
        return
    try:
        matching_names(targets, [""])
    except ValueError as error:
        requirement = f"all-linear, a list of names or a regular expression in RE2's syntax ({one_line(error)})"
        raise ConfigError(
            f"{key_of('target_modules')} must be {requirement}, not {shortened(repr(targets))}; list the modules' names"
        ) from None


def matching_names(pattern: str, names: list[str]) -> list[str]:
    """Those of `names` that a regular expression describes whole, in time linear in their length (RE2).

    Raises:
        ValueError: not a regular expression of RE2, which has no backreferences and no lookaround.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = pa.array(names, pa.string())
    return array.filter(pc.match_substring_regex(array, rf"\A(?:{pattern})\z")).to_pylist()


@dataclass
class ModelOptions:
    """Base model and classification head."""

    base: str = "smollm2-135m"
    """Base model: an embedded name (smollm2-135m), a Hub id, a local directory, or a .gguf file."""
    gguf_file: str | None = None
    """Name of the GGUF file in the directory `base`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the base weights; the head is always float32. Method full needs float32."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; flash_attention_2 supports streams without candidates only."""
    head_init: Literal["label_words", "zero", "random", "words"] = "label_words"
    """Initialization of the head: label_words (rows of the language-model head for the label words; random for an
    encoder; a base that already classifies these labels keeps its head), zero, or random. words is the former name of
    label_words."""
    head_scale: float = number(1.0, 0, 1e6, above=True)
    """Scale of the head with `head_init: label_words`."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory; training takes longer."""
    trust_remote_code: bool = False
    """Run model code that comes with the base."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_init == "words":  # in configurations and manifests of version 0.1
            self.head_init = "label_words"
        require(bool(self.base.strip()), "base", "a model name or path", self.base)


@dataclass
class LoraOptions:
    """LoRA: low-rank adapters in the linear layers (Hu et al. 2021)."""

    r: int = number(16, 1, MAX_RANK)
    """Rank of the update matrices."""
    alpha: float = number(32, 0, 1e6, above=True)
    """Alpha: updates are scaled by alpha / r, or alpha / sqrt(r) with rslora."""
    dropout: float = number(0.0, 0, 1, below=True)
    """Dropout probability on the input of the update matrices."""
    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: all-linear, a list of module names, or a regular expression (RE2) that matches whole paths."""
    dora: bool = False
    """Use weight-decomposed updates (DoRA, Liu et al. 2024)."""
    rslora: bool = False
    """Use the rank-stabilized scale alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    init: str = "default"
    """Initialization of the updates: default, gaussian, olora, pissa, pissa_niter_N, loftq or orthogonal."""
    layers: list[int] | None = _layers()
    """Indices of the layers to adapt, from 0; null for all."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_targets(self.target_modules)
        _check_layers(self.layers)
        if self.init in _DATA_INITS:
            raise ConfigError(
                f"{key_of('init')} must be one of {', '.join(LORA_INITS)} or pissa_niter_N, not {self.init!r}, which "
                "needs activations of real batches before training; use pissa or olora, which start from the weights "
                "alone"
            )
        known = self.init in LORA_INITS or _PISSA_NITER.fullmatch(self.init) is not None
        require(known, "init", f"one of {', '.join(LORA_INITS)} or pissa_niter_N", self.init)
        require(
            not (self.init == "orthogonal" and self.r % 2), "r", "an even number with init orthogonal", self.r
        )  # fmt: skip


@dataclass
class QloraOptions(LoraOptions):
    """QLoRA: LoRA on a 4-bit base (Dettmers et al. 2023)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of the base weights."""
    double_quant: bool = True
    """Quantize the quantization constants too (double quantization)."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of matrix products; null for the model's dtype."""
    quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] | None = None
    """Storage type of the packed weights; null for uint8. With FSDP it must equal the model's dtype."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not changes_base(self), "init", "default, gaussian or loftq on a 4-bit base", self.init)


def changes_base(options: LoraOptions) -> bool:
    """True for the initialisations that move part of the base weights into the adapter."""
    return options.init == "olora" or options.init.startswith("pissa")


@dataclass
class AdapterOptions:
    """Bottleneck adapters: small feed-forward blocks in each layer."""

    placement: Literal["pfeiffer", "houlsby", "parallel"] = "pfeiffer"
    """Position: after the MLP (pfeiffer), after attention and MLP (houlsby), or in parallel to the MLP (parallel)."""
    size: int = number(64, 1, 65_536)
    """Width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Activation function of the bottleneck."""
    dropout: float = number(0.0, 0, 1, below=True)
    """Dropout probability between activation function and up-projection."""
    scale: float = number(1.0, -1e6, 1e6)
    """Scale of the adapter output."""
    layers: list[int] | None = _layers()
    """Indices of the layers to adapt, from 0; null for all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.scale != 0, "scale", "a finite number other than 0", self.scale)
        _check_layers(self.layers)


@dataclass
class HeadOptions:
    """Head only: the base is frozen."""


@dataclass
class FullOptions:
    """Full fine-tuning of base and head."""


MethodOptions = LoraOptions | QloraOptions | AdapterOptions | HeadOptions | FullOptions

# The one registry of tuning methods: lookup, error texts and docs read it.
METHODS: dict[str, type] = {
    "lora": LoraOptions,
    "qlora": QloraOptions,
    "adapter": AdapterOptions,
    "head": HeadOptions,
    "full": FullOptions,
}


def method_options(method: str, values: Mapping[str, Any]) -> MethodOptions:
    """Options object of `method` from a plain mapping. Raises ConfigError for an unknown method, key or value."""
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, not {method!r}; choose one of them")
    return from_mapping(METHODS[method], values, f"method {method}")


def method_name_of(options: MethodOptions) -> str:
    """Name of the method that an options object belongs to."""
    return next(name for name, kind in METHODS.items() if type(options) is kind)


def from_mapping(kind: type, values: Mapping[str, Any], what: str) -> Any:
    """Dataclass `kind` from a mapping. Raises ConfigError for keys that it lacks, naming those it has."""
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [key for key in values if key not in known]
    if unknown:
        listed = ", ".join(known) or "none"
        raise ConfigError(f"{what} has no option {unknown[0]!r}; its options are: {listed}")
    return kind(**values)
