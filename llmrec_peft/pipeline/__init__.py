"""What recipes do, step by step: train a bundle, measure it, merge it, serve many of them on one base, recommend."""

from .evaluate import evaluate
from .fuse import fuse
from .merge import merge
from .recommend import recommend
from .swap import swap
from .train import train

__all__ = ["evaluate", "fuse", "merge", "recommend", "swap", "train"]
