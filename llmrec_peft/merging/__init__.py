"""Merging adapters into the weights of their base."""
