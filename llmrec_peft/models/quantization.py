"""4-bit storage of a base's linear layers by bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmrec_peft.errors import ModelError, joined_lines
from llmrec_peft.models.stock_parts import HEAD_NAMES
from llmrec_peft.models.tuning_options import MethodOptions, ModelOptions, QloraOptions

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class Quantization:
    """Options of 4-bit storage, as bitsandbytes names them."""

    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "float32"
    quant_storage: str = "uint8"


def quantization_of(tuning: MethodOptions, model_options: ModelOptions) -> Quantization | None:
    """Storage of the base's linear layers by the method's options; None if they are not quantised."""
    if not isinstance(tuning, QloraOptions):
        return None
    return Quantization(
        tuning.quant_type,
        tuning.double_quant,
        tuning.compute_dtype or model_options.dtype,
        tuning.quant_storage or "uint8",
    )


def bnb_config(quantization: Quantization | None) -> BitsAndBytesConfig | None:
    """Transformers' configuration of 4-bit layers, which leaves every head whole; None for None."""
    if quantization is None:
        return None
    _require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.quant_storage),
        # This list replaces the library's own, which names the language-model head alone.
        llm_int8_skip_modules=["lm_head", r".*\.pooler", "pre_classifier", *HEAD_NAMES],
    )


def check_quantization(quant_type: str, device: torch.device) -> None:
    """Raise ModelError unless bitsandbytes has 4-bit kernels for `device`; it tries them on a small matrix."""
    _require_bitsandbytes()
    import bitsandbytes.functional as functional

    try:
        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type=quant_type)
        functional.dequantize_4bit(packed, state)
    except Exception as error:  # what a missing kernel raises differs by backend and version
        raise ModelError(
            f"method qlora: bitsandbytes cannot quantise to {quant_type} on {device.type} ({joined_lines(error)}); "
            "use method lora, or another device"
        ) from error


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("method qlora needs the package bitsandbytes; install it with: pip install llmrec_peft[qlora]")
