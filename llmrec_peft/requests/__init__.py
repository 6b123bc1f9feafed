"""One request path: what a caller asks, checked and encoded as tokens; free of torch and Transformers."""
