"""Fine-tune large decoder models, parameter-efficiently, as classifiers of user behaviour."""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints.loading import load_classifier
    from .data.domain import Domain
    from .data.log import BehaviorLog
    from .data.streams import build_streams
    from .errors import BundleError, ConfigError, DataError, DomainError, LLMRecError, ModelError, StreamError
    from .merging.merge_bundle import merge_bundle
    from .recipes.distill import distill
    from .scoring.bank import DomainBank
    from .scoring.scorer import Scorer
    from .training.trainer import BehaviorTrainer

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
    "ModelError",
    "Scorer",
    "StreamError",
    "build_streams",
    "distill",
    "load_classifier",
    "merge_bundle",
]


def __getattr__(name: str) -> object:
    # Read on first use: reading a log does not need torch, and the command line answers at once.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_PLACES[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        raise ImportError(
            f"{__name__}.{name} needs the package {error.name}; install it with: pip install llmrec-peft[train]"
        ) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
