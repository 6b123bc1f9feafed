"""Options of the memory estimate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec_peft.errors import ConfigError
from llmrec_peft.fields import MAX_COUNT, MAX_TOKENS, check_fields, number
from llmrec_peft.models.tuning_options import (
    METHODS,
    AdapterOptions,
    LoraOptions,
    MethodOptions,
    ModelOptions,
    QloraOptions,
)


def _require(rule: bool, key: str, requirement: str, value: object) -> None:
    if not rule:
        raise ConfigError(f"{key} must be {requirement}, not {value!r}; change --{key}")


@dataclass(kw_only=True)
class MemoryConfig(ModelOptions):
    """Estimate the peak memory of training, per device, without loading the base's weights.

    The base needs only its config.json: name the directory that holds it, or the file itself.
    """

    method: Literal["lora", "qlora", "adapter", "head", "full"] = "lora"
    """Tuning method; the options under its name belong to it."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    qlora: QloraOptions = field(default_factory=QloraOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    labels: int = number(2, 2, 100_000)
    """Labels of the domain: rows of the head."""
    micro_tokens: int = number(1200, 1, MAX_TOKENS)
    """Tokens of one micro-batch, at most, as train.micro_tokens."""
    length: int = number(600, 1, MAX_TOKENS)
    """Tokens of a stream; a stream longer than micro_tokens is a micro-batch by itself."""
    targets: int = number(30, 1, MAX_TOKENS)
    """Targets of a stream, as domain.stream.targets."""
    candidates: bool = False
    """Streams have candidates, which need a mask [rows, 1, length, length]."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast to bfloat16: the launcher's --mixed_precision bf16, or zero3_bf16.yaml."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    """Optimiser, as train.optimizer."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Kind of device; on a GPU the optimiser updates all tensors at once, which briefly needs more memory."""
    gpus: int = number(1, 1, MAX_COUNT)
    """Devices, with one process each."""
    zero: int = number(0, 0, 3)
    """Stage of DeepSpeed's ZeRO, 0 to 3; 0 is one process, or DDP."""
    offload_optimizer: bool = False
    """Keep optimiser states and compute the update in host memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights in host memory (ZeRO-3)."""

    def __post_init__(self) -> None:
        _require(self.zero in (0, 1, 2, 3), "zero", "0, 1, 2 or 3", self.zero)
        check_fields(self, brief=True)
        super().__post_init__()
        _require(self.targets <= self.length, "targets", f"at most the length {self.length}", self.targets)
        _require(not self.offload_optimizer or self.zero >= 1, "zero", "1, 2 or 3 with offload_optimizer", self.zero)
        _require(not self.offload_parameters or self.zero == 3, "zero", "3 with offload_parameters", self.zero)
        if self.method == "qlora" and self.zero == 3:
            raise ConfigError(
                "zero must be 0, 1 or 2 with method qlora, not 3: ZeRO-3 does not split packed 4-bit weights; "
                "change --zero or --method"
            )

    @property
    def tuning(self) -> MethodOptions:
        """Options of the method."""
        return getattr(self, self.method) if hasattr(self, self.method) else METHODS[self.method]()

    @property
    def rows(self) -> int:
        """Streams in a micro-batch, as `plan_micro_batches` forms them."""
        return max(1, self.micro_tokens // self.length)
