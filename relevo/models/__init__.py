"""Models of `transformers`, run over a paged KV cache."""
