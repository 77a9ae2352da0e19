"""Relevo: large language models served as a relay race; prefill hands KV blocks over to decode.

from relevo import LLM, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relevo.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from relevo.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """LLM needs torch, which the router and the KV transfer agent do without: imported when asked for."""
    if name == "LLM":
        from relevo.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
