"""What a user would write without this package; the benchmarks measure the package beside it."""
