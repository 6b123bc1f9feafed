"""Options of the recipes, and reading them from files and flags."""
