"""Computes tokens: scheduler, KV cache, model and sampler, put together."""
