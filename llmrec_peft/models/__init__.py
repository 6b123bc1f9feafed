"""Base models, tuning methods, the behaviour classifier and its bundles."""

from llmrec_peft.models.classifier import BehaviorClassifier, load_classifier

__all__ = ["BehaviorClassifier", "load_classifier"]
