"""The metrics of this package as a module of the `evaluate` library; `evaluate.load` takes this directory's path."""
