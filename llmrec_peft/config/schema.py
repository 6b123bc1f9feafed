"""The recipes' configurations by name.

Options, their types, bounds and defaults are declared once, in the dataclasses of `*_options.py` and `*_configs.py`;
the string under a field is its help. `parsing.parse_config` reads them from YAML files and flags.
"""

from __future__ import annotations

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.config.bundle_configs import EvaluateConfig, IndexConfig, MergeConfig, RecommendConfig, ScoreConfig
from llmrec_peft.config.data_options import DataConfig
from llmrec_peft.config.evaluation_options import EvaluationConfig, RankingConfig
from llmrec_peft.config.parsing import config_to_yaml, parse_config, read_config
from llmrec_peft.config.train_configs import (
    AdapterConfig,
    DistillConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    QloraConfig,
    RunConfig,
    TrainRecipeConfig,
)
from llmrec_peft.config.train_options import TrainConfig

__all__ = [
    "CONFIGS",
    "AdapterConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "FullConfig",
    "HeadConfig",
    "IndexConfig",
    "LoraConfig",
    "MergeConfig",
    "QloraConfig",
    "RankingConfig",
    "RecommendConfig",
    "RunConfig",
    "ScoreConfig",
    "TrainConfig",
    "TrainRecipeConfig",
    "config_to_yaml",
    "exit_on_error",
    "parse_config",
    "read_config",
]

CONFIGS: dict[str, type] = {
    **{kind.method_name: kind for kind in (LoraConfig, QloraConfig, AdapterConfig, HeadConfig, FullConfig)},
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "index": IndexConfig,
    "merge": MergeConfig,
    "recommend": RecommendConfig,
    "score": ScoreConfig,
}
"""From a recipe's name (`recipes/NAME.py`, `recipes/configs/*/NAME.yaml`) to its configuration."""
