"""What a launch configuration may be for a recipe, and what all processes of a launch must have in common."""

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from llmrec_peft.checkpoints.manifest import installed
from llmrec_peft.config.schema import RunConfig, TrainRecipeConfig, config_to_yaml
from llmrec_peft.documents import parse_yaml
from llmrec_peft.errors import ConfigError
from llmrec_peft.models.base import check_quantization
from llmrec_peft.models.tuning_options import QloraOptions
from llmrec_peft.training.distributed import on_cpu, partial_state, uses_fsdp

PACKAGES = (
    "llmrec_peft", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "numpy",
)  # fmt: skip


def check_launch(config: RunConfig, arguments: TrainingArguments) -> None:
    """Raise ConfigError or ModelError for a launch that this run cannot have.

    Some of these would end in an error deep inside a library, others in answers that are silently worse.
    """
    plugin = arguments.deepspeed_plugin
    four_bit = isinstance(config, TrainRecipeConfig) and isinstance(config.method, QloraOptions)
    if plugin is not None:
        for name in ("bf16", "fp16"):
            if plugin.hf_ds_config.get_value(f"{name}.enabled") is True:
                raise ConfigError(
                    f"{name}.enabled is true in DeepSpeed's configuration, which rounds the head and the adapters to "
                    f"{name}; set torch_autocast.enabled there instead, and model.dtype for the base"
                )
        if plugin.zero_stage == 3 and four_bit:
            raise ConfigError(
                "method qlora cannot go with ZeRO-3, which splits 4-bit weights without what dequantises them; "
                "use accelerate_configs/zero2.yaml, or fsdp2_qlora.yaml"
            )
    if uses_fsdp():
        if on_cpu():
            raise ConfigError(
                "FSDP needs GPUs: on the CPU Accelerate would leave it out without a word; use ddp, or ZeRO with "
                "DS_ACCELERATOR=cpu"
            )
        if four_bit and (config.method.quant_storage or "uint8") != config.model.dtype:
            raise ConfigError(
                f"method.quant_storage must equal model.dtype ({config.model.dtype}) with FSDP, not "
                f"{config.method.quant_storage or 'uint8'}, so that all it splits has one format; set it"
            )
    if four_bit:
        check_quantization(config.method.quant_type, arguments.device)


def launch_of(arguments: TrainingArguments) -> str:
    """How a run is split over processes; a checkpoint goes on under the same alone."""
    if arguments.deepspeed_plugin is not None:
        kind = f"DeepSpeed ZeRO-{arguments.deepspeed_plugin.zero_stage}"
    else:
        kind = "FSDP" if uses_fsdp() else "DDP"
    number = partial_state().num_processes
    return f"{number} processes with {kind}" if number > 1 or kind != "DDP" else "1 process"


def common_facts(config: RunConfig) -> dict[str, str]:
    """Settings and versions that all processes must share, by name; where the log lies may differ."""
    flat = flatten(parse_yaml(config_to_yaml(config), "the configuration", error=ConfigError))
    facts = {key: repr(value) for key, value in flat.items() if key != "data.path"}
    found = installed(*PACKAGES)
    return facts | {f"the version of {name}": found.get(name, "absent") for name in PACKAGES}


def flatten(content: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mapping to one level, with dotted keys."""
    flat = {}
    for key, value in content.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def check_shared(path: Path, state: PartialState) -> None:
    """Raise ConfigError where a process does not see what the first one has written."""
    if not path.exists():
        raise ConfigError(
            f"{path.parent} on {os.uname().nodename} does not hold {path.name}, which process 0 has written; "
            f"set output_dir to a directory that all {state.num_processes} processes share"
        )
