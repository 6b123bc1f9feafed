"""Models of the log itself, without torch: who likes what, which items go together, and how that joins the LLM."""
