"""From prompts to choices: what each one asks of the fleet, its generation, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from relevo.core.errors import DeadlineExceeded, InvalidRequest
from relevo.core.sampling_params import SamplingParams, choice_seed
from relevo.detokenizer import Detokenizer
from relevo.prompts import resolve_bad_words
from services.pb import messages_pb2
from services.router.generation import Generation, ServedModel
from services.router.http.beams import BeamGeneration, BeamSearchResult
from services.router.http.choice import Choice
from services.router.http.exchange import Exchange
from services.router.http.prompt_logprobs import SharedPromptLogprobs
from services.router.http.protocol import SamplingBody
from services.router.http.sampling import TokenLimit, check_token_ids, draw_seed, sampling_to_proto
from services.router.timeline import Timeline

if TYPE_CHECKING:
    from services.router.http.serving import Prompt, Serving


def make_choices(
    serving: Serving,
    exchange: Exchange,
    answer_id: str,
    prompts: Sequence[Prompt],
    body: SamplingBody,
    sampling: SamplingParams,
    limit: TokenLimit,
) -> list[Choice]:
    """Each prompt's one after the other. Raises InvalidRequest or DeadlineExceeded; nothing was started then."""
    check_token_ids(sampling, serving.model())
    if body.num_choices > body.n and sampling.logprobs is None:
        sampling = replace(sampling, logprobs=0)  # by which the likeliest are found
    sampling = resolve_bad_words(sampling, serving.tokenizer)
    requests = _requests(serving, exchange, answer_id, prompts, body, sampling, limit)
    generations = _generations(serving, exchange, body, requests)
    stop_token_ids = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop_token_ids |= frozenset(serving.defaults.eos_token_ids)
    shared = [SharedPromptLogprobs() if sampling.prompt_logprobs is not None else None for _ in prompts]
    per_prompt = len(generations) // len(prompts)
    return [
        Choice(
            index,
            index // per_prompt,
            generation,
            Detokenizer(
                serving.tokenizer,
                prompts[index // per_prompt].token_ids,
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
            ),
            stop_token_ids,
            include_stop=sampling.include_stop_str_in_output,
            prompt_logprobs=shared[index // per_prompt],
            is_first_of_prompt=index % per_prompt == 0,
            prompt_alone=limit.prompt_alone,
        )
        for index, generation in enumerate(generations)
    ]


def _requests(
    serving: Serving,
    exchange: Exchange,
    answer_id: str,
    prompts: Sequence[Prompt],
    body: SamplingBody,
    sampling: SamplingParams,
    limit: TokenLimit,
) -> list[messages_pb2.GenerationRequest]:
    """What the fleet is asked for: of each prompt its choices one after the other; a beam search is one."""
    model = serving.model()
    timeout_ms = exchange.remaining_ms()
    if timeout_ms < 0:
        raise DeadlineExceeded("the time was over before the request was read")
    traceparent = exchange.trace.traceparent(is_sampled=exchange.trace.is_asked) if exchange.trace else ""
    requests: list[messages_pb2.GenerationRequest] = []
    for prompt in prompts:
        check_prompt(prompt.token_ids, model, limit.prompt_param)
        max_tokens = limit.resolve(len(prompt.token_ids), model.max_model_len)
        seed = draw_seed() if sampling.seed is None else sampling.seed
        for nth in range(1 if body.use_beam_search else body.num_choices):
            # A prompt's logprobs take computing all of it: once.
            own = sampling if nth == 0 else replace(sampling, prompt_logprobs=None)
            request = messages_pb2.GenerationRequest(
                request_id=f"{answer_id}-{len(requests)}",
                prompt_token_ids=prompt.token_ids,
                sampling=sampling_to_proto(own, max_tokens=max_tokens, seed=choice_seed(seed, nth)),
                cache_salt=exchange.key_salt + body.cache_salt,
                timeout_ms=timeout_ms,
                priority=body.priority,
                traceparent=traceparent,
            )
            requests.append(request)
    return requests


def _generations(
    serving: Serving, exchange: Exchange, body: SamplingBody, requests: Sequence[messages_pb2.GenerationRequest]
) -> list[Generation]:
    """One a choice: of a beam search, one for each of its answers."""
    standing = exchange.standing(body.priority)
    model = serving.model_name(body.model)
    generations: list[Generation] = []
    for request in requests:
        generation = serving.admission.generate(request, standing, _timeline(exchange, model, request))
        if body.use_beam_search:
            result = BeamSearchResult(generation)
            generations += [BeamGeneration(result, nth) for nth in range(body.n)]
        else:
            generations.append(generation)
    return generations


def _timeline(exchange: Exchange, model: str, request: messages_pb2.GenerationRequest) -> Timeline:
    """Of a choice whose prompt has just been tokenized."""
    timeline = Timeline(exchange.arrived - exchange.waited_seconds)
    if exchange.waited_seconds:
        timeline.mark("arrive", timeline.arrived, exchange.arrived)
    if exchange.received is not None:
        timeline.mark("receive", exchange.arrived, exchange.received)
        timeline.mark("tokenize", exchange.received, tokens=len(request.prompt_token_ids))
    timeline.attributes = {
        "relevo.request.id": exchange.request_id,
        "gen_ai.operation.name": "chat" if request.request_id.startswith("chatcmpl") else "text_completion",
        "gen_ai.provider.name": "relevo",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.response.id": request.request_id,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
    }
    return timeline


def check_prompt(token_ids: Sequence[int], model: ServedModel, param: str) -> None:
    if not token_ids:
        raise InvalidRequest(f"{param} must not be empty: it has no tokens", param)
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(f"{param} has token id {token_id}; ids are from 0 to {model.vocab_size - 1}", param)
