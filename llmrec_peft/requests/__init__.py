"""Requests to a scorer: checked, encoded as tokens and batched; without torch and Transformers."""
