"""A Python in which packages are not installed, though they are."""

from __future__ import annotations


def hide(*packages: str) -> str:
    """Run first in a child: the path finder, which alone finds what pip installed, no longer finds these."""
    return f"""
import importlib.machinery
def hidden(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
    return None if name.partition(".")[0] in {packages!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = hidden
"""


HIDE_TORCH = hide("torch", "torchvision", "numba", "triton")
