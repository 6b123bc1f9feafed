"""What each recipe does, from its configuration to its outputs."""
