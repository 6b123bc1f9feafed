"""Distilling a trained classifier into small students, and exporting them."""
