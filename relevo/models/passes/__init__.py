"""Passes: what replaces modules of transformers by faster ones that are shown to be equal, one at a time.

A pass recognises a structure and compares what it would put in with what is there, on random rows, with the weights as
loaded. Where they differ, or where nothing is recognised, the module stays and the model still runs.
"""

from relevo.models.passes.apply import PASSES, apply_passes
from relevo.models.passes.report import LeftAlone, PassRecord, grouped

__all__ = ["PASSES", "LeftAlone", "PassRecord", "apply_passes", "grouped"]
