"""Speculative decoding: drafts that a step verifies all at once. Lossless: see docs/adr/0016."""
