"""Behaviour logs: reading, validation, splits, negatives, and token streams."""
