"""Behaviour logs: reading, validation, splits, negatives and the streams made of them."""
