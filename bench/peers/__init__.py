"""Relevo beside what its users would pick instead, on the same cores."""
