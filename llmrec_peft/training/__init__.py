"""Losses, batches and the trainer."""
