"""Base models, tuning methods and the behaviour classifier."""
