"""What recipes do, step by step: train, measure, merge and distil a bundle, serve many on one base, recommend."""

from .distill import distill
from .evaluate import evaluate
from .fuse import fuse
from .merge import merge
from .recommend import recommend
from .swap import swap
from .train import train

__all__ = ["distill", "evaluate", "fuse", "merge", "recommend", "swap", "train"]
