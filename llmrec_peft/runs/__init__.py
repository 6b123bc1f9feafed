"""Parts of a recipe's run: its directory, its checks, its streams and its outputs."""
