"""Fine-tune decoder LLMs as classifiers of user behaviour, parameter-efficiently."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec_peft.checkpoints.loading import load_classifier
    from llmrec_peft.data.domain import Domain
    from llmrec_peft.data.log import BehaviorLog
    from llmrec_peft.data.streams import build_streams
    from llmrec_peft.errors import (
        BundleError,
        ConfigError,
        DataError,
        DomainError,
        LLMRecError,
        ModelError,
        StreamError,
    )
    from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle
    from llmrec_peft.recipes.distill import distill
    from llmrec_peft.scoring.bank import DomainBank
    from llmrec_peft.scoring.scorer import Scorer
    from llmrec_peft.training.trainer import BehaviorTrainer

__version__ = "0.1.0"

# bitsandbytes reports a missing optional kernel whenever PEFT imports it, in runs that hold nothing in 4 bits too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PLACES = {
    "BehaviorLog": "data.log",
    "BehaviorTrainer": "training.trainer",
    "BundleError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Domain": "data.domain",
    "DomainBank": "scoring.bank",
    "DomainError": "errors",
    "LLMRecError": "errors",
    "MergeOptions": "merging.merge_bundle",
    "ModelError": "errors",
    "Scorer": "scoring.scorer",
    "StreamError": "errors",
    "build_streams": "data.streams",
    "distill": "recipes.distill",
    "load_classifier": "checkpoints.loading",
    "merge_bundle": "merging.merge_bundle",
}

__all__ = [
    "BehaviorLog",
    "BehaviorTrainer",
    "BundleError",
    "ConfigError",
    "DataError",
    "Domain",
    "DomainBank",
    "DomainError",
    "LLMRecError",
    "MergeOptions",
    "ModelError",
    "Scorer",
    "StreamError",
    "build_streams",
    "distill",
    "load_classifier",
    "merge_bundle",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: reading a log does not need torch, and `--help` must not wait for it.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_PLACES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        raise ImportError(
            f"{__name__}.{name} needs the package {error.name}; install it with: pip install llmrec-peft[train]"
        ) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
