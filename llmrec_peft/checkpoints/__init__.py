"""Directories of trained models: adapter bundles, merged models, their manifests, cards and the Hub."""
