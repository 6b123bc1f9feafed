"""The settings of a run: what its steps read of a configuration, and the settings and versions that can be compared."""

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from llmrec_peft.checkpoints.manifest import installed
from llmrec_peft.config.schema import DataConfig, EvaluationConfig, TrainConfig, config_to_yaml
from llmrec_peft.data.domain import Domain
from llmrec_peft.documents import parse_yaml
from llmrec_peft.errors import ConfigError
from llmrec_peft.models.tuning_options import MethodOptions, ModelOptions

PACKAGES = (
    "llmrec_peft", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "numpy",
)  # fmt: skip


class RunConfig(Protocol):
    """What the configurations of all recipes that train have in common, distillation among them."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    method_name: ClassVar[str]
    data: DataConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    output_dir: str

    @property
    def domain(self) -> Domain:
        """The domain of the log."""

    @property
    def model(self) -> ModelOptions:
        """The base model and how it is loaded."""

    @property
    def method(self) -> MethodOptions:
        """What is trained."""


def flat_settings(config: Any) -> dict[str, Any]:
    """All settings of a configuration by dotted key, in the types that YAML reads back."""
    return flatten(parse_yaml(config_to_yaml(config), "the configuration", error=ConfigError))


def shared_settings(config: Any) -> dict[str, str]:
    """Settings and versions that all processes must share, by name; the place of the log may differ."""
    settings = {key: repr(value) for key, value in flat_settings(config).items() if key != "data.path"}
    return settings | versions()


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, by the name that messages use."""
    found = installed(*PACKAGES)
    return {f"the version of {name}": found.get(name, "absent") for name in PACKAGES}


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn a nested mapping into one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
