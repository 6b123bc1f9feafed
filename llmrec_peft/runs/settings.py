"""The settings of a run by dotted key, and the settings and versions that can be compared."""

from collections.abc import Mapping
from typing import Any

from llmrec_peft.checkpoints.manifest import installed
from llmrec_peft.config.schema import config_to_yaml
from llmrec_peft.documents import parse_yaml
from llmrec_peft.errors import ConfigError

PACKAGES = (
    "llmrec_peft", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "numpy",
)  # fmt: skip


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
