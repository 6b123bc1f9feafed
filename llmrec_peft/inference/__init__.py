"""Using what was trained: merging, scoring, many domains on one base, recommending."""
