"""What recipes do, step by step: from a configuration to a trained bundle, and from a bundle to its measures."""

from .evaluate import evaluate
from .train import train

__all__ = ["evaluate", "train"]
