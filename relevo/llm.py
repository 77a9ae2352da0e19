"""The offline door: LLM(model).generate(prompts, SamplingParams(...)), with no service running."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relevo.core.errors import InvalidRequest
from relevo.core.request import FinishReason, Request
from relevo.core.sampling_params import MAX_SEED, SamplingParams, choice_seed, mean_logprob
from relevo.detokenizer import Detokenizer
from relevo.engine.beams import Beam
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.logprobs import TokenLogprobs
from relevo.engine.step_result import StepResult
from relevo.model_files import GenerationDefaults, generation_defaults, resolve_model
from relevo.prompts import resolve_bad_words, truncate_prompt
from relevo.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt's answer. text is cut before a stop string; token_ids hold every token that it took.

    prompt_logprobs: of every token of the prompt but the first, if asked for
    alternatives: the other answers to the prompt, if n asks for more; with best_of and beams the best is this one
    score: of a beam, as transformers' sequences_scores
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    alternatives: tuple[Completion, ...] = ()
    score: float | None = None


class LLM:
    """A model, ready to generate. Options are those of EngineConfig: LLM("…", dtype="bfloat16", max_num_seqs=8).

    Raises StartupError if the model can't be loaded.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._engine = Engine(EngineConfig(model=model, **options))
        files = resolve_model(model)
        self.tokenizer: Tokenizer | None = Tokenizer.from_files(files)
        self._defaults = generation_defaults(files)
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """One completion a prompt, in order; the others that n asks for are its alternatives.

        A prompt is text or token ids. Without `sampling`: the model's defaults.

        Raises InvalidRequest for a prompt or parameter that can't be served; then there are no answers.
        """
        listed = _prompt_list(prompts)
        if sampling is None:
            sampling = default_sampling(self._defaults)
        params = [sampling] * len(listed) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(listed):
            raise InvalidRequest(f"{len(listed)} prompts, but {len(params)} sampling parameters", "sampling")
        choices = [self._choices(self._encode(prompt, each), each) for prompt, each in zip(listed, params, strict=True)]
        self._run([answer for of_prompt in choices for answer in of_prompt], progress=progress)
        return [_best(of_prompt, each) for of_prompt, each in zip(choices, params, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """Like generate, for a conversation or several of them: [{"role": "user", "content": "…"}, …]."""
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: it can't chat", "messages")
        prompts = [
            self.tokenizer.encode(self.tokenizer.render_chat(conversation), add_special_tokens=False)
            for conversation in _conversations(messages)
        ]
        return self.generate(prompts, sampling, progress=progress)

    def _encode(self, prompt: Prompt, sampling: SamplingParams) -> list[int]:
        max_model_len = self._engine.info.max_model_len
        if not isinstance(prompt, str):
            return truncate_prompt(list(prompt), sampling, max_model_len, None)
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: give token ids", "prompt")
        return truncate_prompt(self.tokenizer.encode(prompt), sampling, max_model_len, self.tokenizer)

    def _choices(self, token_ids: list[int], sampling: SamplingParams) -> list[_Answer]:
        """The requests that a prompt takes: one a choice, but one for all beams."""
        seed = secrets.randbelow(MAX_SEED + 1) if sampling.seed is None else sampling.seed
        sampling = resolve_bad_words(sampling, self.tokenizer)
        if sampling.num_choices > sampling.n and not sampling.use_beam_search and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # by which the best are found
        answers = []
        for nth in range(1 if sampling.use_beam_search else sampling.num_choices):
            own = replace(sampling, seed=choice_seed(seed, nth))
            if nth > 0:
                own = replace(own, prompt_logprobs=None)  # they are the first one's, and take computing all of it
            self._num_requests += 1
            request = self._engine.make_request(f"llm-{self._num_requests}", token_ids, own)
            answers.append(_Answer(request, self._detokenizer(token_ids, own)))
        return answers

    def _detokenizer(self, token_ids: list[int], sampling: SamplingParams) -> Callable[[], Detokenizer]:
        return lambda: Detokenizer(
            self.tokenizer,
            token_ids,
            stop=sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
        )

    def _run(self, answers: Sequence[_Answer], *, progress: bool) -> None:
        open_answers = {answer.request.request_id: answer for answer in answers}
        try:
            for answer in answers:
                self._engine.submit(answer.request)
            with _progress_bar(len(answers), shown=progress) as advance:
                while open_answers:
                    self._take(self._engine.step(), open_answers, advance)
        finally:
            for request_id in open_answers:
                self._engine.abort(request_id)

    def _take(self, result: StepResult, open_answers: dict[str, _Answer], advance: Callable[[], None]) -> None:
        for scored in result.prompt_logprobs:
            if scored.request_id in open_answers:
                open_answers[scored.request_id].prompt_logprobs += scored.logprobs
        for tokens in result.tokens:
            answer = open_answers.get(tokens.request_id)
            if answer is not None and answer.push(tokens.token_ids, tokens.logprobs):
                self._engine.abort(tokens.request_id)
        for beams in result.beams:
            open_answers[beams.request.request_id].beams = beams.beams
        for ended in result.ended:
            answer = open_answers.pop(ended.request_id, None)
            if answer is not None and ended.error is not None:
                raise ended.error
            if answer is not None:
                if ended.error is not None:
                    raise ended.error
                answer.end(ended.finish_reason, ended.num_cached_tokens)
                advance()


class _Answer:
    """One request under way."""

    def __init__(self, request: Request, make_detokenizer: Callable[[], Detokenizer]) -> None:
        self.request = request
        self.beams: list[Beam] = []
        self._make_detokenizer = make_detokenizer
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._detokenizer = make_detokenizer()
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._end: tuple[FinishReason, int] | None = None

    def push(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> bool:
        """Take tokens in; True when a stop string has just been found."""
        if self._detokenizer.stopped:
            return False
        self._token_ids += token_ids
        self._logprobs += logprobs
        if not self.request.sampling.include_stop_str_in_output and token_ids[-1] in self.request.stop_token_ids:
            token_ids = token_ids[:-1]
        self._text.append(self._detokenizer.push(token_ids))
        return self._detokenizer.stopped

    def end(self, finish_reason: FinishReason, num_cached_tokens: int) -> None:
        if self._detokenizer.stopped:
            finish_reason = FinishReason.STOP
        else:
            self._text.append(self._detokenizer.finish())
        self._end = finish_reason, num_cached_tokens

    def completions(self) -> list[Completion]:
        """One; of a beam search one a beam, the best first."""
        if not self.beams:
            return [self.completion()]
        completions = []
        for beam in self.beams:
            answer = _Answer(self.request, self._make_detokenizer)
            answer.prompt_logprobs = self.prompt_logprobs
            answer.push(beam.token_ids, beam.logprobs)
            assert self._end is not None
            answer.end(beam.finish_reason, self._end[1])
            completions.append(replace(answer.completion(), score=beam.score))
        return completions

    def completion(self) -> Completion:
        assert self._end is not None, "has not ended"
        return Completion(
            prompt_token_ids=self.request.token_ids[: self.request.num_prompt_tokens],
            token_ids=self._token_ids,
            text="".join(self._text),
            finish_reason=self._end[0],
            logprobs=self._logprobs,
            num_cached_tokens=self._end[1],
            prompt_logprobs=self.prompt_logprobs,
        )


def _best(answers: Sequence[_Answer], sampling: SamplingParams) -> Completion:
    """A prompt's answers as one, the first of them or, of more than n, the best."""
    completions = [completion for answer in answers for completion in answer.completions()]
    if len(completions) > sampling.n:
        completions.sort(key=lambda one: -mean_logprob([entry.chosen.logprob for entry in one.logprobs]))
        if sampling.logprobs is None:
            completions = [replace(one, logprobs=[]) for one in completions]
    first, *others = completions[: sampling.n]
    prompt_logprobs = answers[0].prompt_logprobs
    return replace(first, prompt_logprobs=prompt_logprobs, alternatives=tuple(others))


def default_sampling(defaults: GenerationDefaults) -> SamplingParams:
    """What the model's generation_config.json asks for."""
    return SamplingParams(
        max_tokens=defaults.max_tokens,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
    )


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    single = [message for message in messages if isinstance(message, dict)]
    if single:
        return [single]
    return [[message for message in conversation if isinstance(message, dict)] for conversation in messages]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # the first item tells which of the two it is
    return list(prompts)  # type: ignore[arg-type]


@contextmanager
def _progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not shown, transient=False) as bar:
        task = bar.add_task("Prompts", total=total)
        yield lambda: bar.advance(task)
