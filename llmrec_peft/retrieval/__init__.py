"""Retrieval index of a log, without torch: collaborative models, retrieval, fusion with the LLM, recommendation."""
