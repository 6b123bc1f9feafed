"""Which launch configurations a recipe accepts, and how a launch is described."""

import os
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments

from llmrec_peft.config.schema import RunConfig, TrainRecipeConfig
from llmrec_peft.errors import ConfigError
from llmrec_peft.models.quantization import check_quantization
from llmrec_peft.models.tuning_options import QloraOptions
from llmrec_peft.training.distributed import on_cpu, partial_state, uses_fsdp


def check_launch(config: RunConfig, arguments: TrainingArguments) -> None:
    """Raise ConfigError or ModelError for a launch that cannot run this configuration.

    Some of these launches would end in an error deep inside a library, others in worse predictions without an error.
    """
    plugin = arguments.deepspeed_plugin
    method = config.method if isinstance(config, TrainRecipeConfig) else None
    four_bit = isinstance(method, QloraOptions)
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
        if (
            isinstance(config, TrainRecipeConfig)
            and isinstance(method, QloraOptions)
            and (method.quant_storage or "uint8") != config.model.dtype
        ):
            raise ConfigError(
                f"method.quant_storage must equal model.dtype ({config.model.dtype}) with FSDP, not "
                f"{method.quant_storage or 'uint8'}, so that all it splits has one format; set it"
            )
    if isinstance(method, QloraOptions):
        check_quantization(method.quant_type, arguments.device)


def describe_launch(arguments: TrainingArguments) -> str:
    """How a run is split over processes; a checkpoint can be resumed under an equal launch only."""
    if arguments.deepspeed_plugin is not None:
        kind = f"DeepSpeed ZeRO-{arguments.deepspeed_plugin.zero_stage}"
    else:
        kind = "FSDP" if uses_fsdp() else "DDP"
    number = partial_state().num_processes
    return f"{number} processes with {kind}" if number > 1 or kind != "DDP" else "1 process"


def check_shared(path: Path, state: PartialState) -> None:
    """Raise ConfigError where this process does not see a file that the main process wrote."""
    if not path.exists():
        raise ConfigError(
            f"{path.parent} on {os.uname().nodename} does not hold {path.name}, which process 0 has written; "
            f"set output_dir to a directory that all {state.num_processes} processes share"
        )
