"""Every field of vLLM's and OpenAI's lists is taken, or refused by name, and the page in docs says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.router.http.fields import field_names, table, treatment
from services.router.http.protocol import ChatRequest, CompletionRequest, RequestBody
from tests.router.http.conftest import Edge

PAGE = Path(__file__).parents[3] / "docs" / "api-fields.md"

# vLLM 0.33, as its protocol modules list them.
BOTH = [
    "model",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "prompt_logprobs",
    "logprob_token_ids",
    "bad_words",
    "echo",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "cache_salt",
]
COMPLETION = [*BOTH, "prompt", "suffix"]
CHAT = [
    *BOTH,
    *[
        "messages",
        "top_logprobs",
        "max_completion_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "include_reasoning",
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "chat_template",
        "chat_template_kwargs",
    ],
]


@pytest.mark.parametrize(("model", "names"), [(CompletionRequest, COMPLETION), (ChatRequest, CHAT)])
def test_no_field_of_vllms_is_unknown(model: type[RequestBody], names: list[str]) -> None:
    assert not [name for name in names if treatment(model, name) == "unknown"]
    assert not set(model.model_fields) & set(model.unsupported), "taken and refused at once"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == table(), "python -m services.router.http.fields > docs/api-fields.md"


@pytest.mark.parametrize(
    ("path", "model", "base"),
    [
        ("/v1/completions", CompletionRequest, {"prompt": "a"}),
        ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
async def test_the_server_does_what_the_page_says(
    edge: Edge, path: str, model: type[RequestBody], base: dict[str, Any]
) -> None:
    """With a value that no field can be content with: what is taken says so of the value, what is not of the name."""
    for name in field_names():
        if name == "user":
            continue  # any string
        reply = await edge.http.post(path, json={**base, "max_tokens": 1, name: {"\n": ["?"]}})
        says = treatment(model, name)
        if says == "passed over" or (name == "chat_template_kwargs" and says == "taken"):
            assert reply.status_code == 200, (name, reply.text)
            continue
        assert reply.status_code == 400, (name, reply.text)
        error = reply.json()["error"]
        assert error["param"] == name
        code = {"taken": None, "unknown": "unknown_parameter"}.get(says, "unsupported_parameter")
        assert error["code"] == code, name
