"""What a run of a recipe is made of: its directory, its checks, its streams and its outputs."""
