"""Probabilities from trained adapters on one shared base."""
