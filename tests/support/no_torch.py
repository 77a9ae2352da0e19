"""A Python in which torch and numba are not installed, though they are."""

from __future__ import annotations

# Run first in a child: the path finder, which alone finds what pip installed, no longer finds these.
HIDE_TORCH = """
import importlib.machinery
def hidden(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
    return None if name.partition(".")[0] in ("torch", "torchvision", "numba", "triton") else find(name, path, target)
importlib.machinery.PathFinder.find_spec = hidden
"""
