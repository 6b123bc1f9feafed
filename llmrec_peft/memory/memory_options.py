"""Options of the memory estimator."""

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
    """Estimate the peak memory of training per device, without loading the base's weights.

    Of the base, only config.json is needed: give its directory or the file. `--json` prints JSON.
    """

    method: Literal["lora", "qlora", "adapter", "head", "full"] = "lora"
    """Tuning method; the section of its name holds its options."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    qlora: QloraOptions = field(default_factory=QloraOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    labels: int = number(2, 2, 100_000)
    """Number of labels of the domain, which is the number of rows of the head."""
    micro_tokens: int = number(1200, 1, MAX_TOKENS)
    """Maximum tokens per forward pass, as train.micro_tokens."""
    length: int = number(600, 1, MAX_TOKENS)
    """Tokens per stream; a stream longer than micro_tokens is a batch of its own."""
    targets: int = number(30, 1, MAX_TOKENS)
    """Targets per stream, as domain.stream.targets."""
    candidates: bool = False
    """Streams have candidates, which need an attention mask [rows, 1, length, length]."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast to bfloat16: the launcher's --mixed_precision bf16, or zero3_bf16.yaml."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    """Optimizer, as train.optimizer."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Device type; on a GPU the optimizer updates all tensors at once, which needs more memory for a moment."""
    gpus: int = number(1, 1, MAX_COUNT)
    """Number of devices, one process each."""
    zero: int = number(0, 0, 3)
    """Stage of DeepSpeed ZeRO, 0 to 3; 0 is one process or DDP."""
    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory and update there (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights in the host's memory (ZeRO-3)."""

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
