"""Parameters of OpenAI's and vLLM's APIs that Relevo does not have: each is refused by name with a 400.

Clients send many of them with the value that asks for nothing. Those values are listed here and pass, and so does null.
ANY: the parameter never changes an answer, so that every value passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

ANY: Final = "any value"
Harmless = tuple[object, ...] | Literal["any value"]

_BOTH: Mapping[str, Harmless] = {
    # OpenAI's
    "best_of": (1,),
    "metadata": ANY,  # labels of stored completions
    "prediction": (),
    "prompt_cache_key": ANY,  # a hint for OpenAI's routing; blocks are named by their content here
    "prompt_cache_retention": ("in_memory",),
    "safety_identifier": ANY,  # as `user`
    "service_tier": ("auto", "default"),
    "store": (False,),
    # vLLM's
    "length_penalty": (1,),
    "logits_processors": ([],),
    "request_id": (),  # the header x-request-id
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}

COMPLETION: Mapping[str, Harmless] = {**_BOTH, "suffix": ("",)}

CHAT: Mapping[str, Harmless] = {
    **_BOTH,
    # OpenAI's. Without tools there is nothing to choose, and nothing to call in parallel.
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "include_reasoning": (True,),
}
